"""Replace Linears whose weights alone are quantised by ONNX Runtime's MatMulNBits."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from qcompile.passes.constants import constant
from qcompile.passes.integer_matmul import CONTRIB, constant_bias, lower_matmuls

from qcompile.linears import is_constant

KERNEL: Final = "MatMulNBits"
ACCURACY_LEVEL: Final = 4
"""Activations are rounded to int8 per block inside the kernel: the fastest of its levels."""

BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
"""What the kernel takes."""

_BITS: Final = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}


class WeightOnlyMatMul(ir.passes.InPlacePass):
    """Emit the kernel with symmetric blocks, whose implicit zero point is the middle code.

    1. ``MatMul(x, DequantizeLinear(codes, scale, axis=0, block_size)) [+ bias]``
       -> ``MatMulNBits(x, packed codes, scale, , , bias)``

    Args:
        accuracy_level: at most how exact the kernel is to be, as ONNX Runtime numbers it.
    """

    def __init__(self, accuracy_level: int = ACCURACY_LEVEL) -> None:
        super().__init__()
        self.accuracy_level = accuracy_level

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return lower_matmuls(model, partial(_lower, accuracy_level=self.accuracy_level))


def pack(codes: npt.NDArray[Any], bits: int, block_size: int) -> npt.NDArray[np.uint8]:
    """Symmetric int8 `codes` [K, N] as the kernel stores them: uint8 [N, blocks, block bytes].

    Codes are shifted by 2^(bits−1) to be unsigned; of two in a byte the first is the low half.
    """
    depth, width = codes.shape
    shifted = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    padded = np.pad(shifted, ((0, -depth % block_size), (0, 0)), constant_values=2 ** (bits - 1))
    blocks = padded.T.reshape(width, -1, block_size)
    return blocks if bits == 8 else blocks[..., 0::2] | (blocks[..., 1::2] << 4)


def _lower(graph: ir.Graph, matmul: ir.Node, accuracy_level: int) -> bool:
    x, weight = matmul.inputs
    dequantize = weight.producer() if weight is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    codes, scale = dequantize.inputs[:2]
    block_size = dequantize.attributes.get_int("block_size", 0)
    axis = dequantize.attributes.get_int("axis", 1)
    if block_size not in BLOCK_SIZES or axis != 0 or len(dequantize.inputs) > 2:
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
    packed = constant(graph, f"{codes.name}/packed", pack(array, bits, block_size))
    scales = np.ascontiguousarray(scale.const_value.numpy().T).reshape(-1)
    tape = ir.tape.Tape()
    result = tape.op(
        KERNEL,
        [x, packed, constant(graph, f"{scale.name}/packed", scales), None, None, bias],
        {
            "K": depth,
            "N": width,
            "bits": bits,
            "block_size": block_size,
            "accuracy_level": accuracy_level,
        },
        domain=CONTRIB,
    )
    for node in tape.nodes:
        node.metadata_props.update(matmul.metadata_props)
        node.name = str(matmul.name)
    ir.convenience.replace_nodes_and_values(
        graph, replaced, [matmul, *([replaced] if replaced is not matmul else [])],
        list(tape.nodes), replaced.outputs, [result],
    )  # fmt: skip
    return True
