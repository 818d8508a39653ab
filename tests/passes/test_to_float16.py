"""ToFloat16: half precision, but for what it cannot hold."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.to_float16 import ToFloat16

from qcompile.errors import ModelError
from tests.passes.rewriting import HEADER, typed
from tests.support import assert_idempotent, check_model, from_text, ops, run_model

RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 8)).astype(np.float32)
X = RNG.standard_normal((2, 3, 8)).astype(np.float32)


def converted(text: str, **weights: np.ndarray) -> ir.Model:
    model = typed(from_text(HEADER + text, **weights))
    assert ToFloat16()(model).modified
    assert_idempotent(ToFloat16(), model)
    return model


def types(model: ir.Model) -> dict[str, str]:
    return {str(v.name): str(v.dtype) for node in model.graph for v in node.outputs}


def test_products_and_element_wise_ops() -> None:
    text = """g (float[B,S,8] x, float[8,8] w) => (float[B,S,8] y) {
        m = MatMul (x, w) r = Relu (m) y = Add (r, m) }"""
    model = converted(text, w=W)
    assert ops(model) == ["Cast", "MatMul", "Relu", "Add"]
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    wanted = run_model(typed(from_text(HEADER + text, w=W)), {"x": X})["y"]
    np.testing.assert_allclose(run_model(model, {"x": X})["y"], wanted, atol=0.02)


def test_angles_stay_float32_until_they_are_used() -> None:
    model = converted(
        """g (float[B,S,8] x, int64[B,S] at, int64[1] last, float[8] w) => (float[B,S,8] y) {
        p = Unsqueeze (at, last) f = Cast <to = 1> (p) a = Mul (f, w) c = Cos (a)
        h = Relu (x) y = Mul (h, c) }""",
        last=np.array([2]),
        w=W[0],
    )
    found = types(model)
    assert [found[name] for name in ("f", "a", "c", "y")] == ["FLOAT"] * 3 + ["FLOAT16"]
    feed = {"x": X, "at": np.array([[5000, 5001, 5002]] * 2)}
    wanted = np.maximum(X, 0) * np.cos(feed["at"][..., None].astype(np.float32) * W[0])
    np.testing.assert_allclose(run_model(model, feed)["y"], wanted, atol=0.01)


def test_a_cache_comes_out_as_it_goes_in() -> None:
    """Its inputs are float16, and scales of codes stay as the op wants them."""
    text = """g (float[B,S,8] x, float[B,1,P,8] key, float[B,1,P,8] value, int32[B] last,
        int32 total, float[1,1,8] scale) => (float[B,S,8] y, float[B,1,T,8] k, float[B,1,T,8] v) {
        h = Relu (x)
        y, k, v = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1>
          (h, h, h, key, value, last, total, , , , , , scale, scale) }"""
    model = typed(from_text(HEADER + text, scale=np.ones((1, 1, 8), np.float32)))
    for value, kind in zip(model.graph.inputs[1:3], ("key", "value"), strict=True):
        value.name = f"past_key_values.0.{kind}"
    assert ToFloat16()(model).modified
    assert [v.name for node in model.graph for v in node.inputs if v is not None][-6:-3] == [
        "past_key_values.0.key", "past_key_values.0.value", "last",
    ]  # fmt: skip
    half = [*model.graph.inputs[1:3], *model.graph.outputs]
    assert {v.dtype for v in half} == {ir.DataType.FLOAT16}
    assert model.graph.inputs[0].dtype == model.graph.initializers["scale"].dtype
    assert_idempotent(ToFloat16(), model)


def test_sums_are_float32() -> None:
    model = converted(
        """g (float[B,S,8] x, int64[1] last) => (float[B,S] y) {
        h = Relu (x) q = Mul (h, h) s = ReduceSum <keepdims = 0> (q, last) y = Sqrt (s) }""",
        last=np.array([2]),
    )
    assert [types(model)[name] for name in ("q", "s", "y")] == ["FLOAT16", "FLOAT", "FLOAT"]
    found = run_model(model, {"x": 200 * X})["y"]
    np.testing.assert_allclose(found, np.linalg.norm(np.maximum(200 * X, 0), axis=-1), rtol=0.01)


def test_branches_and_infinities() -> None:
    model = converted(
        """g (float[B,S,8] x, bool c, bool[8] k, float low, float zero) => (float[B,S,8] y) {
        h = Relu (x)
        y = If (c) <
          then_branch = a () => (float[B,S,8] t) { t = Add (h, h) },
          else_branch = b () => (float[B,S,8] e) { m = Where (k, zero, low) e = Add (h, m) }
        > }""",
        low=np.array(-3e38, np.float32),
        zero=np.array(0, np.float32),
    )
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    keep = np.arange(8) % 2 == 0
    for condition in (True, False):
        found = run_model(model, {"x": X, "c": np.array(condition), "k": keep})["y"]
        assert np.isfinite(found).all()


def test_what_float32_enters_by_does_not_keep_products_there() -> None:
    model = converted(
        """g (uint8[B,S,8] pixels, float n, float[8,8] w) => (float[B,S,8] y) {
        f = Cast <to = 1> (pixels) d = Div (f, n) y = MatMul (d, w) }""",
        n=np.array(255, np.float32),
        w=W,
    )
    assert types(model)["y"] == "FLOAT16"


def test_inputs_that_onnx_defines_on_float32_alone_stay() -> None:
    model = converted(
        """g (float[1,1,4,4] x, float[4] scales) => (float[1,1,8,8] y) {
        r = Relu (x) y = Resize (r, , scales) }""",
        scales=np.array([1, 1, 2, 2], np.float32),
    )
    check_model(model)
    x = np.abs(RNG.standard_normal((1, 1, 4, 4))).astype(np.float32)
    found = run_model(model, {"x": x})["y"]
    np.testing.assert_allclose(found, x.repeat(2, 2).repeat(2, 3), atol=0.01)


def test_a_mask_is_clipped_for_attention_whoever_reads_it_first() -> None:
    model = converted(
        """g (float[1,1,3,3] x, float[1,3,8] q, bool[1,1,3,3] keep)
            => (float[1,1,3,3] s, float[1,3,8] y) {
        k = Cast <to = 1> (keep) c = Log (k) r = Relu (x) s = Add (r, c)
        h = Relu (q) y = Attention <q_num_heads = 1, kv_num_heads = 1> (h, h, h, c) }"""
    )
    assert "Clip" in ops(model)
    feed = {
        "x": np.ones((1, 1, 3, 3), np.float32),
        "q": X[:1],
        "keep": np.array([[[[1, 0, 0], [0, 0, 0], [1, 1, 1]]]], bool),
    }
    assert np.isfinite(run_model(model, feed)["y"]).all()


def test_weights_that_do_not_fit_are_named() -> None:
    text = "g (float[B,S,8] x, float[8,8] w) => (float[B,S,8] y) { y = MatMul (x, w) }"
    model = typed(from_text(HEADER + text, w=1e6 * W))
    # A pass's error arrives as the cause of onnx_ir's own.
    with pytest.raises((ModelError, ir.passes.PassError)) as caught:
        ToFloat16()(model)
    told = f"{caught.value} {caught.value.__cause__}"
    assert "w holds numbers that float16 does not" in told
