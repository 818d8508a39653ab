"""FuseRmsNorm: decomposed norms, and ONNX Runtime's own norm ops."""

from __future__ import annotations

import numpy as np
import pytest
from qcompile.passes.fuse_rms_norm import FuseRmsNorm

from tests.passes.rewriting import assert_leaves, assert_rewrites

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((2, 3, 8)) * 3).astype(np.float32)
SKIP = RNG.standard_normal((2, 3, 8)).astype(np.float32)
W = RNG.standard_normal(8).astype(np.float32)
B = RNG.standard_normal(8).astype(np.float32)
EPS = np.float32(1e-6)
CONSTANTS = (
    "<int64[1] axes = {-1}, float two = {2.0}, float one = {1.0}, float minus_half = {-0.5}>"
)
SIGNATURE = f"g (float[N,S,8] x, float[8] w, float eps) => (float[N,S,8] y) {CONSTANTS}"
AFTER = """g (float[N,S,8] x, float[8] w) => (float[N,S,8] y) {
  y = RMSNormalization <axis = -1, epsilon = 0.000001, stash_type = 1> (x, w)
}"""
MEAN = "ms = ReduceMean (sq, axes) mse = Add (ms, eps)"
RMS = f"{MEAN} rms = Sqrt (mse)"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            f"sq = Pow (x, two) {RMS} r = Reciprocal (rms) n = Mul (x, r) y = Mul (w, n)",
            id="reciprocal",
        ),
        pytest.param(f"sq = Mul (x, x) {RMS} n = Div (x, rms) y = Mul (n, w)", id="div"),
        pytest.param(
            f"sq = Pow (x, two) {RMS} r = Div (one, rms) n = Mul (r, x) y = Mul (n, w)",
            id="one-over",
        ),
        pytest.param(
            f"sq = Pow (x, two) {MEAN} r = Pow (mse, minus_half) n = Mul (x, r) y = Mul (n, w)",
            id="rsqrt",
        ),
        pytest.param(
            f"c = Cast <to = 1> (x) sq = Pow (c, two) {RMS} r = Reciprocal (rms)"
            " n = Mul (c, r) y = Mul (w, n)",
            id="cast-of-float",
        ),
    ],
)
def test_fuses(body: str) -> None:
    before = f"{SIGNATURE} {{ {body} }}"
    assert_rewrites(FuseRmsNorm(), before, AFTER, {"x": X}, atol=2e-6, w=W, eps=EPS)


def test_simplified_layer_normalization() -> None:
    before = """g (float[N,S,8] x, float[8] w) => (float[N,S,8] y) {
      y = SimplifiedLayerNormalization <axis = -1, epsilon = 0.000001, stash_type = 1> (x, w) }"""
    # ONNX's checker does not know the op, so the text goes through the pass only.
    assert_rewrites(FuseRmsNorm(), before, AFTER, {"x": X}, atol=2e-6, w=W)


def test_splits_skip_layer_normalization() -> None:
    before = """g (float[N,S,8] x, float[N,S,8] skip, float[8] w, float[8] b)
      => (float[N,S,8] y, float[N,S,8] sum) {
      y, m, v, sum = com.microsoft.SkipLayerNormalization <epsilon = 0.000001> (x, skip, w, b) }"""
    after = """g (float[N,S,8] x, float[N,S,8] skip, float[8] w, float[8] b)
      => (float[N,S,8] y, float[N,S,8] sum) {
      sum = Add (x, skip)
      y = LayerNormalization <axis = -1, epsilon = 0.000001, stash_type = 1> (sum, w, b) }"""
    assert_rewrites(FuseRmsNorm(), before, after, {"x": X, "skip": SKIP}, atol=2e-6, w=W, b=B)


def test_splits_skip_simplified_layer_normalization_with_bias() -> None:
    before = """g (float[N,S,8] x, float[N,S,8] skip, float[8] w, float[8] b)
      => (float[N,S,8] y, float[N,S,8] z) {
      y, m, v, sum = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.000001>
        (x, skip, w, b)
      z = Relu (sum) }"""
    after = """g (float[N,S,8] x, float[N,S,8] skip, float[8] w, float[8] b)
      => (float[N,S,8] y, float[N,S,8] z) {
      both = Add (x, skip)
      sum = Add (both, b)
      y = RMSNormalization <axis = -1, epsilon = 0.000001, stash_type = 1> (sum, w)
      z = Relu (sum) }"""
    assert_rewrites(FuseRmsNorm(), before, after, {"x": X, "skip": SKIP}, atol=2e-6, w=W, b=B)


@pytest.mark.parametrize(
    ("change", "to"),
    [
        pytest.param("Pow (x, two)", "Pow (x, one)", id="not-a-square"),
        pytest.param("{-1}", "{1}", id="another-axis"),
        pytest.param("Mul (x, r)", "Mul (z, r)", id="another-input"),
        pytest.param("Mul (n, w)", "Mul (n, z)", id="weight-not-constant"),
    ],
)
def test_leaves_what_is_no_rms_norm(change: str, to: str) -> None:
    text = (
        "g (float[N,S,8] x, float[N,S,8] z, float[8] w, float eps) => (float[N,S,8] y)"
        f" {CONSTANTS} {{ sq = Pow (x, two) {RMS} r = Reciprocal (rms) n = Mul (x, r)"
        " y = Mul (n, w) }"
    )
    assert change in text
    assert_leaves(FuseRmsNorm(), text.replace(change, to), w=W, eps=EPS)


def test_leaves_a_layer_norm_alone() -> None:
    text = (
        f"{SIGNATURE} {{ m = ReduceMean (x, axes) d = Sub (x, m) sq = Mul (d, d) {RMS}"
        " n = Div (d, rms) y = Mul (n, w) }"
    )
    assert_leaves(FuseRmsNorm(), text, w=W, eps=EPS)


def test_leaves_a_skip_op_whose_mean_is_read() -> None:
    text = """g (float[N,S,8] x, float[8] w) => (float[N,S,8] y, float[N,S,1] mean) {
      y, mean = com.microsoft.SkipLayerNormalization <epsilon = 0.000001> (x, x, w) }"""
    assert_leaves(FuseRmsNorm(), text, w=W)
