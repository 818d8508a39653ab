"""--max-size: bits per weight to fit a budget."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile.config import CompileConfig
from qcompile.errors import ConfigError
from qcompile.report import Report
from tests.edge.models import saved, sentences, transformer


def compiled(
    folder: Path, size: int | None, *, target: str = "onnx-edge", opset: int = 21
) -> Report:
    config = CompileConfig(samples=16, opset=opset, max_size=size)
    return qcompile.compile(
        saved(transformer(), folder / "small.onnx"), target=target, calibration=sentences(),
        config=config, output=folder / f"out-{size}",
    ).report  # fmt: skip


def weight_bytes(folder: Path, size: int | None) -> int:
    model = ir.load(folder / f"out-{size}" / "model.onnx")
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_only_as_much_is_narrowed_as_the_budget_wants(tmp_path: Path) -> None:
    wide = compiled(tmp_path, None)
    all_bytes = weight_bytes(tmp_path, None)
    some = all_bytes - 300
    report = compiled(tmp_path, some)
    assert weight_bytes(tmp_path, some) <= some
    model = ir.load(tmp_path / f"out-{some}" / "model.onnx")
    kinds = [
        value.const_value.dtype.numpy()
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.size >= 256
    ]
    assert np.dtype(ml_dtypes.int4) in kinds and np.dtype(np.int8) in kinds
    assert {op.precision for op in report.ops} == {"int4", "int8"}
    assert report.accuracy["sqnr_db"] < wide.accuracy["sqnr_db"]
    # A budget that is met anyway changes nothing.
    assert compiled(tmp_path, all_bytes).accuracy == wide.accuracy


@pytest.mark.parametrize(
    ("target", "opset", "why"),
    [
        ("onnx-edge", 21, ""),
        ("onnx-edge", 17, "4-bit weights need opset 21"),
        ("onnx-edge:nnapi", 21, "every shape"),
    ],
)
def test_a_budget_that_cannot_be_met_says_by_how_much(
    target: str, opset: int, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        compiled(tmp_path, 500, target=target, opset=opset)
    message = str(caught.value)
    assert why in message and "\n" not in message
    if target == "onnx-edge":
        match = re.search(r"least that can be had is (\d+), (\d+) bytes more", message)
        assert match is not None and int(match[1]) - int(match[2]) == 500
