"""`qcompile bench`: how fast artifacts generate, in turn in one process."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from qcompile.artifact import GRAPH, read_record
from qcompile.cache import empty, is_past
from qcompile.errors import ConfigError
from qcompile.generation import Decoder
from qcompile.headline import megabytes
from qcompile.running import check_cache
from qcompile.session import open_session
from qcompile.targets import get_target


@dataclasses.dataclass(frozen=True)
class Rate:
    """Of one artifact: tokens per second, medians over the rounds, of all sequences together."""

    folder: str
    prefill: float
    decode: float


def bench(
    folders: Sequence[Path],
    *,
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 128,
    rounds: int = 5,
) -> list[Rate]:
    """Time a prompt, and the tokens after it, of each artifact in turn.

    Threads sleep between runs where there is more than one artifact; spinning, those of one would
    hold the cores.

    Args:
        folders: artifacts with a cache.
        batch: sequences at once.
        prompt: tokens of each.
        new_tokens: decode steps.
        rounds: how often all are timed.

    Raises:
        ModelError: no artifact, or one without a cache.
        ConfigError: more tokens than an artifact has positions or the memory room, or its kernels
            cannot run here.
    """
    records = [read_record(folder) for folder in folders]
    runtimes = [
        get_target(record["target"]).runtime(folder, record)
        for folder, record in zip(folders, records, strict=True)
    ]
    for folder, runtime in zip(folders, runtimes, strict=True):
        if runtime.stand_in:
            raise ConfigError(f"{folder} cannot be timed: {runtime.stand_in}")
    for folder, record in zip(folders, records, strict=True):
        most = record.get("max_length")
        if most is not None and prompt + new_tokens > most:
            raise ConfigError(f"{folder} has {most} positions, fewer than {prompt + new_tokens}")
    sessions = {
        str(folder): open_session(
            folder / GRAPH,
            runtime,
            spinning=len(folders) == 1,
        )
        for folder, runtime in zip(folders, runtimes, strict=True)
    }
    for folder, record in zip(folders, records, strict=True):
        check_cache(folder, record, sessions[str(folder)])
    wanted = sum(_bytes_of(s, batch, prompt, new_tokens) for s in sessions.values())
    free = available_bytes()
    if free is not None and wanted > free:
        raise ConfigError(
            f"caches and logits of {batch} sequences take {megabytes(wanted)}, and "
            f"{megabytes(free)} are free",
            hint="a smaller --batch, or fewer --prompt-tokens",
        )
    return rates(sessions, batch=batch, prompt=prompt, new_tokens=new_tokens, rounds=rounds)


def _bytes_of(session: ort.InferenceSession, batch: int, prompt: int, new_tokens: int) -> int:
    """Of the cache, and of a prompt's logits, which are the most that leave the session at once."""
    pasts = [empty(i, 1, 1) for i in session.get_inputs() if is_past(i.name)]
    sizes = [o.shape[-1] for o in session.get_outputs() if o.name == "logits"]
    cache = sum(past.nbytes for past in pasts) * (prompt + new_tokens)
    return batch * (cache + prompt * sum(map(int, sizes)) * np.dtype(np.float32).itemsize)


def available_bytes() -> int | None:
    """Memory that can be had without swapping, or None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None


def rates(
    sessions: dict[str, ort.InferenceSession],
    *,
    batch: int,
    prompt: int,
    new_tokens: int,
    rounds: int,
) -> list[Rate]:
    """The rates of `sessions`, graphs with a cache by name, in turn; one round more comes first.

    The tokens are random: how long a step takes does not depend on them.
    """
    sizes = [o.shape[-1] for s in sessions.values() for o in s.get_outputs() if o.name == "logits"]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, min(map(int, sizes)), (batch, prompt + new_tokens))
    prefill: dict[str, list[float]] = {name: [] for name in sessions}
    decode: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds + 1):
        decoders = {
            name: Decoder(session, batch, prompt + new_tokens) for name, session in sessions.items()
        }
        for name, decoder in decoders.items():
            start = time.perf_counter()
            decoder.step(ids[:, :prompt])
            prefill[name].append(time.perf_counter() - start)
        for name, decoder in decoders.items():
            start = time.perf_counter()
            for step in range(prompt, prompt + new_tokens):
                decoder.step(ids[:, step : step + 1])
            decode[name].append(time.perf_counter() - start)
    return [
        Rate(
            name,
            batch * prompt / statistics.median(prefill[name][1:]),
            batch * new_tokens / statistics.median(decode[name][1:]),
        )
        for name in sessions
    ]
