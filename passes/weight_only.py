"""Replace Linears whose weights alone are quantised by ONNX Runtime's MatMulNBits."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from qcompile.passes.constants import constant
from qcompile.passes.integer_matmul import CONTRIB, constant_bias, lower_matmuls
from qcompile.passes.matching import put_kernel

from qcompile.linears import is_constant

KERNEL: Final = "MatMulNBits"
ACCURACY_LEVEL: Final = 4
"""Activations are rounded to int8 per block inside the kernel: the fastest of its levels."""

BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
"""What the kernel takes."""

_BITS: Final = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}


class WeightOnlyMatMul(ir.passes.InPlacePass):
    """Emit the kernel; without zero points, the middle code is the implicit one.

    1. ``MatMul(x, DequantizeLinear(codes, scale, [zero_point], axis=0, block_size)) [+ bias]``
       -> ``MatMulNBits(x, packed codes, scale, [packed zero_point], , bias)``

    Args:
        accuracy_level: at most how exact the kernel is to be, as ONNX Runtime numbers it.
    """

    def __init__(self, accuracy_level: int = ACCURACY_LEVEL) -> None:
        super().__init__()
        self.accuracy_level = accuracy_level

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return lower_matmuls(model, partial(_lower, accuracy_level=self.accuracy_level))


def pack(
    codes: npt.NDArray[Any],
    bits: int,
    block_size: int,
    zero_point: npt.NDArray[Any] | None = None,
) -> npt.NDArray[np.uint8]:
    """int8 `codes` [K, N] as the kernel stores them: uint8 [N, blocks, block bytes].

    Codes are shifted by 2^(bits−1) to be unsigned; of two in a byte the first is the low half. A
    short last block is filled with the code of zero.
    """
    depth, width = codes.shape
    padded = np.pad(_unsigned(codes, bits), ((0, -depth % block_size), (0, 0)))
    zero = 2 ** (bits - 1) if zero_point is None else _unsigned(zero_point[-1], bits)
    padded[depth:] = zero
    blocks = padded.T.reshape(width, -1, block_size)
    return blocks if bits == 8 else _halves(blocks)


def pack_zero_points(zero_point: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """int8 `zero_point` [blocks, N] as the kernel stores it: uint8 [N · bytes of a column's]."""
    unsigned = _unsigned(zero_point, bits).T
    if bits == 8:
        return np.ascontiguousarray(unsigned).reshape(-1)
    return _halves(np.pad(unsigned, ((0, 0), (0, unsigned.shape[1] % 2)))).reshape(-1)


def _unsigned(codes: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    shifted = codes.astype(np.int16) + (1 << (bits - 1))
    unsigned: npt.NDArray[np.uint8] = shifted.astype(np.uint8)
    return unsigned


def _halves(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two 4-bit codes a byte, the first in its low half."""
    packed: npt.NDArray[np.uint8] = (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
    return packed


def _lower(graph: ir.Graph, matmul: ir.Node, accuracy_level: int) -> bool:
    x, weight = matmul.inputs
    dequantize = weight.producer() if weight is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    codes, scale, *others = dequantize.inputs
    block_size = dequantize.attributes.get_int("block_size", 0)
    axis = dequantize.attributes.get_int("axis", 1)
    if block_size not in BLOCK_SIZES or axis != 0:
        return False
    zero = others[0] if others else None
    if zero is not None and (zero.const_value is None or not is_constant(zero)):
        return False
    if codes is None or scale is None or not is_constant(codes) or not is_constant(scale):
        return False
    bits = _BITS.get(codes.dtype) if codes.dtype is not None else None
    if bits is None or codes.const_value is None or scale.const_value is None:
        return False
    array = codes.const_value.numpy().astype(np.int8)
    if array.ndim != 2:
        return False
    depth, width = array.shape
    bias, replaced = constant_bias(matmul)
    points = None
    if zero is not None and zero.const_value is not None:
        points = zero.const_value.numpy().astype(np.int8)
    packed = constant(graph, f"{codes.name}/packed", pack(array, bits, block_size, points))
    zeros = None
    if zero is not None and points is not None:
        zeros = constant(graph, f"{zero.name}/packed", pack_zero_points(points, bits))
    scales = np.ascontiguousarray(scale.const_value.numpy().T).reshape(-1)
    tape = ir.tape.Tape()
    result = tape.op(
        KERNEL,
        [x, packed, constant(graph, f"{scale.name}/packed", scales), zeros, None, bias],
        {
            "K": depth,
            "N": width,
            "bits": bits,
            "block_size": block_size,
            "accuracy_level": accuracy_level,
        },
        domain=CONTRIB,
    )
    put_kernel(graph, matmul, replaced, tape.nodes, result, KERNEL)
    return True
