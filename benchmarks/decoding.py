"""Accuracy of artifacts with a cache, teacher-forced, one token at a time; of others in one go.

    python -m benchmarks.decoding FP32_DIR W8A8_DIR [...] --text eval.txt --samples 8 --length 256

The first folder is what the others are compared with.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.common import publish, windows
from qcompile.artifact import load
from qcompile.cache import has_cache
from qcompile.generation import Decoder
from qcompile.metrics import Accuracy
from qcompile.session import run_outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bos", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(given.folders[0])
    feeds = list(
        windows(tokenizer, given.text, given.bos, samples=given.samples, length=given.length)
    )
    reference = load(given.folders[0])
    expected = [run_outputs(reference, feed)["logits"] for feed in feeds]
    rows: list[dict[str, Any]] = []
    for folder in given.folders:
        session, accuracy = load(folder), Accuracy("text-generation")
        for feed, wanted in zip(feeds, expected, strict=True):
            if has_cache(session):
                decoder = Decoder(session, 1, given.length)
                ids = feed["input_ids"]
                steps = [decoder.step(ids[:, at : at + 1]) for at in range(given.length)]
                found = np.concatenate(steps, axis=1)
            else:
                found = run_outputs(session, feed)["logits"]
            accuracy.add(feed, wanted, found)
        how = "token by token" if has_cache(session) else "in one go"
        rows.append({"artifact": folder.name, "decoded": how, **accuracy.result()})
    publish(f"{given.samples} × {given.length} tokens of {given.text.name}", rows, given.json)


if __name__ == "__main__":
    main()
