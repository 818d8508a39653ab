"""Insert observers of channels: extremes and moments, wherever the channels lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

PARTS: Final = ("rows", "minimum", "maximum", "sum", "squares", "nonzero")
_PREFIX: Final = "channels"


def output_name(key: int, part: str) -> str:
    """Name of the graph output that holds `part` of value number `key`."""
    return f"{_PREFIX}.{key}.{part}"


class ObserveChannels(ir.passes.InPlacePass):
    """Replace the graph's outputs by statistics of chosen values, each [C], over all other axes.

    For the value under key ``i``, whose channels are its axis 1 or its last: ``channels.i.rows``,
    the number of values of a channel, ``.minimum``, ``.maximum``, ``.sum`` of x, ``.squares`` of
    x² and ``.nonzero``, how many are not zero.

    Args:
        values: key -> (name of the value, axis of its channels: 1 or -1, number of channels).
    """

    def __init__(self, values: Mapping[int, tuple[str, int, int]]) -> None:
        super().__init__()
        self.values = dict(values)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if any((v.name or "").startswith(f"{_PREFIX}.") for v in graph.outputs):
            return ir.passes.PassResult(model, modified=False)
        known = ir.convenience.create_value_mapping(graph)
        graph.outputs.clear()
        for key, (name, axis, channels) in self.values.items():
            _observe(graph, key, known[name], axis, channels)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)


def _observe(graph: ir.Graph, key: int, value: ir.Value, axis: int, channels: int) -> None:
    tape = ir.tape.Tape(graph)

    def integers(part: str, numbers: list[int]) -> ir.Value:
        array = np.array(numbers, np.int64)
        return tape.initializer(ir.tensor(array), name=f"{_PREFIX}.{key}.const.{part}")

    # [batch, channels, rest] where they are axis 1, else [rest, channels].
    shape, axes = ([0, channels, -1], [0, 2]) if axis == 1 else ([-1, channels], [0])
    rows = tape.op("Reshape", [value, integers("shape", shape)])
    over = integers("axes", axes)
    count = tape.op("Size", [rows])
    ones = tape.op("Abs", [tape.op("Sign", [rows])])
    results = [
        tape.op("Div", [count, integers("channels", [channels])]),
        *(tape.op(kind, [rows, over], {"keepdims": 0}) for kind in _REDUCTIONS),
        tape.op("ReduceSum", [ones, over], {"keepdims": 0}),
    ]
    for part, result in zip(PARTS, results, strict=True):
        result.name = output_name(key, part)
        result.dtype = ir.DataType.INT64 if part == "rows" else ir.DataType.FLOAT
        result.shape = ir.Shape((1,) if part == "rows" else (channels,))
        graph.outputs.append(result)


_REDUCTIONS: Final = ("ReduceMin", "ReduceMax", "ReduceSum", "ReduceSumSquare")
