"""Accuracy of every activation mode and smoothing strength of a language model.

    python -m benchmarks.accuracy MODEL --calibration calib.txt --evaluation eval.txt

Calibrates on 64 × 256 tokens of one file, measures on 64 × 256 of the other, in plain sessions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

import qcompile
from benchmarks.common import accuracy, publish, session, windows

SETTINGS = [
    ("static", 0.25),
    ("static", 0.5),
    ("static", 0.75),
    ("static", "auto"),
    ("dynamic", 0.25),
    ("dynamic", 0.5),
    ("dynamic", 0.75),
    ("dynamic", "auto"),
    ("token", 0.25),
    ("token", 0.5),
    ("token", 0.75),
    ("token", "auto"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--only", default="", help="e.g. static:auto,token:auto")
    parser.add_argument("--recipe", type=Path, help="as qcompile's own --recipe")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = set(filter(None, arguments.only.split(",")))

    recipe = qcompile.Recipe.read(arguments.recipe) if arguments.recipe else qcompile.Recipe()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 1
    feeds = list(windows(tokenizer, arguments.evaluation, bos, samples=64, length=256))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        baseline = qcompile.compile(
            str(arguments.model), target=arguments.target, scheme="fp32",
            output=Path(scratch) / "fp32",
        )  # fmt: skip
        reference = session(baseline.path)
        for mode, smooth in SETTINGS:
            if wanted and f"{mode}:{smooth}" not in wanted:
                continue
            # From the fp32 artifact: traced once, not once a setting.
            artifact = qcompile.compile(
                baseline.path / "model.onnx",
                target=arguments.target,
                calibration=arguments.calibration,
                config=qcompile.CompileConfig(
                    objective="scheme",
                    activations=mode,  # type: ignore[arg-type]
                    smooth=smooth,  # type: ignore[arg-type]
                    recipe=recipe,
                    strict=False,
                ),
                output=Path(scratch) / "w8a8",
                overwrite=True,
            )
            figures = accuracy(reference, session(artifact.path), feeds)
            rows.append({"activations": mode, "smooth": str(smooth), **figures})
            print(rows[-1], flush=True)
    publish(f"{arguments.model.name}, {len(feeds)} × 256 tokens", rows, arguments.json)


if __name__ == "__main__":
    main()
