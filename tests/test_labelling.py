"""One label per op at least cost: what is found equals the best of all labellings."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcompile.labelling import Cost, Item, Problem, Solution, front, solve

TIME, DAMAGE, SIZE = np.eye(3)
GAP = 1e-4
NEEDS: dict[str, str | None] = {
    "float": None,
    "weight8": None,
    "static": "static",
    "dynamic": "dynamic",
    "token": "token",
}
# Integers: sums of them are exact, ties are many, and a limit between two is never a near thing.
amounts = st.integers(0, 20)
costs = st.tuples(amounts, amounts, amounts).map(lambda parts: np.array(parts, np.float64))
# Seconds, divergence and bytes have such sizes.
UNITS = {"alike": np.ones(3), "real": np.array([1e-5, 1e-6, 1e4])}
prices = st.sampled_from([0.0, 0.25, 1.0, 3.0])
weights = st.tuples(prices, prices, prices).map(np.array).filter(lambda w: w.any())


@st.composite
def problems(
    draw: st.DrawFn, labels: tuple[str, ...], most: int, *, always: int = 1, unit: str = "alike"
) -> Problem:
    """Up to `most` items in up to three groups, each with some of `labels`, at least `always`."""
    scale = UNITS[unit]
    items = []
    for at in range(draw(st.integers(1, most))):
        size = draw(st.integers(always, len(labels)))
        some = draw(st.permutations(labels))[:size]
        items.append(
            Item(
                name=f"op{at}",
                group=draw(st.sampled_from("abc")),
                costs={label: draw(costs) * scale for label in some},
                needs={label: NEEDS[label] for label in some},
            )
        )
    conversions = {
        group: {need: draw(costs) * scale for need in NEEDS.values() if need in labels}
        for group in "abc"
    }
    savings = {
        group: {
            need: np.minimum(conversion, draw(costs) * scale)
            for need, conversion in conversions[group].items()
            if need is not None and draw(st.booleans())
        }
        for group in {item.group for item in items}
    }
    return Problem(tuple(items), conversions, savings)


def every_cost(problem: Problem) -> Cost:
    """The cost vectors of all labellings, [count, parts]; two conversions in a group left out."""
    names = [list(item.costs) for item in problem.items]
    choice = np.array(list(itertools.product(*(range(len(n)) for n in names))), np.int64)
    total = np.zeros((len(choice), problem.width))
    valid = np.ones(len(choice), bool)
    used: dict[str, dict[str, np.ndarray]] = {}
    for at, item in enumerate(problem.items):
        total += np.stack([item.costs[name] for name in names[at]])[choice[:, at]]
        for number, name in enumerate(names[at]):
            need = item.needs[name]
            if need is not None:
                here = used.setdefault(item.group, {})
                here[need] = here.get(need, np.zeros(len(choice), bool)) | (choice[:, at] == number)
    for group, conversions in used.items():
        for need, where in conversions.items():
            total += where[:, None] * problem.conversions[group][need]
            saved = problem.savings.get(group, {}).get(need)
            if saved is not None:
                total -= _all_take(problem, group, need, names, choice)[:, None] * saved
        valid &= np.sum(list(conversions.values()), axis=0) <= 1
    return total[valid]


def _all_take(
    problem: Problem,
    group: str,
    need: str,
    names: list[list[str]],
    choice: np.ndarray,
) -> np.ndarray:
    """Of which labellings every op of the group takes the conversion, [count]."""
    result = np.ones(len(choice), bool)
    for at, found in enumerate(problem.items):
        if found.group == group:
            takes = np.array([found.needs[name] == need for name in names[at]])
            result &= takes[choice[:, at]]
    return result


def solved(problem: Problem, price: Cost, limits: Cost | None = None) -> Solution:
    solution = solve(problem, price, limits)
    assert solution is not None
    return solution


def value_of(problem: Problem, price: Cost) -> float:
    """The sum of all labels' prices; the resolution of a cut is a part of it."""
    return sum(float(price @ cost) for i in problem.items for cost in i.costs.values())


def assert_consistent(problem: Problem, solution: Solution) -> None:
    """Every op has one of its labels, and the cost is that of the labels."""
    assert list(solution.labels) == [item.name for item in problem.items]
    for item in problem.items:
        assert solution.labels[item.name] in item.costs
    np.testing.assert_array_equal(solution.cost, problem.cost(solution.labels))


def limits_of(*, damage: float = np.inf, size: float = np.inf) -> Cost:
    return np.array([np.inf, damage, size])


