"""Rows stay [batch, sequence, channels] where a stretch of the graph made them one dimension."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from qcompile.passes.matching import ints, is_op
from qcompile.passes.per_token import DEQUANTIZE, DOMAIN, QUANTIZE
from qcompile.passes.symbolic_shapes import SymbolicShapes, dims_of

from qcompile.linears import is_constant

_ROWWISE: Final = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Relu",
        "Gelu",
        "Sigmoid",
        "Tanh",
        "Erf",
        "Identity",
        "QuantizeLinear",
        "DequantizeLinear",
    ]
)
_NORMS: Final = ("LayerNormalization", "RMSNormalization")
_Dims = list[int | str | None]


class Unflatten(ir.passes.InPlacePass):
    """Remove Reshapes between [batch, sequence, channels] and [batch · sequence, channels].

    1. ``Reshape(x)`` to the shape that x has -> x
    2. ``Reshape(f(Reshape(x, [-1, C])), [batch, sequence, D])`` -> ``f(x)``, where f works on rows:
       norms over the last axis, products with a constant matrix, element-wise ops with vectors or
       with each other, some of the channels, quantisation by a constant scale or per token

    The way back needs batch and sequence as numbers, which ONNX Runtime computes on the CPU. All
    stretches of one shape go together or stay together: they may read each other.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        refined = SymbolicShapes()(model).modified
        modified = _drop_noops(model.graph)
        groups: dict[tuple[int | str, int | str], list[ir.Node]] = {}
        for node in model.graph:
            rows = _flattened(node)
            if rows is not None:
                groups.setdefault(rows, []).append(node)
        for rows, entries in groups.items():
            modified |= _unflatten(rows, entries)
        if modified:
            RemoveUnusedNodesPass()(model)
            SymbolicShapes()(model)
        return ir.passes.PassResult(model, modified=modified or refined)


def _drop_noops(graph: ir.Graph) -> bool:
    modified = False
    for node in list(graph):
        x = node.inputs[0] if is_op(node, "Reshape") else None
        y = node.outputs[0]
        dims = dims_of(x)
        if x is None or dims is None or None in dims or dims != dims_of(y):
            continue
        if y.is_graph_output() or not y.uses():
            continue
        y.replace_all_uses_with(x)
        modified = True
    return modified


def _flattened(node: ir.Node) -> tuple[int | str, int | str] | None:
    """(batch, sequence), where `node` makes them one dimension."""
    if not is_op(node, "Reshape"):
        return None
    before, after = dims_of(node.inputs[0]), dims_of(node.outputs[0])
    if before is None or after is None or (len(before), len(after)) != (3, 2):
        return None
    batch, sequence, channels = before
    if batch is None or sequence is None:
        return None
    return (batch, sequence) if isinstance(channels, int) and after[1] == channels else None


def _unflatten(rows: tuple[int | str, int | str], entries: list[ir.Node]) -> bool:
    flat: list[ir.Value] = [node.outputs[0] for node in entries]
    inside, exits, at = set(flat), set[ir.Node](), 0
    while at < len(flat):
        value = flat[at]
        at += 1
        if value.is_graph_output():
            return False
        for use in value.uses():
            node = use.node
            if _is_exit(node, value, rows):
                exits.add(node)
                continue
            if not _rowwise(node, use.idx):
                return False
            new = [v for v in node.outputs if v not in inside]
            inside.update(new)
            flat.extend(new)
    made = {node for value in flat for node in [value.producer()] if node is not None}
    if any(not _closed(node, inside) for node in made - set(entries)):
        return False
    for value in flat:
        dims = dims_of(value)
        value.shape = ir.Shape([*rows, dims[-1]]) if dims else None
    for node in exits:
        node.outputs[0].replace_all_uses_with(_data(node), replace_graph_outputs=False)
    for node in entries:
        node.outputs[0].replace_all_uses_with(_data(node))
    return True


def _data(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _is_exit(node: ir.Node, value: ir.Value, rows: tuple[int | str, int | str]) -> bool:
    if not is_op(node, "Reshape") or node.inputs[0] is not value:
        return False
    dims, before = dims_of(node.outputs[0]), dims_of(value)
    if dims is None or before is None or node.outputs[0].is_graph_output():
        return False
    return dims == [*rows, before[-1]] and before[-1] is not None


def _rowwise(node: ir.Node, position: int) -> bool:
    if node.domain == DOMAIN:
        return node.op_type in (QUANTIZE, DEQUANTIZE)
    if is_op(node, "MatMul"):
        return position == 0
    if is_op(node, *_NORMS):
        return position == 0 and node.attributes.get_int("axis", -1) == -1
    if is_op(node, "Gather"):
        return position == 0 and node.attributes.get_int("axis", 0) == -1
    if is_op(node, "Slice"):
        return position == 0 and ints(node, "axes", 3) == [-1]
    return is_op(node, *_ROWWISE)


def _closed(node: ir.Node, inside: set[ir.Value]) -> bool:
    """What `node` reads besides rows does not care how many dimensions those have."""
    for position, value in enumerate(node.inputs):
        if value is None or value in inside:
            continue
        if is_op(node, "MatMul") and position == 1:
            if len(value.shape or ()) != 2:
                return False
        elif not is_constant(value) or value.shape is None or len(value.shape) > 1:
            return False
    return True
