"""Attention with batch and heads in one axis, as attention with an axis for each."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from qcompile.passes.constants import shared_constant
from qcompile.passes.matching import (
    build,
    is_op,
    made_by,
    name_nodes,
    operands,
    put_for,
    scalar_of,
)
from qcompile.passes.symbolic_shapes import SymbolicShapes, broadcast, dims_of


class UnmergeHeads(ir.passes.InPlacePass):
    """A product of [batch · heads, m, k] and [batch · heads, k, n] -> of [batch, heads, …].

    torch's ``bmm`` and ``baddbmm`` want three axes. The Reshape of such a product to
    [batch, heads, m, n] goes, with the Reshapes that merged what it is made of. In between may be
    Transposes of the last two axes, constants that multiply or divide, and terms that are added: of
    the same form, or [batch · heads, 1, n] that was [batch, heads, n] (ALiBi's).

    Left as it is: what was not of four axes with as many heads, or is read in between.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if is_op(node, "Reshape"):
                modified |= _unmerge(model.graph, node)
        if modified:
            RemoveUnusedNodesPass()(model)
            SymbolicShapes()(model)
        return ir.passes.PassResult(model, modified=modified)


def _unmerge(graph: ir.Graph, reshape: ir.Node) -> bool:
    dims, merged = dims_of(reshape.outputs[0]), reshape.inputs[0]
    if dims is None or len(dims) != 4 or not isinstance(dims[1], int) or merged is None:
        return False
    apart = _Apart(graph, (dims[0], dims[1]))
    found = apart.of(merged)
    if found is None or not any(node.op_type == "MatMul" for node in apart.nodes):
        for node in apart.nodes:
            node.resize_inputs(0)  # or they would go on reading what they were made of
        return False
    # Layers may share what was merged: named after that, nodes would be named alike.
    name_nodes(apart.nodes, str(reshape.name))
    shape = found.shape
    put_for(graph, reshape.outputs[0], apart.nodes, found)
    found.shape = shape
    return True


@dataclasses.dataclass
class _Apart:
    """Makes the value of four axes that one of three stands for.

    Attributes:
        lead: batch and heads.
        nodes: made so far, in order.
    """

    graph: ir.Graph
    lead: tuple[int | str | None, int]
    nodes: list[ir.Node] = dataclasses.field(default_factory=list)

    def of(self, value: ir.Value) -> ir.Value | None:
        """None where it stands for none."""
        if made_by(value, "Reshape") is not None:
            return self._before(value)
        node = made_by(value, "Transpose", "MatMul", "Mul", "Div", "Add")
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return None
        if node.op_type in ("Mul", "Div"):
            return self._scaled(node)
        perm = tuple(node.attributes.get_ints("perm", ()))
        if node.op_type == "Transpose" and perm != (0, 2, 1):
            return None
        inputs = [self.of(v) if v is not None else None for v in node.inputs]
        shapes = [dims_of(v) or [] for v in inputs]
        if None in inputs:
            return None
        a, b = shapes[0], shapes[-1]
        if node.op_type == "Transpose":
            return self._made("Transpose", inputs, [a[3], a[2]], node, {"perm": (0, 1, 3, 2)})
        if node.op_type == "MatMul":
            return self._made("MatMul", inputs, [a[2], b[3]], node)
        return self._made("Add", inputs, (broadcast([a, b]) or [])[2:], node)

    def _scaled(self, node: ir.Node) -> ir.Value | None:
        for value, factor in operands(node):
            divided = node.op_type == "Mul" or factor is node.inputs[1]
            source = self.of(value) if scalar_of(factor) is not None and divided else None
            if source is not None:
                return self._made(node.op_type, [source, factor], (dims_of(source) or [])[2:], node)
        return None

    def _before(self, merged: ir.Value) -> ir.Value | None:
        """What `merged` was before batch and heads became one axis."""
        node = made_by(merged, "Reshape")
        source = node.inputs[0] if node is not None else None
        dims, was = dims_of(merged), dims_of(source)
        if node is None or dims is None or was is None or tuple(was[:2]) != self.lead:
            return None
        if len(was) == 4 and len(dims) == 3 and was[2:] == dims[1:]:
            return source
        if len(was) == 3 and dims[1:] == [1, was[2]]:
            axis = shared_constant(self.graph, "axes", np.array([2]))
            return self._made("Unsqueeze", [source, axis], dims[1:], node)
        return None

    def _made(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        last: list[int | str | None],
        origin: ir.Node,
        attributes: dict[str, tuple[int, ...]] | None = None,
    ) -> ir.Value:
        node = build(op_type, inputs, attributes or {}, origin)
        value = node.outputs[0]
        value.type = origin.outputs[0].type
        value.shape = ir.Shape([*self.lead, *last])
        self.nodes.append(node)
        return value
