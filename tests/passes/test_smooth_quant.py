"""SmoothQuant: the scales of a plan, folded into norms and Linears; the function stays the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.smooth_quant import SmoothQuant

from qcompile.linears import find_linears, find_sites
from qcompile.producers import Producer, find_producer
from qcompile.smoothing import Smoothing, SmoothingPlan
from tests.passes.rewriting import HEADER, typed
from tests.support import (
    Feed,
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    run_model,
)

RNG = np.random.default_rng(0)
Weights = dict[str, np.ndarray]


def _random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


S4 = np.array([0.5, 4.0, 1.0, 0.25])
G, C = _random(4) + 2, _random(4)
W, V, B = _random(4, 4), _random(4, 4), _random(4)
X = _random(2, 5, 4)
FEED: Feed = {"x": X}
F = np.float32


def plan_of(model: ir.Model, scales: dict[str, np.ndarray]) -> SmoothingPlan:
    """The plan that smooths the sites named in `scales`, into what the graph offers."""
    linears = find_linears(model.graph)
    entries = []
    for site in find_sites(model.graph):
        if site.name in scales:
            producer = find_producer(site, linears)
            assert isinstance(producer, Producer), producer
            at_producer = np.ones(producer.width)
            at_producer[producer.channels] = scales[site.name]
            names = tuple(linear.name for linear in site.linears)
            scale = scales[site.name].astype(np.float64)
            entries.append(
                Smoothing(site.name, 0.5, "test", scale, producer, at_producer, consumers=names)
            )
    assert len(entries) == len(scales)
    return SmoothingPlan(tuple(entries))


def named(text: str, **weights: np.ndarray) -> ir.Model:
    """The model, every MatMul named after the value it computes."""
    model = typed(from_text(HEADER + text, **weights))
    for node in model.graph:
        node.name = f"{node.op_type}_{node.outputs[0].name}"
        if node.op_type == "MatMul":
            node.name = node.outputs[0].name
    return model


def assert_smooths(
    text: str,
    weights: Weights,
    scales: dict[str, np.ndarray],
    changed: Weights,
    feed: Feed | None = None,
) -> ir.Model:
    """The ops and their wiring stay, the constants in `changed` take their values, y stays."""
    model = named(text, **weights)
    wanted = run_model(model, feed or FEED, optimise=False)
    pass_ = SmoothQuant(plan_of(model, scales))
    result = pass_(model)
    assert result.modified
    assert_same_graph(result.model, from_text(HEADER + text, **(weights | changed)))
    check_model(result.model)
    found = run_model(result.model, feed or FEED, optimise=False)
    for name, array in wanted.items():
        atol = 1e-6 * float(np.abs(array).max())
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=atol)
    assert_idempotent(pass_, result.model)
    return result.model


# 1. norms


def test_layer_norm_before_three_linears() -> None:
    text = """g (float[B,S,4] x, float[4] g, float[4] c, float[4,4] w, float[4,4] v, float[4,4] u)
      => (float[B,S,4] q, float[B,S,4] k, float[B,S,4] z) {
      h = LayerNormalization <axis = -1> (x, g, c)
      q = MatMul (h, w) k = MatMul (h, v) z = MatMul (h, u) }"""
    weights = {"g": G, "c": C, "w": W, "v": V, "u": W + V}
    rows = S4[:, None]
    changed = {"g": G / S4, "c": C / S4, "w": W * rows, "v": V * rows, "u": (W + V) * rows}
    after = {name: array.astype(F) for name, array in changed.items()}
    assert_smooths(text, weights, {"{q,k,z}": S4}, after)


def test_layer_norm_without_bias() -> None:
    text = """g (float[B,S,4] x, float[4] g, float[4,4] w) => (float[B,S,4] y) {
      h = LayerNormalization <axis = -1, epsilon = 0.001> (x, g) y = MatMul (h, w) }"""
    after = {"g": (G / S4).astype(F), "w": (W * S4[:, None]).astype(F)}
    assert_smooths(text, {"g": G, "w": W}, {"y": S4}, after)


def test_rms_norm() -> None:
    text = """g (float[B,S,4] x, float[4] g, float[4,4] w, float[4] b) => (float[B,S,4] y) {
      h = RMSNormalization <axis = -1> (x, g) m = MatMul (h, w) y = Add (m, b) }"""
    after = {"g": (G / S4).astype(F), "w": (W * S4[:, None]).astype(F)}
    assert_smooths(text, {"g": G, "w": W, "b": B}, {"m": S4}, after)


def test_scales_that_are_not_powers_of_two() -> None:
    text = """g (float[B,S,4] x, float[4] g, float[4] c, float[4,4] w) => (float[B,S,4] y) {
      h = LayerNormalization <axis = -1> (x, g, c) y = MatMul (h, w) }"""
    scale = np.array([0.013, 71.7, 1.3, 3.3])
    after = {
        "g": (G / scale).astype(F),
        "c": (C / scale).astype(F),
        "w": (W * scale[:, None]).astype(F),
    }
    assert_smooths(text, {"g": G, "c": C, "w": W}, {"y": scale}, after)


def test_norm_whose_weight_another_norm_shares() -> None:
    """The constant of the other norm must stay."""
    text = """g (float[B,S,4] x, float[4] g, float[4,4] w) => (float[B,S,4] y, float[B,S,4] z) {
      h = RMSNormalization <axis = -1> (x, g) y = MatMul (h, w)
      z = RMSNormalization <axis = -1> (x, g) }"""
    model = named(text, g=G, w=W)
    wanted = run_model(model, FEED, optimise=False)
    SmoothQuant(plan_of(model, {"y": S4}))(model)
    found = run_model(model, FEED, optimise=False)
    np.testing.assert_array_equal(found["z"], wanted["z"])
    np.testing.assert_array_equal(found["y"], wanted["y"])


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_norm_with_one_weight_for_all_channels(op: str) -> None:
    text = f"""g (float[B,S,4] x, float[1] g, float[4,4] w) => (float[B,S,4] y) {{
      h = {op} <axis = -1> (x, g) y = MatMul (h, w) }}"""
    model = named(text, g=G[:1], w=W)
    site = find_sites(model.graph)[0]
    wanted = run_model(model, FEED, optimise=False)["y"]
    if isinstance(find_producer(site, find_linears(model.graph)), Producer):
        SmoothQuant(plan_of(model, {"y": S4}))(model)
    check_model(model)
    for value in model.graph.initializers.values():
        assert value.const_value is not None and value.shape is not None
        assert tuple(value.const_value.numpy().shape) == tuple(value.shape)
    np.testing.assert_allclose(run_model(model, FEED)["y"], wanted, rtol=1e-5, atol=1e-5)


def test_nodes_without_names() -> None:
    """Names are optional in ONNX, and exporters leave them out."""
    text = """g (float[B,S,4] x, float[4] g, float[4] d, float[4,4] w, float[4,4] v)
      => (float[B,S,4] y, float[B,S,4] z) {
      h = RMSNormalization <axis = -1> (x, g) r = RMSNormalization <axis = -1> (x, d)
      y = MatMul (h, w) z = MatMul (r, v) }"""
    model = named(text, g=G, d=C, w=W, v=V)
    for node in model.graph:
        if node.op_type == "RMSNormalization":
            node.name = ""
    wanted = run_model(model, FEED, optimise=False)
    SmoothQuant(plan_of(model, {"z": S4}))(model)
    found = run_model(model, FEED, optimise=False)
    np.testing.assert_array_equal(found["y"], wanted["y"])
    np.testing.assert_array_equal(found["z"], wanted["z"])


# 2. Linears


def test_linear_with_bias_through_relu() -> None:
    text = """g (float[B,S,4] x, float[4,4] w, float[4] b, float[4,4] v) => (float[B,S,4] y) {
      m = MatMul (x, w) a = Add (m, b) h = Relu (a) y = MatMul (h, v) }"""
    after = {"w": W / S4, "b": B / S4, "v": V * S4[:, None]}
    changed = {name: array.astype(F) for name, array in after.items()}
    assert_smooths(text, {"w": W, "b": B, "v": V}, {"y": S4}, changed)


def test_bias_that_is_the_first_operand() -> None:
    text = """g (float[B,S,4] x, float[4,4] w, float[4] b, float[4,4] v) => (float[B,S,4] y) {
      m = MatMul (x, w) a = Add (b, m) h = Relu (a) y = MatMul (h, v) }"""
    after = {"w": W / S4, "b": B / S4, "v": V * S4[:, None]}
    changed = {name: array.astype(F) for name, array in after.items()}
    assert_smooths(text, {"w": W, "b": B, "v": V}, {"y": S4}, changed)


def test_gated_product() -> None:
    text = """g (float[B,S,4] x, float[4,4] w, float[4,4] v, float[4,4] u) => (float[B,S,4] y) {
      gate = MatMul (x, w) up = MatMul (x, v) s = Sigmoid (gate) h = Mul (s, up)
      y = MatMul (h, u) }"""
    after = {"v": (V / S4).astype(F), "u": (B[:, None] * S4[:, None] * W).astype(F)}
    weights = {"w": W, "v": V, "u": (B[:, None] * W).astype(F)}
    assert_smooths(text, weights, {"y": S4}, after)


def test_a_part_of_a_split() -> None:
    text = """g (float[B,S,4] x, float[4,8] w, float[8] b, float[4,4] v)
      => (float[B,S,4] y, float[B,S,4] left) {
      m = MatMul (x, w) a = Add (m, b) left, right = Split <axis = -1, num_outputs = 2> (a)
      h = Relu (right) y = MatMul (h, v) }"""
    wide, bias = _random(4, 8), _random(8)
    scale = np.concatenate([np.ones(4), S4])
    after = {"w": wide / scale, "b": bias / scale, "v": V * S4[:, None]}
    changed = {name: array.astype(F) for name, array in after.items()}
    assert_smooths(text, {"w": wide, "b": bias, "v": V}, {"y": S4}, changed)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_value_path_of_attention(kv_heads: int) -> None:
    """Query heads that share a value head share its scales."""
    width = 2 * kv_heads
    text = f"""g (float[B,S,4] x, float[4,8] wq, float[4,{width}] wk, float[4,{width}] wv,
       float[{width}] bv, float[8,4] wo) => (float[B,S,4] y) {{
      q = MatMul (x, wq) k = MatMul (x, wk) m = MatMul (x, wv) v = Add (m, bv)
      a = Attention <q_num_heads = 4, kv_num_heads = {kv_heads}, is_causal = 1> (q, k, v)
      y = MatMul (a, wo) }}"""
    weights = {
        "wq": _random(4, 8),
        "wk": _random(4, width),
        "wv": _random(4, width),
        "bv": _random(width),
        "wo": _random(8, 4),
    }
    at_value = np.exp(RNG.standard_normal(width))
    repeated = at_value.reshape(kv_heads, 1, 2).repeat(4 // kv_heads, axis=1).ravel()
    after = {
        "wv": weights["wv"] / at_value,
        "bv": weights["bv"] / at_value,
        "wo": weights["wo"] * repeated[:, None],
    }
    changed = {name: array.astype(F) for name, array in after.items()}
    assert_smooths(text, weights, {"y": repeated}, changed)


def test_a_linear_that_is_consumer_and_producer() -> None:
    """Norm -> fc1 -> Relu -> fc2: fc1 takes rows from one site and columns from the other."""
    text = """g (float[B,S,4] x, float[4] g, float[4,4] w, float[4] b, float[4,4] v)
      => (float[B,S,4] fc2) {
      n = RMSNormalization <axis = -1> (x, g)
      fc1 = MatMul (n, w) a = Add (fc1, b) h = Relu (a) fc2 = MatMul (h, v) }"""
    t = S4[::-1].copy()
    after = {"g": G / S4, "w": W * S4[:, None] / t, "b": B / t, "v": V * t[:, None]}
    changed = {name: array.astype(F) for name, array in after.items()}
    assert_smooths(text, {"g": G, "w": W, "b": B, "v": V}, {"fc1": S4, "fc2": t}, changed)


def test_powers_of_two_change_no_bit() -> None:
    text = """g (float[B,S,4] x, float[4] g, float[4] c, float[4,4] w, float[4] b, float[4,4] v)
      => (float[B,S,4] fc2) {
      n = LayerNormalization <axis = -1> (x, g, c)
      fc1 = MatMul (n, w) a = Add (fc1, b) h = Relu (a) fc2 = MatMul (h, v) }"""
    model = named(text, g=G, c=C, w=W, b=B, v=V)
    wanted = run_model(model, FEED, optimise=False)["fc2"]
    assert SmoothQuant(plan_of(model, {"fc1": S4, "fc2": S4}))(model).modified
    np.testing.assert_array_equal(run_model(model, FEED, optimise=False)["fc2"], wanted)


# nothing to do


def test_an_empty_plan_changes_nothing() -> None:
    text = """g (float[B,S,4] x, float[4] g, float[4,4] w) => (float[B,S,4] y) {
      h = RMSNormalization <axis = -1> (x, g) y = MatMul (h, w) }"""
    model = named(text, g=G, w=W)
    assert_idempotent(SmoothQuant(SmoothingPlan()), model)


def test_an_entry_without_a_producer_changes_nothing() -> None:
    text = "g (float[B,S,4] x, float[4,4] w) => (float[B,S,4] y) { y = MatMul (x, w) }"
    model = named(text, w=W)
    refused = Smoothing("y", None, "refused: its input is a graph input", np.ones(4))
    assert_idempotent(SmoothQuant(SmoothingPlan((refused,))), model)
    assert model.graph.initializers["w"].const_value is not None


def test_the_old_constants_are_dropped() -> None:
    text = """g (float[B,S,4] x, float[4] g, float[4,4] w) => (float[B,S,4] y) {
      h = RMSNormalization <axis = -1> (x, g) y = MatMul (h, w) }"""
    model = named(text, g=G, w=W)
    SmoothQuant(plan_of(model, {"y": S4}))(model)
    assert sorted(model.graph.initializers) == ["g/smoothed", "w/smoothed"]
