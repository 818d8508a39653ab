"""The blocks of GGUF tensors, taken apart into codes, scales and offsets.

Every type is ``scale · (code − zero)``, or ``scale · code + minimum`` with a minimum that is no
multiple of the scale. That takes a zero point near it, and what is left over as an offset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.checkpoints.layout import in_blocks
from qcompile.errors import ModelError
from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]
_K: Final = 256


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A tensor taken apart.

    Attributes:
        codes: unsigned [N, K].
        scale: float32 [N, K / size].
        zero: unsigned code of zero, one for all; or float32 minima of the shape of `scale`.
    """

    codes: Array
    scale: Array
    zero: int | Array


@dataclasses.dataclass(frozen=True)
class BlockType:
    """One of GGUF's types.

    Attributes:
        weights: of a block as it is stored.
        size: of what shares a scale.
        bits: of a code, as it is shipped.
        take_apart: uint8 [blocks, bytes] -> codes [blocks, weights], scale and zero.
    """

    weights: int
    size: int
    bits: int
    take_apart: Callable[[Array], Blocks]


def read_blocks(name: str, data: Array, kind: str, depth: int) -> QuantizedWeight:
    """The weight [K, N] of a tensor.

    Args:
        name: of the tensor, for errors.
        data: uint8 [N, bytes of a row].
        kind: one of `TYPES`.
        depth: K.

    Raises:
        ModelError: a scale that is no number.
    """
    of = TYPES[kind]
    width = len(data)
    found = of.take_apart(data.reshape(width * depth // of.weights, -1))
    codes = found.codes.reshape(width, depth).T
    scale = found.scale.reshape(width, -1).T.astype(np.float32)
    if not np.isfinite(scale).all():
        raise ModelError(f"{name} holds NaN or Inf values")
    if isinstance(found.zero, int):
        zeros, offset = np.full(scale.shape, found.zero, np.uint8), None
    else:
        minimum = found.zero.reshape(width, -1).T.astype(np.float32)
        zeros, offset = _nearest_zero(scale, minimum, 2**of.bits - 1)
    return in_blocks(
        name, codes, scale, zeros, bits=of.bits, group=of.size, offset=offset
    )  # fmt: skip


def _nearest_zero(scale: Array, minimum: Array, highest: int) -> tuple[Array, Array]:
    """Zero points and offsets: ``s · code + minimum = s · (code − zero) + offset``, exactly.

    Near the zero point the offset is small, so that a kernel that rounds activations rounds what
    matters.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.nan_to_num(-minimum / scale, nan=0.0)
    zeros = np.clip(np.rint(ratio), 0, highest)
    exact = minimum.astype(np.float64) + scale.astype(np.float64) * zeros
    offset = exact.astype(np.float32)
    zeros = np.where(offset == exact, zeros, 0.0)
    return zeros.astype(np.uint8), np.where(offset == exact, offset, minimum)


def _half(blocks: Array, at: int) -> Array:
    """float16 at byte `at`, as float32 [blocks, 1]."""
    wide: Array = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)
    return wide


def _nibbles(packed: Array, run: int) -> Array:
    """Codes of which the low halves of `run` bytes come first, then their high halves."""
    groups = packed.reshape(len(packed), -1, run)
    return np.stack([groups & 15, groups >> 4], axis=2).reshape(len(packed), -1)


def _fifth_bits(packed: Array) -> Array:
    """Bit 4 of 32 codes, out of four bytes."""
    bits: Array = np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little") << 4
    return bits


def _q4_0(blocks: Array) -> Blocks:
    return Blocks(_nibbles(blocks[:, 2:], 16), _half(blocks, 0), 8)


def _q4_1(blocks: Array) -> Blocks:
    return Blocks(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Array) -> Blocks:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return Blocks(codes + np.uint8(128 - 16), _half(blocks, 0), 128)


def _q5_1(blocks: Array) -> Blocks:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return Blocks(codes, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Array) -> Blocks:
    return Blocks(blocks[:, 2:] ^ 0x80, _half(blocks, 0), 128)  # signed to unsigned


def _k_scales(blocks: Array) -> tuple[Array, Array]:
    """Scales and minima of eight sub-blocks: six bits each, in twelve bytes, times two halves."""
    low, middle, high = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minimum = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return _half(blocks, 0) * scale, -(_half(blocks, 2) * minimum)


def _q4_k(blocks: Array) -> Blocks:
    return Blocks(_nibbles(blocks[:, 16:], 32), *_k_scales(blocks))


def _q5_k(blocks: Array) -> Blocks:
    places = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (blocks[:, None, 16:48] >> places & 1) << 4
    codes = _nibbles(blocks[:, 48:], 32) | fifth.reshape(len(blocks), _K)
    return Blocks(codes, *_k_scales(blocks))


def _q6_k(blocks: Array) -> Blocks:
    low = _nibbles(blocks[:, :128], 64)
    places = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> places & 3) << 4
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    codes = (low | high.reshape(-1, _K)) + np.uint8(128 - 32)
    return Blocks(codes, _half(blocks, 208) * scales, 128)


TYPES: Final[Mapping[str, BlockType]] = {
    "Q4_0": BlockType(32, 32, 4, _q4_0),
    "Q4_1": BlockType(32, 32, 4, _q4_1),
    "Q5_0": BlockType(32, 32, 8, _q5_0),
    "Q5_1": BlockType(32, 32, 8, _q5_1),
    "Q8_0": BlockType(32, 32, 8, _q8_0),
    "Q4_K": BlockType(_K, 32, 4, _q4_k),
    "Q5_K": BlockType(_K, 32, 8, _q5_k),
    "Q6_K": BlockType(_K, 16, 8, _q6_k),
}
"""Those that are read. What has five or six bits ships in eight."""
