"""PackedAttention: queries, keys and values as one product, rotated by the attention."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from qcompile.passes.packed_attention import GUARD, PackedAttention

from tests.passes.rewriting import HEADER, assert_leaves, assert_rewrites, typed
from tests.support import Feed, from_text, ops, run_model

RNG = np.random.default_rng(0)
POSITIONS = 32
INT64, FLOAT = int(ir.DataType.INT64), int(ir.DataType.FLOAT)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


W = {name: normal(24, n) / 5 for name, n in (("wq", 32), ("wk", 16), ("wv", 16))}
B = {"bq": normal(32), "bk": normal(16), "bv": normal(16)}
FREQUENCIES = (1.0 / 10 ** (np.arange(8) / 8)).astype(np.float32)
ANGLES = np.arange(POSITIONS, dtype=np.float32)[:, None] * FREQUENCIES
ARRAYS: dict[str, Any] = {
    "embed": normal(10, 24),
    "c": FREQUENCIES,
    "two": np.array([2]),
    **W,
    **B,
    "w": np.concatenate(list(W.values()), axis=1),
    "b": np.concatenate(list(B.values())),
    "cos": np.cos(ANGLES),
    "sin": np.sin(ANGLES),
}

SIGNATURE = """g (int64[B,S] input_ids, int64[B,T] attention_mask, int64[B,S] position_ids,
    float[B,1,P,16] pk, float[B,1,P,16] pv, int32[B] last, int32 total, float[B,1,S,T] bias{}) =>
    (float[B,S,32] y, float[B,1,T,16] kk, float[B,1,T,16] vv)"""
MADE = ", float[10,24] embed, float[24,64] w, float[64] b, float[32,8] cos, float[32,8] sin"
BEFORE = SIGNATURE.format(
    f"""{MADE}, float[8] c, int64[1] two, float[24,32] wq, float[24,16] wk, float[24,16] wv,
    float[32] bq, float[16] bk, float[16] bv"""
)
EMBED = "x = Gather (embed, input_ids)"
PRODUCTS = "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)"
BIASED = """dq = MatMul (x, wq) q = Add (dq, bq) dk = MatMul (x, wk) k = Add (bk, dk)
    dv = MatMul (x, wv) v = Add (dv, bv)"""
TURNED = f"""column = Unsqueeze (position_ids, two) p = Cast <to = {FLOAT}> (column)
    angle = Mul (p, c) cos1 = Cos (angle) sin1 = Sin (angle) cos2 = Cos (angle) sin2 = Sin (angle)
    rq = RotaryEmbedding <num_heads = 2> (q, cos1, sin1)
    rk = RotaryEmbedding <num_heads = 1> (k, cos2, sin2)"""
KERNEL = "y, kk, vv = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, \
scale = 0.25{}>"
REST = "pk, pv, last, total, , , , bias)"
ATTENTION = f"{KERNEL.format('')} (rq, rk, v, {REST}"
PLACES = f"""
    length = Shape <start = 1, end = 2> (input_ids)
    whole = Shape <start = 1, end = 2> (attention_mask)
    prompt = Equal (length, whole)
    kept = Sign (attention_mask)
    before = ArgMax <axis = 1, keepdims = 1> (kept)
    own = If (prompt) <
      then_branch = first () => (int64[B,S] places) {{
        count = Squeeze (length)
        range = Range (zero, count, one)
        counted = Mul (range, kept)
        shifted = Add (position_ids, before)
        wanted = Mul (shifted, kept)
        agree = Equal (counted, wanted)
        apart = Not (agree)
        wrong = Cast <to = {INT64}> (apart)
        index = ReduceMax <keepdims = 0> (wrong)
        fine = Gather (only, index)
        places = Add (counted, fine) }},
      else_branch = later () => (int64[B,S] after) {{
        moved = Add (position_ids, before)
        after = Max (moved, zero) }}>
