"""FuseAttention: scales, masks and transposes in the places where exporters put them."""

from __future__ import annotations

import numpy as np
import pytest
from qcompile.passes.fuse_attention import FuseAttention

from tests.passes.rewriting import HEADER, assert_leaves, assert_rewrites
from tests.support import Feed, from_text, ops

RNG = np.random.default_rng(0)
B, H, S, D = 2, 3, 5, 8


def _heads(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


MASK = np.zeros((B, 1, S, S), dtype=np.float32)
MASK[1, :, :, 3:] = np.finfo(np.float32).min
FEED: Feed = {
    "q": _heads(B, H, S, D),
    "k": _heads(B, H, S, D),
    "v": _heads(B, H, S, D),
    "mask": MASK,
}
QKV = "float[B,3,S,8] q, float[B,3,S,8] k, float[B,3,S,8] v"
CONSTANTS = "<float c = {0.25}, float half = {0.5}, float four = {4.0}>"
MASKED = f"g ({QKV}, float[B,1,S,S] mask) => (float[B,3,S,8] y)"
PLAIN = f"g ({QKV}) => (float[B,3,S,8] y)"
KT = "kt = Transpose <perm = [0, 1, 3, 2]> (k)"
ATTENTION = "Attention <scale = 0.25, is_causal = 0>"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            f"{KT} s = MatMul (q, kt) a = Mul (s, c) b = Add (a, mask)", id="multiplied-after"
        ),
        pytest.param(
            f"{KT} s = MatMul (q, kt) a = Div (s, four) b = Add (mask, a)", id="divided-after"
        ),
        pytest.param(
            f"p = Mul (c, q) {KT} s = MatMul (p, kt) b = Add (s, mask)", id="query-scaled"
        ),
        pytest.param(
            f"p = Mul (q, half) {KT} r = Mul (kt, half) s = MatMul (p, r) b = Add (s, mask)",
            id="both-scaled",
        ),
        pytest.param(
            "r = Div (k, four) kt = Transpose <perm = [0, 1, 3, 2]> (r) s = MatMul (q, kt)"
            " b = Add (s, mask)",
            id="key-scaled-before-its-transpose",
        ),
    ],
)
def test_fuses_with_mask(body: str) -> None:
    before = f"{MASKED} {CONSTANTS} {{ {body} w = Softmax <axis = -1> (b) y = MatMul (w, v) }}"
    after = f"{MASKED} {{ y = {ATTENTION} (q, k, v, mask) }}"
    assert_rewrites(FuseAttention(), before, after, FEED, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        "a = Mul (s, c) n = Div (a, two) t = Tanh (n) r = Mul (t, two)",
        "a = Mul (s, c) n = Mul (a, half) t = Tanh (n) r = Mul (two, t)",
    ],
)
def test_scores_that_are_capped_before_the_mask(body: str) -> None:
    before = f"""{MASKED} <float c = {{0.25}}, float half = {{0.5}}, float two = {{2.0}}> {{
      {KT} s = MatMul (q, kt) {body} b = Add (r, mask) w = Softmax <axis = -1> (b)
      y = MatMul (w, v) }}"""
    after = f"""{MASKED} {{
      y = Attention <scale = 0.25, is_causal = 0, softcap = 2.0> (q, k, v, mask) }}"""
    assert_rewrites(FuseAttention(), before, after, FEED, atol=1e-6)


def test_fuses_without_mask_through_dropout() -> None:
    before = f"""{PLAIN} {CONSTANTS} {{ {KT} s = MatMul (q, kt) a = Mul (s, c)
      w = Softmax <axis = 3> (a) d = Dropout (w) i = Identity (d) y = MatMul (i, v) }}"""
    after = f"{PLAIN} {{ y = {ATTENTION} (q, k, v) }}"
    assert_rewrites(FuseAttention(), before, after, FEED, atol=1e-6)


def test_transpose_that_also_orders_the_heads() -> None:
    signature = "g (float[B,3,S,8] q, float[B,S,3,8] k, float[B,3,S,8] v) => (float[B,3,S,8] y)"
    before = f"""{signature} {CONSTANTS} {{ kt = Transpose <perm = [0, 2, 3, 1]> (k)
      s = MatMul (q, kt) a = Mul (s, c) w = Softmax (a) y = MatMul (w, v) }}"""
    after = f"""{signature} {{ kh = Transpose <perm = [0, 2, 1, 3]> (k)
      y = {ATTENTION} (q, kh, v) }}"""
    feed = {**FEED, "k": _heads(B, S, H, D)}
    assert_rewrites(FuseAttention(), before, after, feed, atol=1e-6)


def test_guarded_softmax_takes_the_boolean_mask() -> None:
    """torch's older exporter of scaled_dot_product_attention; one row is masked entirely."""
    signature = f"g ({QKV}, bool[B,1,S,S] keep) => (float[B,3,S,8] y)"
    before = f"""{signature} <float c = {{0.25}}, float[1] zero, float[1] inf> {{
      {KT} s = MatMul (q, kt) a = Mul (s, c)
      mask = Where (keep, zero, inf) b = Add (a, mask)
      w = Softmax <axis = -1> (b) nan = IsNaN (w) z = Where (nan, zero, w) y = MatMul (z, v) }}"""
    before = before.replace(", float[1] zero, float[1] inf>", ">")
    before = before.replace("keep)", "keep, float[1] zero, float[1] inf)", 1)
    after = f"{signature} {{ y = {ATTENTION} (q, k, v, keep) }}"
    keep = MASK == 0
    keep[0, 0, 2] = False
    infinity = {
        "zero": np.zeros(1, dtype=np.float32),
        "inf": np.full(1, -np.inf, dtype=np.float32),
    }
    assert_rewrites(FuseAttention(), before, after, {**FEED, "keep": keep}, atol=1e-6, **infinity)


