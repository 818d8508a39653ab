"""Graphs run over the calibration data, to be read batch by batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompile.calibration.observing import outputs_over
from qcompile.errors import CalibrationError
from qcompile.traced import Batch
from tests.passes.rewriting import HEADER
from tests.support import from_text

TEXT = """g (float[B,4] x, float[4] w) => (float[B] y, float[B,4] z) {
  z = Mul (x, w) a = Constant <value = int64[1] {1}> () y = ReduceSum <keepdims = 0> (z, a) }"""
WEIGHT = np.arange(4, dtype=np.float32)


def test_every_output_on_every_batch(tmp_path: Path) -> None:
    batches: list[Batch] = [
        {"x": np.full((rows, 4), rows, np.float32), "other": np.zeros(3)} for rows in (1, 3)
    ]
    done: list[tuple[int, int]] = []
    found = outputs_over(
        from_text(HEADER + TEXT, w=WEIGHT), batches, tmp_path / "graph.onnx",
        progress=lambda *at: done.append(at),
    )  # fmt: skip
    for results, rows in zip(found, (1, 3), strict=True):
        assert set(results) == {"y", "z"}
        np.testing.assert_array_equal(results["y"], np.full(rows, 6.0 * rows))
        np.testing.assert_array_equal(results["z"], np.tile(WEIGHT * rows, (rows, 1)))
    assert done == [(1, 2), (2, 2)]
    assert not list(tmp_path.iterdir())


def test_data_that_the_graph_fails_on_is_one_message(tmp_path: Path) -> None:
    wide: list[Batch] = [{"x": np.ones((2, 5), np.float32)}]
    graph = from_text(HEADER + TEXT, w=WEIGHT)
    with pytest.raises(CalibrationError, match="the model fails on the calibration data: ") as told:
        list(outputs_over(graph, wide, tmp_path / "graph.onnx"))
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())
