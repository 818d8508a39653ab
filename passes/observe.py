"""Insert observers: reductions whose results are the only outputs of the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.calibration.stats import BINS, BINS_PER_SIGN, GRAM_BLOCK, LOW, STEPS

PARTS: Final = ("minimum", "maximum", "sum1", "sum2", "sum3", "sum4")
_PREFIX: Final = "observer"


def output_name(site: int, part: str) -> str:
    """Name of the graph output that holds `part` of site number `site`."""
    return f"{_PREFIX}.{site}.{part}"


class Observe(ir.passes.InPlacePass):
    """Replace the graph's outputs by statistics of chosen values.

    For the value ``x`` [..., C] under key ``i`` the outputs, all over every axis but the last, are

    1. ``observer.i.rows``: the number of rows; ``.minimum``, ``.maximum``: [C]
    2. ``observer.i.sum1`` to ``.sum4``: [C], the sums of x to x⁴
    3. ``observer.i.histogram``: [C * BINS] counts on `qcompile.calibration.stats`' grid, of every
       `histogram_stride`-th row
    4. ``observer.i.gram``: [blocks, GRAM_BLOCK, GRAM_BLOCK], xᵀx within blocks of channels (the
       last one padded with zeros), of every `gram_stride`-th row

    Args:
        sites: key -> name of the value to observe.
        channels: key -> size of the last axis, where the value's shape does not tell.
        histogram_stride, gram_stride: rows between two that enter these observers, which cost more
            than reading their input; extremes and moments always see every row.
    """

    def __init__(
        self,
        sites: Mapping[int, str],
        *,
        channels: Mapping[int, int] | None = None,
        histogram_stride: int = 1,
        gram_stride: int | None = 1,
    ) -> None:
        super().__init__()
        self.sites = dict(sites)
        self.channels = dict(channels or {})
        self.histogram_stride = histogram_stride
        self.gram_stride = gram_stride

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if any((v.name or "").startswith(f"{_PREFIX}.") for v in graph.outputs):
            return ir.passes.PassResult(model, modified=False)
        values = ir.convenience.create_value_mapping(graph)
        graph.outputs.clear()
        for key, name in self.sites.items():
            self._observe(graph, key, values[name])
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def _observe(self, graph: ir.Graph, key: int, value: ir.Value) -> None:
        channels = self.channels.get(key) or _width(value)
        tape = ir.tape.Tape(graph)

        def constant(part: str, array: np.ndarray) -> ir.Value:
            return tape.initializer(ir.tensor(array), name=f"{_PREFIX}.{key}.const.{part}")

        def emit(
            part: str,
            result: ir.Value,
            shape: tuple[int, ...],
            dtype: ir.DataType = ir.DataType.FLOAT,
        ) -> None:
            result.name = output_name(key, part)
            result.dtype = dtype
            result.shape = ir.Shape(shape)
            graph.outputs.append(result)

        rows = tape.op("Reshape", [value, constant("rows", np.array([-1, channels], np.int64))])
        axis = constant("axis", np.array([0], np.int64))
        first = constant("first", np.array(0, np.int64))
        count = tape.op("Gather", [tape.op("Shape", [rows]), first])
        emit("rows", count, (), ir.DataType.INT64)
        square = tape.op("Mul", [rows, rows])
        powers = [rows, square, tape.op("Mul", [square, rows]), tape.op("Mul", [square, square])]
        for part, kind, operand in [
            ("minimum", "ReduceMin", rows),
            ("maximum", "ReduceMax", rows),
            *((f"sum{i + 1}", "ReduceSum", power) for i, power in enumerate(powers)),
        ]:
            emit(part, tape.op(kind, [operand, axis], {"keepdims": 0}), (channels,))
        start = constant("start", np.array([0], np.int64))
        end = constant("end", np.array([2**62], np.int64))

        def every(part: str, stride: int) -> ir.Value:
            step = constant(f"{part}.stride", np.array([stride], np.int64))
            return tape.op("Slice", [rows, start, end, axis, step])

        some = every("histogram", self.histogram_stride)
        bins = _bin_of(tape, some, channels, constant)
        ones = tape.op(
            "Expand", [constant("one", np.array(1.0, np.float32)), tape.op("Shape", [bins])]
        )
        zeros = self._zeros(graph, channels * BINS)
        counts = tape.op("ScatterElements", [zeros, bins, ones], {"reduction": "add"})
        emit("histogram", counts, (channels * BINS,))
        if self.gram_stride is not None:
            blocks = -(-channels // GRAM_BLOCK)
            gram = _block_gram(tape, every("gram", self.gram_stride), channels, constant)
            emit("gram", gram, (blocks, GRAM_BLOCK, GRAM_BLOCK))

    @staticmethod
    def _zeros(graph: ir.Graph, size: int) -> ir.Value:
        """One for all sites of a width: a graph's histograms are as large as its weights."""
        name = f"{_PREFIX}.zeros.{size}"
        if name not in graph.initializers:
            ir.tape.Tape(graph).initializer(ir.tensor(np.zeros(size, np.float32)), name=name)
        return graph.initializers[name]


