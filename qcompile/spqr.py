"""Whole input channels in float beside GPTQ's codes: SpQR (arXiv 2306.03078), channel-sparse.

The paper keeps single weights in float, those that rounding hurts most, as a sparse matrix. Here
whole rows of W stay, k of them: a Gather of k channels and a product [M, k] × [k, N], for which
every runtime has a fast kernel. Rows are chosen by what rounding them costs at the output once the
others have made up for it, Σ_n (w − ŵ)² / [H⁻¹]_jj with H = Σ xᵀx, and left out of their block's
range.

Rows in float can make up for what the others do wrong. With them at their best, E_S = −H_SS⁻¹ H_SR
E_R for errors E_R of the rounded rows, the error that is left is that of E_R under the Schur
complement H_RR − H_RS H_SS⁻¹ H_SR: GPTQ rounds for that one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

from qcompile.gptq import DAMPING, quantize_gptq
from qcompile.precision import Kept, QuantizedWeight
from qcompile.weight_blocks import full_range, in_blocks

Array = npt.NDArray[Any]


def quantize_spqr(
    weight: Array,
    hessian: Array,
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    count: int,
    channels: Sequence[int] | None = None,
) -> QuantizedWeight:
    """Codes of ``W [K, N]`` for inputs of second moments `hessian`, some of its rows in float.

    Args:
        weight: float32 [K, N].
        hessian: float [K, K], Σ xᵀx up to a factor.
        bits: 8 or 4.
        block_size: input channels of a block.
        symmetric: whether blocks have no zero point.
        count: rows that stay in float.
        channels: which; None: those that rounding hurts most.
    """
    damped = hessian.astype(np.float64)
    mean = float(np.diagonal(damped).mean())
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0.0 else 1.0
    if channels is None:
        harm = _harm(weight, damped, bits=bits, block_size=block_size, symmetric=symmetric)
        kept = np.sort(np.argsort(-harm, kind="stable")[:count]).astype(np.int64)
    else:
        kept = np.unique(np.array(channels, np.int64))
    rest = np.setdiff1d(np.arange(len(weight)), kept)
    # How the kept rows follow the errors of the others: E_S = −follow · E_R.
    follow = linalg.solve(damped[np.ix_(kept, kept)], damped[np.ix_(kept, rest)], assume_a="pos")
    left = np.zeros_like(damped)
    left[np.ix_(rest, rest)] = (
        hessian[np.ix_(rest, rest)] - damped[np.ix_(rest, kept)] @ follow
    )  # fmt: skip
    rounded = weight.astype(np.float32)
    rounded[kept] = 0.0
    found = quantize_gptq(rounded, left, bits=bits, block_size=block_size, symmetric=symmetric)
    errors = (found.dequantized() - rounded)[rest]
    moved = (weight[kept] - follow @ errors).astype(np.float32)
    return dataclasses.replace(found, kept=Kept(kept, moved))


def _harm(weight: Array, damped: Array, *, bits: int, block_size: int, symmetric: bool) -> Array:
    """What rounding each row costs, [K]."""
    blocks = in_blocks(weight, block_size)
    grid = full_range(blocks, bits=bits, symmetric=symmetric)
    missed = (grid.values(grid.nearest(blocks)) - blocks).reshape(-1, weight.shape[1])
    inverse = np.diagonal(linalg.inv(damped, check_finite=False))
    result: Array = np.square(missed[: len(weight)]).sum(axis=1) / inverse
    return result
