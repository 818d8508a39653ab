"""ToGemm: a Linear with its bias as one op."""

from __future__ import annotations

import numpy as np
from qcompile.passes.to_gemm import ToGemm

from tests.passes.rewriting import HEADER, assert_leaves, assert_rewrites, typed
from tests.support import assert_idempotent, assert_same_graph, check_model, from_text, run_model

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 3)).astype(np.float32)
B = RNG.standard_normal(3).astype(np.float32)
X = RNG.standard_normal((2, 5, 4)).astype(np.float32)


def test_two_dimensions() -> None:
    assert_rewrites(
        ToGemm(),
        """g (float[N,4] x, float[4,3] w, float[3] b) => (float[N,3] y) {
             h = MatMul (x, w)
             y = Add (h, b)
           }""",
        "g (float[N,4] x, float[4,3] w, float[3] b) => (float[N,3] y) { y = Gemm (x, w, b) }",
        {"x": X[0]},
        atol=1e-6,
        w=W,
        b=B,
    )


def test_rows_of_more_dimensions() -> None:
    text = (
        HEADER
        + """g (float[2,5,4] x, float[4,3] w, float[3] b) => (float[2,5,3] y) {
      h = MatMul (x, w)
      y = Add (h, b)
    }"""
    )
    model = typed(from_text(text, w=W, b=B))
    assert ToGemm()(model).modified
    after = """g (float[2,5,4] x, float[4,3] w, float[3] b, int64[2] s, int64[3] t)
      => (float[2,5,3] y) {
        f = Reshape (x, s)
        h = Gemm (f, w, b)
        y = Reshape (h, t)
      }"""
    shapes = {"s": np.array([10, 4]), "t": np.array([2, 5, 3])}
    assert_same_graph(model, from_text(HEADER + after, w=W, b=B, **shapes))
    check_model(model)
    np.testing.assert_allclose(run_model(model, {"x": X})["y"], X @ W + B, rtol=0, atol=1e-6)
    assert_idempotent(ToGemm(), model)


def test_unknown_sizes_and_no_bias_stay() -> None:
    assert_leaves(
        ToGemm(),
        """g (float[N,5,4] x, float[4,3] w, float[3] b) => (float[N,5,3] y) {
             h = MatMul (x, w)
             y = Add (h, b)
           }""",
        w=W,
        b=B,
    )
    assert_leaves(
        ToGemm(), "g (float[5,4] x, float[4,3] w) => (float[5,3] y) { y = MatMul (x, w) }", w=W
    )
