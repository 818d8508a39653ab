"""Symmetric weights in blocks of input channels, for kernels that take float activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.precision import Precision, QuantizedWeight

Array = npt.NDArray[Any]

BLOCK_SIZE: Final = 32
BITS: Final[Mapping[Precision, int]] = {"weight8": 8, "weight4": 4}


def quantize_blocks(weight: Array, *, bits: int, block_size: int = BLOCK_SIZE) -> QuantizedWeight:
    """Round ``W [K, N]`` to nearest, one scale per block of `block_size` input channels and column.

    The largest magnitude of a block maps to the lowest code, −2^(bits−1), which has one more step
    than the highest: its sign is the scale's, as in llama.cpp's Q4_0.

    Args:
        weight: float32 [K, N].
        bits: 8 or 4.
        block_size: a multiple of 16; the last block may be short.

    Returns:
        codes int8 [K, N] in [−2^(bits−1), 2^(bits−1) − 1], float32 scale [ceil(K / block_size), N].
    """
    depth, width = weight.shape
    padded = np.pad(weight.astype(np.float32), ((0, -depth % block_size), (0, 0)))
    blocks = padded.reshape(-1, block_size, width)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    at = np.abs(blocks).argmax(axis=1, keepdims=True)
    extreme = np.take_along_axis(blocks, at, axis=1)
    scale = extreme / lowest
    scale = np.where(scale == 0.0, np.float32(1.0), scale)
    codes = np.clip(np.rint(blocks / scale), lowest, highest).astype(np.int8)
    return QuantizedWeight(
        codes=codes.reshape(-1, width)[:depth],
        scale=scale[:, 0, :].astype(np.float32),
        block_size=block_size,
        bits=bits,
    )