"""
CONSTANTS = "<int64 zero = {0}, int64 one = {1}, int64[1] only = {0}>"
AFTER = SIGNATURE.format(MADE)
PACKED = KERNEL.format(", do_rotary = 1, rotary_interleaved = 0") + (
    "(qkv, , , pk, pv, last, total, cos, sin, own, bias)"
)
JOIN = {False: "qkv = MatMul (x, w)", True: "p = MatMul (x, w) qkv = Add (p, b)"}


def feed(mask: list[list[int]], tokens: int) -> Feed:
    """The last `tokens` of `mask` [batch, total] as new ones, after random keys and values."""
    kept = np.array(mask)
    batch, total = kept.shape
    positions = np.maximum(np.cumsum(kept, axis=1) - 1, 0)[:, total - tokens :]
    scores = np.where(kept[:, None, None, :] == 1, 0, -65504).astype(np.float32)
    return {
        "input_ids": RNG.integers(0, 10, (batch, tokens)),
        "attention_mask": kept,
        # What the caller gives for padding is nobody's.
        "position_ids": np.where(kept[:, total - tokens :] == 1, positions, 1),
        "pk": normal(batch, 1, total - tokens, 16),
        "pv": normal(batch, 1, total - tokens, 16),
        "last": np.full(batch, total - 1, np.int32),
        "total": np.array(total, np.int32),
        "bias": np.repeat(scores, tokens, axis=2),
    }


def model_of(body: str) -> ir.Model:
    return typed(from_text(f"{HEADER}{BEFORE} {{ {body} }}", **ARRAYS))


@pytest.mark.parametrize("biased", [False, True])
def test_products_and_rotation(biased: bool) -> None:
    """A step after as many tokens as come before, without padding: the same to the bit."""
    products = BIASED if biased else PRODUCTS
    model = assert_rewrites(
        PackedAttention(POSITIONS),
        f"{BEFORE} {{ {EMBED} {products} {TURNED} {ATTENTION} }}",
        f"{AFTER} {CONSTANTS} {{ {PLACES} {EMBED} {JOIN[biased]} {PACKED} }}",
        feed([[1] * 6] * 2, 6),
        atol=0,
        **ARRAYS,
    )
    steps = feed([[1] * 7] * 2, 1)
    before = run_model(model_of(f"{EMBED} {products} {TURNED} {ATTENTION}"), steps)
    for name, array in run_model(model, steps).items():
        np.testing.assert_array_equal(array, before[name])


def test_products_alone() -> None:
    attention = f"(qkv, , , {REST}"
    assert_rewrites(
        PackedAttention(None),
        f"{BEFORE} {{ {EMBED} {PRODUCTS} {KERNEL.format('')} (q, k, v, {REST} }}",
        f"{AFTER} {{ {EMBED} {JOIN[False]} {KERNEL.format('')} {attention} }}",
        feed([[1] * 6] * 2, 6),
        atol=0,
        **ARRAYS,
    )


def test_parts_of_one_product() -> None:
    """GPT-2's, each reshaped into heads and back."""
    sizes = "int64[3] n, int64[4] heads, int64[3] flat"
    signature = BEFORE.replace("int64[1] two", f"int64[1] two, {sizes}")
    parts = "q, k, v = Split <axis = 2> (qkv, n) h = Reshape (q, heads) r = Reshape (h, flat)"
    assert_rewrites(
        PackedAttention(None),
        f"{signature} {{ {EMBED} {JOIN[False]} {parts} {KERNEL.format('')} (r, k, v, {REST} }}",
        f"{AFTER} {{ {EMBED} {JOIN[False]} {KERNEL.format('')} (qkv, , , {REST} }}",
        feed([[1] * 6] * 2, 6),
        atol=0,
        **ARRAYS,
        n=np.array([32, 16, 16]),
        heads=np.array([0, 0, 2, 16]),
        flat=np.array([0, 0, 32]),
    )


PART = """{0}_h = Reshape ({0}, {0}4) {0}_t = Transpose <perm = [0, 2, 1, 3]> ({0}_h)
    {0}_a = Slice ({0}_t, none, cut, three) {0}_b = Slice ({0}_t, {1}, end, three)
    {0}_r = RotaryEmbedding ({0}_a, cos1, sin1) {0}_c = Concat <axis = -1> ({0}_r, {0}_b)
    {0}_u = Transpose <perm = [0, 2, 1, 3]> ({0}_c) r{0} = Reshape ({0}_u, {0}3)"""


