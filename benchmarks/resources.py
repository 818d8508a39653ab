"""Memory and calibration time on an OPT of 125 million random parameters.

    python -m benchmarks.resources --json out.json

Peak resident memory of the whole compile, in a process of its own, against 3 × the float32 weights
+ 1 GB; and calibration time against running the float graph on the same batches, in turn.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.common import publish
from qcompile.calibration.run import calibrate
from qcompile.config import CompileConfig
from qcompile.frontend.huggingface import load_huggingface
from qcompile.linears import find_sites
from qcompile.pipeline import canonicalize, run
from qcompile.session import open_session
from qcompile.spill import spill

SAMPLES, LENGTH = 64, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        size = make_model(scratch / "opt-125m")
        np.savez(scratch / "calibration.npz", **feed(SAMPLES))  # type: ignore[arg-type]
        command = [
            sys.executable, "-m", "qcompile", str(scratch / "opt-125m"), "-q", "--no-strict",
            "--calibration", str(scratch / "calibration.npz"), "-o", str(scratch / "out"),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        ratio = calibration_ratio(scratch / "opt-125m", scratch)
    publish(
        "OPT, 125 M random parameters",
        [
            {
                "figure": "peak resident memory, MB",
                "measured": peak / 1e6,
                "bound": (3 * size + 1e9) / 1e6,
            },
            {"figure": "calibration time / float time", "measured": ratio, "bound": 1.5},
        ],
        arguments.json,
    )


def make_model(folder: Path) -> int:
    """OPT-125M's configuration with random weights; returns the weights' bytes."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig())
    model.save_pretrained(folder)
    return sum(parameter.numel() * 4 for parameter in model.parameters())


def feed(samples: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(4, 50000, (samples, LENGTH))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(LENGTH), (samples, 1)),
    }


def calibration_ratio(model_folder: Path, work: Path) -> float:
    """Median over three turns of calibration time / time of the float graph on the same batches."""
    model = load_huggingface(str(model_folder), CompileConfig(), work)
    run(model.ir, canonicalize())
    graph: ir.Model = spill(model.ir, work, "canonical")
    batches = [feed(8) for _ in range(SAMPLES // 8)]
    session = open_session(work / "canonical.onnx")
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        for batch in batches:
            session.run(None, batch)
        plain = time.perf_counter() - start
        start = time.perf_counter()
        calibrate(graph, find_sites(graph.graph), batches, work)
        ratios.append((time.perf_counter() - start) / plain)
    return sorted(ratios)[1]


if __name__ == "__main__":
    main()
