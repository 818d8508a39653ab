"""Whole input channels in float beside GPTQ's codes: SpQR (arXiv 2306.03078), channel-sparse.

The paper keeps single weights in float, those that rounding hurts most, as a sparse matrix. Here
whole rows of W stay, k of them: a Gather of k channels and a product [M, k] × [k, N], for which
every runtime has a fast kernel. Rows are chosen, one after the other, by how much of the error at
the output goes with them, an error of a weight counting 1 / [H⁻¹]_jj with H = Σ xᵀx, as in the
paper: their own, and what they cost the rows that share a block's range with them.

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
from qcompile.weight_blocks import in_blocks

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
        kept = _most_harmful(
            weight, damped, count, bits=bits, block_size=block_size, symmetric=symmetric
        )
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


def _most_harmful(
    weight: Array, damped: Array, count: int, *, bits: int, block_size: int, symmetric: bool
) -> Array:
    """The rows that rounding hurts most, one after the other, int64 [count], ascending."""
    blocks = in_blocks(weight, block_size)
    counts = 1.0 / np.diagonal(linalg.inv(damped, check_finite=False))
    counts = np.pad(counts, (0, -len(counts) % block_size)).reshape(len(blocks), block_size)
    steps = 2 ** (bits - 1) if symmetric else 2**bits - 1
    gains = np.stack([_gains(*each, steps, symmetric) for each in zip(blocks, counts, strict=True)])
    left = (np.arange(counts.size) < len(weight)).reshape(counts.shape)
    for _ in range(count):
        block, row = divmod(int(np.where(left, gains, -np.inf).argmax()), block_size)
        left[block, row] = False
        blocks[block, row] = counts[block, row] = 0.0
        gains[block] = _gains(blocks[block], counts[block], steps, symmetric)
    return np.flatnonzero(~left.reshape(-1)[: len(weight)]).astype(np.int64)


def _gains(block: Array, counts: Array, steps: int, symmetric: bool) -> Array:
    """By how much the error of `block` [block_size, N] falls if one of its rows leaves it,
    [block_size]: a step of s makes s² / 12, and the row may have been what sets the step."""
    ends = (np.abs(block),) if symmetric else (block, -block)
    reach = np.zeros(block.shape[1])
    without = np.zeros(block.shape)
    for end in ends:
        second, first = np.maximum(np.partition(end, -2, axis=0)[-2:], 0.0)
        reach += first
        without += np.where(end == first, second, first)
    noise, left = np.square(reach / steps), np.square(without / steps)
    whole = counts.sum()
    result: Array = (whole * noise - (whole - counts)[:, None] * left).sum(axis=1) / 12.0
    return result
