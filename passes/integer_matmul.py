"""Replace quantised Linears by ONNX Runtime's integer kernel, MatMulIntegerToFloat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused, sole_use
from qcompile.passes.matching import put_kernel
from qcompile.passes.per_token import DEQUANTIZE, DOMAIN, ZERO_POINT

from qcompile.linears import is_constant

CONTRIB = "com.microsoft"
KERNEL = "MatMulIntegerToFloat"


class IntegerMatMul(ir.passes.InPlacePass):
    """Emit the kernel itself: left to ONNX Runtime's own fusions, a float bias turns the pair
    MatMul + Add into a float Gemm.

    1. ``MatMul(DequantizeLinear(xq, s, z), DequantizeLinear(wq, t)) [+ bias]``, static or dynamic
       -> ``MatMulIntegerToFloat(xq, wq, s, t, z, , bias)``
    2. ``MatMul(DequantizePerToken(xq, r), DequantizeLinear(wq, t)) [+ bias]``
       -> ``MatMulIntegerToFloat(xq, wq, 1, t, 128) * r [+ bias]``: the kernel has no scale per row
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return lower_matmuls(model, _lower)


def lower_matmuls(
    model: ir.Model, lower: Callable[[ir.Graph, ir.Node], bool]
) -> ir.passes.PassResult:
    """Offer every MatMul of the main graph to `lower`, which says whether it replaced it."""
    modified = False
    for node in list(model.graph):
        if node.op_type == "MatMul" and node.domain in ("", "ai.onnx"):
            modified |= lower(model.graph, node)
    if modified:
        model.graph.opset_imports[CONTRIB] = 1
        drop_unused(model)
    return ir.passes.PassResult(model, modified=modified)


def _lower(graph: ir.Graph, matmul: ir.Node) -> bool:
    x_node = _producer(matmul.inputs[0])
    w_node = _producer(matmul.inputs[1])
    if x_node is None or w_node is None or w_node.op_type != "DequantizeLinear":
        return False
    if not _per_output_channel(w_node):
        return False
    codes, w_scale = w_node.inputs[0], w_node.inputs[1]
    if not is_constant(codes) or codes is None or codes.dtype != ir.DataType.INT8:
        return False
    bias, replaced = constant_bias(matmul)
    tape = ir.tape.Tape()
    if x_node.op_type == "DequantizeLinear" and _per_tensor(x_node):
        x, scale, zero_point = x_node.inputs
        result = tape.op(KERNEL, [x, codes, scale, w_scale, zero_point, None, bias], domain=CONTRIB)
    elif x_node.op_type == DEQUANTIZE and x_node.domain == DOMAIN:
        x, row_scale = x_node.inputs
        one = constant(graph, f"{matmul.name}.unit_scale", np.float32(1.0))
        zero_point = constant(graph, f"{matmul.name}.zero_point", np.uint8(ZERO_POINT))
        product = tape.op(KERNEL, [x, codes, one, w_scale, zero_point], domain=CONTRIB)
        result = tape.op("Mul", [product, row_scale])
        if bias is not None:
            result = tape.op("Add", [result, bias])
    else:
        return False
    put_kernel(graph, matmul, replaced, tape.nodes, result, KERNEL)
    return True


def _per_output_channel(node: ir.Node) -> bool:
    """Symmetric, one scale per column: what the kernel takes for its weight."""
    scale = node.inputs[1]
    if any(v is not None for v in node.inputs[2:]) or node.attributes.get_int("block_size", False):
        return False
    if scale is None or scale.shape is None or len(scale.shape) != 1:
        return False
    return node.attributes.get_int("axis", 1) in (1, -1)


def _per_tensor(node: ir.Node) -> bool:
    """One scale and zero point for all values: what the kernel takes for its activation."""
    if len(node.inputs) != 3 or node.attributes.get_int("block_size", False):
        return False
    # DynamicQuantizeLinear's outputs are scalars whether or not their shapes were inferred.
    producer = _producer(node.inputs[1])
    dynamic = producer is not None and producer.op_type == "DynamicQuantizeLinear"
    scale = node.inputs[1]
    return dynamic or (scale is not None and scale.shape is not None and len(scale.shape) == 0)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def constant_bias(matmul: ir.Node) -> tuple[ir.Value | None, ir.Node]:
    """The constant bias vector added to `matmul`, and the last node it replaces."""
    product = matmul.outputs[0]
    if sole_use(product):
        add = next(iter(product.uses())).node
        if add.op_type == "Add" and add.domain in ("", "ai.onnx"):
            other = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
            if other is not None and is_constant(other) and other.shape is not None:
                w = matmul.inputs[1]
                width = w.shape[-1] if w is not None and w.shape is not None else None
                if len(other.shape) == 1 and other.shape[0] == width:
                    return other, add
    return None, matmul
