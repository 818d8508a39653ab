"""Angles of rotary positions as a product, where a model writes them as a matrix product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused
from qcompile.passes.matching import (
    array_of,
    ints,
    is_op,
    like,
    made_by,
    name_nodes,
    put_for,
)
from qcompile.passes.symbolic_shapes import dims_of


class OuterProduct(ir.passes.InPlacePass):
    """``Transpose(MatMul(c [1, D, 1], x [batch, 1, sequence]))`` -> ``Mul(x', c)``, x' a column.

    Rotary frequencies times positions, as older versions of Transformers compute them. c is
    constant, expanded or not; x is ``Cast(Unsqueeze(p, 1))``. As an element-wise product it keeps
    batch and sequence where they are, computes no shape, and stays in float32 beside the angles.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if is_op(node, "Transpose"):
                modified |= _rewrite(model.graph, node)
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _rewrite(graph: ir.Graph, transpose: ir.Node) -> bool:
    product = made_by(transpose.inputs[0], "MatMul")
    if product is None or list(transpose.attributes.get_ints("perm", ())) != [0, 2, 1]:
        return False
    expand = made_by(product.inputs[0], "Expand")
    c = array_of(expand.inputs[0] if expand is not None else product.inputs[0])
    cast = made_by(product.inputs[1], "Cast")
    unsqueeze = made_by(cast.inputs[0], "Unsqueeze") if cast is not None else None
    if c is None or cast is None or unsqueeze is None or ints(unsqueeze, "axes", 1) != [1]:
        return False
    positions, result = unsqueeze.inputs[0], transpose.outputs[0]
    rows = dims_of(positions)
    if c.ndim != 3 or c.shape[::2] != (1, 1) or rows is None or len(rows) != 2:
        return False
    if dims_of(result) != [*rows, c.shape[1]]:
        return False
    tape = ir.tape.Tape()
    last = constant(graph, f"{result.name}.last", np.array([2]))
    column = tape.op("Unsqueeze", [positions, last])
    column.type, column.shape = unsqueeze.outputs[0].type, ir.Shape([*rows, 1])
    wide = tape.op("Cast", [column], {"to": cast.attributes.get_int("to", 1)})
    wide.type, wide.shape = cast.outputs[0].type, ir.Shape([*rows, 1])
    angles = tape.op("Mul", [wide, constant(graph, f"{result.name}.factors", c.reshape(-1))])
    like(angles, result)
    for made in tape.nodes:
        made.metadata_props.update(product.metadata_props)
    name_nodes(tape.nodes, str(product.name))
    put_for(graph, result, tape.nodes, angles)
    return True
