"""Times between those of a table, and beyond them."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx_ir as ir
import pytest
from qcompile.targets.ort_cpu import OrtCpu

from qcompile.costs import CostTable
from qcompile.errors import ConfigError
from qcompile.precision import Label
from qcompile.probe import conversion_key, maker_key
from qcompile.probe_graphs import Shape
from qcompile.stored import StoredTimes

ROWS, CHANNELS = (1, 8, 64), (32, 128)
MACHINE = {"processor": "X100", "onnxruntime": "1.31.1", "date": "2026-11-22"}


def law(rows: int, depth: int, width: int = 1) -> float:
    """A product of powers is a plane in logarithms."""
    return float(1e-6 * rows**0.5 * depth**0.75 * width**0.25)


def stored(*, without: tuple[str, ...] = ()) -> StoredTimes:
    seconds = {"run": 1e-5}
    for rows, depth in itertools.product(ROWS, CHANNELS):
        for width in CHANNELS:
            shape = Shape(rows, depth, width, False)
            seconds[shape.key("float")] = law(rows, depth, width)
            seconds[shape.key("static")] = law(rows, depth, width) / 2
        seconds[conversion_key("static", rows, depth)] = law(rows, depth)
        seconds[maker_key("Relu", "float", rows, depth)] = 3 * law(rows, depth)
        seconds[maker_key("Relu", "static", rows, depth)] = 2 * law(rows, depth)
    for key in without:
        del seconds[key]
    return StoredTimes(CostTable(machine=MACHINE, seconds=seconds), OrtCpu())


@pytest.mark.parametrize("size", [(1, 32, 32), (3, 50, 100), (64, 128, 128), (8, 100, 33)])
def test_sizes_between_are_interpolated(size: tuple[int, int, int]) -> None:
    found = stored().linear(Shape(*size, True), ["float", "static"])
    assert found["float"] == pytest.approx(law(*size))
    assert found["static"] == pytest.approx(law(*size) / 2)


def test_labels_that_share_a_kernel_share_a_time() -> None:
    found = stored().linear(Shape(8, 64, 64, False), ["static", "dynamic"])
    assert found["static"] == found["dynamic"]


def test_conversions_alone_and_fused() -> None:
    times = stored()
    assert times.conversion("static", 16, 64) == pytest.approx(law(16, 64))
    assert times.fused("Relu", "static", 16, 64) == pytest.approx(-law(16, 64))
    assert times.fused("Gelu", "static", 16, 64) is None


def test_larger_sizes_keep_the_throughput_of_the_largest() -> None:
    times = stored()
    assert times.linear(Shape(128, 128, 512, False), ["float"])["float"] == pytest.approx(
        2 * 4 * law(64, 128, 128)
    )
    assert times.conversion("static", 64, 256) == pytest.approx(2 * law(64, 128))
    (_, note) = times.notes
    assert note.endswith("taken at its throughput: float 128×128×512")


def test_smaller_sizes_take_as_long_as_the_smallest() -> None:
    times = stored()
    assert times.linear(Shape(1, 8, 16, False), ["float"])["float"] == pytest.approx(law(1, 32, 32))
    assert len(times.notes) == 1, "no throughput was assumed"


def test_a_size_that_was_too_large_to_measure_has_the_throughput_of_the_next() -> None:
    times = stored(without=(Shape(8, 128, 128, False).key("float"),))
    assert times.linear(Shape(8, 128, 128, False), ["float"])["float"] == pytest.approx(
        4 * law(8, 128, 32)
    )


@pytest.mark.parametrize("label", ["token", "weight4"])
def test_what_the_table_lacks_is_refused(label: Label) -> None:
    with pytest.raises(ConfigError, match=f"no times of {label} Linears"):
        stored().linear(Shape(8, 64, 64, False), [label])
    with pytest.raises(ConfigError, match="no times of token activations"):
        stored().conversion("token", 8, 64)


def test_whole_models_are_not_known() -> None:
    graph = ir.Graph([], [], nodes=[])
    assert stored().model(Path(), graph, []) is None
    assert stored().measured == 0
    assert (
        stored()
        .notes[0]
        .startswith(
            "the plan is from the stored times of an X100 (onnxruntime 1.31.1, date 2026-11-22):"
        )
    )
