"""Prefill and decode tokens/s in onnxruntime-genai's own loop, in turn in one process.

    python -m benchmarks.generation DIR [DIR…] --batch 1 --prompt-tokens 128 --new-tokens 128

With --steps the models take turns after every token, not after every text: no model finds its
weights in a cache that its last step has filled. It is for a machine that is not idle: of all steps
the fifth percentile counts, not the median of a text's mean, and of the prompts the fastest. With
--cpu-time the processor's time counts, of all threads: what others do meanwhile matters little.

Takes any folder with a ``genai_config.json``: artifacts compiled with --cache, and what
``python -m onnxruntime_genai.models.builder`` writes.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import time
from collections.abc import Mapping
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
    parser.add_argument("--steps", action="store_true", help="take turns after every token")
    parser.add_argument("--cpu-time", action="store_true", help="count that in place of time")
    given = parser.parse_args()
    models = {folder.name: _model(folder, given.threads) for folder in given.folders}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    ids = np.random.default_rng(0).integers(2, 200, (given.batch, given.prompt_tokens))
    for round_ in range(given.rounds + 1):
        groups = [models] if given.steps else [{name: model} for name, model in models.items()]
        for group in groups:
            for name, (first, later) in _times(group, ids.astype(np.int32), given).items():
                if round_:  # the first warms up
                    prefill[name].append(first)
                    decode[name] += later if given.steps else [statistics.fmean(later)]
    fast, typical = (0.0, 0.05) if given.steps else (0.5, 0.5)
    rates = [
        Rate(
            name,
            ids.size / float(np.quantile(prefill[name], fast)),
            given.batch / float(np.quantile(decode[name], typical)),
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


def _times(
    models: Mapping[str, Any], ids: np.ndarray, given: argparse.Namespace
) -> dict[str, tuple[float, list[float]]]:
    """Seconds of the prompt, and of every step after it, of `models` in turn."""
    clock = time.process_time if given.cpu_time else time.perf_counter
    generators = {name: _generator(model, ids, given.new_tokens) for name, model in models.items()}
    prompts: dict[str, float] = {}
    steps: dict[str, list[float]] = {name: [] for name in models}
    for name, generator in generators.items():
        start = clock()
        generator.append_tokens(ids)
        generator.generate_next_token()
        prompts[name] = clock() - start
    order = collections.deque(generators.items())
    for _ in range(given.new_tokens - 1):
        for name, generator in order:
            start = clock()
            generator.generate_next_token()
            steps[name].append(clock() - start)
        order.rotate()
    return {name: (prompts[name], steps[name]) for name in models}


def _generator(model: Any, ids: np.ndarray, new_tokens: int) -> Any:
    length = ids.shape[1] + new_tokens
    options = genai.GeneratorParams(model)
    # As many tokens of each, whatever ends a text.
    options.set_search_options(
        max_length=length, min_length=length, batch_size=len(ids), do_sample=False
    )
    return genai.Generator(model, options)


if __name__ == "__main__":
    main()
