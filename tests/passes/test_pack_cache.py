"""PackCache: a cache of tokens alone, wherever the padding is, and no bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.kv_cache import KvCache
from qcompile.passes.pack_cache import PackCache

from qcompile.errors import ModelError
from tests.passes.rewriting import HEADER
from tests.passes.test_kv_cache import (
    ALIBI,
    ATTENTION,
    BOTH,
    CONSTANTS,
    KEPT,
    MADE,
    WINDOW,
    model_of,
    stepped,
    tokens,
)
from tests.support import (
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

AFTER = f"""{HEADER}g (int64[B,S] input_ids, int64[B,total_sequence] attention_mask,
      float[10,32] wq, float[10,16] wk, {MADE}) => (float[B,S,32] y, {KEPT})
      <int64 axis = {{1}}, int64[1] axes = {{1}}, int32 one = {{1}}, int64 axis1 = {{1}},
      int64[1] axes1 = {{1}}, int64 batch = {{0}}, int64[2] flat = {{-1, 32}}> {{
      columns = Shape <start = 1, end = 2> (attention_mask)
      total = Cast <to = 6> (columns)
      real = Cast <to = 9> (attention_mask)
      known = Cast <to = 6> (real)
      size = Shape (input_ids)
      minus = ConstantOfShape <value = int32[1] {{-1}}> (size)
      newest = CumSum <reverse = 1> (minus, axis)
      kept = GatherElements <axis = 1> (known, newest)
      keep = Cast <to = 9> (kept)
      missing = Add (kept, minus)
      in_row = ReduceSum <keepdims = 0> (known, axes)
      absent = ReduceSum <keepdims = 0> (missing, axes)
      places = Sub (in_row, absent)
      last = Sub (places, one)
      front = CumSum <exclusive = 1> (kept, axis1)
      padding = Add (kept, minus)
      back = CumSum <reverse = 1> (padding, axis1)
      place = Where (keep, front, back)
      packed = ScatterElements <axis = 1> (input_ids, place, input_ids)
      length = ReduceSum (minus, axes1)
      first = CumSum <exclusive = 1> (length, batch)
      source = Sub (front, first)
      q = Gather (wq, packed) k = Gather (wk, packed)
      z, present_0_key, present_0_value = com.microsoft.GroupQueryAttention
        <num_heads = 4, kv_num_heads = 2, scale = 0.5>
        (q, k, k, past_key_values_0_key, past_key_values_0_value, last, total)
      lined = Reshape (z, flat)
      y = Gather (lined, source) }}"""

PADDINGS = (
    [[1] * 9, [1] * 9],
    [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    [[1, 1, 0, 0, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1, 0]],
    [[1, 1, 1, 0, 0, 0, 1, 1, 1], [0] * 9],
)


def test_rewrite() -> None:
    model = model_of(BOTH)
    KvCache()(model)
    assert PackCache()(model).modified
    expected = from_text(AFTER, **{name: CONSTANTS[name] for name in ("wq", "wk")})
    for value in expected.graph.inputs[2:]:
        value.name = str(value.name).replace("values_0_", "values.0.")
    assert_same_graph(model, expected)
    check_model(model)
    assert_idempotent(PackCache(), model)


@pytest.mark.parametrize("mask", PADDINGS)
@pytest.mark.parametrize("prompt", [1, 5, 9])
def test_tokens_see_what_they_saw(mask: list[list[int]], prompt: int) -> None:
    """In a prompt, and token by token after it, a batch of two at once."""
    before, after = model_of(BOTH), model_of(BOTH)
    KvCache()(after)
    PackCache()(after)
    feed = tokens(mask)
    real = feed["attention_mask"].astype(bool)
    found = stepped(after, feed, prompt)
    wanted = run_model(before, feed)["y"]
    np.testing.assert_allclose(found[real], wanted[real], rtol=0, atol=1e-5)
    assert np.isfinite(found).all()


def test_several_tokens_on_top_of_a_cache() -> None:
    before, after = model_of(BOTH), model_of(BOTH)
    KvCache()(after)
    PackCache()(after)
    feed = tokens([[0, 1, 1, 0, 1, 1, 0, 1, 1]])
    cache = {f"past_key_values.0.{k}": np.zeros((1, 2, 0, 8), np.float32) for k in ("key", "value")}
    found = []
    for start, end in ((0, 3), (3, 7), (7, 9)):
        part = {"input_ids": feed["input_ids"][:, start:end]}
        part["attention_mask"] = feed["attention_mask"][:, :end]
        outputs = run_model(after, part | cache)
        found.append(outputs["y"])
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
    real = feed["attention_mask"].astype(bool)
    wanted = run_model(before, feed)["y"]
    np.testing.assert_allclose(np.concatenate(found, 1)[real], wanted[real], rtol=0, atol=1e-5)


def test_a_window_is_of_tokens() -> None:
    """As if there were no padding: before it, that is what the mask says too."""
    before, after = model_of(WINDOW), model_of(WINDOW)
    KvCache()(after)
    PackCache()(after)
    plain = tokens([[1] * 6])
    wanted = run_model(before, plain)["y"]
    for padding in ([0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0, 1, 1, 1]):
        feed = tokens([padding])
        real = feed["attention_mask"].astype(bool)
        feed["input_ids"][real] = plain["input_ids"][0]
        np.testing.assert_allclose(stepped(after, feed, 5)[real], wanted[0], rtol=0, atol=1e-5)


def test_without_a_cache_nothing_changes() -> None:
    model = model_of(BOTH)
    kinds = ops(model)
    assert not PackCache()(model).modified
    assert ops(model) == kinds


def test_biases_by_place_are_refused() -> None:
    model = model_of(ALIBI)
    KvCache()(model)
    with pytest.raises(ModelError, match="ALiBi"):
        PackCache()(model)


def test_an_output_that_is_not_of_each_token_is_refused() -> None:
    model = model_of(BOTH, ATTENTION.replace("y =", "a =") + " y = ReduceMean (a, axes)")
    value = ir.Value(name="axes", const_value=ir.tensor(np.array([1]), name="axes"))
    model.graph.register_initializer(value)
    model.graph.outputs[0].shape = ir.Shape(["B", 1, 32])
    next(n for n in model.graph if n.op_type == "ReduceMean").replace_input_with(1, value)
    KvCache()(model)
    with pytest.raises(ModelError, match="y is not of each token"):
        PackCache()(model)
