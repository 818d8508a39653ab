"""KvCache: attention that keeps keys and values, and what cannot."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.kv_cache import KvCache

from qcompile.errors import ModelError
from tests.passes.rewriting import HEADER, typed
from tests.support import (
    Feed,
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

RNG = np.random.default_rng(0)
CONSTANTS = {
    "axis": np.array(1),
    "rows": np.array([1, 3]),
    "columns": np.array([1, 2]),
    "three": np.array(3),
    "one": np.array([1]),
    "slopes": np.array([0.5, -0.25, 0.125, 2.0], np.float32)[:, None, None],
    "lowest": np.array(np.finfo(np.float32).min),
    "wq": RNG.standard_normal((10, 32)).astype(np.float32),
    "wk": RNG.standard_normal((10, 16)).astype(np.float32),
}
INPUTS = "int64[B,S] input_ids, int64[B,S] attention_mask"
DECLARED = "int64 axis, int64[2] rows, int64[2] columns, int64 three, int64[1] one, \
float[4,1,1] slopes, float lowest, float[10,32] wq, float[10,16] wk"
EMBED = "q = Gather (wq, input_ids) k = Gather (wk, input_ids)"
CAUSAL = """
    same = Equal (attention_mask, attention_mask)
    ones = Cast <to = 7> (same)
    at = CumSum (ones, axis)
    r = Unsqueeze (at, rows)
    c = Unsqueeze (at, columns)
    causal = LessOrEqual (c, r)
