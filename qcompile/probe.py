"""Time what an op could become, in ONNX Runtime itself, through the passes that would make it so.

A probe is a small graph of several equal Linears (with weights of their own, so that as little
stays in the cache as in a model), quantised and lowered like any other. The implementations of one
shape are timed in turn, in one process, until their medians are steady.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.costs import CostTable
from qcompile.errors import ConfigError
from qcompile.linears import find_linears, is_constant
from qcompile.outliers import Split
from qcompile.passes.constants import constant
from qcompile.passes.quantize import Quantize
from qcompile.precision import (
    INT8,
    ActivationQuant,
    Choice,
    Label,
    OpPlan,
    PrecisionPlan,
    QuantizedWeight,
    SitePlan,
)
from qcompile.session import open_session
from qcompile.shapes import shape_of
from qcompile.targets.base import Target
from qcompile.timing import steady_medians
from qcompile.traced import Batch
from qcompile.weight_blocks import BITS, BLOCK_SIZE

Feed: TypeAlias = tuple[tuple[int, int], Batch]
"""(batch, sequence), and an input of that shape."""

_CACHE_BYTES: Final = 48 << 20
"""The float weights of one probe fill about this much: more than a core's share of any cache."""

_MOST_COPIES: Final = 8
_OUTLIERS, _COPIES = 4, 4
"""Of a split that is timed: a usual one."""

_MOST_BYTES: Final = 64 << 20
"""A wider Linear is timed in part; its time is proportional to its width."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Linear as the kernel sees it: rows × depth × width, with a bias or without."""

    rows: int
    depth: int
    width: int
    bias: bool

    def key(self, label: str) -> str:
        """Of its time in a cost table."""
        return f"{label} {self.rows}x{self.depth}x{self.width}{'+bias' if self.bias else ''}"


def conversion_key(label: Label, rows: int, depth: int) -> str:
    """Key of the time to quantise an activation [rows, depth]."""
    return f"quantize-{label} {rows}x{depth}"


def model_key(graph: ir.Graph, feed: Batch) -> str:
    """Key of the time of a whole float graph on one feed: the same for the same ops and sizes."""
    text = [
        (
            node.op_type,
            sorted((key, str(a.value)) for key, a in node.attributes.items()),
            [str(v.shape) for v in node.inputs if v is not None and is_constant(v)],
        )
        for node in graph
    ]
    names = {value.name for value in graph.inputs}
    sizes = sorted((name, x.shape) for name, x in feed.items() if name in names)
    digest = hashlib.sha256(repr((text, sizes)).encode()).hexdigest()[:16]
    batch, sequence = shape_of(feed)
    return f"model-{digest} {batch}x{sequence}"


