"""Speed, as a ratio of two sessions run in turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import onnxruntime as ort


def speed_ratio(
    slow: ort.InferenceSession,
    fast: ort.InferenceSession,
    feed: Mapping[str, Any],
    *,
    seconds: float = 3.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> tuple[float, int]:
    """Median time of `slow` over median time of `fast`, and the number of rounds.

    The two run in turn, so that a drifting clock meets both alike; absolute times are not kept.

    Args:
        slow, fast: sessions that take `feed` (names they do not know are left out).
        feed: one input.
        seconds: how long to measure, about.
        min_rounds, max_rounds: bounds on the rounds.
    """
    runs = [_runner(slow, feed), _runner(fast, feed)]
    for run in runs:
        run()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < min_rounds or (time.perf_counter() < end and len(times[0]) < max_rounds):
        for at, run in enumerate(runs):
            start = time.perf_counter()
            run()
            times[at].append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1]), len(times[0])


def _runner(session: ort.InferenceSession, feed: Mapping[str, Any]) -> Any:
    wanted = {i.name: feed[i.name] for i in session.get_inputs()}
    return lambda: session.run(None, wanted)
