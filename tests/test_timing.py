"""Medians of things that run in turn, by a clock that the tests wind."""

from __future__ import annotations

import itertools
import statistics
import types
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import qcompile
from qcompile import timing
from qcompile.cache import after, fed
from qcompile.timing import bound, placed, steady_medians
from tests.support import from_text


def difference() -> ort.InferenceSession:
    """z = x - y."""
    model = from_text(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[N] x, float[N] y) => (float[N] z) '
        "{ z = Sub(x, y) }"
    )
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )


def test_what_lies_on_a_device_is_fed_as_it_is() -> None:
    value = placed(np.ones(3, np.float32), "cpu")
    assert fed(difference(), {"x": value, "unknown": value}) == {"x": value}


def test_bound_inputs_give_the_same_outputs() -> None:
    """On a device nothing is copied; the CPU's own memory will do to see that it runs."""
    session = difference()
    x = np.arange(3, dtype=np.float32)
    feed = {"x": x, "y": placed(np.ones(3, np.float32), "cpu")}
    seen: list[np.ndarray] = []

    class Watched:
        """Lets the outputs be seen."""

        def io_binding(self) -> ort.IOBinding:
            self.binding = session.io_binding()
            return self.binding

        def get_outputs(self) -> list[ort.NodeArg]:
            return list(session.get_outputs())

        def run_with_iobinding(self, binding: ort.IOBinding) -> None:
            session.run_with_iobinding(binding)
            seen.append(binding.copy_outputs_to_cpu()[0])

    run = bound(Watched(), feed, "cpu")
    run()
    run()
    assert [found.tolist() for found in seen] == [[-1.0, 0.0, 1.0]] * 2


def test_a_cache_is_bound_once_for_past_and_present(
    compile_cached: Callable[[str], qcompile.Artifact],
) -> None:
    """Memory for what the mask is of, and the logits of a run with the cache outside it."""
    session = compile_cached("fp32").session()
    step = {"input_ids": np.array([[7]]), "attention_mask": np.ones((1, 1), np.int64)}
    feed = after(session, step | {"position_ids": np.zeros((1, 1), np.int64)}, 3)
    made: list[ort.IOBinding] = []

    class Watched:
        get_inputs, get_outputs = session.get_inputs, session.get_outputs

        def io_binding(self) -> ort.IOBinding:
            made.append(session.io_binding())
            return made[-1]

        run_with_iobinding = session.run_with_iobinding

    bound(Watched(), feed, "cpu")()
    outputs = dict(zip([o.name for o in session.get_outputs()], made[0].get_outputs(), strict=True))
    zeros = {n: np.zeros_like(v) for n, v in feed.items() if n.startswith("past")}
    np.testing.assert_allclose(
        outputs["logits"].numpy(), session.run(["logits"], feed | zeros)[0], atol=1e-5
    )
    assert outputs["present.0.key"].shape() == [1, 4, 4, 32]


class Clock:
    """Stands still, but for what runs."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.order: list[str] = []
        self.taken: dict[str, list[float]] = {}

    def run(self, name: str, durations: Iterable[float]) -> Callable[[], None]:
        """Something that takes each of `durations` in turn; the first is the warm-up's."""
        left: Iterator[float] = iter(durations)
        self.taken[name] = []

        def tick() -> None:
            duration = next(left)
            self.now += duration
            self.order.append(name)
            self.taken[name].append(duration)

        return tick

    def rounds(self, name: str) -> int:
        """How often it was timed."""
        return len(self.taken[name]) - 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def steady(seconds: float, first: float | None = None) -> Iterator[float]:
    return itertools.chain([first or seconds], itertools.repeat(seconds))


def noisy(seconds: float, part: float, seed: int = 0) -> Iterator[float]:
    """Normal draws around `seconds`, with a deviation of `part` of it."""
    rng = np.random.default_rng(seed)
    while True:
        yield seconds * (1.0 + part * float(rng.standard_normal()))


def test_medians_are_those_of_what_was_timed(clock: Clock) -> None:
    """The first run of each warms up, and does not count."""
    found = steady_medians(
        {
            "a": clock.run("a", [9.0, 1.0, 2.0, 8.0, 1.5, 1.25]),
            "b": clock.run("b", [9.0, 1.5, 1.5, 1.5, 1.5, 9.0]),
        },
        seconds=0.0,
    )
    # The clock stands at a thousand seconds: differences have twelve digits.
    assert found == pytest.approx({"a": 1.5, "b": 1.5}, rel=1e-12)


