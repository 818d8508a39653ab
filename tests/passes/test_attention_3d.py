"""AttentionTo3D: projections feed Attention without Reshape and Transpose."""

from __future__ import annotations

import numpy as np
import pytest
from qcompile.passes.attention_3d import AttentionTo3D

from tests.passes.rewriting import assert_leaves, assert_rewrites
from tests.support import Feed

RNG = np.random.default_rng(0)
B, S, H, G, D = 2, 5, 4, 2, 8
KEEP = np.tril(np.ones((S, S), dtype=bool))[None, None].repeat(B, 0)
KEEP[1, :, :, :2] = False  # left padding: the first rows are masked entirely


def _random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


FEED: Feed = {
    "q": _random(B, S, H * D),
    "k": _random(B, S, G * D),
    "v": _random(B, S, G * D),
    "mask": KEEP,
    "cos": np.cos(_random(B, S, D // 2)),
    "sin": np.sin(_random(B, S, D // 2)),
}
INPUTS = "float[B,S,32] q, float[B,S,16] k, float[B,S,16] v, bool[B,1,S,S] mask"
ANGLES = "float[B,S,4] cos, float[B,S,4] sin"
OUTPUT = "(float[B,S,32] y)"
SHAPES = (
    "<int64[4] qs = {0, 0, 4, 8}, int64[4] ks = {0, 0, -1, 8}, int64[3] os = {0, 0, 32},"
    " int64[1] two = {2}, int64[5] repeat = {1, 1, 2, 1, 1}, int64[4] wide = {0, 4, -1, 8}>"
)
Q4 = "q1 = Reshape (q, qs) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)"
K4 = "k1 = Reshape (k, ks) k2 = Transpose <perm = [0, 2, 1, 3]> (k1)"
V4 = "v1 = Reshape (v, ks) v2 = Transpose <perm = [0, 2, 1, 3]> (v1)"
OUT = "y2 = Transpose <perm = [0, 2, 1, 3]> (y1) y = Reshape (y2, os)"
THREE_D = "Attention <scale = 0.25, q_num_heads = 4, kv_num_heads = 2>"


def test_all_three_inputs_and_the_output() -> None:
    before = f"""g ({INPUTS}) => {OUTPUT} {SHAPES} {{ {Q4} {K4} {V4}
      y1 = Attention <scale = 0.25> (q2, k2, v2, mask) {OUT} }}"""
    after = f"g ({INPUTS}) => {OUTPUT} {{ y = {THREE_D} (q, k, v, mask) }}"
    assert_rewrites(AttentionTo3D(), before, after, FEED, atol=1e-6)


def test_rotary_embedding_between() -> None:
    before = f"""g ({INPUTS}, {ANGLES}) => {OUTPUT} {SHAPES} {{ {Q4} {K4} {V4}
      q3 = RotaryEmbedding <interleaved = 0> (q2, cos, sin)
      k3 = RotaryEmbedding <interleaved = 0> (k2, cos, sin)
      y1 = Attention <scale = 0.25> (q3, k3, v2, mask) {OUT} }}"""
    after = f"""g ({INPUTS}, {ANGLES}) => {OUTPUT} {{
      q3 = RotaryEmbedding <interleaved = 0, num_heads = 4> (q, cos, sin)
      k3 = RotaryEmbedding <interleaved = 0, num_heads = 2> (k, cos, sin)
      y = {THREE_D} (q3, k3, v, mask) }}"""
    assert_rewrites(AttentionTo3D(), before, after, FEED, atol=1e-6)


def test_norm_of_each_head_between() -> None:
    before = f"""g ({INPUTS}, {ANGLES}, float[8] w) => {OUTPUT} {SHAPES} {{ {Q4} {K4} {V4}
      q5 = RMSNormalization <axis = -1> (q1, w) q6 = Transpose <perm = [0, 2, 1, 3]> (q5)
      q3 = RotaryEmbedding <interleaved = 0> (q6, cos, sin)
      k5 = RMSNormalization <axis = -1> (k1, w) k6 = Transpose <perm = [0, 2, 1, 3]> (k5)
      y1 = Attention <scale = 0.25> (q3, k6, v2, mask) {OUT} }}"""
    after = f"""g ({INPUTS}, {ANGLES}, float[8] w) => {OUTPUT}
      <int64[4] qs = {{0, 0, 4, 8}}, int64[4] ks = {{0, 0, -1, 8}},
       int64[3] qw = {{0, 0, 32}}, int64[3] kw = {{0, 0, 16}}> {{
      q1 = Reshape (q, qs) k1 = Reshape (k, ks)
      q5 = RMSNormalization <axis = -1> (q1, w) k5 = RMSNormalization <axis = -1> (k1, w)
      q6 = Reshape (q5, qw) q3 = RotaryEmbedding <interleaved = 0, num_heads = 4> (q6, cos, sin)
      k6 = Reshape (k5, kw)
      y = {THREE_D} (q3, k6, v, mask) }}"""
    feed = FEED | {"w": _random(D)}
    assert_rewrites(AttentionTo3D(), before, after, feed, atol=1e-6)


def test_repeated_heads_are_absorbed() -> None:
    before = f"""g ({INPUTS}) => {OUTPUT} {SHAPES} {{ {Q4} {K4} {V4}
      k5 = Unsqueeze (k2, two) k6 = Expand (k5, repeat) k7 = Reshape (k6, wide)
      v5 = Unsqueeze (v2, two) v6 = Expand (v5, repeat) v7 = Reshape (v6, wide)
      y1 = Attention <scale = 0.25> (q2, k7, v7, mask) {OUT} }}"""
    after = f"g ({INPUTS}) => {OUTPUT} {{ y = {THREE_D} (q, k, v, mask) }}"
    assert_rewrites(AttentionTo3D(), before, after, FEED, atol=1e-6)


def test_shapes_computed_by_ops() -> None:
    """As exporters write them: Concat of Shape and Gather, and -1 for the heads."""
    before = f"""g ({INPUTS}) => {OUTPUT}
      <int64 zero = {{0}}, int64 one = {{1}}, int64[1] at = {{0}}, int64[1] any = {{-1}},
       int64[1] size = {{8}}> {{
      dims = Shape (q) b = Gather (dims, zero) s = Gather (dims, one)
      b1 = Unsqueeze (b, at) s1 = Unsqueeze (s, at)
      qs = Concat <axis = 0> (b1, s1, any, size) ks = Concat <axis = 0> (b1, s1, any, size)
      os = Concat <axis = 0> (b1, s1, any)
      {Q4} {K4} {V4}
      y1 = Attention <scale = 0.25> (q2, k2, v2, mask) {OUT} }}"""
    after = f"g ({INPUTS}) => {OUTPUT} {{ y = {THREE_D} (q, k, v, mask) }}"
    assert_rewrites(AttentionTo3D(), before, after, FEED, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "to"),
    [
        pytest.param("(q1)", "(q9)", id="one-input-without-the-transpose"),
        pytest.param("Reshape (q, qs)", "Reshape (q, other)", id="batch-not-kept"),
        pytest.param("(y1) y", "(y9) y", id="something-before-the-output-transpose"),
        pytest.param(f"{OUTPUT}", "(float[B,S,32] y, float[B,4,S,8] y1)", id="output-read"),
    ],
)
def test_leaves_what_does_not_fit(change: str, to: str) -> None:
    text = f"""g ({INPUTS}) => {OUTPUT} {SHAPES} {{ {Q4} {K4} {V4}
      y1 = Attention <scale = 0.25> (q2, k2, v2, mask) {OUT} }}"""
    text = text.replace("int64[1] two", "int64[4] other = {1, -1, 4, 8}, int64[1] two")
    assert change in text
    text = text.replace(change, to)
    text = text.replace(
        "q2 = Transpose <perm = [0, 2, 1, 3]> (q9)",
        "q9 = Relu (q1) q8 = Transpose <perm = [0, 2, 1, 3]> (q9) q2 = Relu (q8)",
    )
    text = text.replace(
        "y2 = Transpose <perm = [0, 2, 1, 3]> (y9)",
        "y9 = Relu (y1) y2 = Transpose <perm = [0, 2, 1, 3]> (y9)",
    )
    assert_leaves(AttentionTo3D(), text)


def test_keys_repeated_without_values_are_left() -> None:
    text = f"""g (float[B,S,32] q, float[B,S,16] k, float[B,S,32] v) => {OUTPUT} {SHAPES} {{
      {Q4} {K4} v1 = Reshape (v, qs) v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
      k5 = Unsqueeze (k2, two) k6 = Expand (k5, repeat) k7 = Reshape (k6, wide)
      y1 = Attention <scale = 0.25> (q2, k7, v2) {OUT} }}"""
    assert_leaves(AttentionTo3D(), text)
