"""Weights in blocks of input channels, for kernels that take float activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.precision import Precision, QuantizedWeight

Array = npt.NDArray[Any]

BLOCK_SIZE: Final = 32
BITS: Final[Mapping[Precision, int]] = {"weight8": 8, "weight4": 4}
_TINY: Final = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that the weights of each block can take: ``(code − zero_point) · scale``.

    Attributes:
        scale: float32 [blocks, N], never zero.
        zero_point: float32 [blocks, N], whole numbers within the codes; zeros where symmetric.
        block_size: input channels of a block.
        bits: of a code, 8 or 4; codes are −2^(bits−1) to 2^(bits−1) − 1.
        symmetric: whether there are no zero points to store.
    """

    scale: Array
    zero_point: Array
    block_size: int
    bits: int
    symmetric: bool

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def nearest(self, blocks: Array) -> Array:
        """Codes, float32, of `blocks` [blocks, block_size, N]."""
        codes = np.rint(blocks / self.scale[:, None]) + self.zero_point[:, None]
        result: Array = np.clip(codes, self.lowest, self.highest, out=codes)
        return result

    def values(self, codes: Array) -> Array:
        """What `codes` [blocks, block_size, N] stand for."""
        result: Array = (codes - self.zero_point[:, None]) * self.scale[:, None]
        return result

    def weight(self, codes: Array, depth: int) -> QuantizedWeight:
        """`codes` [blocks, block_size, N] or [K, N] of a weight of `depth` input channels."""
        return QuantizedWeight(
            codes=codes.reshape(-1, codes.shape[-1])[:depth].astype(np.int8),
            scale=self.scale.astype(np.float32),
            block_size=self.block_size,
            bits=self.bits,
            zero_point=None if self.symmetric else self.zero_point.astype(np.int8),
        )


def in_blocks(weight: Array, block_size: int) -> Array:
    """``W [K, N]`` as float32 [blocks, block_size, N], the last block padded with zeros."""
    padded = np.pad(weight.astype(np.float32), ((0, -len(weight) % block_size), (0, 0)))
    return padded.reshape(-1, block_size, weight.shape[1])


def as_grid(found: QuantizedWeight, columns: slice = slice(None)) -> tuple[Grid, Array]:
    """The grid of a weight in blocks, or of some `columns` of it, and its codes [blocks,
    block_size, N]; a short last block is filled with the code of zero."""
    assert found.block_size is not None
    scale = np.ascontiguousarray(found.scale[:, columns])
    zero = np.zeros_like(scale)
    if found.zero_point is not None:
        zero = found.zero_point[:, columns].astype(np.float32)
    codes = np.repeat(zero, found.block_size, axis=0)
    codes[: len(found.codes)] = found.codes[:, columns]
    grid = Grid(scale, zero, found.block_size, found.bits, found.zero_point is None)
    return grid, codes.reshape(len(scale), found.block_size, -1)


def full_range(blocks: Array, *, bits: int, symmetric: bool) -> Grid:
    """The grid that clips nothing, but for half a step.

    Symmetric, the largest magnitude of a block maps to the lowest code, −2^(bits−1), which has one
    more step than the highest: its sign is the scale's, as in llama.cpp's Q4_0. Asymmetric, the
    range is the block's own with zero in it.

    Args:
        blocks: float32 [blocks, block_size, N].
        bits: 8 or 4.
        symmetric: whether zero is the middle code.
    """
    size = blocks.shape[1]
    if symmetric:
        at = np.abs(blocks).argmax(axis=1, keepdims=True)
        extreme = np.take_along_axis(blocks, at, axis=1)[:, 0]
        return symmetric_grid(extreme, bits, size)
    low = np.minimum(blocks.min(axis=1), 0.0)
    high = np.maximum(blocks.max(axis=1), 0.0)
    return affine_grid(low, high, bits, size)


def symmetric_grid(extreme: Array, bits: int, block_size: int) -> Grid:
    """The lowest code stands for `extreme` [blocks, N]."""
    scale = (extreme / -(2 ** (bits - 1))).astype(np.float32)
    scale = np.where(scale == 0.0, np.float32(1.0), scale)
    return Grid(scale, np.zeros_like(scale), block_size, bits, symmetric=True)


def affine_grid(low: Array, high: Array, bits: int, block_size: int) -> Grid:
    """The codes reach from `low` ≤ 0 to `high` ≥ 0, [blocks, N] each, zero a code exactly."""
    steps = 2**bits - 1
    scale = ((high - low) / steps).astype(np.float32)
    scale = np.where(scale < _TINY, np.float32(1.0), scale)
    zero_point = np.clip(np.rint(-low / scale), 0, steps) - 2 ** (bits - 1)
    return Grid(scale, zero_point.astype(np.float32), block_size, bits, symmetric=False)


def quantize_blocks(
    weight: Array, *, bits: int, block_size: int = BLOCK_SIZE, symmetric: bool = True
) -> QuantizedWeight:
    """Round ``W [K, N]`` to nearest, one scale per block of `block_size` input channels and column.

    Args:
        weight: float32 [K, N].
        bits: 8 or 4.
        block_size: a multiple of 16; the last block may be short.
        symmetric: see `full_range`.

    Returns:
        codes int8 [K, N] in [−2^(bits−1), 2^(bits−1) − 1], float32 scale [ceil(K / block_size), N]
        and, where asymmetric, int8 zero points of the same shape.
    """
    blocks = in_blocks(weight, block_size)
    grid = full_range(blocks, bits=bits, symmetric=symmetric)
    return grid.weight(grid.nearest(blocks), len(weight))
