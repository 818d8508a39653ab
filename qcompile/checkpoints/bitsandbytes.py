"""bitsandbytes folders, as Transformers writes them: NF4 and FP4 (arXiv 2305.14314), and the int8
weights of LLM.int8() (arXiv 2208.07339)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from qcompile.checkpoints.folder import TensorFolder
from qcompile.checkpoints.layout import in_blocks
from qcompile.errors import ModelError
from qcompile.float4 import TABLES, Float4, as_float4
from qcompile.passes.bnb4 import BLOCK_SIZES
from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]

_STATE: Final = "weight.quant_state.bitsandbytes__"
PARTS: Final = (
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *(f"{_STATE}{kind}" for kind in TABLES),
    "SCB",
    "weight_format",
)


def check(settings: Mapping[str, Any]) -> str:
    """What the folder says of itself, in words.

    Raises:
        ModelError: it says neither 4 nor 8 bits.
    """
    if settings.get("load_in_4bit"):
        kind = str(settings.get("bnb_4bit_quant_type", "fp4")).upper()
        double = settings.get("bnb_4bit_use_double_quant")
        return f"bitsandbytes, {kind}{', scales quantised too' if double else ''}"
    if settings.get("load_in_8bit"):
        return "bitsandbytes, int8"
    raise ModelError("bitsandbytes: neither load_in_4bit nor load_in_8bit is set")


def read(tensors: TensorFolder, name: str, settings: Mapping[str, Any]) -> QuantizedWeight:
    """The weight of the module `name`.

    Raises:
        ModelError: tensors are missing or do not go together, or blocks that no kernel has.
    """
    if f"{name}.SCB" in tensors:
        return _int8(tensors, name)
    for kind in TABLES:
        if f"{name}.{_STATE}{kind}" in tensors:
            return _float4(tensors, name, kind)
    raise ModelError(f"{name}.weight has scales and no quant_state, which says its shape")


def _int8(tensors: TensorFolder, name: str) -> QuantizedWeight:
    """Signed codes [N, K], and the largest magnitude of each output channel.

    The activation stays in float. What LLM.int8() does to it, int8 per token beside the channels
    that exceed a threshold in this very input, chooses channels at run time: no kernel does.
    """
    codes = tensors.integers(f"{name}.weight", (torch.int8,))
    largest = tensors.floats(f"{name}.SCB").reshape(-1)
    layout = f"{name}.weight_format"
    if layout in tensors and tensors.integers(layout, (torch.uint8,)).any():
        raise ModelError(f"{name}.weight is in the order of an old GPU kernel", hint="save it anew")
    if codes.ndim != 2 or largest.shape != codes.shape[:1]:
        raise ModelError(f"{name}: {largest.size} scales for a weight of {_by(codes)}")
    unsigned = (codes.T.astype(np.int16) + 128).astype(np.uint8)
    scale = (largest / np.float32(127.0))[None]
    middle = np.full(scale.shape, 128, np.uint8)
    return in_blocks(name, unsigned, scale, middle, bits=8, group=len(unsigned))


def _float4(tensors: TensorFolder, name: str, kind: Float4) -> QuantizedWeight:
    """Codes of ``W [N, K]``, rows one after the other, two in a byte, the first in the high half.

    A block runs on where a row ends, if no whole number of blocks is in it. Here it ends there: the
    blocks are of the largest size that divides both.
    """
    state = _state(tensors, name, kind)
    (width, depth), whole = state["shape"], state["blocksize"]
    stored = tensors.tensor(f"{name}.weight")
    packed = stored.contiguous().reshape(-1).view(torch.uint8).numpy()
    scale = _scales(tensors, name, state)
    if packed.size * 2 != width * depth or scale.size != -(-width * depth // whole):
        raise ModelError(
            f"{name}: {packed.size * 2} codes and {scale.size} scales do not make a weight of "
            f"{width}×{depth} in blocks of {whole}"
        )
    size = math.gcd(depth, whole, max(BLOCK_SIZES))
    if size not in BLOCK_SIZES:
        raise ModelError(
            f"{name}: blocks of {whole} run over the ends of rows of {depth} input channels, and "
            f"parts of them with one scale each are of {size}, which no kernel takes"
        )
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(width, depth)
    of_block = np.arange(0, width * depth, size) // whole
    return QuantizedWeight(
        codes=np.ascontiguousarray(codes.T).astype(np.int8),
        scale=np.ascontiguousarray(scale[of_block].reshape(width, -1).T),
        block_size=size,
        bits=4,
        table=TABLES[kind],
    )


def _state(tensors: TensorFolder, name: str, kind: Float4) -> dict[str, Any]:
    """What is said of the tensors in JSON: the shape [N, K] and the sizes of blocks.

    Raises:
        ModelError: it is damaged, or the codes stand for other values than those of `kind`.
    """
    part = f"{name}.{_STATE}{kind}"
    try:
        state: dict[str, Any] = json.loads(bytes(tensors.tensor(part).numpy()))
        state["shape"] = width, depth = [int(size) for size in state["shape"]]
        sizes = [key for key in ("blocksize", "nested_blocksize") if key in state]
        for key in sizes:
            state[key] = int(state[key])
        least = min(width, depth, *(state[key] for key in sizes))
        sound = as_float4(state["quant_type"]) == kind and "blocksize" in state and least > 0
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{part} is damaged") from error
    if not sound:
        raise ModelError(f"{part} is damaged")
    if not np.array_equal(tensors.floats(f"{name}.weight.quant_map"), TABLES[kind]):
        raise ModelError(f"{name}.weight.quant_map is not the table of {kind}")
    return state


def _scales(tensors: TensorFolder, name: str, state: Mapping[str, Any]) -> Array:
    """float32 [blocks]; quantised scales by the arithmetic of the library, in float32."""
    part = f"{name}.weight.absmax"
    if "nested_blocksize" not in state:
        return tensors.floats(part).reshape(-1)
    codes = tensors.integers(part, (torch.uint8,)).reshape(-1)
    table = tensors.floats(f"{name}.weight.nested_quant_map")
    scale = tensors.floats(f"{name}.weight.nested_absmax").reshape(-1)
    size = state["nested_blocksize"]
    if len(table) != 256 or scale.size != -(-codes.size // size):
        raise ModelError(f"{part}: its codes and their scales do not go together")
    of_code = scale[np.arange(codes.size) // size]
    result: Array = table[codes] * of_code + np.float32(state["nested_offset"])
    return result


def _by(array: Array) -> str:
    return "×".join(map(str, array.shape))
