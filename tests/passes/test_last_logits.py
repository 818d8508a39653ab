"""LastLogits: norm and vocabulary of the last token only."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.last_logits import LastLogits

from tests.passes.rewriting import HEADER, assert_leaves, typed
from tests.support import (
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
    "int64[1] start, int64[1] end, int64[1] axis"
)
SLICE = {
    "start": np.array([-1]),
    "end": np.array([np.iinfo(np.int64).max]),
    "axis": np.array([1]),
}
INPUTS = f"float[B,S,8] a, float[B,S,8] b, {DECLARED}"


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
        text = f"{HEADER}m ({INPUTS}) => {out} {{ h = Add (a, b) y = Relu (h) {body} }}"
        model = typed(from_text(text, **WEIGHTS, **SLICE))
        for value in (v for node in model.graph for v in node.outputs if v.shape is None):
            # Inference knows no shape of a contrib op; lowered graphs keep those of before.
            value.shape = ir.Shape(["B", sequence, 16])
        return model

    model = graph("S", after.format(x="h"))
    wanted = run_model(model, FEED, optimise=False)
    assert LastLogits()(model).modified
    expected = graph("1", f"l = Slice (h, start, end, axis) {after.format(x='l')}")
    assert_same_graph(model, expected)
    check_model(model)
    found = run_model(model, FEED, optimise=False)
    np.testing.assert_array_equal(found["y"], wanted["y"])
    np.testing.assert_allclose(found["logits"], wanted["logits"][:, -1:], rtol=0, atol=1e-5)
    assert_idempotent(LastLogits(), model)


@pytest.mark.parametrize(
    "body",
    [
        "h = Add (a, b) logits = Softmax <axis = 1> (h)",
        "logits = Add (a, b)",
        "h = Add (a, b) logits = LayerNormalization <axis = 1> (h, g)",
    ],
    ids=["over the tokens", "two inputs", "norm over the tokens"],
)
def test_what_stays(body: str) -> None:
    assert_leaves(LastLogits(), f"m ({INPUTS}) => (float[B,S,8] logits) {{ {body} }}", **WEIGHTS)
