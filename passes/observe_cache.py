"""Insert observers of what a cache takes: the only outputs of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused
from qcompile.passes.integer_matmul import CONTRIB

from qcompile.cache import KINDS

_PREFIX: Final = "cache_observer"


def output_name(layer: int, kind: str) -> str:
    """Name of the graph output of a layer's ``key`` or ``value``."""
    return f"{_PREFIX}.{layer}.{kind}"


def cached_attentions(model: ir.Model) -> Iterator[ir.Node]:
    """The attentions with a cache, in the order of their layers."""
    for node in model.graph:
        if node.domain == CONTRIB and node.op_type == "GroupQueryAttention":
            yield node


class ObserveCache(ir.passes.InPlacePass):
    """Replace the graph's outputs by the largest magnitudes of the keys and values that are cached.

    Of layer N, ``cache_observer.N.key`` and ``.value`` [heads · D], over batch and sequence.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if any((v.name or "").startswith(f"{_PREFIX}.") for v in graph.outputs):
            return ir.passes.PassResult(model, modified=False)
        graph.outputs.clear()
        axes = constant(graph, f"{_PREFIX}.axes", np.array([0, 1]))
        for layer, node in enumerate(list(cached_attentions(model))):
            for kind, value in zip(KINDS, node.inputs[1:3], strict=True):
                tape = ir.tape.Tape()
                assert value is not None
                most = tape.op("ReduceMax", [tape.op("Abs", [value]), axes], {"keepdims": 0})
                most.name, most.dtype = output_name(layer, kind), ir.DataType.FLOAT
                most.shape = ir.Shape([None])
                graph.insert_before(node, tape.nodes)
                graph.outputs.append(most)
        drop_unused(model)
        return ir.passes.PassResult(model, modified=True)
