"""SmoothQuant's plan: which sites, how strong, into what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.smooth_quant import SmoothQuant

from qcompile import smoothing
from qcompile.calibration.run import calibrate
from qcompile.calibration.stats import Stats
from qcompile.config import Activations, CompileConfig, Recipe
from qcompile.linears import Site, find_sites
from qcompile.noise import WeightMoments, output_error
from qcompile.planning import weight_of
from qcompile.precision import MODES, Choice, uint8_affine
from qcompile.smoothing import (
    ALPHAS,
    Smoothing,
    SmoothingPlan,
    plan_smoothing,
    smoothing_scale,
)
from tests.passes.rewriting import HEADER, typed
from tests.support import assert_idempotent, from_text, ops, run_model

RNG = np.random.default_rng(0)
C = 16


def _random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


OUTLIERS = np.ones(C, np.float32)
OUTLIERS[5] = 64.0
X = _random(4, 32, C)
MLP = """g (float[B,S,16] x, float[16] g, float[16] c, float[16,24] w1, float[24] b1,
  float[24,8] w2) => (float[B,S,8] fc2) {
  n = LayerNormalization <axis = -1> (x, g, c) fc1 = MatMul (n, w1) a = Add (fc1, b1)
  h = Relu (a) fc2 = MatMul (h, w2) }"""


def mlp(outliers: np.ndarray = OUTLIERS) -> ir.Model:
    """Norm -> fc1 -> Relu -> fc2; the norm's outliers are taken back by fc1's rows."""
    return named(
        MLP,
        g=(_random(C) + 3) * outliers,
        c=_random(C) * outliers,
        w1=_random(C, 24) / outliers[:, None],
        b1=_random(24),
        w2=_random(24, 8),
    )


def named(text: str, **weights: np.ndarray) -> ir.Model:
    model = typed(from_text(HEADER + text, **weights))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    return model


def statistics(model: ir.Model, folder: Path, x: np.ndarray = X) -> dict[str, Stats]:
    return calibrate(model, find_sites(model.graph), [{"x": x}], folder, histogram_stride=1)


def everything(sites: list[Site], mode: Activations = "static") -> dict[str, Choice]:
    return {linear.name: Choice(mode, "test") for site in sites for linear in site.linears}


def plan(model: ir.Model, folder: Path, config: CompileConfig | None = None) -> SmoothingPlan:
    sites = find_sites(model.graph)
    stats = statistics(model, folder)
    config = config or CompileConfig()
    mode = "static" if config.activations == "auto" else config.activations
    return plan_smoothing(sites, stats, config, everything(sites, mode))


def entry_of(plan: SmoothingPlan, site: str) -> Smoothing:
    entry = plan.of(site)
    assert entry is not None
    return entry


def initializer(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def normalised(scale: np.ndarray) -> np.ndarray:
    result: np.ndarray = scale / np.exp(np.log(scale).mean())
    return result


def quantisation_error(model: ir.Model, site: str, scale: np.ndarray, x: np.ndarray = X) -> float:
    """Measured squared error per row of a site's outputs, static activations and int8 weights."""
    by_name = {found.name: found for found in find_sites(model.graph)}
    observed = model.clone()
    value = ir.convenience.create_value_mapping(observed.graph)[str(by_name[site].x.name)]
    observed.graph.outputs.append(value)
    rows = run_model(observed, {"x": x}, optimise=False)[str(value.name)].astype(np.float64)
    smooth = rows.reshape(-1, rows.shape[-1]) / scale
    step, zero = uint8_affine(float(smooth.min()), float(smooth.max()))
    codes = np.clip(np.rint(smooth / step) + zero, 0, 255)
    total = 0.0
    for linear in by_name[site].linears:
        weight = weight_of(linear) * scale[:, None]
        per_channel = np.abs(weight).max(axis=0) / 127
        rounded = np.rint(weight / per_channel) * per_channel
        error = (codes - zero) * step @ rounded - smooth @ weight
        total += float(np.square(error).sum(axis=1).mean())
    return total


# the formula


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_formula_of_the_paper(alpha: float) -> None:
    x, w = np.array([1.0, 2.0, 64.0, 8.0]), np.array([0.5, 0.3, 0.02, 1.0])
    wanted = normalised(x**alpha / w ** (1 - alpha))
    found = smoothing_scale(x, w, alpha, np.arange(4))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_allclose(np.log(found).sum(), 0.0, atol=1e-12)


