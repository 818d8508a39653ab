"""SkipNorm: the residual add and a Linear's bias go into the norm."""

from __future__ import annotations

import numpy as np
import pytest
from qcompile.passes.skip_norm import SkipNorm

from tests.passes.rewriting import assert_leaves, assert_rewrites

RNG = np.random.default_rng(0)
FEED = {name: RNG.standard_normal((2, 3, 8)).astype(np.float32) for name in "ab"}
VECTOR = RNG.standard_normal(8).astype(np.float32)
INPUTS = "float[B,S,8] a, float[B,S,8] b, float[8] w, float[8] c"
OUT = "(float[B,S,8] y, float[B,S,8] z)"


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        ("LayerNormalization", "SkipLayerNormalization"),
        ("RMSNormalization", "SkipSimplifiedLayerNormalization"),
    ],
)
def test_norm_of_a_sum(op: str, kernel: str, biased: bool) -> None:
    vectors = "w, w" if op == "LayerNormalization" else "w"
    before = "p = Add (b, c) s = Add (a, p)" if biased else "s = Add (a, b)"
    bias = ", c" if biased else ""
    assert_rewrites(
        SkipNorm(),
        f"""g ({INPUTS}) => {OUT} {{ {before}
            y = {op} <axis = -1, epsilon = 0.001> (s, {vectors}) z = Relu (s) }}""",
        f"""g ({INPUTS}) => {OUT} {{
            y, , , s = com.microsoft.{kernel} <epsilon = 0.001> (a, b, {vectors}{bias})
            z = Relu (s) }}""",
        FEED,
        atol=1e-5,
        w=VECTOR,
        c=VECTOR * 2,
    )


def test_vectors_of_more_axes() -> None:
    text = f"g ({INPUTS.replace('float[8] w', 'float[1,1,8] w')}) => {OUT} {{"
    assert_rewrites(
        SkipNorm(),
        f"""{text} s = Add (a, b)
            y = LayerNormalization <axis = -1, epsilon = 0.001> (s, w, c) z = Relu (s) }}""",
        f"""g ({INPUTS}) => {OUT} {{
            y, , , s = com.microsoft.SkipLayerNormalization <epsilon = 0.001> (a, b, w, c)
            z = Relu (s) }}""",
        FEED,
        atol=1e-5,
        w=VECTOR.reshape(1, 1, 8),
        c=VECTOR,
    )


@pytest.mark.parametrize(
    "body",
    [
        "s = Mul (a, b) y = RMSNormalization <axis = -1> (s, w) z = Relu (s)",
        "s = Add (a, c) y = RMSNormalization <axis = -1> (s, w) z = Relu (s)",
        "z = Add (a, b) y = RMSNormalization <axis = -1> (z, w)",
    ],
)
def test_norms_that_stay(body: str) -> None:
    assert_leaves(SkipNorm(), f"g ({INPUTS}) => {OUT} {{ {body} }}", w=VECTOR, c=VECTOR)
