"""Ranges of blocks that clip the ends of a weight where that lessens its error."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.weight_blocks import Grid, affine_grid, full_range, symmetric_grid

Array = npt.NDArray[Any]

SHRINKS: Final = tuple(np.round(np.arange(1.0, 0.59, -0.04), 2).tolist())
"""Parts of the full range that are tried."""

_COLUMNS: Final = 256


def clipped_range(blocks: Array, importance: Array | None, *, bits: int, symmetric: bool) -> Grid:
    """The grid of least Σ importance · (w − ŵ)² per block, among shrunk ranges.

    Asymmetric, both ends are tried apart from each other.

    Args:
        blocks: float32 [blocks, block_size, N].
        importance: of the input channels, float32 [blocks, block_size]; None: all alike. With E[x²]
            the error is that of the outputs, channels taken as independent.
        bits: 8 or 4.
        symmetric: see `full_range`.
    """
    counts = None if importance is None else importance.astype(np.float32)[:, :, None]
    parts = [
        _clipped(blocks[:, :, at : at + _COLUMNS], counts, bits, symmetric)
        for at in range(0, blocks.shape[2], _COLUMNS)
    ]
    return Grid(
        np.concatenate([grid.scale for grid in parts], axis=1),
        np.concatenate([grid.zero_point for grid in parts], axis=1),
        blocks.shape[1], bits, symmetric,
    )  # fmt: skip


def _clipped(blocks: Array, counts: Array | None, bits: int, symmetric: bool) -> Grid:
    size = blocks.shape[1]
    best = full_range(blocks, bits=bits, symmetric=symmetric)
    least = _error(best, blocks, counts)
    for grid in _shrunk(best, bits, size):
        error = _error(grid, blocks, counts)
        better = error < least
        least = np.where(better, error, least)
        best = Grid(
            np.where(better, grid.scale, best.scale),
            np.where(better, grid.zero_point, best.zero_point),
            size, bits, symmetric,
        )  # fmt: skip
    return best


def _shrunk(full: Grid, bits: int, size: int) -> list[Grid]:
    if full.symmetric:
        extreme = full.scale * full.lowest
        # From above too: the end without the extreme has one code less.
        return [symmetric_grid(extreme * part, bits, size) for part in (1.08, 1.04, *SHRINKS[1:])]
    low = (full.lowest - full.zero_point) * full.scale
    high = (full.highest - full.zero_point) * full.scale
    return [
        affine_grid(low * below, high * above, bits, size)
        for below in SHRINKS[::2]
        for above in SHRINKS[::2]
        if (below, above) != (1.0, 1.0)
    ]


def _error(grid: Grid, blocks: Array, counts: Array | None) -> Array:
    """Σ over a block's channels, [blocks, N]."""
    missed = np.square(grid.values(grid.nearest(blocks)) - blocks)
    if counts is not None:
        missed *= counts
    result: Array = missed.sum(axis=1)
    return result
