"""Quantised Linears become the CUDA library's operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, derived, drop_unused
from qcompile.passes.integer_matmul import constant_bias
from qcompile.passes.matching import is_op, put_kernel, scalar_of
from qcompile.passes.per_token import DEQUANTIZE, E4M3, ZERO_POINT
from qcompile.passes.per_token import DOMAIN as FUNCTIONS
from qcompile.targets.cuda.schema import DOMAIN, SUFFIX, VERSION, Codes, refusal

from qcompile.linears import is_constant

_FLOAT = int(ir.DataType.FLOAT)
_CODES: dict[ir.DataType, Codes] = {
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "float8e4m3fn",
}


class Int8Linear(ir.passes.InPlacePass):
    """Emit ``QuantizeInt8``, once for all readers of an activation, and ``MatMulInt8``; where the
    codes are float8e4m3fn, ``QuantizeFp8`` and ``MatMulFp8``.

    1. ``MatMul(DequantizePerToken(QuantizePerToken(x)), DequantizeLinear(wq, t)) [+ bias]``
       -> ``MatMulInt8(QuantizeInt8(x), wqᵀ, t, bias)``
    2. ``MatMul(DequantizeLinear(QuantizeLinear(x, s, 128), s, 128), …)``, s a number
       -> the same with `s` as the scale: uint8 codes around 128 are int8 codes around 0; those of
       float8e4m3fn are around 0 already

    Left as it is: other zero points, weights in blocks, shapes that the kernels refuse.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        made: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        modified = False
        for node in list(model.graph):
            if is_op(node, "MatMul"):
                modified |= _lower(model.graph, node, made)
        if modified:
            model.graph.opset_imports[DOMAIN] = VERSION
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _lower(
    graph: ir.Graph, matmul: ir.Node, made: dict[ir.Value, tuple[ir.Value, ir.Value]]
) -> bool:
    x_hat, w_hat = matmul.inputs
    quantized = w_hat.producer() if w_hat is not None else None
    if x_hat is None or quantized is None or not is_op(quantized, "DequantizeLinear"):
        return False
    codes, scale = quantized.inputs[:2]
    if codes is None or scale is None or len(quantized.inputs) > 2:
        return False
    dtype = codes.dtype
    if not is_constant(codes) or dtype is None or dtype not in _CODES:
        return False
    if len(scale.shape or ()) != 1:
        return False
    if quantized.attributes.get_int("axis", 1) not in (1, -1):
        return False
    depth, width = (int(d) for d in codes.shape or ())  # type: ignore[arg-type]
    if refusal(width, depth) is not None:
        return False
    if x_hat not in made:
        before = ir.tape.Tape()
        activation = _activation(graph, before, x_hat, dtype)
        if activation is None:
            return False
        for node in before.nodes:
            node.name = f"{x_hat.name}/codes"
        graph.insert_before(matmul, before.nodes)
        made[x_hat] = activation
    tape = ir.tape.Tape()
    bias, replaced = constant_bias(matmul)
    weight = derived(codes, "transposed", np.transpose, (width, depth))
    inputs = [*made[x_hat], weight, scale, bias]
    inputs = inputs[: 5 if bias is not None else 4]
    op_type = f"MatMul{SUFFIX[_CODES[dtype]]}"
    result = tape.op(op_type, inputs, {"dtype": _FLOAT}, domain=DOMAIN)
    result.type, result.shape = replaced.outputs[0].type, replaced.outputs[0].shape
    put_kernel(graph, matmul, replaced, tape.nodes, result, op_type)
    return True


def _activation(
    graph: ir.Graph, tape: ir.tape.Tape, x_hat: ir.Value, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value] | None:
    """(codes of `dtype`, scale) of the activation that `x_hat` is the dequantised form of."""
    back = x_hat.producer()
    forth = back.inputs[0].producer() if back is not None and back.inputs[0] is not None else None
    x = forth.inputs[0] if forth is not None else None
    if back is None or forth is None or x is None:
        return None
    static = None
    fp8 = dtype == ir.DataType.FLOAT8E4M3FN
    if (back.op_type, back.domain) != (DEQUANTIZE, FUNCTIONS):
        if not is_op(back, "DequantizeLinear") or not is_op(forth, "QuantizeLinear"):
            return None
        numbers = [[scalar_of(v) for v in node.inputs[1:]] for node in (forth, back)]
        number = numbers[0][0]
        if number is None or numbers != [[number, 0 if fp8 else ZERO_POINT]] * 2:
            return None
        zero_point = forth.inputs[2]
        if zero_point is None or (zero_point.dtype == dtype) != fp8:
            return None
        static = constant(graph, f"{x.name}.scale", np.array([number], np.float32))
    elif (back.overload == E4M3) != fp8:
        return None
    quantize = f"Quantize{SUFFIX[_CODES[dtype]]}"
    if static is None:
        codes, scale = tape.op_multi_out(quantize, [x], num_outputs=2, domain=DOMAIN)
        scale.dtype = ir.DataType.FLOAT
    else:
        codes, scale = tape.op(quantize, [x, static], domain=DOMAIN), static
    codes.dtype, codes.shape = dtype, x.shape
    return codes, scale
