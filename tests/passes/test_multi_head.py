"""MultiHead: attention in the kernel that takes no mask, wherever padding allows it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.known_mask import MaskMeaning, meaning_of
from qcompile.passes.multi_head import MultiHead

from tests.passes.rewriting import HEADER, assert_leaves, assert_rewrites, typed
from tests.support import assert_idempotent, from_text, ops, run_model

RNG = np.random.default_rng(0)
CONSTANTS = {
    "axis": np.array(1),
    "rows": np.array([1, 3]),
    "columns": np.array([1, 2]),
    "slopes": np.array([0.5, -0.25, 0.125, 2.0], np.float32)[:, None, None],
    "lowest": np.array(np.finfo(np.float32).min),
}
DECLARED = "int64 axis, int64[2] rows, int64[2] columns, float[4,1,1] slopes, float lowest"
CAUSAL = """
    same = Equal (mask, mask)
    ones = Cast <to = 7> (same)
    at = CumSum (ones, axis)
    r = Unsqueeze (at, rows)
    c = Unsqueeze (at, columns)
    causal = LessOrEqual (c, r)
"""
PADDING = "real = Cast <to = 9> (mask) keys = Unsqueeze (real, columns)"
BOTH = f"{CAUSAL} {PADDING} keep = And (causal, keys)"
PADDED = f"{CAUSAL} {PADDING} all = Equal (r, r) keep = And (all, keys)"


def model_of(body: str, groups: int = 4) -> ir.Model:
    width = 8 * groups
    text = f"""{HEADER}g (float[B,S,32] q, float[B,S,{width}] k, float[B,S,{width}] v,
        int64[B,S] mask, {DECLARED}) => (float[B,S,32] y) {{
        {body}
        y = Attention <q_num_heads = 4, kv_num_heads = {groups}> (q, k, v, keep)
    }}"""
    return typed(from_text(text, **CONSTANTS))


def feed_of(mask: list[list[int]], groups: int = 4) -> dict[str, np.ndarray]:
    kept = np.array(mask)
    widths = {"q": 32, "k": 8 * groups, "v": 8 * groups}
    arrays = {
        name: RNG.standard_normal((*kept.shape, n)).astype(np.float32) for name, n in widths.items()
    }
    return {**arrays, "mask": kept}


MASKS = (
    [[1, 1, 1, 1], [1, 1, 1, 1]],
    [[1, 1, 1, 0], [1, 0, 0, 0]],
    [[0, 1, 1, 1], [1, 1, 1, 1]],
    [[0, 0, 1, 0], [1, 0, 1, 1]],
    [[1]],
)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("body", [BOTH, PADDED])
def test_any_padding(body: str, groups: int) -> None:
    """Equal wherever there is a token, whichever branch runs."""
    before, after = model_of(body, groups), model_of(body, groups)
    assert MultiHead()(after).modified
    assert_idempotent(MultiHead(), after)
    assert "Attention" not in ops(after) and ops(after).count("If") == 2
    assert "Shape" not in ops(after)
    for mask in MASKS:
        feed = feed_of(mask, groups)
        real = feed["mask"].astype(bool)
        wanted, found = run_model(before, feed)["y"], run_model(after, feed)["y"]
        np.testing.assert_allclose(found[real], wanted[real], atol=1e-5)


def test_layers_share_the_condition_and_the_bias() -> None:
    text = f"""{HEADER}g (float[B,S,32] x, int64[B,S] mask, {DECLARED}) => (float[B,S,32] z) {{
        {BOTH}
        y = Attention <q_num_heads = 4, kv_num_heads = 4> (x, x, x, keep)
        z = Attention <q_num_heads = 4, kv_num_heads = 4> (y, y, y, keep)
    }}"""
    model = typed(from_text(text, **CONSTANTS))
    MultiHead()(model)
    assert ops(model).count("If") == 3 and ops(model).count("CumSum") == 1


def test_no_mask() -> None:
    for causal in (0, 1):
        head = "g (float[2,5,32] q) => (float[2,5,32] y) {"
        assert_rewrites(
            MultiHead(),
            f"""{head} y = Attention <q_num_heads = 4, kv_num_heads = 4, scale = 0.5,
                is_causal = {causal}> (q, q, q) }}""",
            f"""{head} y = com.microsoft.MultiHeadAttention <num_heads = 4, scale = 0.5,
                unidirectional = {causal}> (q, q, q) }}""",
            {"q": RNG.standard_normal((2, 5, 32)).astype(np.float32)},
            atol=1e-5,
        )


def test_an_unknown_mask_becomes_a_bias() -> None:
    model = model_of(f"{CAUSAL} keep = Not (causal)")
    MultiHead()(model)
    assert "If" not in ops(model) and ops(model)[-1] == "com.microsoft.MultiHeadAttention"


def in_a_window(width: int) -> str:
    """A token sees as many tokens, itself included; written as exporters write it."""
    return f"""{CAUSAL} width = Constant <value_int = {width}> ()
        edge = Sub (r, width) inside = Greater (c, edge) keep = And (causal, inside)"""


@pytest.mark.parametrize("width", [2, 7, 40])
def test_a_window_is_known_beyond_its_width(width: int) -> None:
    model = model_of(in_a_window(width))
    keep = ir.convenience.create_value_mapping(model.graph)["keep"]
    assert meaning_of(model, keep) == MaskMeaning(True, None, window=width)
    off_by_one = in_a_window(width).replace("Greater (", "GreaterOrEqual (")
    model = model_of(off_by_one)
    keep = ir.convenience.create_value_mapping(model.graph)["keep"]
    assert meaning_of(model, keep) == MaskMeaning(True, None, window=width + 1)


def test_a_window_too_wide_to_try_is_not_taken_for_causality() -> None:
    model = model_of(in_a_window(9000))
    assert meaning_of(model, ir.convenience.create_value_mapping(model.graph)["keep"]) is None


def test_a_window_is_not_taken_for_causality() -> None:
    before, after = model_of(in_a_window(7)), model_of(in_a_window(7))
    assert MultiHead()(after).modified
    feed = feed_of([[1] * 20])
    wanted, found = run_model(before, feed)["y"], run_model(after, feed)["y"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


ALIBI = f"""{BOTH.replace("keep =", "seen =")}
    count = CumSum (mask, axis) place = Sub (count, axis) f = Cast <to = 1> (place)
    wide = Unsqueeze (f, columns) alibi = Mul (wide, slopes) keep = Where (seen, alibi, lowest)"""
COUNTED = ALIBI.replace("Cast <to = 1> (place)", "Cast <to = 1> (count)")


@pytest.mark.parametrize("body", [ALIBI, COUNTED])
def test_biases_by_place_are_not_taken_for_padding(body: str) -> None:
    before, after = model_of(body), model_of(body)
    assert MultiHead()(after).modified
    for mask in MASKS:
        feed = feed_of(mask)
        real = feed["mask"].astype(bool)
        wanted, found = run_model(before, feed)["y"], run_model(after, feed)["y"]
        np.testing.assert_allclose(found[real], wanted[real], atol=1e-5)


def test_what_is_known_of_masks() -> None:
    def meaning(body: str) -> MaskMeaning | None:
        model = model_of(body)
        keep = ir.convenience.create_value_mapping(model.graph)["keep"]
        found = meaning_of(model, keep)
        names = {v.name: v for v in model.graph.inputs}
        if found is not None and found.padding is not None:
            assert found.padding is names["mask"]
        return found

    both, padded = meaning(BOTH), meaning(PADDED)
    assert both is not None and both.causal and both.padding is not None
    assert padded is not None and not padded.causal and padded.padding is not None
    assert meaning(f"{CAUSAL} keep = Identity (causal)") == MaskMeaning(True, None)
    assert meaning(f"{CAUSAL} keep = Not (causal)") is None
    sloped = meaning(ALIBI)
    assert sloped is not None and sloped.causal and sloped.slopes == (0.5, -0.25, 0.125, 2.0)
    assert meaning(COUNTED) is None
    assert meaning(ALIBI.replace("CumSum (mask", "CumSum (ones")) is None
    for most in ("20.0", "30.5", "7000.5"):
        capped = f"most = Constant <value_float = {most}> () f = Min (g, most) wide"
        assert meaning(ALIBI.replace("f = Cast", "g = Cast").replace("wide", capped, 1)) is None
    window = "two = Add (at, at) t = Unsqueeze (two, rows) keep = LessOrEqual (c, t)"
    assert meaning(f"{CAUSAL} {window}") is None


def crossing(keep: str) -> ir.Model:
    """Of three queries and two keys, under a mask of the keys."""
    text = f"""{HEADER}g (float[B,3,32] q, float[B,2,32] k, int64[B,2] mask, int64[4] shape,
        {DECLARED}) => (float[B,3,32] y) {{
        {PADDING} {keep}
        y = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, k, keep) }}"""
    return typed(from_text(text, shape=np.array([1, 1, 3, 1]), **CONSTANTS))


def test_a_mask_of_other_keys_than_queries() -> None:
    """What it means is not asked: it was tried on as many of the one as of the other."""
    before, after = (crossing("keep = Expand (keys, shape)") for _ in "ab")
    after.graph.sort()
    declared = ir.convenience.create_value_mapping(after.graph)["keep"]
    declared.shape = ir.Shape(["B", 1, 3, 2])
    assert MultiHead()(after).modified and "If" not in ops(after)
    feed = {
        "q": RNG.standard_normal((1, 3, 32)).astype(np.float32),
        "k": RNG.standard_normal((1, 2, 32)).astype(np.float32),
        "mask": np.array([[1, 0]]),
    }
    wanted, found = run_model(before, feed)["y"], run_model(after, feed)["y"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_mask_that_the_kernel_would_have_to_broadcast_stays() -> None:
    model = crossing("keep = Identity (keys)")
    assert not MultiHead()(model).modified
    assert "Attention" in ops(model)


def test_attention_that_stays() -> None:
    head = "g (float[2,5,32] q, float[2,4,3,8] p) => (float[2,5,32] y) {"
    for extra in ("softcap = 2.0",):
        assert_leaves(
            MultiHead(),
            f"{head} y = Attention <q_num_heads = 4, kv_num_heads = 4, {extra}> (q, q, q) }}",
        )
    assert_leaves(
        MultiHead(), "g (float[2,4,5,8] q) => (float[2,4,5,8] y) { y = Attention (q, q, q) }"
    )
