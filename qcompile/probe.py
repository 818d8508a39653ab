"""Time what an op could become, in ONNX Runtime itself, through the passes that would make it so.

A probe is a small graph of several equal Linears (with weights of their own, so that as little
stays in the cache as in a model), quantised and lowered like any other. The implementations of one
shape are timed in turn, in one process, until their medians are steady.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qcompile.costs import CostTable
from qcompile.errors import ConfigError
from qcompile.linears import is_constant
from qcompile.makers import Maker
from qcompile.passes.quantize import Quantize
from qcompile.precision import (
    CODED,
    Label,
)
from qcompile.probe_graphs import (
    RANDOM,
    Shape,
    cut_to_activations,
    linear_graph,
    maker_graph,
    plan_of,
    uncast_inputs,
)
from qcompile.session import open_session
from qcompile.shapes import shape_of
from qcompile.targets.base import Target
from qcompile.timing import placed, runner, steady_medians
from qcompile.traced import Batch

Feed: TypeAlias = tuple[tuple[int, int], Batch]
"""(batch, sequence), and an input of that shape."""

_MOST_COPIES: Final = 8
_LEAST: Final = 0.1
"""Part of a probe's time that is its kernels' at least: the conversion was timed apart, and noise
could leave nothing of a small op."""

_MOST_BYTES: Final = 64 << 20
"""A wider Linear is timed in part, unless the target asks for larger probes; its time is
proportional to its width."""

_PART: Final = 64
"""Its part is a multiple of this where it can be: kernels take no odd ones."""


_WARM: Final = 1.0
"""Seconds in which a device that had nothing to do wakes up."""

IDLE: Final = "run"
"""Key of the time of a run that does next to nothing."""


def conversion_key(label: Label, rows: int, depth: int) -> str:
    """Key of the time to quantise an activation [rows, depth]."""
    return f"quantize-{label} {rows}x{depth}"


def maker_key(maker: Maker, label: Label, rows: int, depth: int) -> str:
    """Key of the time of what makes an activation [rows, depth], quantised as `label` or float."""
    return f"{maker}{'' if label == 'float' else f'-{label}'} {rows}x{depth}"


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


class Times(Protocol):
    """Where a choice has its times from."""

    @property
    def machine(self) -> Mapping[str, str]:
        """Where they were taken."""

    @property
    def measured(self) -> int:
        """How many were taken for this compilation."""

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the report has to know of them."""

    def linear(self, shape: Shape, labels: Sequence[Label]) -> dict[Label, float]:
        """Seconds of one Linear by label, its activation's conversion left out."""

    def conversion(self, label: Label, rows: int, depth: int) -> float:
        """Seconds to quantise an activation, after `linear` was asked for the same."""

    def fused(self, maker: Maker, label: Label, rows: int, depth: int) -> float | None:
        """Seconds that `maker` takes longer (less than 0: shorter) where it quantises what it
        makes; None: not known."""

    def model(self, path: Path, graph: ir.Graph, feeds: Sequence[Feed]) -> list[float] | None:
        """Seconds of the whole float graph in `path` on each feed; None: not known."""


_Opened: TypeAlias = tuple[tuple[int | str, ...], dict[Label, ort.InferenceSession]]


