"""GPTQ (arXiv 2210.17323): what rounding a weight does wrong is made up for by those rounded later.

For outputs y = xW, an error in W's row j (an input channel) can be undone in part by the rows that
are still float, as far as their channels are correlated: with H = Σ xᵀx, the rows of the upper
Cholesky factor of H⁻¹ say by how much. The channels that matter most come first (activation
order): blocks in the order of the largest diagonal of H in them, channels within a block in the
order of their own. So each block's range is found from weights that the errors before have moved
already, and codes stay in their places: no kernel has to gather channels. What is found then goes
through coordinate descent (`qcompile.descent`).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import linalg

from qcompile.clipping import clipped_range
from qcompile.descent import damped, refine
from qcompile.precision import QuantizedWeight
from qcompile.weight_blocks import Grid, in_blocks

Array = npt.NDArray[Any]

DAMPING: Final = 0.01
"""Part of the mean of H's diagonal that is added to it: directions that calibration did not show
are not free."""

ROUNDS: Final = 2
"""Of better scales and codes, from what GPTQ leads to."""

_COLUMNS: Final = 2048


def quantize_gptq(
    weight: Array, hessian: Array, *, bits: int, block_size: int, symmetric: bool
) -> QuantizedWeight:
    """Codes of ``W [K, N]`` for inputs of second moments `hessian`.

    A column whose error (w − ŵ)ᵀ H (w − ŵ) is not less than that of rounding to nearest in clipped
    ranges is rounded so.

    Args:
        weight: float32 [K, N].
        hessian: float [K, K], Σ xᵀx up to a factor.
        bits: 8 or 4.
        block_size: input channels of a block.
        symmetric: whether blocks have no zero point.
    """
    depth = len(weight)
    order = _activation_order(np.diagonal(hessian), block_size)
    factor = _factor(hessian, order)
    counts = importance_in_blocks(np.diagonal(hessian), block_size)
    float_hessian = hessian.astype(np.float32)
    # A short last block is filled with channels that never move anything.
    whole = damped(np.pad(hessian, (0, -depth % block_size)))
    parts = []
    for start in range(0, weight.shape[1], _COLUMNS):
        wanted = np.ascontiguousarray(weight[:, start : start + _COLUMNS], np.float32)
        blocks = in_blocks(wanted, block_size)
        plain = clipped_range(blocks, counts, bits=bits, symmetric=symmetric)
        nearest = plain.nearest(blocks)
        codes, grid = _round_in_turn(wanted, order, factor, counts, plain)
        grid, codes = refine(blocks.reshape(-1, blocks.shape[2]), grid, codes, whole, rounds=ROUNDS)
        tried = [plain.values(nearest), grid.values(codes)]
        missed = [each.reshape(-1, wanted.shape[1])[:depth] - wanted for each in tried]
        errors = [np.einsum("kn,kn->n", each, float_hessian @ each) for each in missed]
        better = errors[1] < errors[0]
        chosen = Grid(
            np.where(better, grid.scale, plain.scale),
            np.where(better, grid.zero_point, plain.zero_point),
            block_size, bits, symmetric,
        )  # fmt: skip
        parts.append(chosen.weight(np.where(better, codes, nearest), depth))
    return side_by_side(parts)


def importance_in_blocks(diagonal: Array, block_size: int) -> Array:
    """E[x²] of the input channels, [blocks, block_size], its mean one; what calibration found dead
    still counts a little."""
    padded = np.pad(diagonal.astype(np.float64), (0, -len(diagonal) % block_size))
    counts = np.maximum(padded / max(float(diagonal.mean()), 1e-30), 1e-4)
    result: Array = counts.reshape(-1, block_size).astype(np.float32)
    return result


def _activation_order(diagonal: Array, block_size: int) -> Array:
    """Blocks by falling largest E[x²], channels within each by falling E[x²], [K]."""
    padded = np.pad(diagonal.astype(np.float64), (0, -len(diagonal) % block_size))
    blocks = np.argsort(-padded.reshape(-1, block_size).max(axis=1), kind="stable")
    parts = []
    for block in blocks:
        own = np.arange(block * block_size, min((block + 1) * block_size, len(diagonal)))
        parts.append(own[np.argsort(-diagonal[own], kind="stable")])
    return np.concatenate(parts)


def _factor(hessian: Array, order: Array) -> Array:
    """Upper U with UᵀU = H⁻¹, rows in `order`, float32 [K, K]."""
    damped = hessian[np.ix_(order, order)].astype(np.float64)
    mean = float(np.diagonal(damped).mean())
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0.0 else 1.0
    inverse = linalg.cho_solve(
        linalg.cho_factor(damped, lower=True, overwrite_a=True, check_finite=False),
        np.eye(len(damped)),
        overwrite_b=True,
        check_finite=False,
    )
    upper = linalg.cholesky(inverse, lower=False, overwrite_a=True, check_finite=False)
    result: Array = upper.astype(np.float32)
    return result


def _round_in_turn(
    weight: Array, order: Array, factor: Array, counts: Array, plain: Grid
) -> tuple[Array, Grid]:
    """Codes [blocks, block_size, N] and grid of `weight` [K, N], block after block.

    Blocks that come later are corrected for the errors of a whole block at once.
    """
    size, bits, symmetric = plain.block_size, plain.bits, plain.symmetric
    left = weight[order]
    scale, zero = plain.scale.copy(), plain.zero_point.copy()
    codes = np.repeat(zero[:, None], size, axis=1)
    start = 0
    while start < len(left):
        block = int(order[start]) // size
        stop = start + min(size, len(weight) - block * size)
        now = np.zeros((1, size, weight.shape[1]), np.float32)
        now[0, order[start:stop] - block * size] = left[start:stop]
        grid = clipped_range(now, counts[block : block + 1], bits=bits, symmetric=symmetric)
        scale[block], zero[block] = grid.scale[0], grid.zero_point[0]
        errors = np.empty((stop - start, weight.shape[1]), np.float32)
        for j in range(start, stop):
            row = np.rint(left[j] / scale[block]) + zero[block]
            np.clip(row, grid.lowest, grid.highest, out=row)
            codes[block, order[j] - block * size] = row
            error = (left[j] - (row - zero[block]) * scale[block]) / factor[j, j]
            errors[j - start] = error
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error
        left[stop:] -= factor[start:stop, stop:].T @ errors
        start = stop
    return codes, Grid(scale, zero, size, bits, symmetric)


def side_by_side(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """One weight of several columns' each, rounded alike."""
    first = parts[0]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedWeight(
        codes=np.concatenate([part.codes for part in parts], axis=1),
        scale=np.concatenate([part.scale for part in parts], axis=1),
        block_size=first.block_size,
        bits=first.bits,
        zero_point=np.concatenate(zeros, axis=1) if zeros else None,
    )
