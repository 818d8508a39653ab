"""PackTokens: padding moves behind the tokens, where a causal model does not see it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.pack_tokens import PackTokens
from qcompile.passes.per_token import DOMAIN, per_token_functions

from tests.passes.rewriting import HEADER, typed
from tests.passes.test_multi_head import BOTH, CAUSAL, CONSTANTS, DECLARED, MASKS, PADDED
from tests.support import (
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

RNG = np.random.default_rng(0)
WEIGHTS = {
    "words": RNG.standard_normal((20, 32)).astype(np.float32),
    "places": RNG.standard_normal((8, 32)).astype(np.float32),
    "g": RNG.random(32).astype(np.float32),
    "head": RNG.standard_normal((32, 48)).astype(np.float32),
}
WEIGHT_TYPES = "float[20,32] words, float[8,32] places, float[32] g, float[32,48] head"
CODES = {
    "order": RNG.permutation(32),
    "blocks": np.array([0, 0, -1, 8]),
    "last": np.array([-1]),
    "offset": RNG.standard_normal((4, 48)).astype(np.float32),
}
CODE_TYPES = "int64[32] order, int64[4] blocks, int64[1] last, float[4,48] offset"
INPUTS = f"(int64[B,S] ids, int64[B,S] positions, int64[B,S] mask, {DECLARED}, {WEIGHT_TYPES})"
EMBED = "a = Gather (words, {ids}) b = Gather (places, {positions}) x = Add (a, b)"
LAYER = "h = RMSNormalization <axis = -1> (x, g)"
REST = """
    y = Add (x, o)
    n = RMSNormalization <axis = -1> ({y}, g)
    z = MatMul (n, head)
