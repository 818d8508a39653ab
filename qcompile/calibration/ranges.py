"""From statistics to a static range: min-max, percentile, entropy, mean squared error.

All but min-max look at one histogram of the whole tensor, pooled from the channels' histograms
after smoothing. A range always contains zero, and never exceeds what was seen.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.calibration.stats import Stats
from qcompile.config import RangeMethod

Array = npt.NDArray[Any]

PERCENTILE: Final = 99.99
_CANDIDATES: Final = 2.0 ** (-np.arange(0, 41) / 8.0)
_LEVELS: Final = 255
_LINEAR_BINS: Final = 2048


def static_range(stats: Stats, method: RangeMethod) -> tuple[float, float]:
    """The range [low, high] to quantise an activation over.

    Args:
        stats: of the activation, smoothed if it will be.
        method: ``minmax``; ``percentile`` (99.99 % of the values lie inside, half the rest on each
            side); ``entropy`` (least Kullback-Leibler divergence of the clipped and quantised
            histogram, as in TensorRT's calibrator); ``mse`` (least mean squared error).
    """
    low = min(float(stats.minimum.min()), 0.0)
    high = max(float(stats.maximum.max()), 0.0)
    if method == "minmax" or high - low <= 0.0:
        return low, high
    values, counts = stats.weighted_values()
    values, counts = values.ravel(), counts.ravel()
    present = counts > 0
    values, counts = np.clip(values[present], low, high), counts[present].astype(np.float64)
    if method == "percentile":
        return _percentile(values, counts)
    pick = _mse if method == "mse" else _entropy
    return pick(values, counts, low, high)


def _percentile(values: Array, counts: Array) -> tuple[float, float]:
    order = np.argsort(values)
    values, cumulative = values[order], np.cumsum(counts[order])
    tail = (100.0 - PERCENTILE) / 200.0 * cumulative[-1]
    low = values[np.searchsorted(cumulative, tail)]
    high = values[min(np.searchsorted(cumulative, cumulative[-1] - tail), len(values) - 1)]
    return min(float(low), 0.0), max(float(high), 0.0)


def _mse(values: Array, counts: Array, low: float, high: float) -> tuple[float, float]:
    """Coordinate descent over the two ends: first both together, then each alone."""

    def error(a: float, b: float) -> float:
        step = (b - a) / _LEVELS
        clipped = np.square(values - np.clip(values, a, b))
        rounded = np.minimum(step**2 / 12.0, np.square(values))
        return float(counts @ np.where((values < a) | (values > b), clipped, rounded))

    both = min(_CANDIDATES, key=lambda f: error(low * f, high * f))
    a, b = low * both, high * both
    for _ in range(2):
        b = high * min(_CANDIDATES, key=lambda f: error(a, high * f))
        a = low * min(_CANDIDATES, key=lambda f: error(low * f, b)) if low < 0.0 else 0.0
    return a, b


def _entropy(values: Array, counts: Array, low: float, high: float) -> tuple[float, float]:
    edges = np.linspace(low, high, _LINEAR_BINS + 1)
    histogram, _ = np.histogram(values, bins=edges, weights=counts)
    best, kept = np.inf, max(-low, high)
    # One threshold for both sides: an outlier on one must not clip the other.
    for threshold in max(-low, high) * _CANDIDATES:
        divergence = _clipped_divergence(
            histogram, edges, max(low, -threshold), min(high, threshold)
        )
        if divergence < best:
            best, kept = divergence, float(threshold)
    return max(low, -kept), min(high, kept)


def _clipped_divergence(histogram: Array, edges: Array, a: float, b: float) -> float:
    """KL of the histogram clipped to [a, b] from the same in 255 levels."""
    first = int(np.searchsorted(edges, a, side="right")) - 1
    last = max(int(np.searchsorted(edges, b, side="left")), first + 1)
    inside = histogram[first:last]
    clipped = inside.copy()
    clipped[0] += histogram[:first].sum()
    clipped[-1] += histogram[last:].sum()
    level = np.arange(len(inside)) * _LEVELS // len(inside)
    present = inside > 0
    mass = np.bincount(level, weights=inside)
    members = np.bincount(level, weights=present)
    spread = np.where(present, (mass / np.maximum(members, 1))[level], 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1e-30)
    both = (p > 0) & (q > 0)
    lost = float(p[(p > 0) & (q <= 0)].sum())
    return float((p[both] * np.log(p[both] / q[both])).sum()) + 10.0 * lost
