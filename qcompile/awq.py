"""AWQ (arXiv 2306.00978): scale the input channels that carry most, so that rounding spares them.

The rows of W that large activations meet are multiplied by s_j = mean|x_j|^α before W is rounded,
and x is divided by s, folded as smoothing is. α is searched per site for the least error of the
site's outputs, tr (W − Ŵ)ᵀ H (W − Ŵ) with H = Σ xᵀx within blocks of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.calibration.stats import GRAM_BLOCK, Stats
from qcompile.rounding import Rounding
from qcompile.weight_blocks import full_range, in_blocks

Array = npt.NDArray[Any]

ALPHAS: Final = tuple(np.round(np.arange(0.05, 1.01, 0.05), 2).tolist())
"""The grid of the search; "not at all" is a further candidate."""

COLUMNS: Final = 512
"""Outputs of a site that the search looks at, evenly spaced."""

_FLOOR: Final = 1e-3


def awq_scale(stats: Stats, alpha: float, groups: npt.NDArray[np.int64]) -> Array:
    """s of a site, float64 [channels], its geometric mean set to one.

    Args:
        stats: of the site's activation.
        alpha: 0 leaves everything as it is.
        groups: [channels]; channels of one number share one scale (grouped-query attention).
    """
    values, counts = stats.weighted_values()
    mean = (np.abs(values) * counts).sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
    top = np.zeros(int(groups.max()) + 1)
    np.maximum.at(top, groups, mean)
    mean = top[groups]
    mean = np.maximum(mean, _FLOOR * mean.max() if mean.max() > 0 else 1.0)
    scale = mean**alpha
    result: Array = np.clip(scale / np.exp(np.log(scale).mean()), 1e-4, 1e4)
    return result


def awq_errors(
    stats: Stats, weights: Array, scales: Mapping[float | None, Array], rounding: Rounding
) -> dict[float | None, float]:
    """The error of a site's outputs for each candidate scale.

    Args:
        stats: of the site's activation.
        weights: of all consumers side by side, float32 [K, N].
        scales: α -> s, [K].
        rounding: blocks to round in.
    """
    sampled = weights[:, :: -(-weights.shape[1] // COLUMNS)]
    depth = len(weights)
    gram = stats.gram.astype(np.float32)
    errors = {}
    for alpha, scale in scales.items():
        factor = scale.astype(np.float32)[:, None]
        blocks = in_blocks(sampled * factor, rounding.block_size)
        grid = full_range(blocks, bits=rounding.bits, symmetric=rounding.symmetric)
        restored = grid.values(grid.nearest(blocks)).reshape(-1, sampled.shape[1])[:depth]
        missed = np.pad(restored / factor - sampled, ((0, -depth % GRAM_BLOCK), (0, 0)))
        missed = missed.reshape(-1, GRAM_BLOCK, sampled.shape[1])
        errors[alpha] = float(np.einsum("bkn,bkn->", missed, gram @ missed, dtype=np.float64))
    return errors