def test_the_balance_at_one_half() -> None:
    """At α = ½ each channel's activation and weight end at one maximum, as in figure 5."""
    x, w = np.array([1.0, 2.0, 64.0, 8.0]), np.array([0.5, 0.3, 1.0, 0.25])
    scale = smoothing_scale(x, w, 0.5, np.arange(4))
    ratio = (x / scale) / (w * scale)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)


def test_dead_channels_get_no_extreme_scale() -> None:
    x, w = np.array([0.0, 1e-30, 1.0, 1.0]), np.array([1.0, 1.0, 0.0, 1e-30])
    for alpha in ALPHAS:
        scale = smoothing_scale(x, w, alpha, np.arange(4))
        assert np.isfinite(scale).all()
        assert scale.max() / scale.min() <= 1000.0 * (1 + 1e-12)


def test_an_outlier_channel_is_no_matter_of_the_floor() -> None:
    """A channel times 64 in the activation and by 64 in the weight: the same function, the same
    smoothed activation."""
    x, w = np.array([1.0, 2.0, 3.0, 0.05]), np.array([0.5, 0.3, 0.2, 1.0])
    factor = np.array([1.0, 64.0, 1.0, 1.0])
    for alpha in ALPHAS:
        plain = smoothing_scale(x, w, alpha, np.arange(4))
        outlier = smoothing_scale(x * factor, w / factor, alpha, np.arange(4))
        np.testing.assert_allclose(
            normalised(x * factor / outlier), normalised(x / plain), rtol=1e-12
        )
    nothing = smoothing_scale(np.zeros(4), np.zeros(4), 0.5, np.arange(4))
    np.testing.assert_allclose(nothing, np.ones(4))


def test_channels_of_a_group_share_the_scale_of_their_largest() -> None:
    x, w = np.array([1.0, 9.0, 4.0, 2.0]), np.array([0.5, 1.0, 0.25, 1.0])
    groups = np.array([0, 1, 0, 1])
    found = smoothing_scale(x, w, 0.5, groups)
    largest_x, largest_w = np.array([4.0, 9.0, 4.0, 9.0]), np.array([0.5, 1.0, 0.5, 1.0])
    np.testing.assert_allclose(found, normalised(np.sqrt(largest_x / largest_w)), rtol=1e-12)
    np.testing.assert_array_equal(found[:2], found[2:])


# planning


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_a_given_alpha_is_used_everywhere(alpha: float, tmp_path: Path) -> None:
    model = mlp()
    found = plan(model, tmp_path, CompileConfig(smooth=alpha))
    assert [(e.site, e.alpha, e.reason) for e in found.entries] == [
        ("fc1", alpha, "as asked"),
        ("fc2", alpha, "as asked"),
    ]
    stats = statistics(model, tmp_path)
    for site, columns in (("fc2", np.ones(8)), ("fc1", entry_of(found, "fc2").scale)):
        weight = initializer(model, {"fc1": "w1", "fc2": "w2"}[site]) / columns
        x, w = stats[site].absmax, abs(weight).max(1)
        product = np.maximum(x * w, 1e-3 * (x * w).max())
        wanted = normalised(product**alpha / w)
        np.testing.assert_allclose(entry_of(found, site).scale, wanted, rtol=1e-6)


def test_producers_and_consumers(tmp_path: Path) -> None:
    found = plan(mlp(), tmp_path, CompileConfig(smooth=0.5))
    first, second = entry_of(found, "fc1"), entry_of(found, "fc2")
    assert first.producer is not None and second.producer is not None
    assert (first.producer.kind, first.producer.name) == ("norm", "n")
    assert (second.producer.kind, second.producer.name) == ("linear", "fc1")
    assert (first.consumers, second.consumers) == (("fc1",), ("fc2",))
    assert first.producer_scale is not None
    np.testing.assert_array_equal(first.producer_scale, first.scale)
    assert [entry.site for entry, _, _ in found.folded] == ["fc1", "fc2"]
    np.testing.assert_array_equal(found.scale_of("fc2"), second.scale)
    with pytest.raises(KeyError):
        found.scale_of("fc3")


@pytest.mark.parametrize("smooth", [0.5, 0.8, "auto"])
def test_the_smoothed_graph_computes_the_same(smooth: float | str, tmp_path: Path) -> None:
    model = mlp()
    wanted = run_model(model, {"x": X}, optimise=False)["fc2"]
    config = CompileConfig.model_validate({"smooth": smooth})
    pass_ = SmoothQuant(plan(model, tmp_path, config))
    assert pass_(model).modified
    found = run_model(model, {"x": X}, optimise=False)["fc2"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6 * float(np.abs(wanted).max()))
    assert_idempotent(pass_, model)


