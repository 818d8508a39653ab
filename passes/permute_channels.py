"""Apply permutations of channels: outliers last, so that they are a Slice."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import derived, drop_unused

from qcompile.linears import Linear, find_linears
from qcompile.permuting import Permutation
from qcompile.smoothing import SmoothingPlan

_DONE = "qcompile.permuted"


class PermuteChannels(ir.passes.InPlacePass):
    """Put a site's channels in another order, where they are made and where they are read.

    1. ``x = f(MatMul(h, V) + b)``, f alike on each channel, ``MatMul(x, W)``
       -> V's columns and b in that order, W's rows too
    2. the same with smoothing's ``Mul(x, s)`` before the last product -> s in that order, too

    In exact arithmetic the graph computes what it did. A consumer is marked in its metadata, so
    that a second run changes nothing.
    """

    def __init__(self, plan: SmoothingPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        linears = {linear.name: linear for linear in find_linears(model.graph)}
        for entry in self.plan.entries:
            if entry.permutation is not None:
                consumers = [linears[name] for name in entry.consumers]
                inserted = entry.producer is not None and entry.producer.kind == "mul"
                modified |= _permute(linears, consumers, entry.site, entry.permutation, inserted)
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _permute(
    linears: dict[str, Linear],
    consumers: list[Linear],
    site: str,
    permutation: Permutation,
    inserted: bool,
) -> bool:
    """`inserted`: whether consumers read a Mul that smoothing put in."""
    if all(_DONE in consumer.matmul.metadata_props for consumer in consumers):
        return False
    for name in permutation.producers:
        producer = linears[name]
        _take(producer.matmul, 1, permutation.order, axis=1)
        if producer.bias_add is not None:
            at = 0 if producer.bias_add.inputs[0] is not producer.matmul.outputs[0] else 1
            _take(producer.bias_add, at, permutation.order, axis=0)
    mul = consumers[0].x.producer() if inserted else None
    if mul is not None:
        _take(mul, 1, permutation.order, axis=0)
    for consumer in consumers:
        _take(consumer.matmul, 1, permutation.order, axis=0)
        consumer.matmul.metadata_props[_DONE] = site
    return True


def _take(node: ir.Node, at: int, order: np.ndarray, *, axis: int) -> None:
    source = node.inputs[at]
    assert source is not None
    taken = derived(source, "permuted", lambda array: np.take(array, order, axis), source.shape)
    node.replace_input_with(at, taken)
