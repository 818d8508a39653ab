"""Accuracy, size and speed of every method that rounds weights, of language models.

    python -m benchmarks.methods MODEL… --calibration calib.txt --evaluation eval.txt \\
        --json docs/methods/measured.json
    python -m benchmarks.methods_table

All Linears of the decoder are rounded, the output head stays in float. Calibrates on 64 × 256
tokens of one file, measures on as much of the other, in plain sessions. A model is traced and
calibrated once. Rows of the same model and scheme in the JSON are replaced, the others stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common import Feed, accuracy, publish, session, windows
from qcompile.checkpoints.scheme import choose_scheme
from qcompile.config import CompileConfig
from qcompile.errors import QcompileError
from qcompile.methods import METHODS, PER_CHANNEL
from qcompile.pipeline import compile_shared
from qcompile.progress import Phases
from qcompile.shared import Shared, checked

SETTINGS = [
    *((f"w4a16:{method}", False) for method in METHODS),
    *((f"w4a16:{method}", True) for method in METHODS if method != "hqq"),
    *((scheme, None) for scheme in ("nf4", "fp4", "llm-int8", "w8a8")),
    *((f"w8a8:{method}", None) for method in PER_CHANNEL),
]
"""Scheme, and whether blocks are symmetric."""

KINDS = {None: "", True: "symmetric", False: "asymmetric"}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--block-size", type=int, choices=(32, 64, 128))
    parser.add_argument("--blocks", choices=("asymmetric", "symmetric"), help="only these")
    parser.add_argument("--only", default="", help="e.g. w4a16:gptq,nf4")
    parser.add_argument("--bias-correction", action="store_true", help="of every scheme")
    parser.add_argument("--samples", type=int, default=64, help="to measure on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = set(filter(None, arguments.only.split(",")))
    settings = [
        (scheme, symmetric)
        for scheme, symmetric in SETTINGS
        if (not wanted or scheme in wanted) and arguments.blocks in (None, KINDS[symmetric])
    ]
    for model in arguments.models:
        rows = _measure(model, settings, arguments)
        publish(f"{model.name}, {arguments.samples} × 256 tokens at most", rows, None)


def _measure(model: Path, settings: Sequence[tuple[str, Any]], arguments: Any) -> list[Row]:
    """One row a scheme, each added to the JSON when it is known."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 1
    feeds: list[Feed] = list(
        windows(tokenizer, arguments.evaluation, bos, samples=arguments.samples, length=256)
    )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "work").mkdir()
        shared = Shared(str(model), arguments.calibration, scratch / "work", several=True)
        _compile(shared, "fp32", CompileConfig(), arguments, scratch / "fp32")
        reference = session(scratch / "fp32")
        for scheme, symmetric in settings:
            config = CompileConfig(
                objective="scheme",
                recipe={"lm_head": "float"},  # type: ignore[arg-type]
                block_size=arguments.block_size,
                symmetric=symmetric,
                bias_correction=arguments.bias_correction or None,
                strict=False,
            )
            try:
                report = _compile(shared, scheme, config, arguments, scratch / "own")
            except QcompileError as error:
                raise SystemExit(f"{model.name}, {scheme}: {error}") from error
            corrected = " --bias-correction" if arguments.bias_correction else ""
            row: Row = {"scheme": scheme + corrected, "blocks": KINDS[symmetric]}
            row["MB"] = report.bytes / 1e6
            row |= accuracy(reference, session(scratch / "own"), feeds)
            row |= {f"speed {speed.shape}": speed.ratio for speed in report.speed}
            row["seconds"] = sum(report.seconds.values())
            shutil.rmtree(scratch / "own")
            rows.append(row)
            print(model.name, row, flush=True)
            if arguments.json is not None:
                _record(arguments.json, model.name, row)
    return rows


def _compile(
    shared: Shared, scheme: str, config: CompileConfig, arguments: Any, folder: Path
) -> Any:
    chosen = choose_scheme(shared.source, scheme)
    target, config = checked(arguments.target, chosen, shared.calibration, config)
    folder.mkdir()
    return compile_shared(shared, target, arguments.target, chosen, config, folder, Phases())


def _record(path: Path, model: str, row: Row) -> None:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    key = (row["scheme"], row["blocks"])
    others = [other for other in found.get(model, []) if (other["scheme"], other["blocks"]) != key]
    found[model] = [*others, row]
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
