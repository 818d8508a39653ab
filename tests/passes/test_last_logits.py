"""LastLogits: norm and vocabulary of the last token only."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.last_logits import LastLogits

from qcompile.cache import last_columns
from tests.passes.rewriting import HEADER, assert_leaves, typed
from tests.support import (
    Feed,
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    run_model,
)

RNG = np.random.default_rng(0)
FEED = {n: RNG.standard_normal((2, 3, 8)).astype(np.float32) for n in "ab"}
WEIGHTS = {
    "g": RNG.uniform(0.5, 1.5, 8).astype(np.float32),
    "w": RNG.standard_normal((8, 16)).astype(np.float32),
    "c": RNG.standard_normal(16).astype(np.float32),
    "q": RNG.integers(-64, 64, (8, 16)).astype(np.int8),
    "t": RNG.uniform(0.01, 0.02, 16).astype(np.float32),
    "s": np.float32(0.05),
    "z": np.uint8(120),
}
DECLARED = (
    "float[8] g, float[8,16] w, float[16] c, int8[8,16] q, float[16] t, float s, uint8 z, "
    "int64 axis, int64[1] axes, int64[2] inner, int32 minus_one"
)
CONSTANTS = {
    "axis": np.array(1),
    "axes": np.array([1]),
    "inner": np.array([1, 2]),
    "minus_one": np.array(-1, np.int32),
}
TOKENS = "int64[B,S] input_ids, int64[B,T] attention_mask"
INPUTS = f"float[B,S,8] a, float[B,S,8] b, {DECLARED}"
KEPT = """k = Shape (input_ids) minus = ConstantOfShape <value = int32[1] {-1}> (k)
    newest = CumSum <reverse = 1> (minus, axis)
    is = Cast <to = 9> (attention_mask) known = Cast <to = 6> (is)
    kept = GatherElements <axis = 1> (known, newest)
    places = CumSum (minus, axis) real = Mul (kept, places)
    least = ReduceMin <keepdims = 0> (real, axes) at = Sub (minus_one, least)
    index = Cast <to = 7> (at) ats = Unsqueeze (index, inner)
    l = GatherND <batch_dims = 1> (h, ats)"""
MASKS = {
    "no padding": ([[1, 1, 1], [1, 1, 1]], [2, 2]),
    "left": ([[0, 0, 1], [1, 1, 1]], [2, 2]),
    "right": ([[1, 0, 0], [1, 1, 0]], [0, 1]),
    "all of a row": ([[0, 0, 0], [1, 1, 1]], [2, 2]),
    "ones that are not one": ([[2, 2, 0], [0, 3, 3]], [1, 2]),
    "after a cache": ([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]], [1, 0]),
}


@pytest.mark.parametrize(
    "after",
    [
        "n = RMSNormalization <axis = -1> ({x}, g) p = MatMul (n, w) logits = Add (c, p)",
        """n = RMSNormalization <axis = -1> ({x}, g) p = QuantizeLinear (n, s, z)
           logits = com.microsoft.MatMulIntegerToFloat (p, q, s, t, z, , c)""",
    ],
    ids=["float", "int8"],
)
def test_the_last_token(after: str) -> None:
    def graph(sequence: str, body: str) -> ir.Model:
        out = f"(float[B,{sequence},16] logits, float[B,S,8] y)"
        text = f"{HEADER}m ({TOKENS}, {INPUTS}) => {out} {{ h = Add (a, b) y = Relu (h) {body} }}"
        model = typed(from_text(text, **WEIGHTS, **CONSTANTS))
        for value in (v for node in model.graph for v in node.outputs if v.shape is None):
            # Inference knows no shape of a contrib op; lowered graphs keep those of before.
            value.shape = ir.Shape(["B", sequence, 16])
        return model

    model = graph("S", after.format(x="h"))
    feeds = {name: _feed(mask) for name, (mask, _) in MASKS.items()}
    wanted = {name: run_model(model, feed, optimise=False) for name, feed in feeds.items()}
    assert LastLogits()(model).modified
    assert_same_graph(model, graph("1", KEPT + after.format(x="l")))
    check_model(model)
    for name, feed in feeds.items():
        found, columns = run_model(model, feed, optimise=False), MASKS[name][1]
        np.testing.assert_array_equal(found["y"], wanted[name]["y"])
        last = wanted[name]["logits"][[0, 1], columns]
        np.testing.assert_allclose(found["logits"][:, 0], last, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(last_columns(feed).ravel(), columns)
    assert_idempotent(LastLogits(), model)


def _feed(mask: list[list[int]]) -> Feed:
    return FEED | {"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.array(mask)}


@pytest.mark.parametrize(
    "body",
    [
        "h = Add (a, b) logits = Softmax <axis = 1> (h)",
        "logits = Add (a, b)",
        "h = Add (a, b) logits = LayerNormalization <axis = 1> (h, g)",
        "h = Add (a, b) logits = Mul (h, g)",
    ],
    ids=["over the tokens", "two inputs", "norm over the tokens", "no product behind"],
)
def test_what_stays(body: str) -> None:
    text = f"m ({TOKENS}, {INPUTS}) => (float[B,S,8] logits) {{ {body} }}"
    assert_leaves(LastLogits(), text, **WEIGHTS)


def test_what_has_no_mask_stays() -> None:
    text = f"m ({INPUTS}) => (float[B,S,16] logits) {{ h = Add (a, b) logits = MatMul (h, w) }}"
    assert_leaves(LastLogits(), text, **WEIGHTS)
