"""Replace Linears whose weights are indices into a table by ONNX Runtime's MatMulBnb4."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from qcompile.passes.constants import constant
from qcompile.passes.integer_matmul import CONTRIB, constant_bias, lower_matmuls
from qcompile.passes.matching import put_kernel
from qcompile.passes.per_token import DOMAIN
from qcompile.passes.table_codes import NAME

from qcompile.float4 import TABLES
from qcompile.linears import is_constant

KERNEL: Final = "MatMulBnb4"

BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
"""What the kernel takes."""

_TYPES: Final = {"fp4": 0, "nf4": 1}


class TableMatMul(ir.passes.InPlacePass):
    """Emit the kernel, which knows the tables of FP4 and NF4 itself.

    1. ``MatMul(x, qcompile.DequantizeTable(codes, scale, table))``
       -> ``MatMulBnb4(x, packed codes, scale)``; a bias is added after it
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return lower_matmuls(model, _lower)


def pack(codes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Indices [K, N] as the kernel stores them: uint8 [N · K / 2], a column after the other; of two
    in a byte the first is the high half."""
    flat = codes.T.astype(np.uint8).reshape(-1)
    packed: npt.NDArray[np.uint8] = ((flat[0::2] << 4) | flat[1::2]).astype(np.uint8)
    return packed


def _lower(graph: ir.Graph, matmul: ir.Node) -> bool:
    x, weight = matmul.inputs
    dequantize = weight.producer() if weight is not None else None
    if dequantize is None or (dequantize.domain, dequantize.op_type) != (DOMAIN, NAME):
        return False
    arrays = []
    for value in dequantize.inputs:
        if value is None or not is_constant(value) or value.const_value is None:
            return False
        arrays.append(value.const_value.numpy())
    codes, scale, table = arrays
    kind = next((k for k, known in TABLES.items() if np.array_equal(known, table)), None)
    blocks, size, width = codes.shape
    if kind is None or size not in BLOCK_SIZES:
        return False
    codes_name, scale_name = (str(value.name) for value in dequantize.inputs[:2] if value)
    packed = constant(graph, f"{codes_name}/packed", pack(codes.reshape(-1, width)))
    scales = constant(graph, f"{scale_name}/packed", np.ascontiguousarray(scale.T).reshape(-1))
    tape = ir.tape.Tape()
    attributes = {"K": blocks * size, "N": width, "block_size": size, "quant_type": _TYPES[kind]}
    bias, replaced = constant_bias(matmul)
    result = tape.op(KERNEL, [x, packed, scales], attributes, domain=CONTRIB)
    result.shape, result.dtype = matmul.outputs[0].shape, ir.DataType.FLOAT
    if bias is not None:
        result = tape.op("Add", [result, bias])
    put_kernel(graph, matmul, replaced, tape.nodes, result, KERNEL)
    return True
