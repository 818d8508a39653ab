"""Prefill and decode tokens/s in onnxruntime-genai's own loop, in turn in one process.

    python -m benchmarks.generation DIR [DIR…] --batch 1 --prompt-tokens 128 --new-tokens 128

With --steps the models take turns after every token, not after every text: no model finds its
weights in a cache that its last step has filled. It is for a machine that is not idle: of all steps
the fifth percentile counts, not the median of a text's mean, and of the prompts the fastest. With
--cpu-time the processor's time counts, of all threads: what others do meanwhile matters little.
With --processes every model has a process of its own, and threads that spin while they wait, as
they do unless told otherwise: in one process, those of one model would hold the cores of the next.

Takes any folder with a ``genai_config.json``: artifacts compiled with --cache, and what
``python -m onnxruntime_genai.models.builder`` writes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
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
    parser.add_argument("--processes", action="store_true", help="one for each model")
    given = parser.parse_args()
    if given.processes and (given.steps or given.cpu_time):
        parser.error("--processes takes turns text by text, and counts time")
    make = _Elsewhere if given.processes else _model
    models = {folder.name: make(folder, given) for folder in given.folders}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    ids = _prompts(given)
    for round_ in range(given.rounds + 1):
        groups = [models] if given.steps else [{name: model} for name, model in models.items()]
        for group in groups:
            taken = (
                {name: model.times() for name, model in group.items()}
                if given.processes
                else _times(group, ids, given)
            )
            for name, (first, later) in taken.items():
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


def _prompts(given: argparse.Namespace) -> np.ndarray:
    shape = (given.batch, given.prompt_tokens)
    return np.random.default_rng(0).integers(2, 200, shape).astype(np.int32)


class _Elsewhere:
    """A model in a process of its own, which ends with this one."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, folder, given), daemon=True).start()
        theirs.close()  # so that its end is seen
        self._pipe.recv()  # it is there

    def times(self) -> tuple[float, list[float]]:
        self._pipe.send(None)
        times: tuple[float, list[float]] = self._pipe.recv()
        time.sleep(0.1)  # its threads stop spinning
        return times


def _serve(pipe: Connection, folder: Path, given: argparse.Namespace) -> None:
    model, ids = _model(folder, given), _prompts(given)
    pipe.send(None)
    with contextlib.suppress(EOFError):  # the other end is closed
        while pipe.recv() is None:
            pipe.send(_times({"": model}, ids, given)[""])


def _model(folder: Path, given: argparse.Namespace) -> Any:
    config = genai.Config(str(folder))
    options = {
        "intra_op_num_threads": given.threads,
        # Spinning, the threads of one session would hold the cores of the next.
        "session.intra_op.allow_spinning": "1" if given.processes else "0",
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
