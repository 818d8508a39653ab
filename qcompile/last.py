"""Logits of each row's last token only, once the graph that gives them all was verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.cache import last_columns
from qcompile.equivalence import TOLERANCE
from qcompile.errors import ModelError, VerificationError
from qcompile.passes.last_logits import LastLogits
from qcompile.session import first_sample, open_session, run_outputs
from qcompile.targets.base import Target
from qcompile.traced import Batch


def keep_last(graph: ir.Model, path: Path, target: Target, feed: Batch) -> None:
    """Emit `graph` again, with the logits of each row's last token only.

    Args:
        graph: as it was emitted to `path`, with the logits of every token.
        path: in the artifact's folder.
        target: writes it.
        feed: its first sample must give the same logits before and after.

    Raises:
        ModelError: the logits are made in a form that is not recognised.
        VerificationError: they are not those of before.
    """
    session = open_session(path, target.runtime())
    sample = first_sample(session, feed)
    wanted = np.take_along_axis(run_outputs(session, sample)["logits"], last_columns(sample), 1)
    del session
    if not LastLogits()(graph).modified:
        raise ModelError(
            "the product that makes the logits is in a form that is not recognised",
            hint="leave last_logits out",
        )
    target.emit(graph, path.parent)
    found = run_outputs(open_session(path, target.runtime()), sample)["logits"]
    difference, largest = np.abs(wanted - found).max(), np.abs(wanted).max()
    if not difference <= TOLERANCE * max(largest, 1e-6):
        raise VerificationError(
            f"the last token's logits differ by {difference:.3g} of {largest:.3g} from those "
            "beside the others; this is a bug in qcompile"
        )