def _width(value: ir.Value) -> int:
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    assert isinstance(last, int), f"{value.name} has no known width"
    return last


def _block_gram(
    tape: ir.tape.Tape,
    rows: ir.Value,
    channels: int,
    constant: Callable[[str, np.ndarray], ir.Value],
) -> ir.Value:
    blocks = -(-channels // GRAM_BLOCK)
    if blocks * GRAM_BLOCK != channels:
        pads = np.array([0, 0, 0, blocks * GRAM_BLOCK - channels], np.int64)
        rows = tape.op("Pad", [rows, constant("pads", pads)])
    shape = constant("blocks", np.array([-1, blocks, GRAM_BLOCK], np.int64))
    split = tape.op("Reshape", [rows, shape])
    left = tape.op("Transpose", [split], {"perm": [1, 2, 0]})
    return tape.op("MatMul", [left, tape.op("Transpose", [split], {"perm": [1, 0, 2]})])


def _bin_of(
    tape: ir.tape.Tape,
    rows: ir.Value,
    channels: int,
    constant: Callable[[str, np.ndarray], ir.Value],
) -> ir.Value:
    """The (channel, bin) that each value of `rows` falls into, as flat indices."""
    tiny = constant("tiny", np.array(2.0**LOW, np.float32))
    # NaN has no bin; the sums tell of it.
    nothing = constant("nothing", np.array(0.0, np.float32))
    rows = tape.op("Where", [tape.op("IsNaN", [rows]), nothing, rows])
    magnitude = tape.op("Abs", [rows])
    # log2(|x| / tiny) * STEPS, of something that is never log(0)
    scaled = tape.op("Div", [tape.op("Max", [magnitude, tiny]), tiny])
    per_octave = constant("steps", np.array(STEPS / np.log(2.0), np.float32))
    position = tape.op("Floor", [tape.op("Mul", [tape.op("Log", [scaled]), per_octave])])
    last = constant("last", np.array(BINS_PER_SIGN - 1, np.float32))
    first = constant("first_bin", np.array(1.0, np.float32))
    step = tape.op("Add", [tape.op("Min", [position, last]), first])
    outside_zero = tape.op("Cast", [tape.op("Greater", [magnitude, tiny])], {"to": 1})
    signed = tape.op("Mul", [tape.op("Mul", [step, outside_zero]), tape.op("Sign", [rows])])
    offsets = np.arange(channels, dtype=np.int64) * BINS + BINS_PER_SIGN
    index = tape.op("Add", [tape.op("Cast", [signed], {"to": 7}), constant("offsets", offsets)])
    return tape.op("Reshape", [index, constant("flat", np.array([-1], np.int64))])
