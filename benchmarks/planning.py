"""The default plan against every single choice, and against onnxruntime.quantization.

    python -m benchmarks.planning MODEL --calibration calib.txt --evaluation eval.txt

Every variant is made from one float graph and timed in turn in one process. For language models
with limits too: half and twice the KL of INT8 everywhere. MODEL may be a folder or an .onnx file;
data may be text or an .npz of feeds by input name.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import qcompile
from benchmarks.common import Feed, publish, session, windows
from benchmarks.speed import interleaved, tokens
from qcompile.artifact import read_record
from qcompile.metrics import Accuracy
from qcompile.session import run_outputs
from qcompile.shapes import parse_shapes


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds, one after the other, as onnxruntime.quantization wants them."""

    def __init__(self, feeds: list[Feed]) -> None:
        self.left: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.left, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--shapes", default="1x128,1x512,8x128")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--only", default="", help="variants, separated by commas")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = compare(arguments, Path(scratch))
    publish(f"{arguments.model.name}: speed relative to fp32", rows, arguments.json)


def compare(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """A row per variant: accuracy, and speed at each shape."""
    plain = qcompile.compile(str(arguments.model), scheme="fp32", output=scratch / "fp32")
    kind = read_record(plain.path)["kind"]
    graph = plain.path / "model.onnx"
    names = {i.name for i in session(plain.path).get_inputs()}
    calibration, evaluation = (
        [
            {name: value for name, value in feed.items() if name in names}
            for feed in feeds(path, plain.path, arguments)
        ]
        for path in (arguments.calibration, arguments.evaluation)
    )
    shapes = parse_shapes(arguments.shapes)

    def ours(**options: Any) -> Callable[[Path], Path]:
        config = qcompile.CompileConfig(
            shapes=shapes, samples=arguments.samples, strict=False, **options
        )
        return lambda folder: (
            qcompile.compile(graph, calibration=calibration, config=config, output=folder).path
        )

    def static(reduce_range: bool) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            folder.mkdir()
            quantize_static(
                graph, folder / "model.onnx", Reader(calibration[:16]),
                quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=reduce_range,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
            )  # fmt: skip
            return folder

        return make

    def dynamic(reduce_range: bool) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            folder.mkdir()
            quantize_dynamic(
                graph, folder / "model.onnx", per_channel=True, reduce_range=reduce_range,
                op_types_to_quantize=["MatMul", "Gemm"],
            )  # fmt: skip
            return folder

        return make

    variants: dict[str, Callable[[Path], Path]] = {
        "plan": ours(),
        "all static": ours(objective="scheme", activations="static"),
        "all dynamic": ours(objective="scheme", activations="dynamic"),
        "all weight-only": ours(objective="scheme", recipe={"*": "w8a16"}),
        "ort dynamic": dynamic(False),
        "ort dynamic 7 bit": dynamic(True),
        "ort static": static(False),
        "ort static 7 bit": static(True),
    }
    wanted = list(filter(None, arguments.only.split(","))) or list(variants)
    rows: list[dict[str, Any]] = []
    sessions: dict[str, ort.InferenceSession] = {"fp32": session(plain.path, spinning=False)}
    reference = sessions["fp32"]
    for name in wanted:
        folder = variants[name](scratch / name.replace(" ", "-"))
        sessions[name] = session(folder, spinning=False)
        rows.append({"variant": name, **figures(kind, reference, sessions[name], evaluation)})
        print(rows[-1], flush=True)
    if kind == "text-generation" and not arguments.only:
        everywhere = next(row["kl"] for row in rows if row["variant"] == "all static")
        for name, factor in (("half the KL", 0.5), ("twice the KL", 2.0)):
            folder = ours(max_kl=factor * everywhere)(scratch / name.replace(" ", "-"))
            sessions[name] = session(folder, spinning=False)
            rows.append({"variant": name, **figures(kind, reference, sessions[name], evaluation)})
            print(rows[-1], flush=True)
    for batch, length in shapes:
        feed = {k: np.tile(v, (batch, 1)) for k, v in tokens(length).items()}
        found = interleaved(list(sessions.values()), feed, arguments.rounds)
        for row, (median, _, _) in zip(rows, found[1:], strict=True):
            row[f"{batch}×{length}"] = median
    return rows


def feeds(path: Path, folder: Path, arguments: argparse.Namespace) -> list[Feed]:
    """Windows of a text, or the rows of an .npz."""
    if path.suffix == ".npz":
        with np.load(path) as data:
            arrays = {name: data[name] for name in data}
        count = min(len(next(iter(arrays.values()))), arguments.samples + 16)
        return [{k: v[at : at + 1] for k, v in arrays.items()} for at in range(count)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 1
    return list(
        windows(tokenizer, path, bos, samples=arguments.samples + 16, length=arguments.seq_len)
    )


def figures(
    kind: Any, reference: ort.InferenceSession, compiled: ort.InferenceSession, data: list[Feed]
) -> dict[str, float]:
    """KL or cosine to float, on at most 64 feeds."""
    accuracy = Accuracy(kind)
    for feed in data[:64]:
        known = {i.name: feed[i.name] for i in reference.get_inputs() if i.name in feed}
        accuracy.add_all(known, run_outputs(reference, known), run_outputs(compiled, known))
    kept = ("kl", "top1_agreement", "cosine", "cosine_min")
    return {name: value for name, value in accuracy.result().items() if name in kept}


if __name__ == "__main__":
    main()
