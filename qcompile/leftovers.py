"""What stays in float because it is no Linear: named with its reason, never in silence."""

from __future__ import annotations

import dataclasses
from typing import Final

import onnx_ir as ir

from qcompile.linears import find_linears, is_constant, is_matrix_transpose
from qcompile.names import module_path

_DOMAINS: Final = ("", "ai.onnx", "com.microsoft")
_COMPUTED: Final = frozenset(
    {"Attention", "GroupQueryAttention", "MultiHeadAttention", "PackedMultiHeadAttention"}
)
_HEAVY: Final = _COMPUTED | {
    "Conv", "ConvTranspose", "DeformConv", "Einsum", "FusedConv", "FusedGemm", "FusedMatMul",
    "GRU", "Gemm", "LSTM", "MatMul", "QAttention", "RNN",
}  # fmt: skip
"""Ops that multiply matrices, where quantisation could have gained something."""


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
        Leftover(module_path(node), node.op_type, _reason(node, graph))
        for node in graph.all_nodes()
        if node.op_type in _HEAVY and node.domain in _DOMAINS and node not in linears
    ]


def _reason(node: ir.Node, graph: ir.Graph) -> str:
    if node.graph is not graph:
        return "it is in the body of a control-flow op, and only the main graph is quantised"
    if node.op_type in _COMPUTED:
        return "its products are of computed operands"
    if node.op_type not in ("MatMul", "Gemm"):
        return f"no INT8 form of {node.op_type} is compiled"
    left, right = node.inputs[:2]
    producer = right.producer() if right is not None else None
    if producer is not None and is_matrix_transpose(producer):
        right = producer.inputs[0]
    if is_constant(left):
        return "its constant is the left operand"
    if right is None or not is_constant(right):
        return "its operands are computed"
    if right.dtype != ir.DataType.FLOAT:
        return f"its weight is {right.dtype.name.lower() if right.dtype else 'of unknown type'}"
    if right.shape is not None and len(right.shape) != 2:
        return f"its weight is of rank {len(right.shape)}, and has to be a matrix"
    return f"this form of {node.op_type} is not rewritten to MatMul and Add"
