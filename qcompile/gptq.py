"""GPTQ (arXiv 2210.17323): what rounding a weight does wrong is made up for by those rounded later.

For outputs y = xW, an error in W's row j (an input channel) can be undone in part by the rows that
are still float, as far as their channels are correlated: with H = Σ xᵀx, the rows of the upper
Cholesky factor of H⁻¹ say by how much. Rows are rounded in the order of falling diagonal of H
(activation order), in the blocks' own grids, which are fixed before: so codes stay in their places
and no kernel has to gather channels.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import linalg

from qcompile.clipping import clipped_range
from qcompile.precision import QuantizedWeight
from qcompile.weight_blocks import Grid, in_blocks

Array = npt.NDArray[Any]

DAMPING: Final = 0.01
"""Part of the mean of H's diagonal that is added to it: directions that calibration did not show
are not free."""

DRIFT_DAMPING: Final = 0.01

_LAZY: Final = 32
_COLUMNS: Final = 2048


def quantize_gptq(
    weight: Array,
    hessian: Array,
    drift: Array | None = None,
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
) -> QuantizedWeight:
    """Codes of ``W [K, N]`` for inputs of second moments `hessian`.

    A column whose error (w − ŵ)ᵀ H (w − ŵ) is not less than that of rounding to nearest in the same
    grid keeps those codes.

    Args:
        weight: float32 [K, N].
        hessian: float [K, K], Σ x̂ᵀx̂ up to a factor.
        drift: float [K, K], Σ x̂ᵀ(x − x̂) up to the same, where inputs x̂ stand for inputs x: W is
            first moved to what gives x W from x̂ best. None: they do not differ.
        bits: 8 or 4.
        block_size: input channels of a block.
        symmetric: whether blocks have no zero point.
    """
    depth, width = weight.shape
    if drift is not None:
        weight = weight + _solve(hessian, drift) @ weight
    diagonal = np.diagonal(hessian).astype(np.float64)
    order = np.argsort(-diagonal, kind="stable")
    factor = _factor(hessian, order)
    counts = np.pad(diagonal, (0, -depth % block_size)).reshape(-1, block_size)
    # A channel that calibration found dead still counts a little.
    counts = np.maximum(counts / max(float(diagonal.mean()), 1e-30), 1e-4)
    blocks = in_blocks(weight, block_size)
    grid = clipped_range(blocks, counts, bits=bits, symmetric=symmetric)
    nearest = grid.nearest(blocks).reshape(-1, width)[:depth]
    codes = np.empty_like(nearest)
    float_hessian = hessian.astype(np.float32)
    for start in range(0, width, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        wanted = np.ascontiguousarray(weight[:, part], np.float32)
        scale = np.repeat(grid.scale[:, part], block_size, axis=0)[:depth]
        zero = np.repeat(grid.zero_point[:, part], block_size, axis=0)[:depth]
        found = np.empty_like(wanted)
        found[order] = _round_in_turn(wanted[order], scale[order], zero[order], factor, grid)
        errors = []
        for tried in (nearest[:, part], found):
            missed = (tried - zero) * scale - wanted
            errors.append(np.einsum("kn,kn->n", missed, float_hessian @ missed))
        codes[:, part] = np.where(errors[1] < errors[0], found, nearest[:, part])
    return grid.weight(codes, depth)


def _solve(hessian: Array, drift: Array) -> Array:
    """(H + damping)⁻¹ drift, float32 [K, K]."""
    damped = hessian.astype(np.float64)
    mean = float(np.diagonal(damped).mean())
    damped[np.diag_indices_from(damped)] += DRIFT_DAMPING * mean if mean > 0.0 else 1.0
    return np.asarray(linalg.solve(damped, drift, assume_a="pos", check_finite=False), np.float32)


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


def _round_in_turn(left: Array, scale: Array, zero: Array, factor: Array, grid: Grid) -> Array:
    """Codes of `left` [K, N], row by row; rows far behind are corrected for `_LAZY` errors at once.

    `left` is used up.
    """
    codes, errors = np.empty_like(left), np.empty((_LAZY, left.shape[1]), np.float32)
    for start in range(0, len(left), _LAZY):
        stop = min(start + _LAZY, len(left))
        for j in range(start, stop):
            row = np.rint(left[j] / scale[j]) + zero[j]
            np.clip(row, grid.lowest, grid.highest, out=codes[j])
            error = (left[j] - (codes[j] - zero[j]) * scale[j]) / factor[j, j]
            errors[j - start] = error
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error
        left[stop:] -= factor[start:stop, stop:].T @ errors[: stop - start]
    return codes
