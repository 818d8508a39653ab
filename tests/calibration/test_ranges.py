"""Static ranges: bounds that hold for every method, and what each method is for."""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from qcompile.calibration.ranges import static_range
from qcompile.calibration.stats import Array
from qcompile.config import RangeMethod
from qcompile.precision import uint8_affine
from tests.calibration.test_stats import CHANNELS, data, stats_of

METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)


def range_of(values: Array, method: RangeMethod) -> tuple[float, float]:
    return static_range(stats_of(values.reshape(-1, 1)), method)


def error(values: Array, bounds: tuple[float, float]) -> float:
    """Mean squared error of `values` quantised to uint8 over `bounds`."""
    scale, zero_point = uint8_affine(*bounds)
    codes = np.clip(np.rint(values / scale) + zero_point, 0, 255)
    return float(np.square(values - (codes - zero_point) * scale).mean())


def heavy_tailed(seed: int = 0) -> Array:
    """Student's t with three degrees of freedom: extremes far beyond the bulk."""
    values: Array = np.random.default_rng(seed).standard_t(3, 400_000)
    return values


@pytest.mark.parametrize("method", METHODS)
@given(data(), nps.arrays(np.float64, CHANNELS, elements=st.floats(1e-2, 1e2)))
def test_a_range_contains_zero_and_nothing_unseen(
    method: RangeMethod, rows: Array, scale: Array
) -> None:
    low, high = static_range(stats_of(rows).scaled(scale), method)
    scaled = rows / scale
    assert min(scaled.min(), 0.0) <= low <= 0.0 <= high <= max(scaled.max(), 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_constant_is_kept(method: RangeMethod, value: float) -> None:
    low, high = range_of(np.full(100, value), method)
    # Within a bin of the histogram's grid; zero has one of its own.
    assert low == pytest.approx(min(value, 0.0), rel=0.05)
    assert high == pytest.approx(max(value, 0.0), rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_one_sided_data_gives_a_one_sided_range(method: RangeMethod) -> None:
    values = np.abs(heavy_tailed())
    assert range_of(values, method)[0] == 0.0
    assert range_of(-values, method)[1] == 0.0


@given(data())
def test_minmax_is_exact(rows: Array) -> None:
    bounds = static_range(stats_of(rows), "minmax")
    assert bounds == (min(rows.min(), 0.0), max(rows.max(), 0.0))


def test_the_scale_applies_per_channel() -> None:
    rows = np.array([[1.0, -20.0], [2.0, 10.0]])
    assert static_range(stats_of(rows).scaled(np.array([1.0, 10.0])), "minmax") == (-2.0, 2.0)


def test_percentile_cuts_an_outlier() -> None:
    values = np.random.default_rng(0).standard_normal(40_000)
    values[7], values[70] = 900.0, -800.0
    low, high = range_of(values, "percentile")
    # 99.99 % of a Gaussian lie within 3.9 deviations; the grid is 9 % wide.
    assert -4.5 < low < -3.4
    assert 3.4 < high < 4.5


def test_percentile_keeps_what_is_no_outlier() -> None:
    values = np.random.default_rng(0).uniform(-1.0, 1.0, 20_000)
    low, high = range_of(values, "percentile")
    assert low == pytest.approx(-1.0, rel=0.05)
    assert high == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_mse_has_less_error_than_minmax_on_heavy_tails(seed: int) -> None:
    values = heavy_tailed(seed)
    minmax = error(values, range_of(values, "minmax"))
    assert error(values, range_of(values, "mse")) < 0.8 * minmax


@pytest.mark.parametrize("seed", range(3))
def test_mse_is_near_the_best_of_all_proportional_cuts(seed: int) -> None:
    values = heavy_tailed(seed)
    low, high = range_of(values, "minmax")
    cuts = [error(values, (low * f, high * f)) for f in np.geomspace(0.05, 1.0, 60)]
    assert error(values, range_of(values, "mse")) < 1.05 * min(cuts)


def test_mse_cuts_one_end_and_keeps_the_other() -> None:
    # Clipping x costs x²/n, keeping it x²/(12 · 255²): one in two million is worth cutting.
    bulk = stats_of(np.random.default_rng(0).standard_normal((20_000, 1)))
    bulk = dataclasses.replace(bulk, histogram=bulk.histogram * 100)
    stats = bulk.merge(stats_of(np.array([[60.0]])))
    low, high = static_range(stats, "mse")
    assert low < -3.0
    assert high < 20.0


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_well_spread_data_is_hardly_cut(method: RangeMethod) -> None:
    values = np.random.default_rng(0).uniform(-2.0, 2.0, 20_000)
    low, high = range_of(values, method)
    assert -2.0 <= low <= -1.8
    assert 1.8 <= high <= 2.0


@pytest.mark.parametrize("outlier", [30.0, 300.0])
def test_entropy_keeps_the_bulk_beside_an_outlier(outlier: float) -> None:
    values = np.random.default_rng(0).standard_normal(40_000)
    values[7] = outlier
    low, high = range_of(values, "entropy")
    assert ((values >= low) & (values <= high)).mean() > 0.99


def test_entropy_cuts_outliers_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(40_000) * np.where(rng.random(40_000) < 1e-3, 30.0, 1.0)
    low, high = range_of(values, "entropy")
    inside = (values >= low) & (values <= high)
    assert inside.mean() > 0.99
    assert error(values[inside], (low, high)) < error(values[inside], range_of(values, "minmax"))