@dataclasses.dataclass
class Prober:
    """Looks times up in `table`, and measures what it lacks where that is allowed.

    Attributes:
        target: whose kernels.
        table: added to.
        work: folder for the probes' graphs.
        measures: False for the table of another machine.
        measured: how many times were taken in this run.
    """

    target: Target
    table: CostTable
    work: Path
    measures: bool = True
    measured: int = 0

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that have to be measured.

        Raises:
            ConfigError: they cannot be measured here.
        """
        absent = [key for key in keys if key not in self.table.seconds]
        if absent and not self.measures:
            raise ConfigError(
                f"the table of {self.table.machine.get('processor', 'another machine')} has no "
                f"time for {absent[0]!r} and {len(absent) - 1} more",
                hint="compile once with the same --costs file and --shapes on that machine",
            )
        return absent

    def linear(self, shape: Shape, labels: Sequence[Label]) -> dict[Label, float]:
        """Seconds of one Linear by label, its activation's conversion left out."""
        keys = {label: shape.key(_kernel_label(label)) for label in labels}
        conversions: dict[Label, str] = {
            mode: conversion_key(mode, shape.rows, shape.depth) for mode in INT8 if mode in labels
        }
        if self.missing(conversions.values()):
            self._measure_conversions(shape.rows, shape.depth, conversions)
        if self.missing(keys.values()):
            self._measure_linears(shape, keys, conversions)
        return {label: self.table.seconds[key] for label, key in keys.items()}

    def conversion(self, label: Label, rows: int, depth: int) -> float:
        """Seconds to quantise an activation; `linear` has measured it."""
        return self.table.seconds[conversion_key(label, rows, depth)]

    def model(self, path: Path, graph: ir.Graph, feeds: Sequence[Feed]) -> list[float]:
        """Seconds of the whole float graph in `path` on each feed."""
        keys = [model_key(graph, feed) for _, feed in feeds]
        if self.missing(keys):
            session = open_session(path, spinning=False)
            for key, (_, feed) in zip(keys, feeds, strict=True):
                wanted = {i.name: feed[i.name] for i in session.get_inputs()}
                self._time({key: partial(session.run, None, wanted)})
        return [self.table.seconds[key] for key in keys]

    def _measure_conversions(self, rows: int, depth: int, keys: Mapping[Label, str]) -> None:
        runs = {}
        for mode, key in keys.items():
            model = _graph(Shape(rows, depth, 16, False), _MOST_COPIES, sites=_MOST_COPIES)
            plan = _plan(model, mode)
            _lower(model, plan, self.target)
            _cut_to_conversions(model)
            runs[key] = _runner(self._session(model), rows, depth)
        self._time(runs, copies=dict.fromkeys(runs, _MOST_COPIES))

    def _measure_linears(
        self, shape: Shape, keys: Mapping[Label, str], conversions: Mapping[Label, str]
    ) -> None:
        part = max(min(shape.width, _MOST_BYTES // (4 * shape.depth)), 1)
        timed = dataclasses.replace(shape, width=part)
        copies = int(np.clip(_CACHE_BYTES // (4 * timed.depth * timed.width), 1, _MOST_COPIES))
        runs: dict[str, Callable[[], Any]] = {}
        for label, key in keys.items():
            if key in runs:
                continue
            model = _graph(timed, copies, sites=1)
            _lower(model, _plan(model, label), self.target)
            runs[key] = _runner(self._session(model), shape.rows, shape.depth)
        # Of labels that share a kernel the first is timed, with its own conversion.
        once = {
            keys[label]: self.table.seconds[conversions[label]]
            for label in reversed(list(keys))
            if label in conversions
        }
        self._time(runs, copies=dict.fromkeys(runs, copies), once=once, factor=shape.width / part)

    def _time(
        self,
        runs: Mapping[str, Callable[[], Any]],
        *,
        copies: Mapping[str, int] | None = None,
        once: Mapping[str, float] | None = None,
        factor: float = 1.0,
    ) -> None:
        runs = {key: run for key, run in runs.items() if key not in self.table.seconds}
        for key, seconds in steady_medians(runs).items():
            each = (seconds - (once or {}).get(key, 0.0)) / (copies or {}).get(key, 1)
            self.table.seconds[key] = max(each, 1e-9) * factor
            self.measured += 1

    def _session(self, model: ir.Model) -> ort.InferenceSession:
        path = self.work / "probe.onnx"
        ir.save(model, path, external_data="probe.onnx.data", size_threshold_bytes=1024)
        session = open_session(path, spinning=False)
        for file in (path, self.work / "probe.onnx.data"):
            file.unlink(missing_ok=True)
        return session


def _kernel_label(label: Label) -> str:
    """Static and dynamic activations meet the same kernel: one time for both."""
    return "static" if label == "dynamic" else label


def _graph(shape: Shape, copies: int, *, sites: int) -> ir.Model:
    """`copies` Linears that read one of `sites` inputs each; a corner of each result goes out."""
    rng = np.random.default_rng(0)
    inputs = [
        ir.Value(
            name=f"x{at}",
            shape=ir.Shape([1, shape.rows, shape.depth]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        for at in range(sites)
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 23}, name="probe")
    # Its content does not change its time: one random block serves all.
    weight = rng.standard_normal((shape.depth, shape.width), np.float32)
    zeros = constant(graph, "zeros", np.zeros(3, np.int64))
    ones = constant(graph, "ones", np.ones(3, np.int64))
    for at in range(copies):
        tape = ir.tape.Tape()
        y = tape.op("MatMul", [inputs[at % sites], constant(graph, f"w{at}", np.roll(weight, at))])
        if shape.bias:
            y = tape.op("Add", [y, constant(graph, f"b{at}", weight[0] + at)])
        corner = tape.op("Slice", [y, zeros, ones])
        corner.name, corner.dtype = f"y{at}", ir.DataType.FLOAT
        for node in tape.nodes:
            node.name = f"op{at}" if node.op_type == "MatMul" else f"op{at}/{node.op_type}"
        graph.extend(list(tape.nodes))
        graph.outputs.append(corner)
    return ir.Model(graph, ir_version=10)


def _plan(model: ir.Model, label: Label) -> PrecisionPlan:
    """Every Linear of a probe as `label`, with codes of no meaning."""
    if label == "float":
        return PrecisionPlan()
    rng = np.random.default_rng(1)
    ops, sites = [], []
    by_input: dict[ir.Value, list[str]] = {}
    precision = Choice(label, "").precision
    linears = find_linears(model.graph)
    bits = BITS.get(precision, 8)
    half = 2 ** (bits - 1)
    codes = rng.integers(1 - half, half, (linears[0].in_features, linears[0].out_features), np.int8)
    split = None
    if label == "split":
        split = Split(np.arange(_OUTLIERS), max(1, min(_COPIES, len(codes) // 8 // _OUTLIERS)))
        codes = split.extend(codes)
    for at, linear in enumerate(linears):
        depth, width = linear.in_features, linear.out_features
        block = BLOCK_SIZE if precision in BITS else None
        scale = np.full((-(-depth // block), width) if block else width, 0.01, np.float32)
        weight = QuantizedWeight(np.roll(codes, at), scale, block, bits)
        name = linear.name
        ops.append(OpPlan(name, str(linear.x.name), precision, "", depth, width, "", weight))
        by_input.setdefault(linear.x, []).append(name)
    for x, names in by_input.items():
        mode = Choice(label, "").mode
        if mode is not None:
            activation = ActivationQuant(
                mode,
                0.05 if mode == "static" else None,
                128 if mode == "static" else None,
                np.full(len(codes), 255),
                split,
            )
            sites.append(SitePlan(str(x.name), str(x.name), activation, tuple(names)))
    return PrecisionPlan(tuple(sites), tuple(ops))


def _lower(model: ir.Model, plan: PrecisionPlan, target: Target) -> None:
    for pass_ in (Quantize(plan), *target.lower(plan)):
        pass_(model)


def _cut_to_conversions(model: ir.Model) -> None:
    """Leave what makes the kernels' first inputs, a corner of each as output."""
    graph = model.graph
    names = {str(node.name): node for node in graph}
    kernels = [node for name, node in names.items() if re.fullmatch(r"op\d+", name)]
    zeros, ones = graph.initializers["zeros"], graph.initializers["ones"]
    graph.outputs.clear()
    for at, node in enumerate(kernels):
        x = node.inputs[0]
        assert x is not None
        tape = ir.tape.Tape()
        corner = tape.op("Slice", [x, zeros, ones])
        corner.name, corner.dtype = f"q{at}", ir.DataType.UINT8
        for made in tape.nodes:
            made.name = f"corner{at}"
        graph.insert_after(node, list(tape.nodes))
        graph.outputs.append(corner)
    RemoveUnusedNodesPass()(model)


def _runner(session: ort.InferenceSession, rows: int, depth: int) -> Callable[[], Any]:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1, rows, depth), np.float32)
    feed = {i.name: x.copy() for i in session.get_inputs()}
    return lambda: session.run(None, feed)
