"""Shapes to measure speed at: read, refused, filled with tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompile.errors import ConfigError
from qcompile.report import Report
from qcompile.shapes import check_shapes, parse_shapes, timing_feeds
from qcompile.traced import TracedModel
from tests.cli_runner import RunCli
from tests.support import from_text

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'


def model_of(inputs: str, *, max_length: int | None = None) -> TracedModel:
    graph = from_text(f"{HEADER} g ({inputs}) => (float y) {{ y = Cast <to = 1> (input_ids) }}")
    return TracedModel(ir=graph, name="m", task="x", kind="other", max_length=max_length)


@pytest.mark.parametrize(
    ("text", "shapes"),
    [("1x128", ((1, 128),)), ("1x128, 8×512", ((1, 128), (8, 512))), ("10x1", ((10, 1),))],
)
def test_what_is_read(text: str, shapes: tuple[tuple[int, int], ...]) -> None:
    assert parse_shapes(text) == shapes


@pytest.mark.parametrize("text", ["", "128", "1x", "0x4", "1x0", "-1x4", "1x2x3", "1x2,", "axb"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(ConfigError, match=r"shapes: .* is not a list like"):
        parse_shapes(text)


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ("float[B,S] input_ids", "input input_ids is none"),
        ("int64[B,S] input_ids, float[B,3,8] pixels", "input pixels is none"),
        ("int64[2,S] input_ids", "shape 1x8 does not fit input input_ids, which is 2xS"),
        ("int64[B,16] input_ids", "shape 1x8 does not fit input input_ids, which is Bx16"),
    ],
)
def test_what_a_model_does_not_take(inputs: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_shapes([(1, 8)], model_of(inputs))
    check_shapes([], model_of(inputs))


def test_longer_than_the_positions() -> None:
    model = model_of("int64[B,S] input_ids", max_length=8)
    check_shapes([(1, 8)], model)
    with pytest.raises(ConfigError, match="2x9 is longer than the model's 8 positions"):
        check_shapes([(1, 8), (2, 9)], model)


def test_feeds_are_full() -> None:
    """No padding, whatever the sample had: speed is that of real tokens."""
    sample = {
        "input_ids": np.array([[5, 6, 7], [1, 1, 1]]),
        "attention_mask": np.array([[1, 1, 0], [1, 1, 1]]),
        "position_ids": np.array([[0, 1, 1], [0, 1, 2]]),
    }
    short, wide = timing_feeds([(1, 2), (2, 5)], sample)
    assert {name: value.tolist() for name, value in short.items()} == {
        "input_ids": [[5, 6]],
        "attention_mask": [[1, 1]],
        "position_ids": [[0, 1]],
    }
    assert wide["input_ids"].tolist() == [[5, 6, 7, 5, 6]] * 2
    assert wide["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert all(wide[name].dtype == sample[name].dtype for name in sample)


def test_the_report_has_them(run_cli: RunCli, tiny_onnx: Path, tiny_opt: Path) -> None:
    data = ("--calibration", tiny_opt / "calibration.txt", "--samples", "4", "--seq-len", "16")
    assert run_cli(tiny_onnx, *data, "--shapes", "1x8,3x20", "-o", "out").status == 0
    speeds = Report.read(Path("out")).speed
    assert [(speed.batch, speed.sequence) for speed in speeds] == [(1, 8), (3, 20)]
