"""The error that quantisation puts into a site's outputs, predicted from statistics alone.

With W of shape [K, N] smoothed to diag(s) W and activations to x / s, rounding with step Δ is noise
of variance min(Δ²/12, x̂²) per value (a value below half a step rounds to zero, and an exact zero
makes no error). The output error, summed over the N outputs of every consumer, is then

    Σ_j E_j[min(Δ²/12, x̂_j²)] · s_j² ‖w_j‖²   +   Σ_n δ_n²/12 · Σ_j E[x_j²] / s_j²

with δ_n the step of output channel n's weights. Both terms depend on s; α is chosen for least sum.
The errors of different sites add up at the model's output to first order, each with a factor that
does not depend on s, so the α that is best for a site's outputs is best for the model's.

e4m3 has no one step: its error is a part of each value, but for subnormals. In the second term it
is that part of the output, whatever s is, and δ_n the step of subnormals.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.calibration.stats import Stats
from qcompile.config import Activations
from qcompile.e4m3 import LARGEST, RELATIVE, SUBNORMAL, squared_error

Array = npt.NDArray[Any]

STATIC_LEVELS = 255
TOKEN_LEVELS = 127
WEIGHT_LEVELS = 127
_ROWS = 32


@dataclasses.dataclass(frozen=True)
class WeightMoments:
    """What the prediction needs of a site's weights, all consumers side by side [K, N].

    Attributes:
        squares: float64 [K], Σ_n w_jn² weighted by importance: how much a squared error of each
            channel counts, where that was not measured as it is, through all consumers at once.
        largest: float64 [K], max_n |w_jn|.
        weights: the float32 matrix itself; step sizes δ_n depend on s row by row.
        importance: float64 [N], how much a squared error of each output counts: E[g²] of the
            model's divergence where it was measured, else one.
    """

    squares: Array
    largest: Array
    weights: Array
    importance: Array

    @classmethod
    def of(
        cls, weights: Array, importance: Array | None = None, squares: Array | None = None
    ) -> WeightMoments:
        if importance is None:
            importance = np.ones(weights.shape[1])
        if squares is None:
            squares = np.einsum("kn,kn,n->k", weights, weights, importance, dtype=np.float64)
        return cls(
            squares=squares,
            largest=np.abs(weights).max(axis=1).astype(np.float64),
            weights=weights,
            importance=importance,
        )


def output_error(
    stats: Stats,
    weights: WeightMoments,
    scale: Array,
    activations: Activations,
    *,
    fp8: bool = False,
) -> float:
    """Predicted squared error per row of all outputs of a site smoothed by `scale` [K]."""
    values, counts = stats.weighted_values(scale)
    seen = max(int(counts[0].sum()), 1)
    if fp8:
        per_value = squared_error(values, _reach(stats, scale, activations) / LARGEST)
    else:
        step = _step(stats, scale, activations)
        per_value = np.minimum(step**2 / 12.0, np.square(values))
    per_channel = np.einsum("kb,kb->k", per_value, counts) / seen
    from_activations = float(per_channel @ (weights.squares * scale**2))
    largest = _largest(weights.weights, scale.astype(np.float32))
    steps = largest * (SUBNORMAL / LARGEST) if fp8 else largest / WEIGHT_LEVELS
    from_weights = float(
        (np.square(steps, dtype=np.float64) * weights.importance).sum()
        / 12.0
        * (stats.second_moment / scale**2).sum()
    )
    if fp8:
        from_weights += RELATIVE * float(weights.squares @ stats.second_moment)
    return from_activations + from_weights


def _largest(weights: Array, scale: Array) -> Array:
    """max_j |s_j w_jn|, [N], by a few rows at a time: they stay in the cache."""
    largest = np.zeros(weights.shape[1], np.float32)
    for start in range(0, len(weights), _ROWS):
        rows = slice(start, start + _ROWS)
        scaled = np.abs(weights[rows] * scale[rows, None])
        np.maximum(largest, scaled.max(axis=0), out=largest)
    return largest


def _step(stats: Stats, scale: Array, activations: Activations) -> float:
    """Distance of two codes; per token, the root mean square over rows."""
    if activations == "token":
        return _reach(stats, scale, activations) / TOKEN_LEVELS
    low = min(float((stats.minimum / scale).min()), 0.0)
    high = max(float((stats.maximum / scale).max()), 0.0)
    return (high - low) / STATIC_LEVELS


def _reach(stats: Stats, scale: Array, activations: Activations) -> float:
    """The largest magnitude; per token, the root mean square of each row's."""
    if activations == "token":
        return float(np.sqrt(_mean_square_row_maximum(stats, scale)))
    return float((stats.absmax / scale).max())


def _mean_square_row_maximum(stats: Stats, scale: Array) -> float:
    """E over rows of max_j (x_j / s_j)², taking channels as independent.

    P(row maximum ≤ t) is the product over channels of P(|x_j| ≤ t s_j), read off the histograms.
    """
    values, counts = stats.weighted_values()
    middle = values.shape[1] // 2
    magnitudes = counts[:, middle:].copy()
    magnitudes[:, 1:] += counts[:, :middle][:, ::-1]
    grid = values[0, middle:]
    below = np.cumsum(magnitudes, axis=1) / np.maximum(magnitudes.sum(axis=1, keepdims=True), 1)
    top = float((stats.absmax / scale).max())
    if top <= 0.0:
        return 0.0
    thresholds = top * 2.0 ** (-np.arange(60, -1, -1) / 4.0)
    log_probability = np.zeros(len(thresholds))
    for at, threshold in enumerate(thresholds):
        column = np.searchsorted(grid, threshold * scale, side="right") - 1
        inside = below[np.arange(len(scale)), np.maximum(column, 0)]
        log_probability[at] = np.log(np.maximum(inside, 1e-12)).sum()
    probability = np.exp(log_probability)
    probability[-1] = 1.0
    mass = np.diff(np.concatenate([[0.0], probability]))
    return float((mass * thresholds**2).sum())