"""
PADDING = "real = Cast <to = 9> (attention_mask) keys = Unsqueeze (real, columns)"
BOTH = f"{CAUSAL} {PADDING} keep = And (causal, keys)"
WINDOW = f"""{CAUSAL} {PADDING} edge = Sub (r, three) inside = Greater (c, edge)
    near = And (causal, inside) keep = And (near, keys)"""
ALIBI = f"""{BOTH.replace("keep =", "seen =")}
    count = CumSum (attention_mask, axis) place = Sub (count, one) f = Cast <to = 1> (place)
    wide = Unsqueeze (f, columns) alibi = Mul (wide, slopes) keep = Where (seen, alibi, lowest)"""
ATTENTION = "y = Attention <q_num_heads = 4, kv_num_heads = 2, scale = 0.5> (q, k, k, keep)"

MADE = "float[B,2,past_sequence,8] past_key_values_0_key, \
float[B,2,past_sequence,8] past_key_values_0_value"
KEPT = "float[B,2,total_sequence,8] present_0_key, float[B,2,total_sequence,8] present_0_value"
SHARED = f"""<int32 one = {{1}}, float kept = {{0.0}}, float hidden = {{-65504.0}},
      int64[2] axes = {{1, 2}}, int64[1] i = {{1}}> {{
      batch = Shape <start = 0, end = 1> (attention_mask)
      length = Shape <start = 1, end = 2> (attention_mask)
      length32 = Cast <to = {int(ir.DataType.INT32)}> (length)
      total = Squeeze (length32)
      newest = Sub (total, one)
      last = Expand (newest, batch)
      real = Cast <to = {int(ir.DataType.BOOL)}> (attention_mask)
      keep = Unsqueeze (real, axes)
      sequence = Shape <start = 1, end = 2> (input_ids)
      size = Concat <axis = 0> (i, i, sequence, i)
      added = Where (keep, kept, hidden)
      bias = Expand (added, size)
"""


def cached_text(attributes: str = "") -> str:
    return f"""{HEADER}g (int64[B,S] input_ids, int64[B,total_sequence] attention_mask,
      float[10,32] wq, float[10,16] wk, {MADE}) => (float[B,S,32] y, {KEPT}) {SHARED} {EMBED}
      y, present_0_key, present_0_value = com.microsoft.GroupQueryAttention
        <num_heads = 4, kv_num_heads = 2, scale = 0.5{attributes}>
        (q, k, k, past_key_values_0_key, past_key_values_0_value, last, total, , , , bias) }}"""


def model_of(mask: str, attention: str = ATTENTION) -> ir.Model:
    text = f"{HEADER}g ({INPUTS}, {DECLARED}) => (float[B,S,32] y) {{ {EMBED} {mask} {attention} }}"
    return typed(from_text(text, **CONSTANTS))


def tokens(mask: list[list[int]]) -> Feed:
    kept = np.array(mask)
    return {"input_ids": RNG.integers(0, 10, kept.shape), "attention_mask": kept}


def stepped(model: ir.Model, feed: Feed, prompt: int, cache: Feed | None = None) -> np.ndarray:
    """The outputs of a prompt and of one token at a time after it, side by side."""
    batch, length = feed["input_ids"].shape
    cache = cache or {
        f"past_key_values.0.{kind}": np.zeros((batch, 2, 0, 8), np.float32)
        for kind in ("key", "value")
    }
    found, start = [], 0
    for end in [prompt, *range(prompt + 1, length + 1)]:
        part = {
            "input_ids": feed["input_ids"][:, start:end],
            "attention_mask": feed["attention_mask"][:, :end],
        }
        outputs = run_model(model, part | cache)
        found.append(outputs["y"])
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        start = end
    return np.concatenate(found, axis=1)


def assert_the_same_in_steps(before: ir.Model, after: ir.Model) -> None:
    """With padding before the tokens and between them, after prompts of three lengths."""
    for padding in ([1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0, 1, 1, 1]):
        feed = tokens([padding, [1] * 9])
        wanted, real = run_model(before, feed)["y"], feed["attention_mask"] == 1
        for prompt in (1, 5, 9):
            found = stepped(after, feed, prompt)
            np.testing.assert_allclose(found[real], wanted[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "attributes"),
    [
        pytest.param(BOTH, "", id="causal-and-padding"),
        pytest.param(WINDOW, ", local_window_size = 3", id="in-a-window"),
    ],
)
def test_attention_keeps_keys_and_values(mask: str, attributes: str) -> None:
    before, after = model_of(mask), model_of(mask)
    assert KvCache()(after).modified
    needed = {name: CONSTANTS[name] for name in ("wq", "wk")}
    expected = from_text(cached_text(attributes), **needed)
    for value in expected.graph.inputs[2:]:
        # ONNX text has no dots in names.
        value.name = str(value.name).replace("values_0_", "values.0.")
    assert_same_graph(after, expected)
    assert [v.name for v in after.graph.outputs] == ["y", "present.0.key", "present.0.value"]
    check_model(after)
    assert_idempotent(KvCache(), after)
    assert_the_same_in_steps(before, after)


def test_scores_that_are_capped() -> None:
    capped = ATTENTION.replace("scale = 0.5", "scale = 0.5, softcap = 0.7")
    before, after = model_of(BOTH, capped), model_of(BOTH, capped)
    assert KvCache()(after).modified
    cached = next(node for node in after.graph if node.op_type == "GroupQueryAttention")
    assert cached.attributes["softcap"].as_float() == np.float32(0.7)
    feed = tokens([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    wanted, real = run_model(before, feed)["y"], feed["attention_mask"] == 1
    plain = run_model(model_of(BOTH), feed)["y"]
    assert np.abs(wanted - plain)[real].max() > 0.01
    for prompt in (1, 4, 6):
        found = stepped(after, feed, prompt)
        np.testing.assert_allclose(found[real], wanted[real], rtol=0, atol=1e-5)


def test_biases_by_place() -> None:
    """ALiBi: a token's place counts those before it that are no padding."""
    before, after = model_of(ALIBI), model_of(ALIBI)
    assert KvCache()(after).modified
    assert_idempotent(KvCache(), after)
    assert_the_same_in_steps(before, after)