def test_masks_that_are_added_one_by_one() -> None:
    signature = f"g ({QKV}, float[B,1,S,S] mask, float[B,3,1,S] a) => (float[B,3,S,8] y)"
    first = """s = MatMul (q, kt) m = Mul (s, c) n = Add (m, a) o = Add (n, mask)
      w = Softmax <axis = -1> (o) x = MatMul (w, v)"""
    second = """t = MatMul (x, kt) h = Mul (t, c) i = Add (h, a) j = Add (i, mask)
      u = Softmax <axis = -1> (j) y = MatMul (u, v)"""
    before = f"{signature} {CONSTANTS} {{ {KT} {first} {second} }}"
    after = f"""{signature} {{ both = Add (mask, a)
      x = {ATTENTION} (q, k, v, both) y = {ATTENTION} (x, k, v, both) }}"""
    feed = {**FEED, "a": _heads(B, H, 1, S)}
    assert_rewrites(FuseAttention(), before, after, feed, atol=1e-6)


def test_padding_mask_is_expanded_once_for_two_layers() -> None:
    signature = f"g ({QKV}, float[B,1,1,S] mask) => (float[B,3,S,8] y)"
    before = f"""{signature} {CONSTANTS} {{
      {KT} s = MatMul (q, kt) a = Mul (s, c) b = Add (a, mask) w = Softmax (b) x = MatMul (w, v)
      s2 = MatMul (x, kt) a2 = Mul (s2, c) b2 = Add (a2, mask) w2 = Softmax (b2)
      y = MatMul (w2, v) }}"""
    after = f"""{signature} <int64[2] ones = {{1, 1}}> {{
      rows = Shape <start = 2, end = 3> (q) columns = Shape <start = 2, end = 3> (k)
      size = Concat <axis = 0> (ones, rows, columns) full = Expand (mask, size)
      x = {ATTENTION} (q, k, v, full) y = {ATTENTION} (x, k, v, full) }}"""
    feed = {**FEED, "mask": np.ascontiguousarray(MASK[:, :, :1])}
    assert_rewrites(FuseAttention(), before, after, feed, atol=1e-6)


def test_multi_head_attention() -> None:
    inputs = "float[B,S,24] q, float[B,S,24] k, float[B,S,24] v, float[B,1,S,S] mask"
    signature = f"g ({inputs}) => (float[B,S,24] y)"
    before = f"""{signature} {{
      y = com.microsoft.MultiHeadAttention <num_heads = 3, scale = 0.25> (q, k, v, , , mask) }}"""
    after = f"""{signature} {{
      y = Attention <is_causal = 0, q_num_heads = 3, kv_num_heads = 3, scale = 0.25>
        (q, k, v, mask) }}"""
    feed = {**{name: _heads(B, S, H * D) for name in "qkv"}, "mask": MASK}
    assert_rewrites(FuseAttention(), before, after, feed, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "to"),
    [
        pytest.param("axis = -1", "axis = 2", id="another-axis"),
        pytest.param("[0, 1, 3, 2]", "[0, 1, 2, 3]", id="key-not-transposed"),
        pytest.param("Mul (s, c)", "Mul (s, mask)", id="scale-not-constant"),
        pytest.param("Mul (s, c)", "Mul (s, minus)", id="scale-negative"),
        pytest.param("Softmax", "LogSoftmax", id="not-a-softmax"),
        pytest.param("MatMul (w, v)", "MatMul (v, w)", id="values-first"),
        pytest.param(
            "(float[B,3,S,8] y)", "(float[B,3,S,8] y, float[B,3,S,S] w)", id="weights-read"
        ),
        pytest.param("float[B,3,S,8] v", "float[B,1,S,8] v", id="values-broadcast"),
        pytest.param("float[B,1,S,S] mask", "float[2,3,4,S,S] mask", id="mask-of-five-axes"),
    ],
)
def test_leaves_what_is_no_attention(change: str, to: str) -> None:
    text = f"""g ({QKV}, float[B,1,S,S] mask) => (float[B,3,S,8] y)
      <float c = {{0.25}}, float minus = {{-0.25}}> {{
      {KT} s = MatMul (q, kt) a = Mul (s, c) b = Add (a, mask)
      w = Softmax <axis = -1> (b) y = MatMul (w, v) }}"""
    assert change in text
    assert_leaves(FuseAttention(), text.replace(change, to))


def test_leaves_three_axes() -> None:
    text = """g (float[B,S,8] q, float[B,S,8] k, float[B,S,8] v) => (float[B,S,8] y) {
      kt = Transpose <perm = [0, 2, 1]> (k) s = MatMul (q, kt) w = Softmax (s)
      y = MatMul (w, v) }"""
    assert_leaves(FuseAttention(), text)


def test_module_path_is_kept() -> None:
    text = f"""{PLAIN} {CONSTANTS} {{ {KT} s = MatMul (q, kt) a = Mul (s, c)
      w = Softmax (a) y = MatMul (w, v) }}"""
    model = from_text(HEADER + text)
    model.graph[-1].name = "/encoder/layer.0/attention/self/MatMul_1"
    FuseAttention()(model)
    assert ops(model) == ["Attention"]
    assert model.graph[0].metadata_props["qcompile.module_path"] == (
        "encoder.layer.0.attention.self"
    )
