"""Apply cross-layer equalisation (arXiv 1906.04721): scales that move from one op into the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import derived, drop_unused

from qcompile.equalization import EqualizationPlan, Equalized
from qcompile.weighted import Weighted, find_weighted, set_bias

_DONE = "qcompile.equalized"


class Equalize(ir.passes.InPlacePass):
    """For each planned pair, divide the output channels of the first op's weight and its bias by s,
    and multiply the input channels of the second op's weight by s.

    In exact arithmetic the graph computes what it did. A second op is marked in its metadata, so
    that a second run changes nothing.
    """

    def __init__(self, plan: EqualizationPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        ops = {op.name: op for op in find_weighted(model.graph)}
        modified = False
        for pair in self.plan.pairs:
            if _DONE in ops[pair.second].node.metadata_props:
                continue
            _apply(model.graph, ops, pair)
            modified = True
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _apply(graph: ir.Graph, ops: dict[str, Weighted], pair: Equalized) -> None:
    first, second = ops[pair.first], ops[pair.second]
    shape = [1] * len(first.weight.shape or ())
    shape[first.out_axis] = -1
    inverse = 1.0 / pair.scale
    first = first.with_weight(_times(first.weight, inverse.reshape(shape)))
    if first.bias is not None:
        first = set_bias(graph, first, _times(first.bias, inverse))
    ops[pair.first] = first
    factor = _of_inputs(second, pair.scale[pair.channels])
    ops[pair.second] = second.with_weight(_times(second.weight, factor))
    second.node.metadata_props[_DONE] = pair.first


def _of_inputs(op: Weighted, scale: Any) -> Any:
    """`scale` [in channels], as it multiplies the weight of `op`."""
    if not op.convolves:
        return scale[:, None]
    # The rows of a grouped Conv read the channels of their own group.
    per_group = scale.reshape(op.groups, op.in_channels // op.groups)
    rows = np.repeat(per_group, op.out_channels // op.groups, axis=0)
    return rows.reshape(*rows.shape, *[1] * (len(op.weight.shape or ()) - 2))


def _times(value: ir.Value, factor: Any) -> ir.Value:
    def multiplied(array: Any) -> Any:
        return (array.astype(np.float64) * factor).astype(np.float32)

    return derived(value, "equalized", multiplied, value.shape)
