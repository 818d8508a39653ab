"""Caches of codes: what the passes write, and what the kernel makes of it, against integers."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qcompile.passes.float_cache import FloatCache
from qcompile.passes.kv_cache import KvCache
from qcompile.passes.observe_cache import ObserveCache

from qcompile.cache import KINDS
from qcompile.cache_plan import CachePlan
from qcompile.errors import ModelError
from tests.passes.rewriting import HEADER, typed
from tests.passes.test_kv_cache import (
    BOTH,
    CONSTANTS,
    SHARED,
    model_of,
    stepped,
    tokens,
)
from tests.support import (
    Feed,
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    run_model,
)

Array: TypeAlias = np.ndarray[Any, Any]
HEADS, SIZE, WIDE = 2, 8, 32
ATTENTION = "n = Neg (k) y = Attention <q_num_heads = 4, kv_num_heads = 2, scale = 0.5> \
(q, n, k, keep)"
STORED = {8: ("int8", SIZE), 4: ("uint8", SIZE // 2)}


def plan_of(bits: int) -> CachePlan:
    """Scales that differ between channels, and clip the largest values."""
    largest = np.abs(CONSTANTS["wk"]).max(axis=0).reshape(HEADS, SIZE)
    scale = (0.8 * largest / (2 ** (bits - 1) - 1)).astype(np.float32)
    return CachePlan(bits, (scale,), (scale * np.float32(0.9),))


def plain() -> ir.Model:
    return model_of(BOTH, ATTENTION)


def cached(bits: int) -> ir.Model:
    model = plain()
    assert KvCache(plan_of(bits))(model).modified
    return model


def text_of(bits: int | None, keys: str = "n", rounding: str = "") -> str:
    """The graph with a cache of `bits`; None: in float, with `rounding` before the attention."""
    type_, width = STORED[bits] if bits else ("float", SIZE)
    attributes, scales, declared = "", "", ""
    if bits:
        attributes = f""", k_quant_type = "PER_CHANNEL", v_quant_type = "PER_CHANNEL",
          kv_cache_bit_width = {bits}"""
        scales = ", , k_scale, v_scale"
        declared = f"float[1,{HEADS},1,{SIZE}] k_scale, float[1,{HEADS},1,{SIZE}] v_scale,"
    pasts, presents = (
        ", ".join(f"{type_}[B,{HEADS},{axis},{width}] {name}_{kind}" for kind in KINDS)
        for name, axis in (("past", "past_sequence"), ("present", "total_sequence"))
    )
    return f"""{HEADER}g (int64[B,S] input_ids, int64[B,total_sequence] attention_mask, {declared}
      float[10,32] wq, float[10,16] wk, {pasts}{", float[16] step" if rounding else ""})
      => (float[B,S,{WIDE}] y, {presents}) {SHARED}
      q = Gather (wq, input_ids) k = Gather (wk, input_ids) n = Neg (k) {rounding}
      y, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads = 4, kv_num_heads = 2, scale = 0.5{attributes}>
        (q, {keys}, k, past_key, past_value, last, total, , , , bias{scales}) }}"""


def expected(text: str, **constants: np.ndarray) -> ir.Model:
    """From text, which has no dots in names."""
    weights = {name: CONSTANTS[name] for name in ("wq", "wk")}
    model = from_text(text, **weights, **constants)
    for value in model.graph.inputs:
        if str(value.name).startswith("past_"):
            value.name = str(value.name).replace("past_", "past_key_values.0.")
    return model


def scales_of(plan: CachePlan) -> dict[str, np.ndarray]:
    return {"k_scale": plan.keys[0][None, :, None], "v_scale": plan.values[0][None, :, None]}


def empty(bits: int | None, batch: int) -> Feed:
    type_, width = STORED[bits] if bits else ("float32", SIZE)
    zeros = np.zeros((batch, HEADS, 0, width), type_)
    return {f"past_key_values.0.{kind}": zeros for kind in KINDS}


def codes_of(values: np.ndarray, scale: np.ndarray, bits: int) -> Array:
    """Of [batch, sequence, heads · D]: integers [batch, heads, sequence, D]."""
    batch, length = values.shape[:2]
    split = values.reshape(batch, length, HEADS, SIZE).transpose(0, 2, 1, 3)
    last = 2 ** (bits - 1) - 1
    codes: Array = np.clip(np.rint(split / scale[:, None]), -last - 1, last).astype(np.int64)
    return codes


def unpacked(stored: np.ndarray, bits: int) -> Array:
    if bits == 8:
        return stored.astype(np.int64)
    both = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int64) - 8
    return both.reshape(*stored.shape[:-1], SIZE)


def attended(feed: Feed, keys: np.ndarray, values: np.ndarray) -> Array:
    """Causal attention of the queries of `feed` over `keys` and `values` [batch, heads, T, D]."""
    batch, length = feed["input_ids"].shape
    query = CONSTANTS["wq"][feed["input_ids"]].reshape(batch, length, 4, SIZE).transpose(0, 2, 1, 3)
    keys, values = (np.repeat(x, 4 // HEADS, axis=1) for x in (keys, values))
    scores = query @ keys.swapaxes(2, 3) * 0.5
    seen = np.tril(np.ones((length, length), bool)) & (feed["attention_mask"][:, None, None] == 1)
    scores = np.where(seen, scores, -1e9)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    result: Array = (weights @ values).transpose(0, 2, 1, 3).reshape(batch, length, WIDE)
    return result


@pytest.mark.parametrize("bits", STORED)
def test_keys_and_values_become_codes(bits: int) -> None:
    after, plan = cached(bits), plan_of(bits)
    assert_same_graph(after, expected(text_of(bits), **scales_of(plan)))
    for value in (*after.graph.inputs[2:], *after.graph.outputs[1:]):
        assert value.dtype == getattr(ir.DataType, STORED[bits][0].upper())
        assert value.shape is not None and value.shape[3] == STORED[bits][1]
    check_model(after)
    assert_idempotent(KvCache(plan), after)


@pytest.mark.parametrize("bits", STORED)
@pytest.mark.parametrize("prompt", [1, 4, 7])
def test_the_kernel_against_integers(bits: int, prompt: int) -> None:
    model, plan = cached(bits), plan_of(bits)
    feed = tokens([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    new = CONSTANTS["wk"][feed["input_ids"]]
    wanted = [codes_of(x, s[0], bits) for x, s in ((-new, plan.keys), (new, plan.values))]
    outputs = run_model(model, feed | empty(bits, 2))
    for kind, codes in zip(KINDS, wanted, strict=True):
        kept = unpacked(outputs[f"present.0.{kind}"], bits)
        np.testing.assert_array_equal(kept, codes)
        assert (kept == -(2 ** (bits - 1))).any(), "nothing was clipped"
    keys, values = (
        codes * scale[0][:, None]
        for codes, scale in zip(wanted, (plan.keys, plan.values), strict=True)
    )
    real = feed["attention_mask"] == 1
    found, reference = stepped(model, feed, prompt, empty(bits, 2)), attended(feed, keys, values)
    np.testing.assert_allclose(found[real], reference[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", STORED)
def test_back_in_float_with_the_same_rounding(bits: int) -> None:
    """So that keys and values can be measured apart."""
    quantised, plan = cached(bits), plan_of(bits)
    feed = tokens([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    keys = cached(bits)
    assert FloatCache("key")(keys).modified
    ends = f"{{{-(2 ** (bits - 1))}.0}}", f"{{{2 ** (bits - 1) - 1}.0}}"
    rounding = "d = Div (n, step) r = Round (d) c = Clip (r, low, high) m = Mul (c, step)"
    text = text_of(None, "m", rounding).replace(
        "{1, 2},", f"{{1, 2}}, float low = {ends[0]}, float high = {ends[1]},"
    )
    assert_same_graph(keys, expected(text, step=plan.keys[0].reshape(-1)))
    check_model(keys)
    assert_idempotent(FloatCache("key"), keys)
    both = cached(bits)
    FloatCache(*KINDS)(both)
    wanted = run_model(quantised, feed | empty(bits, 2))["y"]
    found = run_model(both, feed | empty(None, 2))["y"]
    real = feed["attention_mask"] == 1
    np.testing.assert_allclose(found[real], wanted[real], rtol=0, atol=1e-5)
    neither, in_float = cached(bits), plain()
    FloatCache()(neither)
    KvCache()(in_float)
    assert_same_graph(neither, in_float)
    assert not FloatCache(*KINDS)(in_float).modified


def test_observers_see_what_is_cached() -> None:
    model = plain()
    KvCache()(model)
    ObserveCache()(model)
    check_model(model)
    feed = tokens([[1] * 5, [1] * 5])
    found = run_model(model, feed | empty(None, 2))
    largest = np.abs(CONSTANTS["wk"][feed["input_ids"]]).max(axis=(0, 1))
    assert list(found) == ["cache_observer.0.key", "cache_observer.0.value"]
    for array in found.values():
        np.testing.assert_array_equal(array, largest)
    assert_idempotent(ObserveCache(), model)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1), bits=st.sampled_from(list(STORED)), exponent=st.integers(-8, 8)
)
def test_within_the_calibrated_range_a_value_is_off_by_half_a_step(
    seed: int, bits: int, exponent: int
) -> None:
    rng = np.random.default_rng(seed)
    table = (rng.standard_normal((10, 16)) * 2.0**exponent).astype(np.float32)
    scale = np.abs(table).max(axis=0).reshape(HEADS, SIZE) / np.float32(2 ** (bits - 1) - 1)
    model = cached(bits)
    for value in model.graph.initializers.values():
        if value.name == "wk":
            value.const_value = ir.tensor(table, name="wk")
        if str(value.name).endswith("_scale"):
            value.const_value = ir.tensor(scale[None, :, None], name=value.name)
    feed = tokens([[1] * 9])
    kept = run_model(model, feed | empty(bits, 1))["present.0.value"]
    values = table[feed["input_ids"]].reshape(1, 9, HEADS, SIZE).transpose(0, 2, 1, 3)
    error = np.abs(unpacked(kept, bits) * scale[:, None] - values)
    assert (error <= 0.5001 * scale[:, None]).all()


def test_heads_that_cannot_be_packed_are_refused() -> None:
    text = f"""{HEADER}g (int64[B,S] input_ids, int64[B,S] attention_mask, int64 axis,
      int64[2] rows, int64[2] columns, float[10,12] wq) => (float[B,S,12] y) {{
      q = Gather (wq, input_ids) {BOTH}
      y = Attention <q_num_heads = 4, kv_num_heads = 4> (q, q, q, keep) }}"""
    names = ("axis", "rows", "columns")
    arrays = {name: CONSTANTS[name] for name in names} | {"wq": np.ones((10, 12), np.float32)}
    scale = (np.ones((4, 3), np.float32),)
    with pytest.raises(ModelError, match="of 4 bits: its heads have 3 channels"):
        KvCache(CachePlan(4, scale, scale))(typed(from_text(text, **arrays)))
    assert KvCache(CachePlan(8, scale, scale))(typed(from_text(text, **arrays))).modified
