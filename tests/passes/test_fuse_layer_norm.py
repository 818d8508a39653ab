"""FuseLayerNorm: the decompositions of torch's older exporter and their variants."""

from __future__ import annotations

import numpy as np
import pytest
from qcompile.passes.fuse_layer_norm import FuseLayerNorm

from tests.passes.rewriting import assert_leaves, assert_rewrites

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((2, 3, 8)) * 3 + 1).astype(np.float32)
W = RNG.standard_normal(8).astype(np.float32)
B = RNG.standard_normal(8).astype(np.float32)
EPS = np.float32(1e-5)
AXES = "<int64[1] axes = {-1}, float two = {2.0}, float one = {1.0}, float half = {0.5}>"
SIGNATURE = f"g (float[N,S,8] x, float[8] w, float[8] b, float eps) => (float[N,S,8] y) {AXES}"
AFTER = """g (float[N,S,8] x, float[8] w, float[8] b) => (float[N,S,8] y) {
  y = LayerNormalization <axis = -1, epsilon = 0.00001, stash_type = 1> (x, w, b)
}"""
DEVIATION = """
  mean = ReduceMean (x, axes)
  d = Sub (x, mean)"""
STD = """
  var = ReduceMean (dd, axes)
  vare = Add (var, eps)
  std = Sqrt (vare)"""


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            f"{DEVIATION} dd = Pow (d, two) {STD} n = Div (d, std) s = Mul (n, w) y = Add (s, b)",
            id="torch",
        ),
        pytest.param(
            f"{DEVIATION} dd = Mul (d, d) {STD} n = Div (d, std) s = Mul (w, n) y = Add (b, s)",
            id="mul-and-swapped-operands",
        ),
        pytest.param(
            f"{DEVIATION} dd = Mul (d, d) {STD} r = Reciprocal (std) n = Mul (r, d)"
            " s = Mul (n, w) y = Add (s, b)",
            id="reciprocal",
        ),
        pytest.param(
            f"{DEVIATION} dd = Mul (d, d) {STD} r = Div (one, std) n = Mul (d, r)"
            " s = Mul (n, w) y = Add (s, b)",
            id="one-over",
        ),
        pytest.param(
            f"{DEVIATION} d2 = Sub (x, mean) dd = Pow (d2, two) var = ReduceMean (dd, axes)"
            " vare = Add (eps, var) std = Pow (vare, half)"
            " n = Div (d, std) s = Mul (n, w) y = Add (s, b)",
            id="deviation-twice-and-pow",
        ),
    ],
)
def test_fuses(body: str) -> None:
    before = f"{SIGNATURE} {{ {body} }}"
    assert_rewrites(FuseLayerNorm(), before, AFTER, {"x": X}, atol=2e-6, w=W, b=B, eps=EPS)


def test_fuses_without_bias() -> None:
    before = f"""g (float[N,S,8] x, float[8] w, float eps) => (float[N,S,8] y) {AXES} {{
      {DEVIATION} dd = Pow (d, two) {STD} n = Div (d, std) y = Mul (n, w) }}"""
    after = """g (float[N,S,8] x, float[8] w) => (float[N,S,8] y) {
      y = LayerNormalization <axis = -1, epsilon = 0.00001, stash_type = 1> (x, w) }"""
    assert_rewrites(FuseLayerNorm(), before, after, {"x": X}, atol=2e-6, w=W, eps=EPS)


def test_positive_axis_and_weight_with_leading_ones() -> None:
    before = f"""g (float[N,S,8] x, float[1,1,8] w, float[1,1,8] b, float eps)
      => (float[N,S,8] y) <int64[1] axes = {{2}}, float two = {{2.0}}> {{
      {DEVIATION} dd = Pow (d, two) {STD} n = Div (d, std) s = Mul (n, w) y = Add (s, b) }}"""
    arrays = {"w": W.reshape(1, 1, 8), "b": B.reshape(1, 1, 8), "eps": EPS}
    model = assert_rewrites(FuseLayerNorm(), before, AFTER, {"x": X}, atol=2e-6, **arrays)
    assert [list(v.shape or ()) for v in model.graph.initializers.values()] == [[8], [8]]


@pytest.mark.parametrize(
    ("change", "to"),
    [
        pytest.param("Div (d, std)", "Div (x, std)", id="not-centred"),
        pytest.param("ReduceMean (dd, axes)", "ReduceMean (x, axes)", id="not-the-variance"),
        pytest.param("Pow (d, two)", "Pow (d, eps)", id="not-a-square"),
        pytest.param("ReduceMean (x, axes)", "ReduceSum (x, axes)", id="not-a-mean"),
        pytest.param("{-1}", "{1}", id="another-axis"),
        pytest.param("Mul (n, w)", "Mul (n, x)", id="weight-not-constant"),
    ],
)
def test_leaves_what_is_no_layer_norm(change: str, to: str) -> None:
    text = (
        f"{SIGNATURE} {{ {DEVIATION} dd = Pow (d, two) {STD} n = Div (d, std)"
        " s = Mul (n, w) y = Add (s, b) }"
    )
    assert change in text
    assert_leaves(FuseLayerNorm(), text.replace(change, to), w=W, b=B, eps=EPS)