def large_problem(seed: int, items: int, groups: int) -> Problem:
    """Too many labellings to try them all; float is slow and safe, as it is in a model."""
    rng = np.random.default_rng(seed)
    labels = ("float", "weight8", "static", "token")
    low = {"float": (4, 0, 4), "weight8": (5, 0.2, 1), "static": (1, 1, 1), "token": (2, 0.5, 1)}
    return Problem(
        tuple(
            Item(
                name=f"op{at}",
                group=f"site{at % groups}",
                costs={
                    label: np.array(low[label]) * rng.uniform(0.5, 2.0, 3) * UNITS["real"]
                    for label in labels
                },
                needs={label: NEEDS[label] for label in labels},
            )
            for at in range(items)
        ),
        {
            f"site{at}": {
                need: rng.uniform(0.2, 2.0, 3) * [1, 0, 0] * UNITS["real"]
                for need in ("static", "token")
            }
            for at in range(groups)
        },
    )


# the cost of a labelling


def item(name: str, group: str, **found: float) -> Item:
    """Labels with a time alone."""
    return Item(
        name,
        group,
        {label: np.array([time, 0.0, 0.0]) for label, time in found.items()},
        {label: NEEDS[label] for label in found},
    )


TWO = Problem(
    (item("p", "a", float=5, static=1, token=2), item("q", "a", float=5, static=1, token=2)),
    {"a": {"static": 3 * TIME, "token": 4 * TIME}},
)


def test_ops_of_a_group_pay_for_one_conversion() -> None:
    np.testing.assert_array_equal(TWO.cost({"p": "static", "q": "static"}), 5 * TIME)
    np.testing.assert_array_equal(TWO.cost({"p": "float", "q": "token"}), 11 * TIME)
    np.testing.assert_array_equal(TWO.cost({"p": "float", "q": "float"}), 10 * TIME)


def test_ops_of_two_groups_pay_for_two_conversions() -> None:
    apart = Problem(
        (item("p", "a", float=5, static=1), item("q", "b", float=5, static=1)),
        {"a": {"static": 3 * TIME}, "b": {"static": 7 * TIME}},
    )
    np.testing.assert_array_equal(apart.cost({"p": "static", "q": "static"}), 12 * TIME)
    assert solved(apart, TIME).labels == {"p": "static", "q": "float"}


def test_two_conversions_in_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match="a cannot be both static and token"):
        TWO.cost({"p": "static", "q": "token"})


def test_a_conversion_is_paid_where_its_readers_together_are_worth_it() -> None:
    shared = Problem(
        tuple(item(name, "a", float=3, static=1) for name in "pqr"), {"a": {"static": 5 * TIME}}
    )
    assert set(solved(shared, TIME).labels.values()) == {"static"}
    alone = Problem(shared.items[:2], shared.conversions)
    assert set(solved(alone, TIME).labels.values()) == {"float"}


def test_a_saving_is_had_where_all_readers_convert() -> None:
    """The third op is dearer converted; alone it would stay."""
    items = tuple(
        item(name, "a", float=3, static=cost) for name, cost in zip("pqr", (1, 1, 4), strict=True)
    )
    plain = Problem(items, {"a": {"static": 3 * TIME}})
    fused = dataclasses.replace(plain, savings={"a": {"static": 2 * TIME}})
    assert solved(plain, TIME).labels == {"p": "static", "q": "static", "r": "float"}
    assert solved(fused, TIME).labels == dict.fromkeys("pqr", "static")
    np.testing.assert_array_equal(fused.cost(dict.fromkeys("pqr", "static")), 7 * TIME)
    two = {"p": "static", "q": "static", "r": "float"}
    np.testing.assert_array_equal(fused.cost(two), 8 * TIME)


def test_a_saving_is_not_had_where_an_op_has_to_stay() -> None:
    items = (item("p", "a", float=4, static=1), item("q", "a", float=1))
    problem = Problem(items, {"a": {"static": 4 * TIME}}, {"a": {"static": 4 * TIME}})
    assert solved(problem, TIME).labels == {"p": "float", "q": "float"}
    limited = solve(problem, TIME, limits_of(size=1.0))
    assert limited is not None and limited.labels == {"p": "float", "q": "float"}


def test_nothing_to_label() -> None:
    empty = Problem((), {})
    assert empty.width == 0
    solution = solved(empty, np.zeros(0))
    assert solution.labels == {} and solution.cost.shape == (0,) and solution.gap == 0.0
    assert len(front(empty, np.zeros(0), np.zeros(0))) == 1


