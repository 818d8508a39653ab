"""Put the float graph beside the quantised one, and measure by how much ops are off on average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from qcompile.passes.constants import constant

PARTS: Final = ("rows", "mean", "squares")
_PREFIX: Final = "bias"
_FLOAT: Final = "float"

Measured: TypeAlias = tuple[str, str, int, int]
"""Names of the nodes that compute one output, in the float graph and in the quantised one; axis of
its channels, 1 or -1; number of channels."""


def output_name(at: int, part: str) -> str:
    """Name of the graph output that holds `part` of op number `at`."""
    return f"{_PREFIX}.{at}.{part}"


class ObserveBias(ir.passes.InPlacePass):
    """Replace the outputs of a quantised graph by what its ops are off, float against quantised.

    The float graph is copied into it, under names of its own, on the same inputs. For op ``i``,
    over all axes but its channels: ``bias.i.rows``, the values per channel, ``.mean`` [C] of
    y_float − y and ``.squares`` [C], the mean of its square. All that reads y reads y + mean
    instead, so that the next op is measured as it will be when this one is corrected: one run does
    the work of a run per op (arXiv 1906.04721, 4.2 and appendix D).

    Args:
        reference: the float graph, which stays as it is.
        ops: in graph order.
    """

    def __init__(self, reference: ir.Model, ops: Sequence[Measured]) -> None:
        super().__init__()
        self.reference = reference
        self.ops = tuple(ops)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if any((v.name or "").startswith(f"{_PREFIX}.") for v in graph.outputs):
            return ir.passes.PassResult(model, modified=False)
        nodes = {str(node.name): node for node in graph}
        expected = _beside(model, self.reference.clone())
        graph.outputs.clear()
        for at, (name, quantized, axis, channels) in enumerate(self.ops):
            _observe(graph, at, nodes[quantized], expected[name], axis, channels)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)


def _beside(model: ir.Model, reference: ir.Model) -> dict[str, ir.Value]:
    """Move the nodes of `reference` into `model`; name of each -> its first output."""
    graph, source = model.graph, reference.graph
    inputs = {value.name: value for value in graph.inputs}
    for value in source.inputs:
        value.replace_all_uses_with(inputs[value.name])
    source.outputs.clear()
    for value in list(source.initializers.values()):
        del source.initializers[str(value.name)]
        value.name = f"{_FLOAT}/{value.name}"
        graph.register_initializer(value)
    nodes = list(source)
    found = {str(node.name): node.outputs[0] for node in nodes}
    source.remove(nodes)
    for node in nodes:
        node.name = f"{_FLOAT}/{node.name}"
        for value in node.outputs:
            value.name = f"{_FLOAT}/{value.name}"
    graph.insert_before(graph[0], nodes)
    for key, function in reference.functions.items():
        model.functions.setdefault(key, function)
    for domain, version in source.opset_imports.items():
        graph.opset_imports.setdefault(domain, version)
    return found


def _observe(
    graph: ir.Graph, at: int, node: ir.Node, expected: ir.Value, axis: int, channels: int
) -> None:
    y = node.outputs[0]
    tape = ir.tape.Tape()

    def integers(part: str, numbers: list[int]) -> ir.Value:
        return constant(graph, f"{_PREFIX}.{at}.const.{part}", np.array(numbers, np.int64))

    readers = list(y.uses())
    shape, axes = ([0, channels, -1], [0, 2]) if axis == 1 else ([-1, channels], [0])
    off = tape.op("Reshape", [tape.op("Sub", [expected, y]), integers("shape", shape)])
    over = integers("axes", axes)
    mean = tape.op("ReduceMean", [off, over], {"keepdims": 0})
    squares = tape.op("ReduceMean", [tape.op("Mul", [off, off]), over], {"keepdims": 0})
    rows = tape.op("Div", [tape.op("Size", [off]), integers("channels", [channels])])
    added = mean
    if axis == 1:
        ones = [1] * (len(y.shape or ()) - 2)
        added = tape.op("Reshape", [mean, integers("broadcast", [channels, *ones])])
    corrected = tape.op("Add", [y, added])
    corrected.type, corrected.shape = y.type, y.shape
    graph.insert_after(node, list(tape.nodes))
    for reader, index in readers:
        reader.replace_input_with(index, corrected)
    for part, result in zip(PARTS, (rows, mean, squares), strict=True):
        result.name = output_name(at, part)
        result.dtype = ir.DataType.INT64 if part == "rows" else ir.DataType.FLOAT
        result.shape = ir.Shape((1,) if part == "rows" else (channels,))
        graph.outputs.append(result)
