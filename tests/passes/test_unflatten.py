"""Unflatten: rows stay in three dimensions, and no shape is computed."""

from __future__ import annotations

import numpy as np
from qcompile.passes.unflatten import Unflatten

from tests.passes.rewriting import assert_leaves, assert_rewrites

RNG = np.random.default_rng(0)
FEED = {"x": RNG.standard_normal((2, 3, 8)).astype(np.float32)}
WEIGHTS = {
    "w": RNG.standard_normal((8, 8)).astype(np.float32),
    "b": RNG.standard_normal(8).astype(np.float32),
    "flat": np.array([-1, 8]),
    "eight": np.array([8]),
}
INPUTS = "float[B,S,8] x, float[8,8] w, float[8] b, int64[2] flat, int64[1] eight"
BACK = """
    n = Shape <start = 0, end = 1> (x)
    s = Shape <start = 1, end = 2> (x)
    d = Concat <axis = 0> (n, s, eight)
    y = Reshape (h, d)
    z = Add (y, x)
"""


def test_a_stretch_of_rows() -> None:
    assert_rewrites(
        Unflatten(),
        f"""g ({INPUTS}) => (float[B,S,8] z) {{
        f = Reshape (x, flat)
        a = LayerNormalization <axis = -1> (f, b, b)
        m = MatMul (a, w)
        r = Relu (m)
        h = Add (f, r)
        {BACK}
        }}""",
        """g (float[B,S,8] x, float[8,8] w, float[8] b) => (float[B,S,8] z) {
        a = LayerNormalization <axis = -1> (x, b, b)
        m = MatMul (a, w)
        r = Relu (m)
        h = Add (x, r)
        z = Add (h, x)
        }""",
        FEED,
        atol=1e-6,
        **WEIGHTS,
    )


def test_scalars_fit_any_number_of_dimensions() -> None:
    assert_rewrites(
        Unflatten(),
        f"""g ({INPUTS}, float half, uint8 zero) => (float[B,S,8] z) {{
        f = Reshape (x, flat)
        c = QuantizeLinear (f, half, zero)
        h = DequantizeLinear (c, half, zero)
        {BACK}
        }}""",
        """g (float[B,S,8] x, float half, uint8 zero) => (float[B,S,8] z) {
        c = QuantizeLinear (x, half, zero)
        h = DequantizeLinear (c, half, zero)
        z = Add (h, x)
        }""",
        FEED,
        atol=1e-6,
        half=np.float32(0.5),
        zero=np.uint8(128),
        **WEIGHTS,
    )


def test_a_reshape_to_the_same_shape() -> None:
    assert_rewrites(
        Unflatten(),
        """g (float[B,S,8] x, int64[3] same) => (float[B,S,8] z) {
        y = Reshape (x, same)
        z = Relu (y)
        }""",
        "g (float[B,S,8] x) => (float[B,S,8] z) { z = Relu (x) }",
        FEED,
        atol=0,
        same=np.array([0, 0, 8]),
    )


def test_what_is_not_by_rows_stays() -> None:
    for op in ("h = Softmax <axis = 0> (f)", "h = CumSum (f, w)", "h = Transpose (f)"):
        text = op if "CumSum" not in op else "c = Softmax <axis = 0> (f) h = Add (f, c)"
        if "Transpose" in op:
            text = "t = Transpose (f) u = MatMul (f, t) h = MatMul (u, f)"
        assert_leaves(
            Unflatten(),
            f"g ({INPUTS}) => (float[B,S,8] z) {{ f = Reshape (x, flat) {text} {BACK} }}",
            **WEIGHTS,
        )
