"""Codes of any grouping, in the blocks that kernels for quantised weights take."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import ModelError
from qcompile.passes.weight_only import BLOCK_SIZES
from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]


def unpack_words(words: Array, bits: int, axis: int) -> Array:
    """Unsigned `bits`-bit codes out of int32 `words` along `axis`, those of low bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    wide = np.moveaxis(np.ascontiguousarray(words).view(np.uint32), axis, -1)[..., None]
    codes = ((wide >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8)
    flat = codes.reshape(*codes.shape[:-2], -1)
    result: Array = np.moveaxis(flat, -1, axis)
    return result


def in_blocks(
    name: str,
    codes: Array,
    scale: Array,
    zero_point: Array,
    *,
    bits: int,
    group: int,
    order: Array | None = None,
    offset: Array | None = None,
) -> QuantizedWeight:
    """Codes in groups of input channels as blocks of a size that the kernels take.

    Where a group is larger than any block, or no power of two, several blocks have its scale.

    Args:
        name: of the module, for errors.
        codes: unsigned [K, N].
        scale: float32 [groups, N].
        zero_point: unsigned, of the shape of `scale`, below 2^bits.
        bits: of a code, 4 or 8.
        group: input channels that share a scale; the last group may be short.
        order: see `QuantizedWeight`.
        offset: float32, of the shape of `scale`, or None; see `QuantizedWeight`.

    Raises:
        ModelError: shapes that do not go together, or groups that no block size divides.
    """
    depth, width = codes.shape
    groups = -(-depth // group)
    if scale.shape != (groups, width) or zero_point.shape != scale.shape:
        raise ModelError(
            f"{name}: scales of {_by(scale)} and zero points of {_by(zero_point)} do not fit codes "
            f"of {_by(codes)} in groups of {group}"
        )
    sizes = [size for size in BLOCK_SIZES if group % size == 0 or groups == 1]
    if not sizes:
        raise ModelError(f"{name}: no block of a kernel divides groups of {group} input channels")
    # One group has the block that fits best: short weights are padded to whole blocks.
    size = max((s for s in sizes if s < 2 * depth), default=min(sizes))
    of_block = np.arange(0, depth, size) // group
    middle = 2 ** (bits - 1)
    points = (zero_point.astype(np.int16) - middle).astype(np.int8)[of_block]
    return QuantizedWeight(
        codes=(codes.astype(np.int16) - middle).astype(np.int8),
        scale=np.ascontiguousarray(scale[of_block], np.float32),
        block_size=size,
        bits=bits,
        zero_point=points if points.any() else None,
        order=order,
        offset=offset[of_block] if offset is not None and offset.any() else None,
    )


def _by(array: Array) -> str:
    return "×".join(map(str, array.shape))