def partly(rest: str = "cut") -> tuple[str, dict[str, Any]]:
    """Heads of 32 channels, the first 16 of which are rotated, and the constants for it."""
    numbers = {
        "q4": [0, 0, 2, 32], "k4": [0, 0, 1, 32], "q3": [0, 0, 64], "k3": [0, 0, 32],
        "none": [0], "cut": [16], "late": [17], "end": [2**62], "three": [3],
    }  # fmt: skip
    wide = {name: normal(24, n) / 5 for name, n in (("wq", 64), ("wk", 32), ("wv", 32))}
    arrays = {name: np.array(value) for name, value in numbers.items()} | wide
    arrays |= {name: ARRAYS[name] for name in ("embed", "c", "two")}
    types = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}
    declared = [
        f"{types[array.dtype]}[{','.join(map(str, array.shape))}] {name}"
        for name, array in arrays.items()
    ]
    signature = SIGNATURE.format(f", {', '.join(declared)}").replace("16]", "32]")
    signature = signature.replace("(float[B,S,32] y", "(float[B,S,64] y")
    angles = TURNED[: TURNED.index("cos2")]
    parts = " ".join(PART.format(name, rest) for name in "qk")
    return f"{signature} {{ {EMBED} {PRODUCTS} {angles} {parts} {ATTENTION} }}", arrays


def test_first_channels_of_each_head() -> None:
    """Phi's."""
    text, arrays = partly()
    model = typed(from_text(HEADER + text, **arrays))
    given = feed([[1] * 6] * 2, 6) | {name: normal(2, 1, 0, 32) for name in ("pk", "pv")}
    wanted = run_model(model, given, optimise=False)
    assert PackedAttention(POSITIONS)(model).modified
    assert not {"RotaryEmbedding", "Reshape", "Transpose"}.intersection(ops(model))
    for name, array in run_model(model, given, optimise=False).items():
        np.testing.assert_array_equal(array, wanted[name])
    assert not PackedAttention(POSITIONS)(model).modified


def test_channels_that_are_left_out() -> None:
    """Between those that are rotated and those that are not."""
    text, arrays = partly(rest="late")
    assert_leaves(PackedAttention(POSITIONS), text, **arrays)


def called(model: ir.Model, whole: Feed, ends: list[int]) -> np.ndarray:
    """y of `whole`, given in several calls: the first up to token `ends[0]`, and so on."""
    cache = {name: whole[name] for name in ("pk", "pv")}
    found, start = [], 0
    for end in ends:
        part = {name: whole[name][:, start:end] for name in ("input_ids", "position_ids")}
        part["attention_mask"] = whole["attention_mask"][:, :end]
        part["bias"] = whole["bias"][:, :, start:end, :end]
        part["last"] = np.full(len(whole["last"]), end - 1, np.int32)
        part["total"] = np.array(end, np.int32)
        outputs = run_model(model, part | cache)
        found.append(outputs["y"])
        cache = {"pk": outputs["kk"], "pv": outputs["vv"]}
        start = end
    return np.concatenate(found, axis=1)


SINGLY = [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("masks", "ends"),
    [
        pytest.param([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8], [8], id="before"),
        pytest.param([[1, 1, 1, 1, 1, 0, 0, 0], [0] + [1] * 7], [8], id="behind"),
        pytest.param([[0, 1, 1, 0, 1, 1, 1, 1], [1] * 8], SINGLY, id="behind-then-steps"),
        pytest.param([[0, 1, 1, 1, 0, 0, 1, 1], [1] * 8], SINGLY, id="a-turn-was-over"),
        pytest.param([[0] * 5 + [1] * 3, [1] * 8], SINGLY, id="all-of-a-prompt"),
        pytest.param([[0, 1, 1, 1, 0, 0, 1, 1]], [4, 8], id="several-turns"),
    ],
)
def test_positions_are_counted_by_place(masks: list[list[int]], ends: list[int]) -> None:
    before, after = (model_of(f"{EMBED} {BIASED} {TURNED} {ATTENTION}") for _ in range(2))
    assert PackedAttention(POSITIONS)(after).modified
    whole, real = feed(masks, 8), np.array(masks) == 1
    wanted = called(before, whole, ends)
    # Angles are rounded to float32 at another place.
    np.testing.assert_allclose(called(after, whole, ends)[real], wanted[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        pytest.param([1, 1, 0, 1, 1], [0, 1, 1, 2, 3], id="padding-between"),
        pytest.param([1] * 5, [0, 1, 0, 1, 2], id="several-texts-in-a-row"),
        pytest.param([1] * 5, [1, 2, 3, 4, 5], id="from-one"),
    ],
)
def test_what_the_kernel_would_rotate_otherwise_fails(
    mask: list[int], positions: list[int]
) -> None:
    model = model_of(f"{EMBED} {BIASED} {TURNED} {ATTENTION}")
    assert PackedAttention(POSITIONS)(model).modified
    given = feed([[1] * 5, mask], 5)
    given["position_ids"][1] = positions
    for optimise in (False, True):
        with pytest.raises(InvalidArgument, match=f"Name:'{GUARD}'"):
            run_model(model, given, optimise=optimise)