def test_heads_first() -> None:
    """Inputs of four axes, as exporters leave them where the heads are normed."""
    text = """
        shape = Shape (attention_mask) heads = Concat <axis = 0> (shape, four, eight)
        pairs = Concat <axis = 0> (shape, two, eight)
        q4 = Reshape (q, heads) k4 = Reshape (k, pairs)
        qt = Transpose <perm = [0, 2, 1, 3]> (q4) kt = Transpose <perm = [0, 2, 1, 3]> (k4)
        n = Neg (kt) y4 = Attention (qt, n, kt, keep)
        yt = Transpose <perm = [0, 2, 1, 3]> (y4) flat = Concat <axis = 0> (shape, wide)
        y = Reshape (yt, flat)"""
    declared = f"{DECLARED}, int64[1] two, int64[1] four, int64[1] eight, int64[1] wide"
    numbers = {"two": 2, "four": 4, "eight": 8, "wide": 32}
    arrays = CONSTANTS | {name: np.array([n]) for name, n in numbers.items()}
    signature = f"{HEADER}g ({INPUTS}, {declared}) => (float[B,S,32] y)"
    models = [
        typed(from_text(f"{signature} {{ {EMBED} {BOTH} {text} }}", **arrays)) for _ in range(2)
    ]
    for model in models:
        for node in model.graph:
            if node.op_type in ("Transpose", "Neg") and node.outputs[0].name in ("qt", "kt", "n"):
                heads = 4 if node.outputs[0].name == "qt" else 2
                node.outputs[0].shape = ir.Shape(["B", heads, "S", 8])
    assert KvCache()(models[1]).modified
    assert "com.microsoft.GroupQueryAttention" in ops(models[1])
    feed = tokens([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    wanted, real = run_model(models[0], feed)["y"], feed["attention_mask"] == 1
    for prompt in (1, 4, 6):
        found = stepped(models[1], feed, prompt)
        np.testing.assert_allclose(found[real], wanted[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "attention", "reason"),
    [
        pytest.param(
            CAUSAL.replace("causal =", "keep ="), ATTENTION, "attention_mask", id="no-pad"
        ),
        pytest.param(
            f"{CAUSAL} {PADDING} all = Equal (r, r) keep = And (all, keys)",
            ATTENTION,
            "is not causal",
            id="both-ways",
        ),
        pytest.param(
            BOTH.replace("LessOrEqual (c, r)", "Less (c, r)"),
            ATTENTION,
            "neither causality nor padding",
            id="a-mask-of-its-own",
        ),
        pytest.param(BOTH, ATTENTION.replace(", keep)", ")"), "no mask of padding", id="no-mask"),
        pytest.param(
            BOTH,
            ATTENTION.replace("k, k", "kk, kk").replace("y =", "kk = Concat <axis = 1> (k, k) y ="),
            "has no cached op",
            id="other-keys-than-the-tokens",
        ),
        pytest.param(
            BOTH,
            ATTENTION.replace("y =", "x =")
            + " s = Cast <to = 1> (at) t = Unsqueeze (s, two) y = Add (x, t)",
            "reads attention_mask",
            id="positions-of-the-mask",
        ),
        pytest.param(
            BOTH,
            ATTENTION.replace("y =", "x =")
            + " m = Cast <to = 1> (attention_mask) t = Unsqueeze (m, two) y = Mul (x, t)",
            "reads attention_mask",
            id="the-mask-elsewhere",
        ),
        pytest.param(
            BOTH,
            ATTENTION.replace("y =", "x =")
            + " xt = Transpose <perm = [0, 2, 1]> (x) s = MatMul (x, xt) y = MatMul (s, x)",
            "not recognised",
            id="another-attention",
        ),
    ],
)
def test_refuses_by_name(mask: str, attention: str, reason: str) -> None:
    declared = f"{DECLARED}, int64 two"
    text = f"{HEADER}g ({INPUTS}, {declared}) => (float[B,S,32] y) {{ {EMBED} {mask} {attention} }}"
    model = typed(from_text(text, **CONSTANTS, two=np.array(2)))
    for node in model.graph:
        node.metadata_props["qcompile.module_path"] = "layers.0.attention"
    with pytest.raises(ModelError, match=f"layers.0.attention cannot have a cache: .*{reason}"):
        KvCache()(model)


def test_refuses_what_has_no_attention() -> None:
    model = model_of("", "keep = Identity (input_ids) y = Identity (q)")
    with pytest.raises(ModelError, match="no attention was recognised"):
        KvCache()(model)
