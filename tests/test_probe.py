"""Times of what an op could become: what is timed, under which key, and what is looked up."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.targets.ort_cpu import OrtCpu

from qcompile import probe
from qcompile.costs import CostTable
from qcompile.errors import ConfigError
from qcompile.precision import FP8, INT8, MODES, Label
from qcompile.precision import LABELS as ALL_LABELS
from qcompile.probe import Prober, conversion_key, model_key
from qcompile.probe_graphs import Shape, cut_to_activations, linear_graph
from qcompile.timing import steady_medians
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text, ops, run_model

TARGET = OrtCpu()
SMALL = Shape(rows=5, depth=64, width=32, bias=True)
COPIES = 8


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real times, taken in a hurry; no test may depend on how long anything takes."""
    quick = functools.partial(steady_medians, min_rounds=3)
    monkeypatch.setattr(probe, "steady_medians", quick)


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, float]], None]:
    """Times of whole probes by the first word of their key."""

    def patch(seconds: Mapping[str, float]) -> None:
        def medians(runs: Mapping[str, Any], **_: float) -> dict[str, float]:
            return {key: seconds[key.partition(" ")[0]] for key in runs}

        monkeypatch.setattr(probe, "steady_medians", medians)

    return patch


def prober(work: Path, table: CostTable | None = None, *, measures: bool = True) -> Prober:
    table = table or CostTable(machine=TARGET.machine())
    return Prober(TARGET, table, work, measures, seconds=0.05)


KERNELS = {"MatMul", *(row.kernel.rpartition(".")[2] for row in TARGET.capabilities)}
OUTLIERS = re.compile(r"op\d+/kept/MatMul")


LABELS = tuple(label for label in ALL_LABELS if label not in FP8)
"""Of the CPU target."""


def kernels(model: ir.Model) -> list[ir.Node]:
    """The products of a probe, those of outlier channels left out."""
    return [
        node
        for node in model.graph
        if node.op_type in KERNELS and not OUTLIERS.fullmatch(str(node.name))
    ]


# what is timed


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("bias", [True, False])
def test_every_implementation_gets_a_time(bias: bool, tmp_path: Path) -> None:
    shape = Shape(5, 64, 32, bias)
    here = prober(tmp_path)
    times = here.linear(shape, LABELS)
    assert list(times) == list(LABELS)
    assert all(0.0 < seconds < np.inf for seconds in times.values())
    for mode in INT8:
        assert 0.0 < here.conversion(mode, 5, 64) < np.inf
    end = "5x64x32+bias" if bias else "5x64x32"
    # Static and dynamic activations meet one kernel.
    kept = [f"{label} {end}" for label in LABELS if label != "dynamic"]
    # So do activations per token, with outlier channels beside them or without.
    kept += [f"quantize-{mode} 5x64" for mode in INT8 if mode != "llm-int8"]
    assert sorted(here.table.seconds) == sorted(kept)
    assert here.measured == len(kept)
    assert list(tmp_path.iterdir()) == [], "probes are taken away again"


@pytest.mark.usefixtures("measured")
def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    first = prober(tmp_path)
    times = first.linear(SMALL, LABELS)
    again = prober(tmp_path, first.table)
    assert again.linear(SMALL, LABELS) == times
    assert again.measured == 0
    # A new shape is measured alone; its activation's conversion is known.
    again.linear(Shape(5, 64, 16, True), ["float", "static"])
    assert again.measured == 2


def test_static_and_dynamic_meet_the_same_kernel(
    tmp_path: Path, invented: Callable[[Mapping[str, float]], None]
) -> None:
    invented({"static": 8.0, "quantize-static": 8.0, "quantize-dynamic": 16.0})
    here = prober(tmp_path)
    static = here.linear(SMALL, ["static"])["static"]
    assert here.measured == 2
    dynamic = here.linear(SMALL, ["dynamic"])["dynamic"]
    assert here.measured == 3, "what it takes to quantise is another time"
    assert dynamic == static
    assert here.conversion("dynamic", 5, 64) == 2 * here.conversion("static", 5, 64)


@pytest.mark.parametrize("label", INT8)
def test_a_probe_counts_each_of_its_ops_and_no_conversion(
    label: Label, tmp_path: Path, invented: Callable[[Mapping[str, float]], None]
) -> None:
    """Eight Linears and one conversion in 20 seconds, eight conversions in 32."""
    made_as = TARGET.converted_as.get(label, label)
    conversion = conversion_key(made_as, 5, 64).partition(" ")[0]
    kernel = "static" if label == "dynamic" else label
    invented({kernel: 20.0, "float": 24.0, conversion: 32.0})
    here = prober(tmp_path)
    assert here.linear(SMALL, ["float", label]) == {"float": 3.0, label: (20.0 - 4.0) / COPIES}
    assert here.conversion(label, 5, 64) == 4.0


