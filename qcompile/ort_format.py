"""ONNX Runtime's own format, for reduced builds of it, and what such a build has to contain."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import onnxruntime as ort

from qcompile.equivalence import TOLERANCE
from qcompile.errors import ModelError, VerificationError
from qcompile.session import HERE, Runtime, first_sample, open_session, run_outputs
from qcompile.traced import Batch

OrtStyle: TypeAlias = Literal["fused", "standard"]
"""``fused``: as the CPU provider fuses it, once and for all. ``standard``: the operators stay as
they are, for a provider that has to recognise them."""

ORT_GRAPH: Final = "model.ort"
REQUIRED: Final = "required_operators.config"

_LARGEST: Final = 2**31 - 1
"""A flatbuffer's offsets have 32 bits and a sign."""


def write_ort(path: Path, style: OrtStyle, feed: Batch, runtime: Runtime = HERE) -> None:
    """Write ``model.ort`` and ``required_operators.config`` beside the graph.

    The second lists the operators, and the types of each, that a build of ONNX Runtime needs
    (``build.sh --include_ops_by_config … --enable_reduced_operator_type_support``).

    Args:
        path: the graph, as it was emitted.
        style: what is done to it before it is written.
        feed: its first sample must give the same outputs from both files.
        runtime: how sessions on the graph are opened.

    Raises:
        ModelError: the graph does not fit into the format, or ONNX Runtime refuses it.
        VerificationError: the outputs are not those of the graph.
    """
    size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
    if size > _LARGEST:
        raise ModelError(
            f"the graph takes {size} bytes, and a file in ONNX Runtime's format at most {_LARGEST}",
            hint="leave --format ort out",
        )
    output = path.parent / ORT_GRAPH
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(output)
    for key, value in runtime.entries.items():
        options.add_session_config_entry(key, value)
    options.add_session_config_entry("session.save_model_format", "ORT")
    if style == "standard":
        # ONNX Runtime can also note fusions for later ("save" and replay), and fails at it from
        # opset 21 on.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        # Blocks of channels are as wide as the vector registers of this very machine.
        written = ort.InferenceSession(
            str(path),
            options,
            providers=list(runtime.providers),
            disabled_optimizers=["NchwcTransformer"],
        )
    except Exception as error:  # onnxruntime raises its own, unexported types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"ONNX Runtime cannot write {ORT_GRAPH}: {lines[0]}") from error
    _write_required(output, path.parent / REQUIRED)
    _compare(written, open_session(output, runtime), feed)


def _write_required(graph: Path, output: Path) -> None:
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logger = logging.getLogger("ort_format_model.utils")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # It leaves the file that it read to the garbage collector.
            warnings.simplefilter("ignore", ResourceWarning)
            create_config_from_models([graph], output, enable_type_reduction=True)
    finally:
        logger.setLevel(level)
    # It begins with the path of the graph, here in a folder that is about to be renamed.
    lines = output.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line and not line.startswith("#")]
    text = "\n".join([f"# Operators and types of {graph.name}.", *kept])
    output.write_text(text + "\n", encoding="utf-8")


def _compare(written: ort.InferenceSession, again: ort.InferenceSession, feed: Batch) -> None:
    """Refuse a file that computes, opened `again`, anything but what was `written`."""
    sample = first_sample(written, feed)
    wanted = run_outputs(written, sample)
    found = run_outputs(again, sample)
    for name, expected in wanted.items():
        off = np.subtract(expected, found[name], dtype=np.float64)
        difference = float(np.abs(off).max(initial=0.0))
        largest = float(np.abs(expected).max(initial=0.0))
        if not difference <= TOLERANCE * max(largest, 1e-6):
            raise VerificationError(
                f"{name} of {ORT_GRAPH} differs by {difference:.3g} of {largest:.3g} from the graph"
            )
