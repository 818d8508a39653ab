"""AWQ: scales that change nothing in float, and lessen the error of four bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from qcompile.passes.smooth_quant import SmoothQuant

from qcompile.awq import awq_errors, awq_scale
from qcompile.config import CompileConfig
from qcompile.linears import find_sites
from qcompile.planning import weight_of
from qcompile.precision import Choice
from qcompile.rounding import Rounding
from qcompile.smoothing import SmoothingPlan, plan_smoothing
from qcompile.weight_blocks import quantize_blocks
from tests.support import run_model
from tests.test_smoothing import C, X, mlp, statistics

MODEL = mlp()
CONFIG = CompileConfig(method="awq")
ROUNDING = Rounding("awq", 4, 32, symmetric=False)


def planned(folder: Path, config: CompileConfig = CONFIG) -> SmoothingPlan:
    model = MODEL.clone()
    sites = find_sites(model.graph)
    chosen = {x.name: Choice("weight4", "test") for site in sites for x in site.linears}
    return plan_smoothing(sites, statistics(model, folder), config, chosen)


def test_the_folds_change_nothing_in_float(tmp_path: Path) -> None:
    model = MODEL.clone()
    wanted = run_model(model, {"x": X}, optimise=False)["fc2"]
    plan = planned(tmp_path)
    assert plan.folded and any(not np.allclose(e.scale, 1.0) for e in plan.entries)
    assert SmoothQuant(plan)(model).modified
    found = run_model(model, {"x": X}, optimise=False)["fc2"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_only_methods_that_scale_do(tmp_path: Path) -> None:
    for method in ("rtn", "gptq", "hqq"):
        plan = planned(tmp_path, CompileConfig(method=method))
        assert not plan.folded
        assert {entry.reason for entry in plan.entries} == {"not quantised"}


def test_the_error_is_that_of_the_outputs(tmp_path: Path) -> None:
    """Of one block of the Gram matrix, where it is exact."""
    model = MODEL.clone()
    site = find_sites(model.graph)[0]
    stats = statistics(model, tmp_path)[site.name]
    weight = weight_of(site.linears[0])
    rng = np.random.default_rng(0)
    scales = {None: np.ones(C), 0.5: rng.uniform(0.5, 2.0, C)}
    errors = awq_errors(stats, weight, scales, ROUNDING)
    for alpha, scale in scales.items():
        factor = scale.astype(np.float32)[:, None]
        rounded = quantize_blocks(weight * factor, bits=4, symmetric=False).dequantized()
        missed = rounded / factor - weight
        gram = stats.gram[0][:C, :C]
        np.testing.assert_allclose(errors[alpha], np.trace(missed.T @ gram @ missed), rtol=1e-4)


def test_the_best_alpha_is_taken(tmp_path: Path) -> None:
    model = MODEL.clone()
    site = find_sites(model.graph)[0]
    stats = statistics(model, tmp_path)
    entry = planned(tmp_path).of(site.name)
    assert entry is not None and entry.alpha is not None
    seen = stats[site.name]
    groups = np.arange(C)
    alphas: tuple[float | None, ...] = (0.0, entry.alpha)
    scales = {a: awq_scale(seen, a or 0.0, groups) for a in alphas}
    np.testing.assert_allclose(scales[0.0], 1.0)
    np.testing.assert_allclose(entry.scale, scales[entry.alpha])
    errors = awq_errors(seen, weight_of(site.linears[0]), scales, ROUNDING)
    assert errors[entry.alpha] < errors[0.0]


def test_scales_follow_activations(tmp_path: Path) -> None:
    model = MODEL.clone()
    site = find_sites(model.graph)[0]
    scale = awq_scale(statistics(model, tmp_path)[site.name], 1.0, np.arange(C))
    assert int(scale.argmax()) == 5  # where the outliers are
    assert abs(float(np.log(scale).mean())) < 1e-9
    shared = awq_scale(statistics(model, tmp_path)[site.name], 1.0, np.arange(C) // 4)
    assert (shared.reshape(-1, 4) == shared[::4, None]).all()
