"""GPTQ and learned rounding of weights with one scale per output channel.

The steps are those of weights in blocks (`qcompile.gptq`, `qcompile.adaround`), with one block of
all input channels. What is more: pairs of codes that a kernel's 16 bits cannot add are moved inside
(`qcompile.weights`), and an output channel keeps the best of what every step led to.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from qcompile.adaround import learn_rounding, threads_for
from qcompile.descent import best_of, damped, refine
from qcompile.gptq import ROUNDS
from qcompile.precision import QuantizedWeight
from qcompile.weight_blocks import Grid
from qcompile.weights import ENDS, Neighbours, kept_inside, quantize_weight

Array = npt.NDArray[Any]

_COLUMNS: Final = 1024


def quantize_channels(
    weight: Array,
    gram: Array,
    method: Literal["gptq", "adaround"],
    *,
    bits: int = 8,
    highest: Array | None = None,
) -> QuantizedWeight:
    """Codes of ``W [K, N]`` for inputs of second moments `gram`.

    By (w − ŵ)ᵀ G (w − ŵ), G damped, no output channel is worse than GPTQ without descent, and that
    none than rounded to nearest.

    Args:
        weight: float32 [K, N].
        gram: float64 [K, K], Σ xᵀx up to a factor.
        method: ``gptq`` is followed by coordinate descent, ``adaround`` by learned rounding too.
        bits: 8 or 4.
        highest: see `quantize_weight`.

    Returns:
        int8 codes [K, N] and float32 scale [N].
    """
    moment = np.diagonal(gram)
    neighbours = Neighbours.of(gram[None])
    started = quantize_weight(weight, moment, highest, neighbours, bits=bits)
    objective = damped(gram)
    codes, scales = np.empty_like(started.codes), np.empty_like(started.scale)
    for start in range(0, weight.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        wanted = np.array(weight[:, part], np.float32, order="C")
        scale = started.scale[None, part]
        grid = Grid(scale, np.zeros_like(scale), len(weight), bits, symmetric=True)
        found = started.codes[None, :, part].astype(np.float32)
        tried = [(grid, found)]
        grid, found = refine(wanted, grid, found, objective, rounds=ROUNDS)
        tried.append((grid, found))
        if method == "adaround":
            with threads_for(wanted):
                learned = learn_rounding(wanted, grid, found, objective)
            tried.append(refine(wanted, grid, learned, objective, rounds=ROUNDS))
        safe = [(g, _inside(wanted, g, c, moment, highest)) for g, c in tried]
        grid, found = best_of(wanted, safe, objective)
        codes[:, part], scales[part] = found[0], grid.scale[0]
    return QuantizedWeight(codes=codes, scale=scales, bits=bits)


def _inside(wanted: Array, grid: Grid, codes: Array, moment: Array, highest: Array | None) -> Array:
    """`codes` [1, K, N] as kernels take them."""
    codes = np.clip(codes[0], *ENDS[grid.bits])
    if highest is not None:
        importance = np.maximum(moment / max(float(moment.mean()), 1e-30), 1e-6)
        codes = kept_inside(codes, wanted / grid.scale, highest, importance)
    result: Array = codes[None]
    return result