def test_noise_gives_no_negative_time(
    tmp_path: Path, invented: Callable[[Mapping[str, float]], None]
) -> None:
    invented({"static": 1.0, "quantize-static": 80.0})
    assert prober(tmp_path).linear(SMALL, ["static"])["static"] > 0.0


def test_a_wide_linear_is_timed_in_part(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    invented: Callable[[Mapping[str, float]], None],
) -> None:
    """A quarter of its width, and four times its time; the conversion is no wider for it."""
    invented({"float": 16.0, "static": 16.0, "quantize-static": 8.0})
    built: list[Shape] = []

    def watch(shape: Shape, copies: int, *, sites: int, corners: bool) -> ir.Model:
        built.append(shape)
        return linear_graph(shape, copies, sites=sites, corners=corners)

    monkeypatch.setattr(probe, "linear_graph", watch)
    monkeypatch.setattr(probe, "_MOST_BYTES", 4 * 64 * 8)
    monkeypatch.setattr(OrtCpu, "probe_bytes", 4 * 64 * 8)
    here = prober(tmp_path)
    times = here.linear(SMALL, ["float", "static"])
    assert built[1:] == [Shape(5, 64, 8, True)] * 2
    assert times == {"float": 16.0 * 4, "static": (16.0 - 1.0) * 4}
    assert here.conversion("static", 5, 64) == 1.0
    assert "float 5x64x32+bias" in here.table.seconds, "kept under its real width"


def test_a_linear_deeper_than_a_probe_is_timed_one_column_wide(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    invented: Callable[[Mapping[str, float]], None],
) -> None:
    invented({"float": 8.0})
    monkeypatch.setattr(probe, "_MOST_BYTES", 1)
    monkeypatch.setattr(OrtCpu, "probe_bytes", 1)
    assert prober(tmp_path).linear(SMALL, ["float"]) == {"float": 8.0 * 32}


def test_a_large_linear_is_timed_in_fewer_copies(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    invented: Callable[[Mapping[str, float]], None],
) -> None:
    invented({"float": 6.0})
    monkeypatch.setattr(OrtCpu, "probe_bytes", 3 * 4 * 64 * 32)
    assert prober(tmp_path).linear(SMALL, ["float"]) == {"float": 2.0}


# the graphs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("label", LABELS)
def test_a_probe_runs_the_kernel_it_is_about(label: Label, bias: bool) -> None:
    shape = Shape(5, 64, 32, bias)
    model = linear_graph(shape, COPIES, sites=1)
    prober(Path())._lower(model, label)
    row = TARGET.capability("MatMul", label)
    expected = row.kernel if row is not None else "MatMul"
    found = kernels(model)
    assert [str(node.name) for node in found] == [f"op{at}" for at in range(COPIES)]
    assert {f"{node.domain}.{node.op_type}".strip(".") for node in found} == {expected}
    quantizers = ops(model).count("QuantizeLinear") + ops(model).count("DynamicQuantizeLinear")
    # Outlier channels that are split have a quantiser of their own.
    assert quantizers == (label in INT8) + (label == "split")
    feed = {"x0": np.zeros((1, 5, 64), np.float32)}
    outputs = run_model(model, feed)
    assert list(outputs) == [f"y{at}/corner" for at in range(COPIES)]
    assert all(array.shape == (1, 1, 1) for array in outputs.values()), "a corner goes out"
    if not bias:
        assert all(array.item() == 0.0 for array in outputs.values())
    else:
        assert len({array.item() for array in outputs.values()}) == COPIES


CODES: dict[Label, Callable[[np.ndarray], int]] = {
    "static": lambda x: int(np.rint(x[0, 0, 0] / np.float32(0.05))) + 128,
    "dynamic": lambda x: _dynamic_code(x),
    "split": lambda x: int(np.rint(x[0, 0, 0] / np.float32(0.05))) + 128,
    "token": lambda x: _token_code(x),
    "llm-int8": lambda x: _token_code(x),
}


def _token_code(x: np.ndarray) -> int:
    return int(np.rint(x[0, 0, 0] / (np.abs(x[0, 0]).max() / np.float32(127)))) + 128


def _dynamic_code(x: np.ndarray) -> int:
    step = (x.max() - x.min()) / np.float32(255)
    return int(np.rint(x[0, 0, 0] / step) + np.rint(-x.min() / step))


