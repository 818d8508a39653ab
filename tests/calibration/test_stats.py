"""Stats: merging, scaling and the summary, against numpy on the data itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from qcompile.calibration.stats import (
    BINS,
    BINS_PER_SIGN,
    GRAM_BLOCK,
    LOW,
    STEPS,
    Array,
    Stats,
    bin_centers,
)

CHANNELS = 3


def stats_of(rows: Array) -> Stats:
    """Statistics of `rows` [n, channels], straight from their definitions."""
    magnitude = np.abs(rows)
    with np.errstate(divide="ignore"):
        step = np.floor((np.log2(magnitude) - LOW) * STEPS)
    step = np.where(magnitude > 2.0**LOW, np.clip(step, 0, BINS_PER_SIGN - 1) + 1, 0)
    index = (np.sign(rows) * step).astype(int) + BINS_PER_SIGN
    return Stats(
        count=len(rows),
        minimum=rows.min(0),
        maximum=rows.max(0),
        power_sums=np.stack([(rows**k).sum(0) for k in range(1, 5)]),
        histogram=np.stack([np.bincount(column, minlength=BINS) for column in index.T]),
        gram=gram_of(rows),
    )


def gram_of(rows: Array) -> Array:
    """xᵀx within blocks of channels, the last block padded with zeros."""
    result = np.zeros((-(-rows.shape[1] // GRAM_BLOCK), GRAM_BLOCK, GRAM_BLOCK))
    for at, block in enumerate(result):
        part = rows[:, at * GRAM_BLOCK : (at + 1) * GRAM_BLOCK]
        width = part.shape[1]
        block[:width, :width] = part.T @ part
    return result


def data(low: float = -1e3, high: float = 1e3) -> st.SearchStrategy[Array]:
    """Rows of an activation, of float32 values as a session gives them."""
    values = st.floats(low, high, width=32)
    shapes = st.tuples(st.integers(1, 8), st.just(CHANNELS))
    return nps.arrays(np.float64, shapes, elements=values)


def assert_equal(left: Stats, right: Stats, magnitude: Stats) -> None:
    """Alike, power sums but for float64 rounding; `magnitude` are the statistics of |x|."""
    assert left.count == right.count
    np.testing.assert_array_equal(left.minimum, right.minimum)
    np.testing.assert_array_equal(left.maximum, right.maximum)
    np.testing.assert_array_equal(left.histogram, right.histogram)
    for name in ("power_sums", "gram"):
        difference = np.abs(getattr(left, name) - getattr(right, name))
        assert (difference <= 1e-14 * left.count * getattr(magnitude, name) + 1e-300).all(), name


@given(data(), data())
def test_merge_is_commutative(a: Array, b: Array) -> None:
    left, right = stats_of(a), stats_of(b)
    both = stats_of(np.abs(np.concatenate([a, b])))
    assert_equal(left.merge(right), right.merge(left), both)


@given(data(), data(), data())
def test_merge_is_associative(a: Array, b: Array, c: Array) -> None:
    x, y, z = stats_of(a), stats_of(b), stats_of(c)
    everything = stats_of(np.abs(np.concatenate([a, b, c])))
    assert_equal(x.merge(y).merge(z), x.merge(y.merge(z)), everything)


@given(data(), st.integers(1, 7))
def test_merge_of_parts_is_the_whole(rows: Array, at: int) -> None:
    assume(at < len(rows))
    whole, parts = stats_of(rows), stats_of(rows[:at]).merge(stats_of(rows[at:]))
    assert_equal(parts, whole, stats_of(np.abs(rows)))


def test_merge_leaves_its_operands_alone() -> None:
    a, b = stats_of(np.ones((2, CHANNELS))), stats_of(np.full((2, CHANNELS), 5.0))
    a.merge(b)
    assert a.count == 2
    assert a.histogram.sum() == 2 * CHANNELS
    np.testing.assert_array_equal(a.maximum, np.ones(CHANNELS))


@given(data(), nps.arrays(np.float64, CHANNELS, elements=st.floats(1e-3, 1e3)))
def test_scaled_is_the_statistics_of_the_quotient(rows: Array, scale: Array) -> None:
    # What lies below the grid counts as zero, and no scale brings it back.
    rows = np.where(np.abs(rows) <= 2.0**LOW, 0.0, rows)
    actual, expected = stats_of(rows).scaled(scale), stats_of(rows / scale)
    assert actual.count == expected.count
    np.testing.assert_allclose(actual.minimum, expected.minimum, rtol=1e-15)
    np.testing.assert_allclose(actual.maximum, expected.maximum, rtol=1e-15)
    magnitude = stats_of(np.abs(rows / scale))
    for name in ("power_sums", "gram"):
        difference = np.abs(getattr(actual, name) - getattr(expected, name))
        assert (difference <= 1e-13 * getattr(magnitude, name) + 1e-300).all(), name
    # A histogram moves by whole bins, so a value may land one bin beside its own, and none is lost.
    assert (actual.histogram >= 0).all()
    assert (actual.histogram.sum(1) == len(rows)).all()
    moved = np.abs(np.cumsum(actual.histogram - expected.histogram, axis=1)).sum(1)
    assert (moved <= len(rows)).all()


@given(data(), nps.arrays(np.int64, CHANNELS, elements=st.integers(-10, 10)))
def test_scaling_by_powers_of_two_is_exact(rows: Array, exponents: Array) -> None:
    assume((np.abs(rows[rows != 0]) > 2.0**-5.5).all())  # nothing nears an end of the grid
    scale = 2.0**exponents
    actual, expected = stats_of(rows).scaled(scale), stats_of(rows / scale)
    np.testing.assert_array_equal(actual.histogram, expected.histogram)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_scaling_past_the_grid_keeps_every_count(scale: float) -> None:
    rows = np.array([[-3.0], [0.0], [2.0], [700.0]])
    scaled = stats_of(rows).scaled(np.array([scale])).histogram[0]
    ends = {2.0**-40: [1, 1, 2], 2.0**40: [0, 4, 0]}[scale]
    assert [scaled[0], scaled[BINS_PER_SIGN], scaled[-1]] == ends


@given(data(-50.0, 50.0))
def test_summary_is_numpys(rows: Array) -> None:
    assume(rows.std() > 0.5)  # power sums lose the deviations of nearly constant data
    summary = stats_of(rows).summary()
    deviation = rows - rows.mean()
    assert summary.absmax == np.abs(rows).max()
    assert summary.std == pytest.approx(rows.std(), rel=1e-6)
    kurtosis = (deviation**4).mean() / (deviation**2).mean() ** 2
    assert summary.kurtosis == pytest.approx(kurtosis, rel=1e-5)


def test_summary_of_a_gaussian() -> None:
    rows = np.random.default_rng(0).normal(1.0, 2.0, (50_000, CHANNELS))
    summary = stats_of(rows).summary()
    assert summary.std == pytest.approx(2.0, rel=0.01)
    assert summary.kurtosis == pytest.approx(3.0, rel=0.03)


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-30])
def test_summary_of_a_constant_has_no_kurtosis(value: float) -> None:
    summary = stats_of(np.full((4, CHANNELS), value)).summary()
    assert (summary.absmax, summary.std, summary.kurtosis) == (abs(value), 0.0, 0.0)


def test_channel_figures() -> None:
    stats = stats_of(np.array([[1.0, -4.0], [3.0, 2.0]]))
    np.testing.assert_array_equal(stats.absmax, [3.0, 4.0])
    np.testing.assert_array_equal(stats.second_moment, [5.0, 10.0])


@given(data())
def test_histogram_values_are_within_half_a_bin(rows: Array) -> None:
    assume((np.abs(rows[rows != 0]) > 2.0**LOW).all())
    values, counts = stats_of(rows).weighted_values()
    for channel in range(CHANNELS):
        kept = np.repeat(values[channel], counts[channel])
        seen = np.sort(rows[:, channel])
        np.testing.assert_allclose(kept, seen, rtol=2.0 ** (0.5 / STEPS) - 1.0 + 1e-9)


def test_weighted_values_divide_by_the_scale() -> None:
    stats, scale = stats_of(np.ones((2, CHANNELS))), np.array([1.0, 2.0, 4.0])
    values, counts = stats.weighted_values(scale)
    assert counts is stats.histogram
    np.testing.assert_array_equal(values, bin_centers()[None, :] / scale[:, None])


def test_scaling_divides_the_gram_block_by_block() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((7, GRAM_BLOCK + 5))
    scale = rng.uniform(0.5, 2.0, GRAM_BLOCK + 5)
    scaled = stats_of(rows).scaled(scale).gram
    assert scaled.shape == (2, GRAM_BLOCK, GRAM_BLOCK)
    np.testing.assert_allclose(scaled, gram_of(rows / scale), rtol=1e-9, atol=1e-12)
    assert not scaled[1, 5:].any()
