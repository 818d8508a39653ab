"""Fold what scales and shifts the outputs of a Conv or a Linear into its weight and bias."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, derived, drop_unused, sole_use
from qcompile.passes.matching import array_of, is_op, operands

from qcompile.batch_norm import batch_norm_obstacle
from qcompile.weighted import Weighted, find_weighted, set_bias

Affine = tuple[Any, Any]
"""Factor and shift of each channel, float64 [channels]; None for none."""


class FoldAffine(ir.passes.InPlacePass):
    """One form for Convs: a weight and a bias, and nothing per channel after them.

    1. ``BatchNormalization(y, scale, B, mean, var)`` -> W·a, b·a + B − mean·a with
       a = scale / √(var + epsilon)
    2. ``Mul(y, a)``, a constant of one value per channel of a Conv, or one for all -> W·a, b·a
    3. ``Add(y, c)``, c likewise -> b + c

    where y is a Conv, or for 1 a Linear of two-dimensional input, that nothing else reads. A weight
    that several ops share gets a folded copy. The Linears' own biases are `CanonicalLinear`'s.

    Args:
        kept: module paths of Linears whose weights have to stay as they are, bit for bit.
    """

    def __init__(self, kept: Collection[str] = ()) -> None:
        super().__init__()
        self.kept = frozenset(kept)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        ops = {op.output: op for op in find_weighted(model.graph) if op.name not in self.kept}
        modified = False
        for node in list(model.graph):
            found = _match(node, ops)
            if found is None:
                continue
            op, (factor, shift) = found
            # What was folded before has changed it.
            op = ops[op.output] = _fold(model.graph, op, factor, shift)
            _replace(model.graph, node, op)
            modified = True
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _match(node: ir.Node, ops: dict[ir.Value, Weighted]) -> tuple[Weighted, Affine] | None:
    if is_op(node, "BatchNormalization"):
        op = ops.get(node.inputs[0]) if node.inputs[0] is not None else None
        if op is None or batch_norm_obstacle(node) is not None:
            return None
        gamma, beta, mean, variance = (
            np.asarray(array_of(v), np.float64) for v in node.inputs[1:5]
        )
        factor = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        return op, (factor, beta - mean * factor)
    if not is_op(node, "Add", "Mul"):
        return None
    for product, other in operands(node):
        op = ops.get(product)
        if op is None or op.node.op_type != "Conv" or not sole_use(product):
            continue
        values = _per_channel(other, op)
        if values is not None:
            return op, (None, values) if node.op_type == "Add" else (values, None)
    return None


def _per_channel(value: ir.Value, op: Weighted) -> Any:
    """`value` as float64 [channels of `op`], or None where it is something else."""
    shape, output = value.shape, op.output.shape
    if shape is None or output is None or value.dtype != ir.DataType.FLOAT:
        return None
    rank, dims = len(output), tuple(shape)
    padded = (1,) * (rank - len(dims)) + dims
    if len(dims) > rank or any(d != 1 for at, d in enumerate(padded) if at != 1):
        return None
    if padded[1] not in (1, op.out_channels):
        return None
    array = array_of(value)
    if array is None:
        return None
    return np.broadcast_to(np.ravel(array).astype(np.float64), (op.out_channels,))


def _fold(graph: ir.Graph, op: Weighted, factor: Any, shift: Any) -> Weighted:
    if factor is not None:
        shape = [1] * len(op.weight.shape or ())
        shape[op.out_axis] = -1
        scale = _affine(factor.reshape(shape), 0.0)
        op = op.with_weight(derived(op.weight, "folded", scale, op.weight.shape))
    if op.bias is not None:
        folded = _affine(1.0 if factor is None else factor, 0.0 if shift is None else shift)
        return set_bias(graph, op, derived(op.bias, "folded", folded, op.bias.shape))
    if shift is None:
        return op
    return set_bias(graph, op, constant(graph, f"{op.name}.bias", shift.astype(np.float32)))


def _affine(factor: Any, shift: Any) -> Callable[[Any], Any]:
    return lambda array: (array.astype(np.float64) * factor + shift).astype(np.float32)


def _replace(graph: ir.Graph, node: ir.Node, op: Weighted) -> None:
    """Everything that read `node` reads the op, which takes its output's name."""
    result, name = node.outputs[0], node.outputs[0].name
    result.replace_all_uses_with(op.output, replace_graph_outputs=result.is_graph_output())
    graph.remove(node, safe=True)
    op.output.name = name