@dataclasses.dataclass
class Prober:
    """Looks times up in `table`, and measures what it lacks where that is allowed.

    Attributes:
        target: whose kernels.
        table: added to.
        work: folder for the probes' graphs.
        measures: False for the table of another machine.
        measured: how many times were taken in this run.
        seconds: the most to spend on what is timed in turn, about.
    """

    target: Target
    table: CostTable
    work: Path
    measures: bool = True
    measured: int = 0
    seconds: float = 2.0
    notes: Sequence[str] = ()
    _open: dict[str, _Opened] = dataclasses.field(default_factory=dict, repr=False)
    _fed: dict[tuple[int, int, str], Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def machine(self) -> Mapping[str, str]:
        """Of the table."""
        return self.table.machine

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
        as_ = self.target.timed_as
        keys = {label: shape.key(as_.get(label, label)) for label in labels}
        made_as = self.target.converted_as
        conversions: dict[Label, str] = {
            mode: conversion_key(made_as.get(mode, mode), shape.rows, shape.depth)
            for mode in CODED
            if mode in labels
        }
        if self.missing(conversions.values()):
            own = {made_as.get(mode, mode): key for mode, key in conversions.items()}
            self._measure_conversions(shape.rows, shape.depth, own)
        if self.missing(keys.values()):
            self._measure_linears(shape, keys, conversions)
        return {label: self.table.seconds[key] for label, key in keys.items()}

    def conversion(self, label: Label, rows: int, depth: int) -> float:
        """Seconds to quantise an activation; `linear` has measured it."""
        made_as = self.target.converted_as.get(label, label)
        return self.table.seconds[conversion_key(made_as, rows, depth)]

    def fused(self, maker: Maker, label: Label, rows: int, depth: int) -> float | None:
        """Seconds that `maker` takes longer where it quantises what it makes."""
        label = self.target.converted_as.get(label, label)
        both: tuple[Label, Label] = (label, "float")
        keys: dict[Label, str] = {each: maker_key(maker, each, rows, depth) for each in both}
        if self.missing(keys.values()):
            self._measure_makers(maker, rows, depth, keys)
        return self.table.seconds[keys[label]] - self.table.seconds[keys["float"]]

    def model(self, path: Path, graph: ir.Graph, feeds: Sequence[Feed]) -> list[float] | None:
        """Seconds of the whole float graph in `path` on each feed."""
        keys = [model_key(graph, feed) for _, feed in feeds]
        if self.missing(keys):
            session = open_session(path, self.target.runtime(), spinning=False)
            for key, (_, feed) in zip(keys, feeds, strict=True):
                self._time({key: runner(session, feed)})
        return [self.table.seconds[key] for key in keys]

    def _measure_conversions(self, rows: int, depth: int, keys: Mapping[Label, str]) -> None:
        shape = Shape(rows, depth, 16, False)
        build = partial(linear_graph, shape, _MOST_COPIES, sites=_MOST_COPIES, corners=False)
        self._measure_activations("conversion", (depth,), build, rows, keys)

    def _measure_makers(
        self, maker: Maker, rows: int, depth: int, keys: Mapping[Label, str]
    ) -> None:
        build = partial(maker_graph, maker, depth, _MOST_COPIES)
        self._measure_activations("maker", (depth, maker), build, rows, keys)

    def _measure_activations(
        self,
        kind: str,
        sizes: tuple[int, *tuple[int | str, ...]],
        build: Callable[[], ir.Model],
        rows: int,
        keys: Mapping[Label, str],
    ) -> None:
        runs = {}
        for label, key in keys.items():
            session = self._session(kind, sizes, label, build, cut=True)
            runs[key] = self._runner(session, rows, sizes[0])
        self._time(runs, copies=dict.fromkeys(runs, _MOST_COPIES))

    def _measure_linears(
        self, shape: Shape, keys: Mapping[Label, str], conversions: Mapping[Label, str]
    ) -> None:
        room = max(self.target.probe_bytes, _MOST_BYTES) // (4 * shape.depth)
        part = shape.width if shape.width <= room else max(room - room % _PART or room, 1)
        timed = dataclasses.replace(shape, width=part)
        size = 4 * timed.depth * timed.width
        copies = int(np.clip(self.target.probe_bytes // size, 1, _MOST_COPIES))
        build = partial(linear_graph, timed, copies, sites=1, corners=self._corners)
        sizes = (timed.depth, timed.width, timed.bias, copies)
        runs: dict[str, Callable[[], Any]] = {}
        for label, key in keys.items():
            if key in runs or key in self.table.seconds:
                continue
            session = self._session("linear", sizes, label, build)
            runs[key] = self._runner(session, shape.rows, shape.depth)
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
        idle = self._idle() if copies is not None else 0.0
        for key, seconds in steady_medians(runs, seconds=self.seconds).items():
            kernels = max(seconds - idle - (once or {}).get(key, 0.0), _LEAST * seconds)
            self.table.seconds[key] = kernels / (copies or {}).get(key, 1) * factor
            self.measured += 1

    def _idle(self) -> float:
        """Seconds of a run that does next to nothing: on a device, much of what a probe takes.

        Before the first time is taken, the device is kept busy until it is awake.
        """
        if self._corners:
            return 0.0
        if self.measured == 0:
            build = partial(maker_graph, "Relu", 32, 1)
            run = self._runner(self._session(IDLE, (), "float", build, cut=True), 1, 32)
            end = time.perf_counter() + _WARM
            while time.perf_counter() < end:
                run()
            self._time({IDLE: run})
        return self.table.seconds[IDLE]

    @property
    def _corners(self) -> bool:
        """On a device results can stay where they are; others are cut, so that none is copied."""
        return self.target.runtime().device == "cpu"

    def _lower(self, model: ir.Model, label: Label) -> None:
        plan = plan_of(model, label, self.target.floats)
        for pass_ in (Quantize(plan), *self.target.lower(plan)):
            pass_(model)
        uncast_inputs(model.graph)

    def _session(
        self,
        kind: str,
        sizes: tuple[int | str, ...],
        label: Label,
        build: Callable[[], ir.Model],
        *,
        cut: bool = False,
    ) -> ort.InferenceSession:
        """It takes any number of rows; of each kind those of the last sizes stay open."""
        if kind not in self._open or self._open[kind][0] != sizes:
            self._open[kind] = (sizes, {})
        sessions = self._open[kind][1]
        if label not in sessions:
            model = build()
            self._lower(model, label)
            if cut:
                cut_to_activations(model, self._corners)
            sessions[label] = self._opened(model)
        return sessions[label]

    def _opened(self, model: ir.Model) -> ort.InferenceSession:
        with tempfile.TemporaryDirectory(dir=self.work, prefix="probe-") as folder:
            path = self.target.emit(model, Path(folder))
            return open_session(path, self.target.runtime(), spinning=False)

    def _runner(self, session: ort.InferenceSession, rows: int, depth: int) -> Callable[[], Any]:
        """All inputs are of one size; on a device they share one tensor of each type."""
        device = self.target.runtime().device
        if any(key[1] != depth for key in self._fed):
            self._fed.clear()
        feed = {}
        for value in session.get_inputs():
            key = (rows, depth, value.type)
            if key not in self._fed:
                block = np.random.default_rng(2).standard_normal(RANDOM, np.float32)
                half = value.type == "tensor(float16)"
                x = np.resize(block.astype(np.float16 if half else np.float32), (1, rows, depth))
                self._fed[key] = x if device == "cpu" else placed(x, device)
            feed[value.name] = self._fed[key].copy() if device == "cpu" else self._fed[key]
        return runner(session, feed)
