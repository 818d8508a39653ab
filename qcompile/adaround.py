"""AdaRound (arXiv 2004.10568): whether each weight goes up or down is learned, for its outputs.

Between the two codes around a weight lies a soft one, floor(w / s) + h with h in [0, 1] a
rectified sigmoid of what Adam learns. The loss is the squared error of the outputs, known whole by
the Gram matrix of the inputs, and a regulariser 1 − |2h − 1|^β that forces h to zero or one as β
falls. With all inputs in the Gram matrix there are no mini-batches, and nothing is random.

In the paper the grid is the weight's own. Here it is GPTQ's, its scales fitted to the outputs; what
was learned is then mended by coordinate descent (`qcompile.descent`), which may leave the two codes
around a weight; and a column keeps what GPTQ and descent alone lead to where that is better.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from qcompile.descent import best_of, damped, output_errors, refine
from qcompile.gptq import quantize_gptq, side_by_side
from qcompile.precision import QuantizedWeight
from qcompile.weight_blocks import Grid, as_grid, full_range, in_blocks

Array = npt.NDArray[Any]
Tensor = torch.Tensor

STEPS: Final = 200
RATE: Final = 0.1
"""Adam's; the paper takes 10,000 steps of a hundredth of that."""

WARM: Final = 0.2
"""Part of the steps before the regulariser comes in."""

FORCE: Final = 10.0
"""The regulariser's weight, where a weight's share of its column's loss starts at one."""

BETAS: Final = (20.0, 2.0)
STRETCH: Final = (-0.1, 1.1)
"""What the sigmoid's range is stretched to before it is cut to [0, 1], as in the paper."""

_COLUMNS: Final = 1024
_ALONE: Final = 1 << 20
"""Weights up to which one thread is taken: several wait for each other, long on a busy machine."""


def quantize_adaround(
    weight: Array, gram: Array, *, bits: int, block_size: int, symmetric: bool
) -> QuantizedWeight:
    """Codes of ``W [K, N]`` for inputs of second moments `gram`.

    By (w − ŵ)ᵀ G (w − ŵ), G damped as in GPTQ, no column is worse than GPTQ's or than rounded to
    nearest.

    Args:
        weight: float32 [K, N].
        gram: float [K, K], Σ xᵀx up to a factor.
        bits: 8 or 4.
        block_size: input channels of a block.
        symmetric: whether blocks have no zero point.
    """
    depth, width = weight.shape
    # A short last block is filled with channels that never move anything.
    more = -depth % block_size
    gram_ = damped(np.pad(gram, (0, more)))
    started = quantize_gptq(weight, gram, bits=bits, block_size=block_size, symmetric=symmetric)
    parts = []
    for start in range(0, width, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        wanted = in_blocks(weight[:, part], block_size)
        flat = wanted.reshape(-1, wanted.shape[-1])
        grid, codes = as_grid(started, part)
        grid, codes = refine(flat, grid, codes, gram_, rounds=3)
        with threads_for(flat):
            learned = learn_rounding(flat, grid, codes, gram_)
        other, learned = refine(flat, grid, learned, gram_, rounds=3)
        plain = full_range(wanted, bits=bits, symmetric=symmetric)
        tried = [(grid, codes), (other, learned), (plain, plain.nearest(wanted))]
        grid, codes = best_of(flat, tried, gram_)
        parts.append(grid.weight(codes, depth))
    return side_by_side(parts)


def learn_rounding(weight: Array, grid: Grid, codes: Array, gram: Array) -> Array:
    """The code below or above each weight, as it is learned; shapes as for `descend`.

    Args:
        codes: others, whose error is the measure of the loss.
    """
    target = weight.reshape(codes.shape) / grid.scale[:, None]
    below = np.floor(target)
    lowest, highest = (
        _tensor(np.broadcast_to(end - grid.zero_point[:, None], codes.shape), weight.shape)
        for end in (grid.lowest, grid.highest)
    )
    scale = _tensor(np.repeat(grid.scale, grid.block_size, axis=0), weight.shape)
    wanted, floor = _tensor(weight, weight.shape), _tensor(below, weight.shape)
    share = output_errors(weight, grid, codes, gram) / len(weight)
    slope_of = 2.0 * scale / torch.from_numpy(np.maximum(share, 1e-20).astype(np.float32))
    gram_ = torch.from_numpy(gram)
    low, high = STRETCH
    fraction = (_tensor(target, weight.shape) - floor).clamp(0.001, 0.999)
    free = torch.logit((fraction - low) / (high - low)).requires_grad_()
    adam = torch.optim.Adam([free], lr=RATE)

    def soft() -> Tensor:
        return (torch.sigmoid(free) * (high - low) + low).clamp(0.0, 1.0)

    for step in range(STEPS):
        h = soft()
        with torch.no_grad():
            code = floor + h
            inside = (code >= lowest) & (code <= highest)
            missed = torch.minimum(torch.maximum(code, lowest), highest) * scale - wanted
            slope = (gram_ @ missed) * slope_of * inside
        loss = (h * slope).sum()
        if step >= WARM * STEPS:
            done = (step / STEPS - WARM) / (1.0 - WARM)
            beta = BETAS[1] + (BETAS[0] - BETAS[1]) * 0.5 * (1.0 + math.cos(math.pi * done))
            loss = loss + FORCE * (1.0 - (2.0 * h - 1.0).abs().pow(beta)).sum()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    found = below + (soft().detach().numpy() >= 0.5).reshape(codes.shape)
    found += grid.zero_point[:, None]
    result: Array = np.clip(found, grid.lowest, grid.highest).astype(np.float32)
    return result


@contextlib.contextmanager
def threads_for(weight: Array) -> Iterator[None]:
    """One thread for a small `weight`."""
    before = torch.get_num_threads()
    try:
        if weight.size <= _ALONE:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def _tensor(values: Array, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32).reshape(shape))
