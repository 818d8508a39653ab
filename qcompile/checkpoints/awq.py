"""AWQ folders in the ``gemm`` layout, as AutoAWQ writes them (arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from qcompile.checkpoints.folder import TensorFolder
from qcompile.checkpoints.layout import in_blocks, unpack_words
from qcompile.errors import ModelError
from qcompile.precision import QuantizedWeight

PARTS: Final = ("qweight", "qzeros", "scales")
_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word the code of each of eight output channels lies."""


def check(settings: Mapping[str, Any]) -> str:
    """What the folder says of itself, in words.

    Raises:
        ModelError: bits or a layout that are not read.
    """
    bits = settings.get("bits", settings.get("w_bit"))
    layout = str(settings.get("version", settings.get("format", "gemm"))).lower()
    if bits != 4:
        raise ModelError(f"AWQ codes of {bits} bits are not read", hint="4 are")
    if layout != "gemm":
        raise ModelError(f"the AWQ layout {layout} is not read", hint="gemm is")
    size = settings.get("group_size", settings.get("q_group_size", -1))
    grouping = f"groups of {size}" if isinstance(size, int) and size > 0 else "one group a channel"
    return f"AWQ, {bits} bit, {grouping}"


def read(tensors: TensorFolder, name: str, settings: Mapping[str, Any]) -> QuantizedWeight:
    """The weight of the module `name`: codes and zero points packed along output channels.

    Raises:
        ModelError: tensors are missing or do not go together.
    """
    scale = tensors.floats(f"{name}.scales")
    codes, zeros = (
        _unpack(tensors, f"{name}.{part}", scale.shape[-1]) for part in ("qweight", "qzeros")
    )
    if len(codes) % max(len(scale), 1):
        raise ModelError(f"{name}: {len(scale)} groups do not divide {len(codes)} input channels")
    return in_blocks(name, codes, scale, zeros, bits=4, group=len(codes) // len(scale))


def _unpack(tensors: TensorFolder, name: str, width: int) -> np.ndarray:
    words = tensors.integers(name)
    if words.ndim != 2 or words.shape[1] * 8 != width:
        shape = "×".join(map(str, words.shape))
        raise ModelError(f"{name} is {shape}, for {width} output channels")
    packed = unpack_words(words, 4, 1).reshape(len(words), -1, 8)
    result: np.ndarray = packed[..., list(_PLACES)].reshape(len(words), width)
    return result