# minimum cut


@settings(max_examples=150)
@given(problems(("float", "static"), 12), weights, st.sampled_from([None, limits_of()]))
def test_a_cut_is_the_best_of_all_labellings(
    problem: Problem, price: Cost, limits: Cost | None
) -> None:
    scale = value_of(problem, price)
    assume(scale > 0)
    solution = solved(problem, price, limits)
    assert_consistent(problem, solution)
    assert solution.method == "cut" and solution.gap == 0.0
    best = float((every_cost(problem) @ price).min())
    # Costs are rounded to a part in 2⁴⁰ of their sum.
    assert float(price @ solution.cost) == pytest.approx(best, rel=0, abs=1e-10 * scale)


@settings(max_examples=50)
@given(problems(("float", "static"), 8, unit="real"), weights)
def test_a_cut_is_the_best_of_costs_of_very_different_size(problem: Problem, price: Cost) -> None:
    scale = value_of(problem, price)
    assume(scale > 0)
    solution = solved(problem, price)
    assert solution.method == "cut"
    best = float((every_cost(problem) @ price).min())
    assert float(price @ solution.cost) == pytest.approx(best, rel=0, abs=1e-10 * scale)


def test_a_program_finds_what_a_cut_finds() -> None:
    """A limit that binds nothing makes it a program."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        items = tuple(
            Item(
                f"op{at}",
                "abc"[at % 3],
                {"float": rng.uniform(1, 2, 3), "static": rng.uniform(0, 1.5, 3)},
                {"float": None, "static": "static"},
            )
            for at in range(20)
        )
        problem = Problem(items, {group: {"static": rng.uniform(1, 3, 3)} for group in "abc"})
        cut, program = solved(problem, TIME), solved(problem, TIME, limits_of(size=1e6))
        assert (cut.method, program.method) == ("cut", "milp")
        assert cut.cost[0] <= program.cost[0] * (1 + 1e-9)
        assert program.cost[0] == pytest.approx(cut.cost[0], rel=GAP)


# more labels


@settings(max_examples=150)
@given(
    problems(tuple(NEEDS), 6, always=3) | problems(("float", "static", "token"), 6, always=3),
    weights,
)
def test_groups_apart_are_the_best_of_all_labellings(problem: Problem, price: Cost) -> None:
    found = every_cost(problem) @ price
    solution = solve(problem, price)
    if not len(found):
        assert solution is None
        return
    assert solution is not None
    assert_consistent(problem, solution)
    assert (solution.method, solution.gap) == ("groups", 0.0)
    assert float(price @ solution.cost) == pytest.approx(float(found.min()), rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_program_finds_what_groups_apart_find(seed: int) -> None:
    """A limit that binds nothing makes it a program."""
    problem = large_problem(seed, items=60, groups=15)
    apart, program = solved(problem, TIME), solved(problem, TIME, limits_of(size=1e9))
    assert (apart.method, program.method) == ("groups", "milp")
    assert apart.cost[0] <= program.cost[0] * (1 + 1e-9)
    assert program.cost[0] == pytest.approx(apart.cost[0], rel=GAP)


# mixed-integer program


@settings(max_examples=120)
@given(
    problems(("float", "static", "dynamic", "token"), 6),
    weights,
    st.integers(-1, 60),
    st.integers(-1, 60),
    st.sampled_from(["damage", "size", "both"]),
)
def test_under_limits_it_is_the_best_that_keeps_them(
    problem: Problem, price: Cost, damage: int, size: int, which: str
) -> None:
    """None exactly where no labelling keeps them."""
    limits = limits_of(
        damage=damage + 0.5 if which != "size" else np.inf,
        size=size + 0.5 if which != "damage" else np.inf,
    )
    found = every_cost(problem)
    found = found[(found <= limits).all(axis=1)]
    solution = solve(problem, price, limits)
    if not len(found):
        assert solution is None
        return
    assert solution is not None
    assert_consistent(problem, solution)
    assert solution.method == "milp"
    assert (solution.cost <= limits).all()
    best = float((found @ price).min())
    assert float(price @ solution.cost) == pytest.approx(best, rel=GAP, abs=1e-9)


@settings(max_examples=60)
@given(
    problems(("float", "static", "token"), 6, unit="real"),
    st.integers(-1, 60),
    st.integers(-1, 60),
)
def test_limits_of_very_different_size(problem: Problem, damage: int, size: int) -> None:
    limits = limits_of(damage=damage + 0.5, size=size + 0.5) * UNITS["real"]
    found = every_cost(problem)
    found = found[(found <= limits).all(axis=1)]
    solution = solve(problem, TIME, limits)
    assert (solution is None) == (not len(found))
    if solution is not None:
        assert (solution.cost <= limits).all()
        best = float(found[:, 0].min())
        assert solution.cost[0] == pytest.approx(best, rel=GAP, abs=1e-9 * UNITS["real"][0])


def neighbours(problem: Problem, labels: dict[str, str]) -> list[dict[str, str]]:
    """`labels` with one op changed, where its group allows it."""
    found = []
    for one in problem.items:
        for label in one.costs:
            changed = labels | {one.name: label}
            try:
                problem.cost(changed)
            except ValueError:
                continue
            found.append(changed)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_random_labelling_within_the_limit_is_faster(seed: int) -> None:
    problem = large_problem(seed, items=30, groups=10)
    rng = np.random.default_rng(seed)
    limit = 10 * UNITS["real"][1]
    solution = solved(problem, TIME, limits_of(damage=limit))
    assert solution.cost[1] <= limit
    assert solution.cost[0] > solved(problem, TIME).cost[0], "the limit binds"
    tried = neighbours(problem, dict(solution.labels))
    for _ in range(1000):
        safe = rng.random()  # how many ops stay in float
        modes = {group: rng.choice(["static", "token"]) for group in problem.conversions}
        tried.append(
            {
                one.name: str(
                    rng.choice(["float", "weight8"]) if rng.random() < safe else modes[one.group]
                )
                for one in problem.items
            }
        )
    within = [cost for cost in map(problem.cost, tried) if cost[1] <= limit]
    assert len(within) >= 200
    assert min(cost[0] for cost in within) >= solution.cost[0] * (1 - GAP)


# the front


@settings(max_examples=60)
@given(problems(("float", "static"), 7) | problems(("float", "static", "token"), 4, always=2))
def test_no_labelling_is_better_than_a_point_of_the_front_in_both(problem: Problem) -> None:
    assume(value_of(problem, TIME + DAMAGE) > 0)
    found = every_cost(problem)[:, :2]
    points = [point.cost[:2] for point in front(problem, TIME, DAMAGE, most=1 << 20)]
    for point in points:
        assert not (found < point).all(axis=1).any()
    times, damages = np.transpose(points)
    # Not strictly: two points may differ in their sizes alone.
    assert (np.diff(times) >= 0).all() and (np.diff(damages) <= 0).all()
    assert times[0] == pytest.approx(found[:, 0].min(), abs=1e-9)
    assert damages[-1] == pytest.approx(found[:, 1].min(), abs=1e-9)


@settings(max_examples=60)
@given(problems(("float", "static"), 7))
def test_no_labelling_lies_below_the_line_between_two_points(problem: Problem) -> None:
    assume(value_of(problem, TIME + DAMAGE) > 0)
    found = every_cost(problem)[:, :2]
    points = [point.cost[:2] for point in front(problem, TIME, DAMAGE, most=1 << 20)]
    for (t0, d0), (t1, d1) in itertools.pairwise(points):
        normal = np.array([d0 - d1, t1 - t0])
        assert (found @ normal).min() >= float(normal @ [t0, d0]) - 1e-6


def test_the_front_of_a_large_problem_has_no_gaps() -> None:
    """Each point is the best for the price that its neighbours set."""
    problem = large_problem(3, items=30, groups=10)
    points = front(problem, TIME, DAMAGE)
    assert len(points) > 10
    times, damages = np.transpose([point.cost[:2] for point in points])
    assert (np.diff(times) > 0).all() and (np.diff(damages) < 0).all()
    for at in range(1, len(points) - 1):
        price = (times[at + 1] - times[at - 1]) / (damages[at - 1] - damages[at + 1])
        best = solved(problem, TIME + price * DAMAGE)
        value = times[at] + price * damages[at]
        assert value == pytest.approx(float((TIME + price * DAMAGE) @ best.cost), rel=2 * GAP)
    fewer = front(problem, TIME, DAMAGE, most=8)
    assert 2 < len(fewer) <= 9 < len(points)


def test_a_front_of_one_point() -> None:
    """The fastest plan does the least damage too."""
    problem = Problem((item("p", "a", float=5, static=1),), {"a": {"static": TIME}})
    (point,) = front(problem, TIME, DAMAGE)
    assert point.labels == {"p": "static"}
