"""Lower a graph by a plan and open it, for a look: nothing of it stays."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from qcompile.passes.quantize import Quantize
from qcompile.precision import PrecisionPlan
from qcompile.session import open_session
from qcompile.targets.base import Target


def open_lowered(
    model: ir.Model, plan: PrecisionPlan, target: Target, work: Path
) -> ort.InferenceSession:
    """A session on `model`, which is quantised by `plan` and lowered in place.

    Args:
        model: a float graph.
        plan: for it.
        target: lowers it, and says how it is opened here.
        work: folder for the graph while it is opened.

    Raises:
        ModelError: ONNX Runtime refuses it.
    """
    for pass_ in (Quantize(plan), *target.lower(plan)):
        pass_(model)
    with tempfile.TemporaryDirectory(dir=work, prefix="lowered-") as folder:
        path = target.emit(model, Path(folder))
        return open_session(path, target.runtime(), exact=not target.saturates)
