"""What stays in float because it is no Linear: named with its reason, never in silence."""

from __future__ import annotations

import dataclasses
from typing import Final

import onnx_ir as ir

from qcompile.linears import find_linears, is_constant
from qcompile.names import module_path

_HEAVY: Final = frozenset(
    {"MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "RNN", "GRU", "LSTM"}
)
"""Ops that multiply matrices, where quantisation would have gained something."""


@dataclasses.dataclass(frozen=True)
class Leftover:
    """One op that scheme and target do not cover.

    Attributes:
        name: module path, or the node's name.
        op: its type.
        reason: why it stays in float.
    """

    name: str
    op: str
    reason: str


def find_leftovers(graph: ir.Graph) -> list[Leftover]:
    """The heavy ops of `graph` and of the bodies in it that are no Linear, in graph order."""
    linears = {linear.matmul for linear in find_linears(graph)}
    return [
        Leftover(module_path(node) or str(node.name), node.op_type, _reason(node, graph))
        for node in graph.all_nodes()
        if node.op_type in _HEAVY and node.domain in ("", "ai.onnx") and node not in linears
    ]


def _reason(node: ir.Node, graph: ir.Graph) -> str:
    if node.graph is not graph:
        return "it is in the body of a control-flow op, and only the main graph is quantised"
    if node.op_type not in ("MatMul", "Gemm"):
        return f"no INT8 form of {node.op_type} is compiled"
    if node.op_type == "Gemm":
        return "this form of Gemm is not rewritten to MatMul and Add"
    left, right = node.inputs
    if is_constant(left):
        return "its constant is the left operand"
    if right is None or not is_constant(right):
        return "its right operand is no constant"
    if right.dtype != ir.DataType.FLOAT:
        return f"its weight is {right.dtype.name.lower() if right.dtype else 'of unknown type'}"
    return f"its weight has {len(right.shape or ())} dimensions, and two are needed"
