"""A Linear as one operator with its bias: Gemm."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import drop_unused, shared_constant
from qcompile.passes.matching import build, put_for

from qcompile.linears import Linear, find_linears


class ToGemm(ir.passes.InPlacePass):
    """State ``MatMul(x, W) + b`` as one op, so that nothing is rounded between the two.

    1. x of two dimensions -> ``Gemm(x, W, b)``
    2. x of more, all known -> ``Reshape(Gemm(Reshape(x, [rows, K]), W, b))``

    Left as it is: a Linear without a bias, a weight that is stored transposed, x of a shape that is
    not known.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for linear in find_linears(model.graph):
            if linear.bias is not None and not linear.transposed:
                modified |= _rewrite(model.graph, linear, linear.bias)
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _rewrite(graph: ir.Graph, linear: Linear, bias: ir.Value) -> bool:
    x, nodes = linear.x, []
    if x.shape is None:
        return False
    dims = list(x.shape)
    deep = len(dims) > 2
    sizes = [dim for dim in dims if isinstance(dim, int)]
    if len(dims) < 2 or (deep and len(sizes) < len(dims)):
        return False
    if deep:
        rows = math.prod(sizes[:-1])
        flat = build("Reshape", [x, _dims(graph, rows, linear.in_features)], {}, linear.matmul)
        flat.outputs[0].type = x.type
        flat.outputs[0].shape = ir.Shape([rows, linear.in_features])
        x = flat.outputs[0]
        nodes.append(flat)
    gemm = build("Gemm", [x, linear.weight, bias], {}, linear.matmul)
    result = gemm.outputs[0]
    nodes.append(gemm)
    if deep:
        result.type, result.shape = x.type, ir.Shape([rows, linear.out_features])
        back = _dims(graph, *sizes[:-1], linear.out_features)
        nodes.append(build("Reshape", [result, back], {}, linear.matmul))
        result = nodes[-1].outputs[0]
    put_for(graph, linear.output, nodes, result)
    return True


def _dims(graph: ir.Graph, *dims: int) -> ir.Value:
    return shared_constant(graph, "dims", np.array(dims, np.int64))
