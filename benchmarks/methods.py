"""Accuracy, size and speed of every method that rounds weights alone, of a language model.

    python -m benchmarks.methods MODEL --calibration calib.txt --evaluation eval.txt

All Linears of the decoder are rounded, the output head stays in float. Calibrates on 64 × 256
tokens of one file, measures on as much of the other, in plain sessions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import qcompile
from benchmarks.common import accuracy, publish, session, windows

SCHEMES = ("rtn", "mse", "hqq", "awq", "gptq", "awq+gptq", "adaround")
SETTINGS = [
    *((f"w4a16:{method}", False) for method in SCHEMES),
    *((f"w4a16:{method}", True) for method in SCHEMES if method != "hqq"),
    ("nf4", None),
    ("fp4", None),
]
"""Scheme, and whether blocks are symmetric."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--block-size", type=int, choices=(32, 64, 128))
    parser.add_argument("--blocks", choices=("asymmetric", "symmetric"), help="only these")
    parser.add_argument("--only", default="", help="e.g. w4a16:gptq,nf4")
    parser.add_argument("--samples", type=int, default=64, help="to measure on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = set(filter(None, arguments.only.split(",")))

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 1
    feeds = list(
        windows(tokenizer, arguments.evaluation, bos, samples=arguments.samples, length=256)
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        baseline = qcompile.compile(
            str(arguments.model), target=arguments.target, scheme="fp32",
            output=Path(scratch) / "fp32",
        )  # fmt: skip
        reference = session(baseline.path)
        for symmetric in (False, True, None):
            kind = {None: "", True: "symmetric", False: "asymmetric"}[symmetric]
            schemes = [
                scheme
                for scheme, of in SETTINGS
                if of is symmetric and (not wanted or scheme in wanted)
            ]
            if not schemes or arguments.blocks not in (None, kind):
                continue
            compared = qcompile.compare(
                str(arguments.model),
                schemes,
                target=arguments.target,
                calibration=arguments.calibration,
                config=qcompile.CompileConfig(
                    objective="scheme",
                    recipe={"lm_head": "float"},  # type: ignore[arg-type]
                    block_size=arguments.block_size,
                    symmetric=symmetric,
                    strict=False,
                ),
                output=Path(scratch) / "compared",
                overwrite=True,
            )
            for row in compared:
                if row.folder is None:
                    raise SystemExit(f"{row.scheme}: {row.error}")
                found = accuracy(reference, session(Path(scratch) / "compared" / row.folder), feeds)
                speed = {f"speed {shape}": ratio for shape, ratio in row.speed.items()}
                own = {"scheme": row.scheme, "blocks": kind, "MB": row.bytes / 1e6}
                rows.append({**own, **found, **speed, "seconds": row.seconds})
                print(rows[-1], flush=True)
    publish(f"{arguments.model.name}, {len(feeds)} × 256 tokens", rows, arguments.json)


if __name__ == "__main__":
    main()