def test_statistics_after_smoothing_are_those_of_the_smoothed_graph(tmp_path: Path) -> None:
    """The pipeline scales what it gathered before, and does not calibrate again."""
    model = mlp()
    before = statistics(model, tmp_path)
    found = plan(model, tmp_path, CompileConfig(smooth=0.5))
    SmoothQuant(found)(model)
    for site, after in statistics(model, tmp_path).items():
        scaled = before[site].scaled(found.scale_of(site))
        size = after.absmax.max()
        np.testing.assert_allclose(scaled.maximum, after.maximum, rtol=1e-5, atol=1e-6 * size)
        np.testing.assert_allclose(scaled.minimum, after.minimum, rtol=1e-5, atol=1e-6 * size)
        np.testing.assert_allclose(scaled.second_moment, after.second_moment, rtol=1e-4)


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("outlier", [1.0, 8.0, 64.0])
def test_auto_never_predicts_more_error_than_off(
    activations: Activations, outlier: float, tmp_path: Path
) -> None:
    outliers = np.ones(C, np.float32)
    outliers[5] = outlier
    model = mlp(outliers)
    config = CompileConfig.model_validate({"smooth": "auto", "activations": activations})
    found = plan(model, tmp_path, config)
    stats = statistics(model, tmp_path)
    columns = {"fc2": np.ones(8), "fc1": entry_of(found, "fc2").scale}
    for site in find_sites(model.graph):
        weights = WeightMoments.of(weight_of(site.linears[0]) / columns[site.name])

        def error(
            scale: np.ndarray, seen: Stats = stats[site.name], of: WeightMoments = weights
        ) -> float:
            return output_error(seen, of, scale, activations)

        chosen = error(entry_of(found, site.name).scale)
        assert chosen <= error(np.ones(site.channels)) * (1 + 1e-6)
        identity = np.arange(site.channels)
        for alpha in ALPHAS:
            other = smoothing_scale(stats[site.name].absmax, weights.largest, alpha, identity)
            assert chosen <= error(other) * (1 + 1e-6)


@pytest.mark.parametrize("activations", MODES)
def test_an_outlier_channel_is_smoothed(activations: Activations, tmp_path: Path) -> None:
    model = mlp()
    config = CompileConfig.model_validate({"smooth": "auto", "activations": activations})
    entry = entry_of(plan(model, tmp_path, config), "fc1")
    assert entry.alpha is not None and entry.alpha > 0
    assert int(entry.scale.argmax()) == 5
    assert entry.scale[5] > 8 * np.median(entry.scale)
    assert entry.reason.startswith("least predicted output error, ")
    stats = statistics(model, tmp_path)["fc1"]
    weights = WeightMoments.of(initializer(model, "w1"))
    after = output_error(stats, weights, entry.scale, activations)
    before = output_error(stats, weights, np.ones(C), activations)
    assert after < before / 50


def test_the_measured_error_of_an_outlier_channel_falls_as_well(tmp_path: Path) -> None:
    model = mlp()
    entry = entry_of(plan(model, tmp_path), "fc1")
    before = quantisation_error(model, "fc1", np.ones(C))
    assert quantisation_error(model, "fc1", entry.scale) < before / 50


def test_the_prediction_is_near_the_measured_error(tmp_path: Path) -> None:
    """Uniform rounding noise: within a quarter of what numpy measures, smoothed or not."""
    model = mlp()
    stats = statistics(model, tmp_path)["fc1"]
    weights = WeightMoments.of(initializer(model, "w1"))
    for scale in (np.ones(C), entry_of(plan(model, tmp_path), "fc1").scale):
        predicted = output_error(stats, weights, scale, "static")
        assert predicted == pytest.approx(quantisation_error(model, "fc1", scale), rel=0.25)


def test_grouped_heads_share_one_scale(tmp_path: Path) -> None:
    text = """g (float[B,S,16] x, float[16,16] wq, float[16,8] wk, float[16,8] wv, float[16,4] wo)
      => (float[B,S,4] o) {
      q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
      a = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v) o = MatMul (a, wo) }"""
    loud = np.ones(8, np.float32)
    loud[6] = 64.0
    model = named(
        text, wq=_random(16, 16), wk=_random(16, 8), wv=_random(16, 8) * loud, wo=_random(16, 4)
    )
    found = plan(model, tmp_path, CompileConfig(smooth=0.5))
    entry = entry_of(found, "o")
    heads = entry.scale.reshape(2, 2, 4)
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])
    assert entry.producer_scale is not None and entry.producer_scale.shape == (8,)
    np.testing.assert_array_equal(entry.producer_scale.reshape(2, 4), heads[:, 0])
    assert int(entry.producer_scale.argmax()) == 6
    wanted = run_model(model, {"x": X}, optimise=False)["o"]
    SmoothQuant(found)(model)
    smoothed = run_model(model, {"x": X}, optimise=False)["o"]
    np.testing.assert_allclose(smoothed, wanted, rtol=1e-5, atol=2e-6 * float(abs(wanted).max()))


