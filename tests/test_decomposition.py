"""LLM.int8(): which channels stay in float, and that no scale per token is theirs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qcompile.passes.permute_channels import PermuteChannels
from qcompile.passes.quantize import Quantize
from qcompile.passes.smooth_quant import SmoothQuant
from qcompile.targets.ort_cpu import OrtCpu

from qcompile.calibration.run import calibrate
from qcompile.calibration.stats import GRAM_BLOCK, Stats
from qcompile.config import CompileConfig
from qcompile.decomposition import (
    BELOW,
    MOST,
    THRESHOLD,
    find_outliers,
    kept_count,
    scale_away,
    without,
)
from qcompile.linears import find_sites
from qcompile.planning import plan_precision
from qcompile.precision import Choice, PrecisionPlan
from qcompile.sensitivity import quantized_activation
from qcompile.smoothing import SmoothingPlan, plan_smoothing
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text, run_model
from tests.test_outliers import stats_of

RNG = np.random.default_rng(0)
K, N = 64, 8
CONFIG = CompileConfig()
ALONE = np.arange(K)


def with_outliers(channels: list[int], factor: float = 40.0, rows: int = 300) -> np.ndarray:
    x = np.clip(RNG.standard_normal((rows, K)), -4, 4).astype(np.float32)
    x[:, channels] *= factor
    return x


@given(width=st.integers(8, 5000), share=st.floats(1e-6, 0.125))
def test_a_share_is_some_channels_and_never_many(width: int, share: float) -> None:
    count = kept_count(width, share)
    assert 1 <= count <= width * MOST
    assert count == 1 or abs(count - width * share) < 1.0


def test_channels_that_reach_the_threshold() -> None:
    stats = stats_of(with_outliers([3, 40]))
    assert find_outliers(stats, ALONE, CONFIG).tolist() == [3, 40]
    high = CompileConfig(outlier_threshold=1e4)
    assert find_outliers(stats, ALONE, high).size == 0
    one = CompileConfig(outlier_share=0.01)
    assert set(find_outliers(stats, ALONE, one)) < {3, 40}


def test_at_most_an_eighth_and_the_largest() -> None:
    x = np.outer(RNG.uniform(0.5, 1, 50), 10.0 + np.arange(K)).astype(np.float32)
    found = find_outliers(stats_of(x), ALONE, CONFIG)
    assert (stats_of(x).absmax >= THRESHOLD).sum() > K * MOST
    assert found.tolist() == list(range(K - int(K * MOST), K))


def test_channels_that_are_divided_alike_are_kept_together() -> None:
    groups = ALONE % (K // 2)  # two heads that read one
    found = find_outliers(stats_of(with_outliers([5])), groups, CONFIG)
    assert found.tolist() == [5, 5 + K // 2]
    scale = scale_away(stats_of(with_outliers([5])), found, groups)
    assert scale[5] == scale[5 + K // 2] > 1


@given(seed=st.integers(0, 100), factor=st.floats(3.0, 1e4), outliers=st.sets(
    st.integers(0, K - 1), min_size=1, max_size=6))  # fmt: skip
def test_the_division_is_exact_and_gets_outliers_out_of_the_way(
    seed: int, factor: float, outliers: set[int]
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((100, K)).astype(np.float32)
    found = np.array(sorted(outliers))
    x[:, found] *= np.float32(factor)
    scale = scale_away(stats_of(x), found, ALONE)
    divided = x / scale.astype(np.float32)
    np.testing.assert_array_equal(divided * scale.astype(np.float32), x)
    rest = np.delete(divided, found, axis=1)
    np.testing.assert_array_equal(rest, np.delete(x, found, axis=1))
    assert np.abs(divided[:, found]).max() <= BELOW * np.sqrt(np.square(rest).mean()) * 1.001
    assert (np.abs(divided).argmax(axis=1)[:, None] != found).all()


def test_all_channels_as_outliers_or_dead() -> None:
    dead = stats_of(np.zeros((3, K), np.float32))
    assert (scale_away(dead, np.array([0]), ALONE) == 1).all()
    stats = stats_of(np.eye(K, dtype=np.float32) * 100)
    assert np.isfinite(scale_away(stats, ALONE, ALONE)).all()


def test_statistics_in_another_order() -> None:
    x = with_outliers([1])
    stats = stats_of(x)
    gram = np.zeros((1, GRAM_BLOCK, GRAM_BLOCK))
    gram[0, :K, :K] = x.astype(np.float64).T @ x
    order = np.arange(K)
    order[[1, K - 1]] = [K - 1, 1]
    found = dataclasses.replace(stats, gram=gram).permuted(order)
    wanted = stats_of(x[:, order])
    np.testing.assert_array_equal(found.absmax, wanted.absmax)
    np.testing.assert_allclose(found.power_sums, wanted.power_sums)
    true = x[:, order].astype(np.float64).T @ x[:, order]
    same = np.setdiff1d(np.arange(K), [1, K - 1])
    np.testing.assert_allclose(found.gram[0][np.ix_(same, same)], true[np.ix_(same, same)])
    np.testing.assert_allclose(np.diagonal(found.gram[0])[:K], np.diagonal(true))
    alone = without(found.gram, np.array([2]))
    assert not alone[0, 2].any() and not alone[0, :, 2].any() and alone[0, 3, 3] > 0


# What a plan becomes


MODELS = {
    "norm": f"""g (float[R,S,{K}] x, float[{K}] g, float[{K},{N}] w, float[{N}] b) =>
      (float[R,S,{N}] y) {{ h = LayerNormalization <axis = -1> (x, g) m = MatMul (h, w)
      y = Add (m, b) }}""",
    "linear": f"""g (float[R,S,{K}] x, float[{K},{K}] v, float[{K},{N}] w) => (float[R,S,{N}] y) {{
      u = MatMul (x, v) h = Relu (u) y = MatMul (h, w) }}""",
    "input": f"""g (float[R,S,{K}] x, float[{K},{N}] w) => (float[R,S,{N}] y) {{
      y = MatMul (x, w) }}""",
}


def planned(
    kind: str, folder: Path, config: CompileConfig = CONFIG
) -> tuple[ir.Model, ir.Model, SmoothingPlan, PrecisionPlan, np.ndarray]:
    """The model with two outlier channels at its last Linear, the same quantised, its plans, x."""
    large = np.ones(K, np.float32)
    large[[7, 30]] = 50.0
    rng = np.random.default_rng(1)
    weights = {
        "g": large,
        "v": np.eye(K, dtype=np.float32) * large,
        "w": (rng.standard_normal((K, N)) / large[:, None]).astype(np.float32),
        "b": rng.standard_normal(N).astype(np.float32),
    }
    text = MODELS[kind]
    declared = {str(v.name) for v in ir.from_onnx_text(HEADER + text).graph.inputs}
    model = typed(from_text(HEADER + text, **{k: a for k, a in weights.items() if k in declared}))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    x = np.clip(rng.standard_normal((4, 25, K)), -2, 2).astype(np.float32)
    if kind == "input":
        x *= large
    sites = find_sites(model.graph)
    stats = calibrate(model, sites, [{"x": x}], folder, histogram_stride=1)
    last = sites[-1].linears[0].name
    chosen = {n.name: Choice("llm-int8" if n.name == last else "float", "test")
              for s in sites for n in s.linears}  # fmt: skip
    smoothing = plan_smoothing(sites, stats, config, chosen)
    changed = model.clone()
    for pass_ in (SmoothQuant(smoothing), PermuteChannels(smoothing)):
        pass_(changed)
    plan = plan_precision(
        find_sites(changed.graph), stats, smoothing, chosen, config, OrtCpu("vnni")
    )
    return model, changed, smoothing, plan, x


HOW = {
    "norm": (
        "gathered from their places (LayerNormalization (h) does not work on each channel alike), "
        "divided out where they are made",
        "Gather",
    ),
    "linear": ("sliced, since what makes them puts them last, divided out where they", "Slice"),
    "input": ("divided out by a Mul of their own (its input is a graph input)", "Gather"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_plan_computes_what_numpy_does(kind: str, tmp_path: Path) -> None:
    model, changed, smoothing, plan, x = planned(kind, tmp_path)
    how, op_type = HOW[kind]
    entry = smoothing.entries[-1]
    assert entry.kept is not None and entry.kept.tolist() == [7, 30]
    op = plan.op(plan.ops[-1].name)
    assert how in entry.reason and how in op.reason
    wanted = run_model(model, {"x": x}, optimise=False)["y"]
    same = run_model(changed, {"x": x}, optimise=False)["y"]
    np.testing.assert_allclose(same, wanted, rtol=1e-4, atol=1e-4)
    # The paper's decomposition by itself: outliers in float, the rest per token by per channel.
    inner = next(n for n in model.graph if n.outputs[0].name in ("m", "y")).inputs[0]
    assert inner is not None
    h = x if kind == "input" else exposed(model, str(inner.name), x)
    weight = next(v for v in model.graph.initializers.values() if v.name == "w")
    assert weight.const_value is not None and op.weight is not None
    rest = np.delete(np.arange(K), entry.kept)
    places = np.arange(K) if entry.permutation is None else entry.permutation.order
    codes = dataclasses.replace(op.weight, kept=None).dequantized()[np.argsort(places)]
    step = np.abs(h[..., rest]).max(axis=-1, keepdims=True) / np.float32(127)
    rounded = np.rint(h[..., rest] / step) * step
    exact = weight.const_value.numpy()[entry.kept]
    expected = rounded @ codes[rest] + h[..., entry.kept] @ exact
    bias = model.graph.initializers.get("b")
    if bias is not None and bias.const_value is not None:
        expected = expected + bias.const_value.numpy()
    Quantize(plan)(changed)
    assert [n.op_type for n in changed.graph].count(op_type) == 1
    found = run_model(changed, {"x": x}, optimise=False)["y"]
    # A code on the edge between two may fall either way.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-2)
    assert np.square(found - expected).mean() < 1e-3 * np.square(found - wanted).mean()


def exposed(model: ir.Model, name: str, x: np.ndarray) -> np.ndarray:
    clone = model.clone()
    value = ir.convenience.create_value_mapping(clone.graph)[name]
    value.dtype = ir.DataType.FLOAT
    clone.graph.outputs.append(value)
    return run_model(clone, {"x": x}, optimise=False)[name]


def test_the_emulation_of_the_activation_spares_what_is_kept(tmp_path: Path) -> None:
    _, _, _, plan, x = planned("input", tmp_path)
    op = plan.ops[-1]
    kept = plan.sites[0].activation.kept
    assert kept is not None
    found = quantized_activation(torch.from_numpy(x), op, plan).numpy()
    np.testing.assert_array_equal(found[..., kept], x[..., kept])
    rest = np.delete(x, kept, axis=-1)
    error = np.abs(np.delete(found, kept, axis=-1) - rest)
    assert (error <= np.abs(rest).max(axis=-1, keepdims=True) / 254 * 1.001).all()
    assert error.max() > 0


def test_without_outliers_all_is_per_token(tmp_path: Path) -> None:
    *_, smoothing, plan, _ = planned("linear", tmp_path, CompileConfig(outlier_threshold=1e6))
    assert smoothing.folded == ()
    op = plan.ops[-1]
    assert plan.label(op) == "token" and op.weight is not None and op.weight.kept is None
    assert op.reason == "test; none of 64 channels reaches 1e+06, so that all are in int8 per token"


def test_gathered_in_place_where_nothing_is_permuted(tmp_path: Path) -> None:
    *_, smoothing, _, _ = planned("linear", tmp_path)
    assert smoothing.entries[-1].permutation is not None
    places = smoothing.entries[-1].places
    assert places is not None and places.tolist() == [K - 2, K - 1]
    entry = smoothing.in_place.entries[-1]
    assert entry.permutation is None and entry.places is entry.kept


def test_stats_are_values() -> None:
    assert isinstance(stats_of(with_outliers([])), Stats)
