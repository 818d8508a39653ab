"""Prefill and decode tokens/s in onnxruntime-genai's own loop, in turn in one process.

    python -m benchmarks.generation DIR [DIR…] --batch 1 --prompt-tokens 128 --new-tokens 128

Takes any folder with a ``genai_config.json``: artifacts compiled with --cache, and what
``python -m onnxruntime_genai.models.builder`` writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from rich.console import Console

from qcompile.benching import Rate
from qcompile.summary import rates_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    models = {folder.name: _model(folder, given.threads) for folder in given.folders}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    ids = np.random.default_rng(0).integers(2, 200, (given.batch, given.prompt_tokens))
    for _ in range(given.rounds + 1):
        for name, model in models.items():
            first, later = _times(model, ids.astype(np.int32), given.new_tokens)
            prefill[name].append(first)
            decode[name].append(later)
    rates = [
        Rate(
            name,
            ids.size / statistics.median(prefill[name][1:]),
            given.batch * (given.new_tokens - 1) / statistics.median(decode[name][1:]),
        )
        for name in models
    ]
    Console(width=120).print(rates_table(rates))


def _model(folder: Path, threads: int) -> Any:
    config = genai.Config(str(folder))
    options = {
        "intra_op_num_threads": threads,
        # Spinning, the threads of one session would hold the cores of the next.
        "session.intra_op.allow_spinning": "0",
    }
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return genai.Model(config)


def _times(model: Any, ids: np.ndarray, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and of all new tokens but the first."""
    length = ids.shape[1] + new_tokens
    options = genai.GeneratorParams(model)
    # As many tokens of each, whatever ends a text.
    options.set_search_options(
        max_length=length, min_length=length, batch_size=len(ids), do_sample=False
    )
    generator = genai.Generator(model, options)
    start = time.perf_counter()
    generator.append_tokens(ids)
    generator.generate_next_token()
    middle = time.perf_counter()
    for _ in range(new_tokens - 1):
        generator.generate_next_token()
    return middle - start, time.perf_counter() - middle


if __name__ == "__main__":
    main()