"""
HEADS = "q_num_heads = 4, kv_num_heads = 4"


def before(*, mask: str = BOTH, rest: str = REST, embed: str = EMBED, more: str = "") -> ir.Model:
    text = f"""{HEADER}g {INPUTS} => ({more}float[B,S,48] z) {{
        {mask}
        {embed.format(ids="ids", positions="positions")}
        {LAYER}
        o = Attention <{HEADS}> (h, h, h, keep)
        {rest.format(y="y")}
    }}"""
    text = text.replace(WEIGHT_TYPES, f"{WEIGHT_TYPES}, {CODE_TYPES}")
    model = from_text(text, **CONSTANTS, **WEIGHTS, **CODES)
    for function in per_token_functions():
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    return typed(model)


AFTER = f"""{HEADER}g (int64[B,S] ids, int64[B,S] positions, int64[B,S] mask, int64 axis,
    int64[1] axes, int64 batch, int64[2] flat, {WEIGHT_TYPES}) => (float[B,S,48] z) {{
    keep = Cast <to = 9> (mask)
    kept = Cast <to = 6> (keep)
    size = Shape (mask)
    minus = ConstantOfShape <value = int32[1] {{-1}}> (size)
    front = CumSum <exclusive = 1> (kept, axis)
    absent = Add (kept, minus)
    back = CumSum <reverse = 1> (absent, axis)
    place = Where (keep, front, back)
    packed_ids = ScatterElements <axis = 1> (ids, place, ids)
    packed_positions = ScatterElements <axis = 1> (positions, place, positions)
    length = ReduceSum (minus, axes)
    first = CumSum <exclusive = 1> (length, batch)
    source = Sub (front, first)
    {EMBED.format(ids="packed_ids", positions="packed_positions")}
    {LAYER}
    o = Attention <{HEADS}, is_causal = 1> (h, h, h)
    y = Add (x, o)
    lined = Reshape (y, flat)
    put_back = Gather (lined, source)
    n = RMSNormalization <axis = -1> (put_back, g)
    z = MatMul (n, head)
}}"""


def test_rewrite() -> None:
    model = before()
    assert PackTokens()(model).modified
    numbers = {
        "axis": np.array(1),
        "axes": np.array([1]),
        "batch": np.array(0),
        "flat": np.array([-1, 32]),
    }
    assert_same_graph(model, from_text(AFTER, **numbers, **WEIGHTS))
    check_model(model)
    assert_idempotent(PackTokens(), model)


def feed_of(mask: list[list[int]]) -> dict[str, np.ndarray]:
    kept = np.array(mask)
    positions = np.maximum(np.cumsum(kept, 1) - 1, 0)
    return {"ids": RNG.integers(0, 20, kept.shape), "positions": positions, "mask": kept}


@pytest.mark.parametrize("mask", [*MASKS, [[0, 0, 0], [1, 0, 1]]])
def test_tokens_see_what_they_saw(mask: list[list[int]]) -> None:
    plain, packed = before(), before()
    PackTokens()(packed)
    feed = feed_of(mask)
    real = feed["mask"].astype(bool)
    wanted, found = run_model(plain, feed)["z"], run_model(packed, feed)["z"]
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-5)
    assert np.isfinite(found).all()


def test_what_is_quantised_per_token_stays_together() -> None:
    """The way back lies before the norm, not between a Linear and its codes."""
    model = before(
        rest="""
        y = Add (x, o)
        n = RMSNormalization <axis = -1> ({y}, g)
        codes, scale = qcompile.QuantizePerToken (n)
        d = qcompile.DequantizePerToken (codes, scale)
        z = MatMul (d, head)
    """
    )
    values = ir.convenience.create_value_mapping(model.graph)
    for name in ("codes", "scale", "d"):
        values[name].shape = None  # as Quantize leaves them
    assert PackTokens()(model).modified
    kinds = ops(model)
    assert kinds[kinds.index("Reshape") :] == [
        "Reshape", "Gather", "RMSNormalization",
        "qcompile.QuantizePerToken", "qcompile.DequantizePerToken", "MatMul",
    ]  # fmt: skip


def test_an_output_that_another_is_made_from() -> None:
    """Only what leaves the graph is put back."""
    more = "float[B,S,32] y, "
    plain, packed = before(more=more), before(more=more)
    assert PackTokens()(packed).modified
    check_model(packed)
    feed = feed_of([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
    real = feed["mask"].astype(bool)
    wanted, found = run_model(plain, feed), run_model(packed, feed)
    for name in ("y", "z"):
        np.testing.assert_allclose(found[name][real], wanted[name][real], atol=1e-5)


WINDOW = f"{BOTH.replace('keep', 'seen')} d = Sub (r, axis) in = GreaterOrEqual (c, d)"


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(PADDED, id="not causal"),
        pytest.param(f"{WINDOW} keep = And (seen, in)", id="a window"),
        pytest.param(f"{CAUSAL} keep = Identity (causal)", id="no padding"),
    ],
)
def test_other_masks_stay(mask: str) -> None:
    assert_stays(before(mask=mask))


STORED = """y = Add (x, o) p = Gather <axis = -1> (y, order) m = MatMul (p, head)
    cut = Reshape (p, blocks) s = ReduceSum <keepdims = 0> (cut, last) e = MatMul (s, offset)
    z = Add (m, e)"""


def test_codes_of_a_checkpoint_work_on_tokens_alone() -> None:
    """Channels in another order, and sums of blocks of them."""
    plain, packed = before(rest=STORED), before(rest=STORED)
    assert PackTokens()(packed).modified
    feed = feed_of([[0, 1, 1], [1, 0, 1]])
    real = feed["mask"].astype(bool)
    wanted, found = run_model(plain, feed)["z"], run_model(packed, feed)["z"]
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-4)


@pytest.mark.parametrize(
    "mixed",
    [
        pytest.param("p = Gather <axis = 1> (y, mask) z = MatMul (p, head)", id="tokens gathered"),
        pytest.param(
            "s = ReduceSum <keepdims = 1> (y, columns) p = Add (y, s) z = MatMul (p, head)",
            id="tokens summed",
        ),
    ],
)
def test_tokens_that_meet_after_attention_stay(mixed: str) -> None:
    assert_stays(before(rest=f"y = Add (x, o) {mixed}"))


@pytest.mark.parametrize("second", ["is_causal = 1> (y, y, y)", "is_causal = 0> (y, y, y, causal)"])
def test_layers_of_different_masks_stay(second: str) -> None:
    layer = f"y = Add (x, o) u = Attention <{HEADS}, {second} z = MatMul (u, head)"
    assert_stays(before(rest=layer))


@pytest.mark.parametrize(
    "embed",
    [
        pytest.param(
            EMBED.replace("x =", "w =") + " x = CumSum (w, axis)", id="tokens that are summed"
        ),
        pytest.param(
            """a = Gather (words, ids) t = Cast <to = 7> (mask) p = CumSum (t, axis)
            b = Gather (places, p) x = Add (a, b)""",
            id="positions from the mask",
        ),
    ],
)
def test_tokens_that_meet_outside_attention_stay(embed: str) -> None:
    assert_stays(before(embed=embed))


def assert_stays(model: ir.Model) -> None:
    kinds = ops(model)
    assert not PackTokens()(model).modified
    assert ops(model) == kinds
