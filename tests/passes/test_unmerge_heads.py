"""UnmergeHeads: products with batch and heads in one axis."""

from __future__ import annotations

import re

import numpy as np
import pytest
from qcompile.passes.unmerge_heads import UnmergeHeads

from tests.passes.rewriting import HEADER, assert_leaves, assert_rewrites, typed
from tests.support import from_text, ops

RNG = np.random.default_rng(0)
SIGNATURE = "g (float[2,3,5,8] q, float[2,3,5,8] k, float[2,3,5,8] v, float[2,3,5] a)"
SHAPES = """<float c = {0.25}, float two = {2.0}, int64[3] heads = {6, -1, 8},
  int64[3] row = {6, 1, -1}, int64[3] square = {6, 5, 5}, int64[4] apart = {2, 3, 5, 5},
  int64[4] back = {2, 3, 5, 8}, int64[1] axes = {2}>"""
MERGED = f"""{SIGNATURE} => (float[2,3,5,8] y) {SHAPES} {{
  q3 = Reshape (q, heads) k3 = Reshape (k, heads) v3 = Reshape (v, heads) a3 = Reshape (a, row)
  kt = Transpose <perm = [0, 2, 1]> (k3) s = MatMul (q3, kt) m = Mul (c, s) d = Div (m, two)
  n = Add (d, a3) o = Reshape (n, apart) w = Softmax <axis = -1> (o) w3 = Reshape (w, square)
  p = MatMul (w3, v3) y = Reshape (p, back) }}"""
APART = f"""{SIGNATURE} => (float[2,3,5,8] y)
  <float c = {{0.25}}, float two = {{2.0}}, int64[1] axes = {{2}}> {{
  kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt) m = Mul (s, c) d = Div (m, two)
  a4 = Unsqueeze (a, axes) o = Add (d, a4) w = Softmax <axis = -1> (o) y = MatMul (w, v) }}"""


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_attention_of_bmm() -> None:
    feed = {name: normal(2, 3, 5, 8) for name in "qkv"} | {"a": normal(2, 3, 5)}
    assert_rewrites(UnmergeHeads(), MERGED, APART, feed, atol=1e-6)


def test_layers_that_share_a_term_have_names_of_their_own() -> None:
    signature, body = MERGED.replace("8] y)", "8] y, float[2,3,5,8] z)").rsplit("{", 1)
    first = body.replace("y =", "z =").rsplit("}", 1)[0]
    again = body.split("a3 = Reshape (a, row)")[1]
    for name in ("kt", "s", "m", "d", "n", "o", "w", "w3", "p"):
        again = re.sub(rf"\b{name}\b(?=[ ,)])", f"{name}b", again)
    model = typed(from_text(f"{HEADER}{signature}{{{first}{again}"))
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    assert UnmergeHeads()(model).modified
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names) and ops(model).count("MatMul") == 4


@pytest.mark.parametrize(
    ("change", "to"),
    [
        pytest.param("5,5] o)", "5,5] o, float[6,5,5] s)", id="read"),
        pytest.param("Mul (c, s)", "Mul (s, s)", id="not-scaled"),
        pytest.param("Div (m, two)", "Div (two, m)", id="divides"),
        pytest.param("perm = [0, 2, 1]", "perm = [0, 1, 2]", id="not-transposed"),
        pytest.param("float[2,3,5,8] q", "float[6,5,8] q", id="not-of-four-axes"),
        pytest.param("float[2,3,5,8] q", "float[3,2,5,8] q", id="other-heads"),
    ],
)
def test_what_is_left(change: str, to: str) -> None:
    scores = MERGED[: MERGED.index("w = Softmax")].replace("5,8] y)", "5,5] o)") + "}"
    assert change in scores
    assert_leaves(UnmergeHeads(), scores.replace(change, to))