def test_runs_take_turns(clock: Clock) -> None:
    """A machine that slows down meets all alike."""
    steady_medians({name: clock.run(name, steady(0.01)) for name in "abc"}, min_rounds=6)
    assert clock.order == list("abc") * 7


def test_a_drift_meets_all_alike(clock: Clock) -> None:
    drift = [1.0 + 0.1 * at for at in range(12)]
    found = steady_medians(
        {"a": clock.run("a", drift), "b": clock.run("b", [2.0 * d for d in drift])},
        seconds=0.0,
        min_rounds=9,
    )
    assert found["b"] / found["a"] == pytest.approx(2.0, rel=1e-9)


def test_what_is_steady_is_run_no_more_than_asked(clock: Clock) -> None:
    found = steady_medians({"a": clock.run("a", steady(0.01, first=5.0))}, min_rounds=7)
    assert clock.rounds("a") == 7
    assert found["a"] == pytest.approx(0.01, rel=1e-9)


def test_what_takes_far_longer_than_the_quickest_is_run_three_times(clock: Clock) -> None:
    found = steady_medians(
        {
            "slow": clock.run("slow", steady(0.21)),
            "quick": clock.run("quick", steady(0.1)),
            "near": clock.run("near", steady(0.19)),
        },
        seconds=100.0,
        min_rounds=20,
    )
    assert {name: clock.rounds(name) for name in found} == {"slow": 3, "quick": 20, "near": 20}
    assert found == pytest.approx({"slow": 0.21, "quick": 0.1, "near": 0.19}, rel=1e-9)


def test_slow_rounds_do_not_make_it_slow(clock: Clock) -> None:
    """What was quick once may be so again."""
    found = steady_medians(
        {
            "a": clock.run("a", itertools.chain([1.0, 9.0, 9.0, 1.0], itertools.repeat(1.0))),
            "b": clock.run("b", steady(1.0)),
        },
        seconds=100.0,
        min_rounds=9,
    )
    assert clock.rounds("a") >= 9
    assert found["a"] == pytest.approx(1.0, rel=1e-9)


def test_what_varies_is_repeated_until_its_median_is_steady(clock: Clock) -> None:
    found = steady_medians(
        {
            "steady": clock.run("steady", steady(0.01)),
            "noisy": clock.run("noisy", noisy(0.01, 0.04)),
        },
        precision=0.01,
        seconds=100.0,
        max_rounds=1000,
    )
    assert clock.rounds("steady") == 5
    # The standard error of the median is 1.25 deviations / √n: 1 % of it takes about 25 rounds.
    assert 10 < clock.rounds("noisy") < 60
    assert found["noisy"] == pytest.approx(0.01, rel=0.04)
    assert found["noisy"] == pytest.approx(statistics.median(clock.taken["noisy"][1:]), rel=1e-6)


def test_more_precision_takes_more_rounds(clock: Clock) -> None:
    for precision in (0.02, 0.01, 0.005):
        run = clock.run(str(precision), noisy(0.01, 0.04))
        steady_medians({"a": run}, precision=precision, seconds=100.0, max_rounds=1000)
    rounds = [clock.rounds(name) for name in ("0.02", "0.01", "0.005")]
    assert rounds[0] < rounds[1] < rounds[2] < 1000


def test_it_stops_after_the_most_rounds(clock: Clock) -> None:
    steady_medians({"a": clock.run("a", noisy(0.01, 0.3))}, seconds=1e6, max_rounds=13)
    assert clock.rounds("a") == 13


def test_it_stops_when_the_time_is_up(clock: Clock) -> None:
    began = clock.now
    runs = {name: clock.run(name, noisy(0.5, 0.3, seed)) for seed, name in enumerate("ab")}
    steady_medians(runs, seconds=20.0, max_rounds=1000)
    assert 20.0 < clock.now - began < 20.0 + 6.0  # warm-up, and the round that was begun
    assert abs(clock.rounds("a") - clock.rounds("b")) <= 15
    assert max(clock.rounds(name) for name in "ab") < 100


def test_the_least_rounds_are_run_though_time_is_up(clock: Clock) -> None:
    runs = {"a": clock.run("a", noisy(10.0, 0.3)), "b": clock.run("b", noisy(10.0, 0.3, 1))}
    steady_medians(runs, seconds=1.0, min_rounds=5)
    assert [clock.rounds(name) for name in runs] == [5, 5]


def test_nothing_to_time() -> None:
    assert steady_medians({}) == {}
