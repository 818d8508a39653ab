"""The artifact: a folder that stands alone."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qcompile.cache_plan import CachePlan
from qcompile.config import CompileConfig
from qcompile.edge.plan import EdgePlan
from qcompile.errors import ModelError, StandInWarning
from qcompile.genai import CONFIG as GENAI
from qcompile.genai import genai_config
from qcompile.metrics import Accuracy
from qcompile.precision import PrecisionPlan
from qcompile.ranges import RANGES, Ranges
from qcompile.report import Report
from qcompile.session import Runtime, first_sample, open_session, run_outputs
from qcompile.targets import Target, get_target
from qcompile.traced import Batch, Kind, TracedModel

GRAPH: Final = "model.onnx"
RECORD: Final = "qcompile.json"
REPORT: Final = "report.json"
SAMPLE: Final = "check.npz"
PAGE: Final = "report.html"
FORMAT: Final = 1
_SAMPLE_OUTPUT_BYTES: Final = 2 << 20


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A compiled model on disk."""

    path: Path
    report: Report

    def session(self) -> ort.InferenceSession:
        """A session on the graph, under default options."""
        return load(self.path)


def load(
    folder: str | Path,
    *,
    trust_library: bool = False,
    provider_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Open the artifact in `folder`.

    Args:
        folder: the artifact.
        trust_library: whether a library of operators that it carries may be loaded, where this
            package's own does not fit. A library is code.
        provider_options: of the preferred execution provider, as ONNX Runtime names them.

    Raises:
        ModelError: not an artifact, or a graph that ONNX Runtime refuses.

    Warns:
        StandInWarning: the kernels that it was made for cannot run here.
    """
    path = Path(folder)
    if not (path / RECORD).is_file() or not (path / GRAPH).is_file():
        raise ModelError(f"{path} is not a qcompile artifact")
    record = read_record(path)
    runtime = get_target(record["target"]).runtime(path, record, trust_library=trust_library)
    if runtime.stand_in:
        warnings.warn(f"{path}: {runtime.stand_in}", StandInWarning, stacklevel=3)
    runtime = dataclasses.replace(runtime, options=provider_options or {})
    return open_session(path / GRAPH, runtime)


def complete(
    folder: Path,
    model: TracedModel,
    target: Target,
    report: Report,
    ranges: Ranges,
    plan: PrecisionPlan | EdgePlan,
    cache: CachePlan | None,
    config: CompileConfig,
    feed: Batch,
    reference: Path,
) -> None:
    """Write everything but the graph: assets, check sample, report, and the record of it all.

    A page that cannot be drawn costs nobody the rest: the report then warns of it.

    Args:
        folder: holds the graph already.
        ranges: of activations and weights, where something is quantised.
        cache: how keys and values are codes, where they are.
        feed: a held-back feed, for the check sample.
        reference: path of the float graph, whose output the sample records.
    """
    for asset in model.assets:
        if not (folder / asset.name).exists():
            shutil.copyfile(asset, folder / asset.name)
    if config.cache:
        library = target.carried(folder)
        settings = genai_config(
            ir.load(folder / GRAPH).graph,
            folder,
            model.max_length,
            provider=target.genai,
            library=library["file"] if library is not None else None,
        )
        (folder / GENAI).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if config.last_logits and "attention_mask" in feed:
        # The reference gives logits of every column, and the last of them are what is compared.
        real = feed["attention_mask"][0] != 0
        feed = {name: value[:1, real] for name, value in feed.items()}
    _write_sample(folder, model.kind, feed, reference, target.runtime())
    report.bytes_float = _weight_bytes(model.ir)
    report.bytes = sum(p.stat().st_size for p in folder.glob(f"{GRAPH}*"))
    try:
        # Here, because it imports a plotting library, and whoever loads an artifact needs none.
        from qcompile.page import page

        text = page(report, ranges)
    except Exception as error:
        report.warnings.append(
            f"{PAGE} could not be drawn ({type(error).__name__}: {' '.join(str(error).split())}); "
            "everything else is there, and `qcompile report` tries again"
        )
    else:
        (folder / PAGE).write_text(text, encoding="utf-8")
    (folder / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if ranges.weights:
        (folder / RANGES).write_text(ranges.model_dump_json() + "\n", encoding="utf-8")
    record = {
        "format": FORMAT,
        "versions": _versions(),
        "target": report.target,
        "probed": target.probe(),
        "scheme": report.scheme,
        "kind": model.kind,
        "max_length": model.max_length,
        "config": config.model_dump(mode="json"),
        "session_options": {},
        "library": target.carried(folder),
        "plan": plan.to_dict(),
        "cache": cache.to_dict() if cache is not None else None,
        "kernels": _kernels(target, plan),
        "sha256": {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.is_file()},
    }
    write_record(folder, record)


def _kernels(target: Target, plan: PrecisionPlan | EdgePlan) -> dict[str, tuple[str, ...]]:
    if isinstance(plan, EdgePlan):
        return {unit.name: (unit.op,) for unit in plan.quantized}
    return {op.name: target.kernels_for(op, plan) for op in plan.quantized}


def read_record(folder: Path) -> dict[str, Any]:
    """``qcompile.json`` of an artifact.

    Raises:
        ModelError: missing, damaged, or written by a later format.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{folder} is not a qcompile artifact: no {RECORD}") from error
    except ValueError as error:
        raise ModelError(f"{folder / RECORD} is damaged") from error
    if not isinstance(record, dict) or "format" not in record:
        raise ModelError(f"{folder / RECORD} is damaged")
    if record["format"] != FORMAT:
        raise ModelError(
            f"{folder} has artifact format {record['format']}, this qcompile reads {FORMAT}"
        )
    wanted = {"target": str, "scheme": str, "kind": str, "plan": dict, "kernels": dict}
    if not all(isinstance(record.get(k), t) for k, t in {**wanted, "sha256": dict}.items()):
        raise ModelError(f"{folder / RECORD} is damaged")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write ``qcompile.json``."""
    text = json.dumps(record, indent=1)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def damaged_files(folder: Path, record: dict[str, Any]) -> list[str]:
    """Files of the record that are missing or changed."""
    return [
        name
        for name, digest in record["sha256"].items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]


def _write_sample(folder: Path, kind: Kind, feed: Batch, reference: Path, runtime: Runtime) -> None:
    """Keep one short feed, the float model's output and how far the compiled one is from it."""
    expected_session, session = open_session(reference), open_session(folder / GRAPH, runtime)
    sample = first_sample(expected_session, feed, session)
    expected = run_outputs(expected_session, sample)
    size = sum(output.nbytes for output in expected.values())
    length = _free_length(expected_session, sample)
    given = [i.shape for i in session.get_inputs() if i.name in sample]
    if any(isinstance(size, int) for shape in given for size in shape[1:2]):
        length = None  # given for good
    if length is not None and size > _SAMPLE_OUTPUT_BYTES:
        kept = max(8, length * _SAMPLE_OUTPUT_BYTES // size)
        sample = {n: v[:, :kept] if v.shape[1:] == (length,) else v for n, v in sample.items()}
        expected = run_outputs(expected_session, sample)
    accuracy = Accuracy(kind)
    compiled = run_outputs(session, sample)
    accuracy.add_all(sample, expected, compiled)
    arrays = {f"input.{name}": value for name, value in sample.items()}
    arrays |= {f"figure.{k}": np.array(v) for k, v in accuracy.result().items()}
    arrays |= {f"output.{name}": value for name, value in expected.items()}
    np.savez_compressed(folder / SAMPLE, **arrays)  # type: ignore[arg-type]


def _free_length(session: ort.InferenceSession, sample: Batch) -> int | None:
    """Tokens in `sample`, where the graph takes sequences of any length."""
    free = all(len(i.shape) == 2 and not isinstance(i.shape[1], int) for i in session.get_inputs())
    return sample["input_ids"].shape[1] if free and "input_ids" in sample else None


def read_sample(folder: Path) -> tuple[Batch, Batch, dict[str, float]]:
    """(feed, float outputs, figures measured at compile time).

    Raises:
        ModelError: the artifact has no readable sample.
    """
    try:
        # Opened here: np.load leaves a file that it cannot read open.
        with (folder / SAMPLE).open("rb") as file, np.load(file) as data:
            feed = {k.removeprefix("input."): data[k] for k in data if k.startswith("input.")}
            figures = {
                k.removeprefix("figure."): float(data[k]) for k in data if k.startswith("figure.")
            }
            outputs = {k.removeprefix("output."): data[k] for k in data if k.startswith("output.")}
            if not outputs:
                raise KeyError("output")
            return feed, outputs, figures
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(f"{folder / SAMPLE} cannot be read") from error


def _weight_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _versions() -> dict[str, str]:
    packages = ("qcompile", "onnxruntime", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")
    return {package: importlib.metadata.version(package) for package in packages}


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
