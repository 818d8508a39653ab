"""Memory and time on an OPT of 125 million random parameters.

    python -m benchmarks.resources --json out.json

- ``compile``: peak resident memory of the whole compile, against 3 × the float32 weights + 1 GB;
- ``calibration``: its time against running the float graph on the same batches, in turn;
- ``gptq``: time of a whole ``w4a16:gptq``, against 4 minutes, and its peak memory against 3 GB
  beyond the float32 weights; and the seconds of rounding with a quarter and half of the layers;
- ``shards``: peak memory of tracing the same weights from eight files, against from one.

Memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.common import publish
from qcompile.calibration.run import calibrate
from qcompile.config import CompileConfig
from qcompile.frontend.huggingface import load_huggingface
from qcompile.linears import find_sites
from qcompile.pipeline import canonicalize
from qcompile.pipeline import run as run_passes
from qcompile.session import open_session
from qcompile.spill import spill

SAMPLES, LENGTH = 64, 256
LAYERS = 12
SHARDS = 8
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=FIGURES, action="append", default=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        np.savez(scratch / "calibration.npz", **feed(SAMPLES))  # type: ignore[arg-type]
        rows = [
            row for name in arguments.only or FIGURES for row in FIGURES[name](scratch)
        ]  # fmt: skip
    publish("OPT, 125 M random parameters", rows, arguments.json)


def make_model(folder: Path, layers: int = LAYERS, shards: int = 1) -> int:
    """OPT-125M's configuration with random weights; returns the weights' bytes."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(num_hidden_layers=layers))
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else size // shards)
    return size


@dataclasses.dataclass(frozen=True)
class Run:
    """One compilation: seconds, those of all processors, those of rounding, and peak bytes."""

    seconds: float
    processor: float
    rounding: float
    peak: int


def compiled(scratch: Path, model: Path, *options: str) -> Run:
    """What `qcompile` takes in a process of its own."""
    out = scratch / "out"
    data = ["--calibration", str(scratch / "calibration.npz"), "-o", str(out), "--overwrite"]
    command = [sys.executable, "-m", "qcompile", str(model), "-q", "--no-strict", *data, *options]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    phases = json.loads((out / "report.json").read_text(encoding="utf-8"))["seconds"]
    processor = usage.ru_utime + usage.ru_stime
    return Run(seconds, processor, phases.get("quantize", 0.0), usage.ru_maxrss * 1024)


def compile_rows(scratch: Path) -> list[Row]:
    size = make_model(scratch / "opt-125m")
    run = compiled(scratch, scratch / "opt-125m")
    return [_row("peak resident memory, MB", run.peak / 1e6, (3 * size + 1e9) / 1e6)]


def calibration_rows(scratch: Path) -> list[Row]:
    make_model(scratch / "opt-125m")
    ratio = calibration_ratio(scratch / "opt-125m", scratch)
    return [_row("calibration time / float time", ratio, 1.5)]


def gptq_rows(scratch: Path) -> list[Row]:
    rows = []
    for layers in (LAYERS // 4, LAYERS // 2, LAYERS):
        size = make_model(scratch / "layers", layers)
        options = ("--scheme", "w4a16:gptq", "--objective", "scheme")
        run = compiled(scratch, scratch / "layers", *options)
        of = f"GPTQ, {layers} layers"
        rows += [
            _row(f"{of}: rounding, s", run.rounding, None),
            _row(f"{of}: processor time, s", run.processor, None),
            _row(f"{of}: memory beyond the weights, MB", (run.peak - size) / 1e6, 3000.0),
        ]
    return [*rows, _row(f"{of}: all of it, s", run.seconds, 240.0)]


def shard_rows(scratch: Path) -> list[Row]:
    peaks = {}
    for shards in (1, SHARDS):
        make_model(scratch / f"shards{shards}", shards=shards)
        peaks[shards] = compiled(scratch, scratch / f"shards{shards}", "--scheme", "fp32").peak
    return [_row(f"peak memory, {SHARDS} shards / 1", peaks[SHARDS] / peaks[1], None)]


def _row(figure: str, measured: float, bound: float | None) -> Row:
    return {"figure": figure, "measured": measured, "bound": bound}


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
    run_passes(model.ir, canonicalize())
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


FIGURES: dict[str, Callable[[Path], list[Row]]] = {
    "compile": compile_rows,
    "calibration": calibration_rows,
    "gptq": gptq_rows,
    "shards": shard_rows,
}


if __name__ == "__main__":
    main()
