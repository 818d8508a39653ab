"""Ranges of blocks that clip the ends of a weight where that lessens its error."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.weight_blocks import Grid, affine_grid, full_range, symmetric_grid

Array = npt.NDArray[Any]

SHRINKS: Final = tuple(np.round(np.arange(1.0, 0.59, -0.04), 2).tolist())
"""Parts of the full range that are tried, where it is symmetric."""

MIDDLE: Final = 0.84
STEPS: Final = (0.16, 0.08, 0.04, 0.02)
"""Else both ends are moved by the first around that part of them, then by the others around the
best so far of each block."""

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
    full = full_range(blocks, bits=bits, symmetric=symmetric)
    if not symmetric:
        return _both_ends(full, blocks, counts)
    best, least = full, _error(full, blocks, counts)
    extreme = full.scale * full.lowest
    # From above too: the end without the extreme has one code less.
    for part in (1.08, 1.04, *SHRINKS[1:]):
        grid = symmetric_grid(extreme * part, bits, full.block_size)
        error = _error(grid, blocks, counts)
        best = _chosen(error < least, grid, best)
        least = np.minimum(error, least)
    return best


def _both_ends(full: Grid, blocks: Array, counts: Array | None) -> Grid:
    low = (full.lowest - full.zero_point) * full.scale
    high = (full.highest - full.zero_point) * full.scale
    best, least = full, _error(full, blocks, counts)
    parts = np.ones((2, *low.shape), np.float32)
    around = np.full_like(parts, MIDDLE)
    for step in STEPS:
        for moves in itertools.product((-step, 0.0, step), repeat=2):
            ends = around + np.array(moves, np.float32)[:, None, None]
            grid = affine_grid(low * ends[0], high * ends[1], full.bits, full.block_size)
            error = _error(grid, blocks, counts)
            better = error < least
            best, parts = _chosen(better, grid, best), np.where(better, ends, parts)
            least = np.minimum(error, least)
        around = parts
    return best


def _chosen(better: Array, grid: Grid, best: Grid) -> Grid:
    """`grid` where it is `better`, [blocks, N]."""
    return dataclasses.replace(
        best,
        scale=np.where(better, grid.scale, best.scale),
        zero_point=np.where(better, grid.zero_point, best.zero_point),
    )


def _error(grid: Grid, blocks: Array, counts: Array | None) -> Array:
    """Σ over a block's channels, [blocks, N]."""
    missed = np.square(grid.values(grid.nearest(blocks)) - blocks)
    if counts is not None:
        missed *= counts
    result: Array = missed.sum(axis=1)
    return result
