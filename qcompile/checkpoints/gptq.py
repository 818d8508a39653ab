"""GPTQ folders, as AutoGPTQ and GPTQModel write them (arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from qcompile.checkpoints.folder import TensorFolder
from qcompile.checkpoints.layout import in_blocks, unpack_words
from qcompile.errors import ModelError
from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]

PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_BITS: Final = (4, 8)
_FORMATS: Final = ("gptq", "gptq_v2")


def check(settings: Mapping[str, Any]) -> str:
    """What the folder says of itself, in words.

    Raises:
        ModelError: bits or a packing that are not read.
    """
    bits, packing = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in _BITS:
        raise ModelError(f"GPTQ codes of {bits} bits are not read", hint="4 and 8 are")
    if packing not in _FORMATS:
        raise ModelError(f"the GPTQ packing {packing} is not read", hint=" and ".join(_FORMATS))
    size = settings.get("group_size", -1)
    grouping = f"groups of {size}" if isinstance(size, int) and size > 0 else "one group a channel"
    return f"GPTQ, {bits} bit, {grouping}{', act-order' if settings.get('desc_act') else ''}"


def read(tensors: TensorFolder, name: str, settings: Mapping[str, Any]) -> QuantizedWeight:
    """The weight of the module `name`.

    Codes are packed along input channels, zero points along output channels. The first version of
    the packing stores zero points less one. With act-order, channels of a group lie apart
    (``g_idx``); their rows are gathered here, and the plan gathers the activation alike.

    Raises:
        ModelError: tensors are missing or do not go together.
    """
    bits, first = int(settings["bits"]), settings.get("checkpoint_format", "gptq") == "gptq"
    scale = tensors.floats(f"{name}.scales")
    codes = unpack_words(tensors.integers(f"{name}.qweight"), bits, 0)
    zeros = unpack_words(tensors.integers(f"{name}.qzeros"), bits, 1)[:, : scale.shape[-1]]
    if first:
        if (zeros == 2**bits - 1).any():
            raise ModelError(
                f"{name}: a zero point overflows its {bits} bits, where libraries disagree",
                hint="write it as gptq_v2",
            )
        zeros = zeros + np.uint8(1)
    depth = len(codes)
    if f"{name}.g_idx" in tensors:
        index = tensors.integers(f"{name}.g_idx", (torch.int32, torch.int64)).astype(np.int64)
    elif settings.get("desc_act"):
        raise ModelError(f"{name} has no g_idx, and with desc_act nothing else says its groups")
    else:
        size = settings.get("group_size", -1)
        index = np.arange(depth) // (size if size > 0 else depth)
    if index.shape != (depth,):
        raise ModelError(f"{name}: g_idx has {index.size} entries for {depth} input channels")
    return _grouped(name, codes, scale, zeros, bits, index)


def _grouped(
    name: str, codes: Array, scale: Array, zeros: Array, bits: int, index: Array
) -> QuantizedWeight:
    """Rows in the order of their groups, where it is another."""
    groups, depth = len(scale), len(codes)
    if index.min() < 0 or index.max() >= groups:
        raise ModelError(f"{name}: g_idx names a group that has no scale")
    sizes = np.bincount(index, minlength=groups)
    group = int(sizes.max())
    if (sizes[:-1] != group).any() or sizes[-1] == 0:
        raise ModelError(f"{name}: the groups of g_idx are of different sizes, up to {group}")
    order = np.argsort(index, kind="stable")
    moved = bool((order != np.arange(depth)).any())
    return in_blocks(
        name,
        codes[order] if moved else codes,
        scale,
        zeros,
        bits=bits,
        group=group,
        order=order if moved else None,
    )
