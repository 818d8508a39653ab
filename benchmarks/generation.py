"""Prefill and decode tokens/s of folders with model.onnx, in turn in one process.

    python -m benchmarks.generation DIR [DIR…] [--batch 4] [--genai]

Takes artifacts compiled with --cache, and what onnxruntime_genai.models.builder writes.
All run in the same loop over ONNX Runtime sessions, past and present in one memory; with --genai,
in the loop of onnxruntime-genai.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.benching import Rate, rates
from qcompile.session import open_session
from qcompile.summary import rates_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--genai", action="store_true")
    given = parser.parse_args()
    sizes = {
        "batch": given.batch,
        "prompt": given.prompt_tokens,
        "new_tokens": given.new_tokens,
        "rounds": given.rounds,
    }
    if given.genai:
        found = genai_rates(given.folders, **sizes)
    else:
        sessions = {
            str(folder): open_session(folder / "model.onnx", spinning=False)
            for folder in given.folders
        }
        found = rates(sessions, **sizes)
    from rich.console import Console

    Console(width=160).print(rates_table(found))


def genai_rates(
    folders: list[Path], *, batch: int, prompt: int, new_tokens: int, rounds: int
) -> list[Rate]:
    """As `qcompile.benching.rates`, by onnxruntime-genai's generator."""
    import onnxruntime_genai as genai

    models: dict[str, Any] = {}
    for folder in folders:
        config = genai.Config(str(folder))
        quiet = {"session.intra_op.allow_spinning": "0"}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": quiet}}}))
        models[str(folder)] = genai.Model(config)
    ids = np.random.default_rng(0).integers(2, 200, (batch, prompt)).astype(np.int32)
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            options = genai.GeneratorParams(model)
            length = prompt + new_tokens
            # As many tokens of each, whatever ends a text.
            options.set_search_options(
                max_length=length, min_length=length, batch_size=batch, do_sample=False
            )
            generator = genai.Generator(model, options)
            start = time.perf_counter()
            generator.append_tokens(ids)
            prefill[name].append(time.perf_counter() - start)
            generator.generate_next_token()
            start = time.perf_counter()
            for _ in range(new_tokens - 1):
                generator.generate_next_token()
            decode[name].append((time.perf_counter() - start) * new_tokens / (new_tokens - 1))
    return [
        Rate(
            name,
            batch * prompt / statistics.median(prefill[name][1:]),
            batch * new_tokens / statistics.median(decode[name][1:]),
        )
        for name in models
    ]


if __name__ == "__main__":
    main()