@pytest.mark.parametrize("mode", INT8)
def test_what_is_left_of_a_probe_is_the_conversion(mode: Label) -> None:
    """One of each input, and no kernel."""
    model = linear_graph(Shape(5, 64, 16, False), COPIES, sites=COPIES, corners=False)
    prober(Path())._lower(model, mode)
    assert len(kernels(model)) == COPIES
    cut_to_activations(model, corners=True)
    assert not kernels(model)
    assert f"{CONTRIB}.MatMulIntegerToFloat" not in ops(model)
    kind = "DynamicQuantizeLinear" if mode == "dynamic" else "QuantizeLinear"
    assert ops(model).count(kind) == COPIES * (2 if mode == "split" else 1)
    assert ops(model).count("Slice") == COPIES
    per_token = mode in ("token", "llm-int8")
    token = {"Abs", "ReduceMax", "Max", "Div", "Constant"}
    split = {"Gather", "Add", "Concat"} if mode == "split" else set()
    only = {kind, "Slice"} | split | (token & set(ops(model)))
    assert set(ops(model)) == only
    assert per_token == ("Div" in only)
    rng = np.random.default_rng(0)
    feed = {f"x{at}": rng.standard_normal((1, 5, 64), np.float32) for at in range(COPIES)}
    codes = run_model(model, feed)
    assert len(codes) == COPIES
    for code, x in zip(codes.values(), feed.values(), strict=True):
        assert code.dtype == np.uint8 and code.shape == (1, 1, 1)
        assert code.item() == CODES[mode](x)


# tables of other machines


@pytest.mark.usefixtures("measured")
def test_the_table_of_another_machine_is_only_read(tmp_path: Path) -> None:
    first = prober(tmp_path)
    times = first.linear(SMALL, LABELS)
    table = first.table.model_copy(update={"machine": {"processor": "a far one"}})
    there = prober(tmp_path, table, measures=False)
    assert there.linear(SMALL, LABELS) == times
    with pytest.raises(
        ConfigError, match=r"the table of a far one has no time for 'quantize-static 6x64'"
    ):
        there.linear(Shape(6, 64, 32, True), ["float", "static"])
    with pytest.raises(
        ConfigError, match=r"has no time for 'float 5x64x99' and 1 more \(compile once with"
    ):
        there.linear(Shape(5, 64, 99, False), ["float", "static"])
    assert there.measured == 0 and there.table.seconds == first.table.seconds


# whole models

TEXT = """g (float[B,8] x, float[8,{width}] w) => (float[B,{width}] y) {{
  m = MatMul (x, w) y = Relu (m) }}"""


def whole(width: int, seed: int = 0) -> ir.Model:
    weight = np.random.default_rng(seed).standard_normal((8, width)).astype(np.float32)
    return typed(from_text(HEADER + TEXT.format(width=width), w=weight))


@pytest.mark.usefixtures("measured")
def test_a_whole_model_is_timed_at_each_shape_once(tmp_path: Path) -> None:
    model = whole(4)
    ir.save(model, tmp_path / "model.onnx")
    feeds: list[probe.Feed] = [
        ((batch, 8), {"x": np.zeros((batch, 8), np.float32), "unknown": np.zeros(1)})
        for batch in (1, 4)
    ]
    here = prober(tmp_path)
    times = here.model(tmp_path / "model.onnx", model.graph, feeds)
    assert (
        times is not None and len(times) == 2 and all(0.0 < seconds < np.inf for seconds in times)
    )
    assert here.measured == 2
    assert list(here.table.seconds) == [model_key(model.graph, feed) for _, feed in feeds]
    again = prober(tmp_path, here.table)
    assert again.model(tmp_path / "gone.onnx", model.graph, feeds) == times
    assert again.measured == 0


def test_models_of_one_size_share_a_key() -> None:
    """Weights do not change the time; sizes, ops and shapes do, every axis of them."""

    def key(model: ir.Model, *shape: int) -> str:
        return model_key(model.graph, {"x": np.zeros(shape), "unknown": np.zeros(shape[0])})

    model, other = whole(4), whole(4)
    assert key(whole(4, seed=1), 1, 8) == key(model, 1, 8)
    next(n for n in other.graph if n.op_type == "Relu").op_type = "Abs"
    keys = {key(model, 1, 8), key(whole(5), 1, 8), key(other, 1, 8), key(model, 2, 8)}
    assert len(keys) == 4
    assert key(model, 1, 8, 3) != key(model, 1, 8, 4)


def test_keys_tell_all_that_a_time_depends_on() -> None:
    shapes = [SMALL, Shape(6, 64, 32, True), Shape(5, 6, 32, True), Shape(5, 64, 3, True)]
    shapes.append(Shape(5, 64, 32, False))
    keys = {shape.key(label) for shape in shapes for label in LABELS}
    assert len(keys) == len(shapes) * len(LABELS)
    conversions = {
        conversion_key(mode, *size) for mode in MODES for size in ((5, 6), (6, 6), (5, 7))
    }
    assert len(conversions) == 3 * len(MODES) and not conversions & keys
