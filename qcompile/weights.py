"""Symmetric int8 weights per output channel, safe from 16-bit saturation where the target needs it.

A kernel built on vpmaddubsw multiplies two adjacent input channels 2i and 2i+1, unsigned code times
signed weight, and adds the products in 16 bits. It is exact if, for every pair and output channel,

    h_2i · max(w_2i, 0) + h_2i+1 · max(w_2i+1, 0) ≤ 32767, and likewise for the negative parts,

with h the highest code that each channel reaches. Making every weight fit by 7 bits, or by a larger
scale for the whole channel, costs accuracy everywhere; here the few pairs that break the bound are
moved to the nearest point that keeps it, and the scale is chosen for the least error of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]

LEVELS: Final = 127
LIMIT: Final = 32767
ENDS: Final = {8: (-LEVELS, LEVELS), 4: (-8, 7)}
"""The codes of so many bits: of eight, as many on either side."""

WHOLE: Final = (1.0,)
"""Of a range: no weight is clipped."""

_SHRINK: Final = {8: 0.80, 4: 0.50}
_STEPS: Final = {8: 8, 4: 11}
_BLOCK: Final = 256
_LAZY: Final = 16
_PAIRED: Final = 128  # input channels whose products are held at once, of all outputs
_ROW: Final = 4096  # values that are rounded at once: few calls, and rows that stay in the cache
_DAMPING: Final = 0.01
_HUGE: Final = 1e30


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """How input channels stand in for one another; Linears that share an input share it.

    Attributes:
        gram: Σ xᵀx within blocks of channels, [blocks, size, size].
        factors: upper Cholesky factors of the damped blocks' inverses, of the same shape: row j
            says how the channels after j make up for an error in j.
    """

    gram: Array
    factors: Array

    @classmethod
    def of(cls, gram: Array) -> Neighbours:
        """From a Gram matrix in blocks, as `qcompile.calibration.stats.Stats` holds it."""
        gram = np.nan_to_num(gram, posinf=_HUGE, neginf=-_HUGE)
        diagonal = np.einsum("bkk->bk", gram)
        damping = _DAMPING * diagonal.mean(axis=1) + 1e-12 * max(float(diagonal.max()), 1e-30)
        damped = gram + damping[:, None, None] * np.eye(gram.shape[1])
        return cls(gram, np.linalg.cholesky(np.linalg.inv(damped)).transpose(0, 2, 1))


def quantize_weight(
    weight: Array,
    second_moment: Array | None = None,
    highest: Array | None = None,
    neighbours: Neighbours | None = None,
    *,
    bits: int = 8,
    parts: Sequence[float] | None = None,
) -> QuantizedWeight:
    """Quantise ``W [K, N]``, each output channel with the scale of least error.

    With `neighbours`, rounding errors are then made up for by the weights that are rounded later
    (GPTQ, arXiv 2210.17323, within blocks of channels), where that lessens a channel's error.

    Args:
        weight: float32 [K, N].
        second_moment: E[x²] of the input channels, [K]: an error counts as much as it moves the
            output. None weighs all alike.
        highest: the highest uint8 code of each input channel, [K]. None: no constraint.
        neighbours: of the input channels; None rounds each weight for itself.
        bits: 8 or 4.
        parts: of the whole range, that are tried; None: from 0.8 up, of 4 bits from 0.5. In the
            `WHOLE` the largest weight is the largest code, or less for the sake of a pair.

    Returns:
        int8 codes [K, N] and float32 scale [N]. Time and memory are bounded by blocks of output
        channels.
    """
    depth, width = weight.shape
    importance = np.ones(depth) if second_moment is None else np.asarray(second_moment, np.float64)
    importance = np.maximum(importance / max(float(importance.mean()), 1e-30), 1e-6)
    counts = _apart(importance.astype(np.float32), 1.0)
    if highest is not None:
        highest = np.maximum(highest, 1).astype(np.float32)
    reach = None if highest is None else _apart(highest, 1.0)
    codes = np.empty((depth, width), np.int8)
    scale = np.empty(width, np.float32)
    for start in range(0, width, _BLOCK):
        part = slice(start, start + _BLOCK)
        block = _apart(np.ascontiguousarray(weight[:, part].T, np.float32), 0.0)
        found, scale[part] = _quantize_block(block, counts, reach, bits, parts)
        half = found.shape[1] // 2
        codes[0::2, part] = found[:, :half].T
        codes[1::2, part] = found[:, half : half + depth // 2].T
    if neighbours is not None:
        codes = _compensate(weight, codes, scale, highest, neighbours, bits)
    return QuantizedWeight(codes=codes, scale=scale, bits=bits)


def violations(codes: Array, highest: Array) -> int:
    """How many (pair, output channel, sign) of int8 `codes` [K, N] can leave 16 bits.

    Args:
        codes: int8 [K, N].
        highest: highest code of each input channel, [K].
    """
    reach = np.asarray(highest, np.int32)[:, None]
    count = 0
    for start in range(0, len(codes), _PAIRED):
        rows = slice(start, start + _PAIRED)
        wide = codes[rows].astype(np.int32) * reach[rows]
        for part in (np.maximum(wide, 0), np.maximum(-wide, 0)):
            # Of an odd number of channels the last has no partner.
            count += int((np.add.reduceat(part, range(0, len(part), 2)) > LIMIT).sum())
    return count


def kept_inside(codes: Array, target: Array, highest: Array, importance: Array) -> Array:
    """`codes` [K, N] with each pair that breaks the bound moved to the best that keeps it.

    Args:
        codes: within ±`LEVELS`.
        target: the weights in units of a code, [K, N].
        highest: highest code of each input channel, [K].
        importance: E[x²] of each input channel up to a factor, positive, [K].
    """
    pairs = _apart(codes.T.astype(np.float32), 0.0)
    _keep_pairs_inside(
        pairs,
        _apart(target.T, 0.0),
        _apart(np.maximum(highest, 1).astype(np.float32), 1.0),
        _apart(importance.astype(np.float32), 1.0),
    )
    result, half = np.empty_like(codes), pairs.shape[1] // 2
    result[0::2], result[1::2] = pairs[:, :half].T, pairs[:, half : half + len(codes) // 2].T
    return result


def _apart(values: Array, padding: float) -> Array:
    """Input channels [..., K] as the first of every pair, then the second of every pair."""
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)], constant_values=padding)
    return np.concatenate([values[..., 0::2], values[..., 1::2]], axis=-1)


def _quantize_block(
    block: Array,
    importance: Array,
    highest: Array | None,
    bits: int,
    parts: Sequence[float] | None,
) -> tuple[Array, Array]:
    """Codes [n, K] and scales [n] of output channels `block` [n, K], its pairs `_apart`."""
    least, most = ENDS[bits]
    top = np.maximum(np.abs(block).max(axis=1), 1e-30) / most
    # Both ways from the scale that maps the largest weight to 127: smaller ones clip a few weights
    # for a finer step, larger ones keep pairs inside the bound.
    down = np.linspace(_SHRINK[bits], 1.0, _STEPS[bits]) if parts is None else np.array(parts)
    ratios = np.repeat(down[:, None], len(block), axis=1)
    if highest is not None:
        enlarge = np.maximum(_safe_scale(block, highest) / top, 1.0)
        up = np.linspace(0.0, 1.0, _STEPS[bits] + 1)[1:, None]
        ratios = np.concatenate([ratios, 1.0 + (enlarge - 1.0) * up])
    best = np.full(len(block), np.inf)
    best_codes, best_scale = np.zeros_like(block), top.astype(np.float32)
    for ratio in ratios:
        scale = (top * ratio).astype(np.float32)
        target = block / scale[:, None]
        codes = np.clip(np.rint(target), least, most)
        if highest is not None:
            _keep_pairs_inside(codes, target, highest, importance)
        error = np.einsum("nk,k->n", np.square(target - codes), importance) * np.square(ratio)
        better = error < best
        best[better] = error[better]
        best_scale[better], best_codes[better] = scale[better], codes[better]
    return best_codes, best_scale


def _safe_scale(block: Array, highest: Array) -> Array:
    """The scale of each output channel [n] from which on no rounding can break the bound."""
    reached = [np.maximum(block, 0) * highest, np.maximum(-block, 0) * highest]
    pairs = [np.add(*np.split(part, 2, axis=1)).max(axis=1) for part in reached]
    # Rounding adds up to half a code to each of the two.
    result: Array = np.maximum(*pairs) / (LIMIT - 255)
    return result


def _keep_pairs_inside(codes: Array, target: Array, highest: Array, importance: Array) -> None:
    """Move, in place, each pair of `codes` [n, K] that breaks the bound to the best that keeps it.

    One code alone never breaks it (255 · 127 < 32767), so a pair that does has both codes of one
    sign. The real-valued optimum lies on the bound, at the foot of the error-weighted normal; the
    integers around it are tried, each with the largest partner that fits.
    """
    a, b = np.split(codes, 2, axis=1)
    high_a, high_b = np.split(highest, 2)
    row, pair = np.nonzero(np.abs(a * high_a + b * high_b) > LIMIT)
    if len(row) == 0:
        return
    sign = np.sign(a[row, pair])
    start_a, start_b = np.abs(a[row, pair]), np.abs(b[row, pair])
    want_a, want_b = (np.abs(part[row, pair]) for part in np.split(target, 2, axis=1))
    h_a, h_b = high_a[pair], high_b[pair]
    m_a, m_b = (part[pair] for part in np.split(importance, 2))
    excess = np.maximum(want_a * h_a + want_b * h_b - LIMIT, 0.0)
    foot = np.floor(want_a - excess * (h_a / m_a) / (h_a * h_a / m_a + h_b * h_b / m_b))
    best = np.full(len(row), np.inf)
    best_a, best_b = start_a.copy(), np.zeros_like(start_b)
    for step in range(-2, 3):
        try_a = np.clip(foot + step, 0, start_a)
        try_b = np.clip(np.floor((LIMIT - try_a * h_a) / h_b), 0, start_b)
        error = m_a * np.square(want_a - try_a) + m_b * np.square(want_b - try_b)
        better = error < best
        best = np.where(better, error, best)
        best_a, best_b = np.where(better, try_a, best_a), np.where(better, try_b, best_b)
    a[row, pair], b[row, pair] = sign * best_a, sign * best_b


def _compensate(
    weight: Array,
    codes: Array,
    scale: Array,
    highest: Array | None,
    neighbours: Neighbours,
    bits: int,
) -> Array:
    """GPTQ within blocks: `codes` [K, N], or better ones for the channels where they are found."""
    depth, width = weight.shape
    gram, factors = neighbours.gram.astype(np.float32), neighbours.factors.astype(np.float32)
    blocks, size = gram.shape[:2]

    def blocked(values: Array, padding: float = 0.0) -> Array:
        """[K, ...] as [size, blocks, ...]: one channel of every block is a row."""
        wide = np.full((blocks * size, *values.shape[1:]), padding, np.float32)
        wide[:depth] = values
        return np.ascontiguousarray(wide.reshape(blocks, size, *values.shape[1:]).swapaxes(0, 1))

    reach = None if highest is None else blocked(highest[:depth], 1.0)
    result = codes.copy()
    columns = max(_ROW // blocks, 1)
    for start in range(0, width, columns):
        part = slice(start, start + columns)
        wanted = blocked(weight[:, part])
        rounded = _round_in_turn(wanted / scale[part], reach, factors, ENDS[bits])
        errors = []
        for candidate in (blocked(codes[:, part]), rounded):
            miss = (wanted - candidate * scale[part]).swapaxes(0, 1)
            errors.append(np.einsum("bkn,bkn->n", miss, gram @ miss))
        better = errors[1] < errors[0]
        rounded = rounded.swapaxes(0, 1).reshape(blocks * size, -1)[:depth]
        result[:, part] = np.where(better, rounded, codes[:, part])
    return result


def _round_in_turn(
    left: Array, reach: Array | None, factors: Array, ends: tuple[int, int]
) -> Array:
    """Round `left` [size, blocks, N], in units of a code, row by row; later rows make up for each
    error.

    Rows far behind are corrected for `_LAZY` errors at once: one matrix product.
    """
    made, errors = np.empty_like(left), np.empty_like(left)
    size = len(left)
    for start in range(0, size, _LAZY):
        stop = min(start + _LAZY, size)
        for j in range(start, stop):
            code = np.clip(np.rint(left[j]), *ends)
            if reach is not None and j % 2:
                before = made[j - 1]
                room = np.floor(
                    (LIMIT - np.abs(before) * reach[j - 1, :, None]) / reach[j, :, None]
                )
                crowded = (before * code > 0) & (np.abs(code) > room)
                code[crowded] = np.sign(code[crowded]) * room[crowded]
            made[j] = code
            errors[j] = (left[j] - code) / factors[:, j, j, None]
            left[j + 1 : stop] -= factors[:, j, j + 1 : stop].T[:, :, None] * errors[j]
        made_up = factors[:, start:stop, stop:].swapaxes(1, 2) @ errors[start:stop].swapaxes(0, 1)
        left[stop:] -= made_up.swapaxes(0, 1)
    return made
