"""Times of things that run in turn in one process: ratios, or medians until they are steady."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnxruntime as ort

from qcompile.cache import MASK, after, bind_shared, fed, is_past, is_present
from qcompile.session import device_of


def speed_ratio(
    slow: ort.InferenceSession,
    fast: ort.InferenceSession,
    feed: Mapping[str, Any],
    *,
    past: int = 0,
    seconds: float = 3.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> tuple[float, int]:
    """Median time of `slow` over median time of `fast`, and the number of rounds.

    The two run in turn, so that a drifting clock meets both alike; absolute times are not kept.

    Args:
        slow, fast: sessions that take `feed` (names they do not know are left out; a
            cache that is not in it is empty).
        feed: one input.
        past: tokens that are in the cache of a session that keeps one.
        seconds: how long to measure, about.
        min_rounds, max_rounds: bounds on the rounds.
    """
    runs = [runner(s, after(s, feed, past) if past else feed) for s in (slow, fast)]
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


def runner(session: ort.InferenceSession, feed: Mapping[str, Any]) -> Callable[[], Any]:
    """Runs `session` on `feed` to its end.

    Where the session is on a device, inputs and outputs lie in its memory: copying them is no part
    of the time.

    Args:
        session: open.
        feed: arrays, or what lies on the device already; names it does not know are left out.
    """
    wanted = fed(session, feed)
    device = device_of(session.get_providers()[0])
    return (
        (lambda: session.run(None, wanted)) if device == "cpu" else bound(session, wanted, device)
    )


def bound(session: ort.InferenceSession, feed: Mapping[str, Any], device: str) -> Callable[[], Any]:
    """Runs `session` with inputs and outputs bound to the memory of `device`.

    A cache is as long as the mask says, whatever is in it, and written in place.
    """
    binding = session.io_binding()
    for name, value in feed.items():
        if not is_past(name):
            binding.bind_ortvalue_input(name, placed(value, device))
    for output in session.get_outputs():
        if not is_present(output.name):
            binding.bind_output(output.name, device)
    if any(map(is_past, feed)):
        batch, tokens = placed(feed[MASK], "cpu").shape()
        bind_shared(session, binding, batch, tokens, device)
    return lambda: session.run_with_iobinding(binding)


def placed(value: Any, device: str) -> Any:
    """`value`, an array or what lies on the device already, on `device`."""
    if isinstance(value, ort.OrtValue):
        return value
    return ort.OrtValue.ortvalue_from_numpy(value, device)


def steady_medians(
    runs: Mapping[str, Callable[[], Any]],
    *,
    precision: float = 0.01,
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
) -> dict[str, float]:
    """Median seconds of each of `runs`, taken in turn until all medians are steady.

    Args:
        runs: what to time, by name.
        precision: a median is steady once its standard error, read off the quartiles, is this part
            of it or less.
        seconds: the most to spend on all together, about; `min_rounds` are run in any case, but of
            what takes more than twice as long as the quickest only three.
        min_rounds, max_rounds: bounds on the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    active = list(runs)
    while active:
        for name in active:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
        rounds = max(len(taken) for taken in times.values())
        quickest = min(statistics.median(taken) for taken in times.values())
        late = time.perf_counter() > end or rounds >= max_rounds
        active = [
            name
            for name in active
            if not (rounds >= min_rounds and (late or _is_steady(times[name], precision)))
            and not (rounds >= 3 and min(times[name]) > 2.0 * quickest)
        ]
    return {name: statistics.median(taken) for name, taken in times.items()}


def _is_steady(times: Sequence[float], precision: float) -> bool:
    if len(times) < 2:
        return True
    low, middle, high = statistics.quantiles(times, n=4)
    # Of normal draws: the median's standard error is 1.25 deviations / √n, the quartiles' distance
    # 1.35 deviations.
    return bool(1.25 * (high - low) / 1.35 / len(times) ** 0.5 <= precision * middle)
