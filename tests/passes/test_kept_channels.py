"""Quantize: input channels that stay in float, beside codes of both kinds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.integer_matmul import CONTRIB, KERNEL, IntegerMatMul
from qcompile.passes.quantize import Quantize
from qcompile.passes.weight_only import KERNEL as NBITS
from qcompile.passes.weight_only import WeightOnlyMatMul

from qcompile.correction import correct_linears
from qcompile.linears import find_linears
from qcompile.precision import ActivationQuant, Kept, OpPlan, PrecisionPlan, SitePlan
from qcompile.weight_blocks import quantize_blocks
from qcompile.weights import quantize_weight
from tests.passes.rewriting import HEADER, typed
from tests.support import (
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

RNG = np.random.default_rng(0)
K, N = 32, 8
W = RNG.standard_normal((K, N)).astype(np.float32)
B = RNG.standard_normal(N).astype(np.float32)
X = RNG.standard_normal((2, 5, K)).astype(np.float32)
APART, TOGETHER = np.array([3, 20]), np.array([30, 31])
OPSETS = HEADER.replace("]", ', "qcompile" : 1]')
TEXT = f"""g (float[R,S,{K}] x, float[{K},{N}] w, float[{N}] b) => (float[R,S,{N}] y) {{
  m = MatMul (x, w) y = Add (m, b) }}"""
TAKEN = {
    "apart": (APART, "int64[2] i", "o = Gather <axis = -1> (x, i)"),
    "together": (
        TOGETHER,
        "int64[1] i, int64[1] j, int64[1] l",
        "o = Slice (x, i, j, l)",
    ),
}


def planned(channels: np.ndarray, *, blocks: bool) -> tuple[ir.Model, PrecisionPlan]:
    model = typed(from_text(HEADER + TEXT, w=W, b=B))
    model.graph[0].name = "fc"
    name = find_linears(model.graph)[0].name
    rest = W.copy()
    rest[channels] = 0
    made = quantize_blocks(rest, bits=8) if blocks else quantize_weight(rest)
    weight = dataclasses.replace(made, kept=Kept(channels, W[channels]))
    precision = "weight8" if blocks else "int8"
    op = OpPlan(name, name, precision, "test", K, N, "y", weight)  # type: ignore[arg-type]
    activation = ActivationQuant("token", None, None, np.full(K, 255), kept=channels)
    sites = () if blocks else (SitePlan(name, "x", activation, (name,)),)
    return model, PrecisionPlan(sites, (op,))


@pytest.mark.parametrize(("channels", "declared", "taken"), TAKEN.values(), ids=TAKEN)
def test_a_narrow_product_is_added(channels: np.ndarray, declared: str, taken: str) -> None:
    model, plan = planned(channels, blocks=False)
    assert plan.label(plan.ops[0]) == "llm-int8"
    pass_ = Quantize(plan)
    assert pass_(model).modified
    weight = plan.ops[0].weight
    assert weight is not None and weight.kept is not None
    assert not weight.codes[channels].any()
    after = f"""g (float[R,S,{K}] x, int8[{K},{N}] wq, float[{N}] ws, float[{N}] b, {declared},
      float[2,{N}] k) => (float[R,S,{N}] y) {{
      {taken} q, t = qcompile.QuantizePerToken (x) d = qcompile.DequantizePerToken (q, t)
      v = DequantizeLinear <axis = 1> (wq, ws) m = MatMul (d, v) c = Add (m, b)
      p = MatMul (o, k) y = Add (c, p) }}"""
    places = {"i": channels}
    if channels is TOGETHER:
        ends = (channels[0], channels[-1] + 1, -1)
        places = {n: np.array([at]) for n, at in zip("ijl", ends, strict=True)}
    constants = {"wq": weight.codes, "ws": weight.scale, "b": B, "k": W[channels], **places}
    assert_same_graph(model, from_text(OPSETS + after, **constants))
    check_model(model)
    assert_idempotent(pass_, model)


def by_numpy(x: np.ndarray, plan: PrecisionPlan, *, token: bool) -> np.ndarray:
    weight = plan.ops[0].weight
    assert weight is not None and weight.kept is not None
    codes = dataclasses.replace(weight, kept=None).dequantized()
    rounded = x
    if token:
        step = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        rounded = np.rint(x / step) * step
    result: np.ndarray = rounded @ codes + x[..., weight.kept.channels] @ weight.kept.weight + B
    return result


@pytest.mark.parametrize("channels", [APART, TOGETHER], ids=TAKEN)
def test_beside_codes_per_token(channels: np.ndarray) -> None:
    x = X.copy()
    x[..., channels] *= 1e-3  # as what makes them leaves them
    model, plan = planned(channels, blocks=False)
    Quantize(plan)(model)
    wanted = by_numpy(x, plan, token=True)
    np.testing.assert_allclose(
        run_model(model, {"x": x}, optimise=False)["y"], wanted, rtol=1e-5, atol=1e-5
    )
    assert IntegerMatMul()(model).modified
    assert f"{CONTRIB}.{KERNEL}" in ops(model)


@pytest.mark.parametrize("channels", [APART, TOGETHER], ids=TAKEN)
def test_beside_weights_alone(channels: np.ndarray) -> None:
    model, plan = planned(channels, blocks=True)
    pass_ = Quantize(plan)
    pass_(model)
    check_model(model)
    assert_idempotent(pass_, model)
    wanted = by_numpy(X, plan, token=False)
    np.testing.assert_allclose(
        run_model(model, {"x": X}, optimise=False)["y"], wanted, rtol=1e-5, atol=1e-5
    )
    assert WeightOnlyMatMul()(model).modified
    assert ops(model).count(f"{CONTRIB}.{NBITS}") == 1
    assert [node.name for node in model.graph if node.op_type == NBITS] == ["fc"]


def test_a_kept_row_counts_in_what_the_codes_stand_for() -> None:
    for blocks in (False, True):
        weight = planned(APART, blocks=blocks)[1].ops[0].weight
        assert weight is not None
        np.testing.assert_array_equal(weight.dequantized()[APART], W[APART])
        np.testing.assert_allclose(weight.dequantized(), W, atol=0.02)


def test_readers_of_one_activation_share_its_channels() -> None:
    text = f"""g (float[R,S,{K}] x, float[{K},{N}] w, float[{K},{N}] v) =>
      (float[R,S,{N}] y, float[R,S,{N}] z) {{ y = MatMul (x, w) z = MatMul (x, v) }}"""
    model = typed(from_text(HEADER + text, w=W, v=W + 1))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    one = planned(APART, blocks=True)[1].ops[0]
    named = [dataclasses.replace(one, name=name, site="{y,z}", output=name) for name in "yz"]
    Quantize(PrecisionPlan((), tuple(named)))(model)
    assert ops(model).count("Gather") == 1
    assert {v.name for v in model.graph.outputs} == {"y", "z"}
    check_model(model)


def test_nothing_kept_adds_nothing() -> None:
    model, plan = planned(APART, blocks=True)
    weight = plan.ops[0].weight
    assert weight is not None
    plain = dataclasses.replace(plan.ops[0], weight=dataclasses.replace(weight, kept=None))
    Quantize(PrecisionPlan((), (plain,)))(model)
    assert ops(model) == ["DequantizeLinear", "MatMul", "Add"]


def test_the_graph_is_that_of_the_text() -> None:
    model, plan = planned(APART, blocks=True)
    Quantize(plan)(model)
    weight = plan.ops[0].weight
    assert weight is not None
    after = f"""g (float[R,S,{K}] x, int8[{K},{N}] wq, float[1,{N}] ws, float[{N}] b, int64[2] i,
      float[2,{N}] k) => (float[R,S,{N}] y) {{
      o = Gather <axis = -1> (x, i)
      v = DequantizeLinear <axis = 0, block_size = 32> (wq, ws) m = MatMul (x, v) c = Add (m, b)
      p = MatMul (o, k) y = Add (c, p) }}"""
    constants = {"wq": weight.codes, "ws": weight.scale, "b": B, "i": APART, "k": W[APART]}
    assert_same_graph(model, from_text(HEADER + after, **constants))


@pytest.mark.parametrize("channels", [APART, TOGETHER])
def test_a_bias_is_not_corrected_for_what_they_add(channels: np.ndarray, tmp_path: Path) -> None:
    model, plan = planned(channels, blocks=True)
    x = X + 1.0
    weight = plan.ops[0].weight
    assert weight is not None
    off = (x @ (W - weight.dequantized())).mean((0, 1))
    shift = correct_linears(model, plan, [{"x": x}], tmp_path).shifts[plan.ops[0].name]
    # Uncertainty takes a part of it, and never adds to it.
    assert (np.abs(shift) <= np.abs(off) + 1e-5).all() and shift.any()
    assert np.abs((x[..., channels] @ W[channels]).mean((0, 1))).min() > np.abs(off).max()
