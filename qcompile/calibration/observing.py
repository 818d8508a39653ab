"""Run a graph with observer nodes over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.errors import CalibrationError
from qcompile.session import HERE, Runtime, open_session
from qcompile.traced import Batch


def outputs_over(
    observed: ir.Model,
    batches: Sequence[Batch],
    path: Path,
    *,
    runtime: Runtime = HERE,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """All outputs of `observed` on each of `batches`, by name.

    Args:
        observed: the graph with its observer nodes.
        batches: feeds of the graph; names that it does not take are left out.
        path: where it is written for a moment, beside its external weights.
        runtime: how it is opened.
        progress: called with (batches done, batches in all).

    Raises:
        CalibrationError: the graph fails on this data.
    """
    ir.save(observed, path)
    session = open_session(path, runtime, planned=False)
    path.unlink()
    names = [output.name for output in session.get_outputs()]
    inputs = {i.name for i in session.get_inputs()}
    for done, batch in enumerate(batches):
        feed = {name: array for name, array in batch.items() if name in inputs}
        try:
            results = session.run(names, feed)
        except Exception as error:  # onnxruntime raises its own, unexported types
            detail = " ".join(str(error).split())
            raise CalibrationError(f"the model fails on the calibration data: {detail}") from error
        yield dict(zip(names, results, strict=True))
        if progress:
            progress(done + 1, len(batches))
