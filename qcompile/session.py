"""Opening ONNX Runtime sessions: in one place, so that all of them behave alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qcompile.errors import ModelError, VerificationError


def open_session(
    path: Path, *, optimised_to: Path | None = None, threads: int = 0, profile: Path | None = None
) -> ort.InferenceSession:
    """A CPU session on the file `path`, under default options but for quiet logs.

    Args:
        path: an ONNX file; external data is found beside it.
        optimised_to: where ONNX Runtime writes the graph it really runs.
        threads: intra-op threads; 0 leaves the default.
        profile: prefix of a profile file to write.

    Raises:
        ModelError: ONNX Runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimised_to is not None:
        options.optimized_model_filepath = str(optimised_to)
        # Inline weights would meet protobuf's limit of 2 GB, and fill memory well before it.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimised_to.name}.data"
        )
    if threads:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own, unexported types
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"ONNX Runtime cannot run the graph: {lines[0] if lines else error}"
        ) from error


def run_first_output(session: ort.InferenceSession, feed: Mapping[str, Any]) -> np.ndarray:
    """The first output on `feed`; names that the session does not take are left out.

    Raises:
        VerificationError: the graph fails on this input.
    """
    missing = [i.name for i in session.get_inputs() if i.name not in feed]
    if missing:
        raise VerificationError(f"the graph wants an input {missing[0]!r} that the data lacks")
    wanted = {i.name: feed[i.name] for i in session.get_inputs()}
    try:
        result: np.ndarray = session.run([session.get_outputs()[0].name], wanted)[0]
    except Exception as error:  # onnxruntime raises its own, unexported types
        lines = str(error).strip().splitlines()
        raise VerificationError(f"the graph fails on a valid input: {lines[0]}") from error
    return result