def test_a_producer_takes_one_scale_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of one Split, each read by a Linear: the second is refused."""
    text = """g (float[B,S,16] x, float[16,16] w, float[8,4] u, float[8,4] v)
      => (float[B,S,4] y, float[B,S,4] z) {
      m = MatMul (x, w) p, q = Split <axis = -1, num_outputs = 2> (m)
      y = MatMul (p, u) z = MatMul (q, v) }"""
    model = named(text, w=_random(16, 16), u=_random(8, 4), v=_random(8, 4))
    monkeypatch.setattr(smoothing, "PAYS", 0.0)
    found = plan(model, tmp_path, CompileConfig(smooth=0.5))
    assert [entry.alpha for entry in found.entries] == [None, None, 0.5]
    reason = entry_of(found, "y").reason
    assert reason.startswith("refused: m already takes another site's scale; a Mul would not pay")


# refusals


GELU_AND_RESIDUAL = {
    "a": "its input is also read by Add (r), which cannot take the scale",
    "y": "Gelu (h) does not commute with a scale per channel",
    "z": "Add (r) does not commute with a scale per channel",
}


def gelu_and_residual() -> ir.Model:
    text = """g (float[B,S,16] x, float[16,16] w, float[16,16] u, float[16,16] v)
      => (float[B,S,16] z) {
      a = MatMul (x, w) h = Gelu (a) y = MatMul (h, u) r = Add (y, x) z = MatMul (r, v) }"""
    return named(text, w=_random(C, C), u=_random(C, C), v=_random(C, C))


def test_refusals_have_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "PAYS", 0.0)
    found = plan(gelu_and_residual(), tmp_path)
    assert found.folded == ()
    for entry in found.entries:
        why = GELU_AND_RESIDUAL[entry.site]
        assert entry.reason.startswith(f"refused: {why}; a Mul would not pay")
        assert entry.alpha is None and entry.producer is None
        np.testing.assert_array_equal(entry.scale, np.ones(C))


def test_a_mul_is_inserted_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "PAYS", 1.0)
    model = gelu_and_residual()
    feed = {"x": np.random.default_rng(1).standard_normal((2, 5, 16)).astype(np.float32)}
    before = run_model(model, feed)["z"]
    found = plan(model, tmp_path)
    for entry, producer, _ in found.folded:
        assert producer.kind == "mul"
        assert GELU_AND_RESIDUAL[entry.site] in entry.reason
    assert len(found.folded) == 3
    SmoothQuant(found)(model)
    assert ops(model).count("Mul") == 3
    np.testing.assert_allclose(run_model(model, feed)["z"], before, rtol=1e-4, atol=1e-5)
    assert_idempotent(SmoothQuant(found), model)


def test_off(tmp_path: Path) -> None:
    found = plan(mlp(), tmp_path, CompileConfig(smooth="off"))
    assert [entry.reason for entry in found.entries] == ["off, as asked"] * 2
    assert found.folded == ()


def test_a_site_that_stays_in_float_is_left_alone(tmp_path: Path) -> None:
    model = mlp()
    sites = find_sites(model.graph)
    chosen = everything(sites) | {"fc1": Choice("float", "recipe")}
    found = plan_smoothing(sites, statistics(model, tmp_path), CompileConfig(smooth=0.5), chosen)
    assert entry_of(found, "fc1").reason == "not quantised"
    assert entry_of(found, "fc2").alpha == 0.5


def test_a_recipe_overrides_alpha(tmp_path: Path) -> None:
    rules = {"fc1": {"smooth": "off"}, "fc2": {"smooth": 0.3}}
    config = CompileConfig(smooth=0.7, recipe=Recipe.from_mapping(rules))
    found = plan(mlp(), tmp_path, config)
    assert [(entry.alpha, entry.reason) for entry in found.entries] == [
        (None, "off, as asked"),
        (0.3, "as asked"),
    ]