def test_more_tokens_than_positions_fail() -> None:
    model = model_of(f"{EMBED} {BIASED} {TURNED} {ATTENTION}")
    assert PackedAttention(POSITIONS)(model).modified
    with pytest.raises(InvalidArgument, match="cos_cache dimension 0"):
        run_model(model, feed([[1] * (POSITIONS + 1)], POSITIONS + 1))


WHOLE = f"{EMBED} {BIASED} {TURNED} {ATTENTION}"
LONGEST = "top = ReduceMax (position_ids) far = Cast <to = 1> (top) wide = Mul (angle0, far)"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(WHOLE.replace("(rq, rk", "(rq, k"), "only one", id="keys-not-rotated"),
        pytest.param(
            WHOLE.replace("(rq, rk", "(sq, rk").replace("y, kk", "sq = Neg (rq) y, kk"),
            "only one",
            id="scaled-after-rotation",
        ),
        pytest.param(
            WHOLE.replace("(k, cos2", "(nk, cos2").replace("rk =", "nk = Neg (k) rk ="),
            "no products right before it",
            id="keys-normed",
        ),
        pytest.param(
            WHOLE.replace("Add (bk, dk)", "Identity (dk)"), "no products", id="bias-of-some"
        ),
        pytest.param(
            WHOLE.replace("dk = MatMul (x", "xx = Neg (x) dk = MatMul (xx"),
            "several inputs or precisions",
            id="another-input",
        ),
        pytest.param(
            WHOLE.replace("cos2 = Cos (angle)", "cos2 = Sin (angle)"),
            "in different ways",
            id="other-angles",
        ),
        pytest.param(
            WHOLE.replace("<num_heads = 1>", "<num_heads = 1, interleaved = 1>"),
            "in different ways",
            id="two-kinds-of-rotation",
        ),
        pytest.param(
            WHOLE.replace("angle = Mul", "angle0 = Mul").replace(
                "cos1 = ", f"{LONGEST} angle = Identity (wide) cos1 = "
            ),
            "more than each token's position_ids",
            id="angles-by-the-longest",
        ),
        pytest.param(
            WHOLE.replace(
                "scale = 0.25", "scale = 0.25, k_quant_type = 'PER_CHANNEL'".replace("'", '"')
            ),
            "in codes",
            id="cache-of-codes",
        ),
    ],
)
def test_what_stays_and_why(body: str, reason: str) -> None:
    pass_ = PackedAttention(POSITIONS)
    assert_leaves(pass_, f"{BEFORE} {{ {body} }}", **ARRAYS)
    (note,) = pass_.notes
    assert re.match(f"[^ ]*: .*{reason}", note)


def test_positions_have_to_be_known() -> None:
    pass_ = PackedAttention(None)
    assert_leaves(pass_, f"{BEFORE} {{ {WHOLE} }}", **ARRAYS)
    assert "does not say how many positions" in pass_.notes[0]


def test_sizes_that_the_kernel_does_not_rotate() -> None:
    """Tables of 4 columns, half of 8 channels."""
    arrays = ARRAYS | {"c": FREQUENCIES[:4]}
    pass_ = PackedAttention(POSITIONS)
    text = f"{BEFORE.replace('float[8] c', 'float[4] c')} {{ {WHOLE} }}"
    text = text.replace("num_heads = 2>", "num_heads = 2, rotary_embedding_dim = 8>")
    text = text.replace("num_heads = 1>", "num_heads = 1, rotary_embedding_dim = 8>")
    assert_leaves(pass_, text, **arrays)
    assert "rotates no 8 channels" in pass_.notes[0]
