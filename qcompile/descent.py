"""Better codes and scales, from given ones, for an error known whole: tr (W − Ŵ)ᵀ G (W − Ŵ).

Each of both is least squares when the other is fixed. Scales have a closed form: those of a
column's blocks solve one small system. Codes are taken in turn (coordinate descent): a code moves
to the best whole number given all others, until none moves. Neither step adds to the error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.weight_blocks import Grid

Array = npt.NDArray[Any]

DAMPING: Final = 0.01
"""Part of the mean of G's diagonal that is added to it, as in GPTQ."""

MOST_CHANGE: Final = 0.5
"""Of a scale, relative: more is a system that says little about it."""

_ROWS: Final = 64
_SYSTEMS: Final = 1 << 24


def damped(gram: Array) -> Array:
    """`gram` [K, K] as float32 of mean diagonal one, damped, for the functions below."""
    mean = float(np.diagonal(gram).mean())
    result: Array = (gram / (mean if mean > 0.0 else 1.0)).astype(np.float32)
    result[np.diag_indices_from(result)] += DAMPING
    return result


def output_errors(weight: Array, grid: Grid, codes: Array, gram: Array) -> Array:
    """(w − ŵ)ᵀ G (w − ŵ) of each column, [N]; shapes as for `descend`."""
    missed = grid.values(codes).reshape(weight.shape) - weight
    result: Array = np.einsum("kn,kn->n", missed, gram @ missed, dtype=np.float64)
    return result


def best_of(weight: Array, found: Sequence[tuple[Grid, Array]], gram: Array) -> tuple[Grid, Array]:
    """Of several grids and codes, the best of each column. Shapes as for `descend`."""
    grid, codes = found[0]
    least = output_errors(weight, grid, codes, gram)
    for other, others in found[1:]:
        error = output_errors(weight, other, others, gram)
        better = error < least
        least = np.where(better, error, least)
        codes = np.where(better, others, codes)
        grid = dataclasses.replace(
            grid,
            scale=np.where(better, other.scale, grid.scale),
            zero_point=np.where(better, other.zero_point, grid.zero_point),
        )
    return grid, codes


def refine(
    weight: Array, grid: Grid, codes: Array, gram: Array, *, rounds: int
) -> tuple[Grid, Array]:
    """Scales and codes in turn; no column becomes worse. Shapes as for `descend`."""
    for _ in range(rounds):
        fitted = fit_scales(weight, grid, codes, gram)
        grid, codes = best_of(weight, [(grid, codes), (fitted, codes)], gram)
        codes = descend(weight, grid, codes, gram, sweeps=2)
    return grid, codes


def fit_scales(weight: Array, grid: Grid, codes: Array, gram: Array) -> Grid:
    """`grid` with the scales that are best for `codes`; shapes as for `descend`."""
    blocks, size, width = codes.shape
    steps = codes - grid.zero_point[:, None]
    moved = (gram @ weight).reshape(codes.shape)
    right = np.einsum("bkn,bkn->nb", steps, moved, dtype=np.float64)
    scale = grid.scale.copy()
    columns = max(_SYSTEMS // blocks**2, 1)
    for start in range(0, width, columns):
        part = slice(start, start + columns)
        own = steps[:, :, part]
        left = np.empty((own.shape[2], blocks, blocks))
        for b in range(blocks):
            carried = gram[:, b * size : (b + 1) * size] @ own[b]
            left[:, :, b] = np.einsum("akn,akn->na", own, carried.reshape(own.shape))
        before = grid.scale[:, part].T.astype(np.float64)
        # A block of zeros says nothing about its scale.
        little = 1e-6 * np.einsum("nbb->nb", left).mean(axis=1, keepdims=True) + 1e-12
        left[:, np.arange(blocks), np.arange(blocks)] += little
        wanted = right[part] + little * before
        found = np.linalg.solve(left, wanted[..., None])[..., 0]
        near = np.abs(found - before) < MOST_CHANGE * np.abs(before)
        scale[:, part] = np.where(near, found, before).T
    return dataclasses.replace(grid, scale=scale)


def descend(weight: Array, grid: Grid, codes: Array, gram: Array, *, sweeps: int) -> Array:
    """Codes none of which can be moved alone to lessen the error, or as near as `sweeps` lead.

    Args:
        weight: float32 [blocks · block_size, N].
        grid: of N columns.
        codes: float32 [blocks, block_size, N], where to start.
        gram: float32 [K, K], positive definite.
        sweeps: most times that every channel is visited.
    """
    shape, depth = codes.shape, len(weight)
    codes = codes.reshape(weight.shape).copy()
    missed = grid.values(codes.reshape(shape)).reshape(weight.shape) - weight
    own = np.diagonal(gram)
    for _ in range(sweeps):
        moved = False
        for start in range(0, depth, _ROWS):
            stop = min(start + _ROWS, depth)
            slope = gram[start:stop] @ missed
            for j in range(start, stop):
                scale = grid.scale[j // grid.block_size]
                code = np.rint(codes[j] - slope[j - start] / (own[j] * scale))
                np.clip(code, grid.lowest, grid.highest, out=code)
                change = (code - codes[j]) * scale
                columns = np.flatnonzero(change)
                if not len(columns):
                    continue
                moved = True
                codes[j] = code
                missed[j] += change
                # Few move in later sweeps.
                some = columns if 8 * len(columns) < len(change) else slice(None)
                slope[j - start :, some] += gram[j:stop, j, None] * change[some]
        if not moved:
            break
    return codes.reshape(shape)
