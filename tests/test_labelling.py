"""One label per op at least cost: what is found equals the best of all labellings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcompile.labelling import Cost, Item, Problem, Solution, front, solve
from tests.labelling_problems import (
    GAP,
    NEEDS,
    TIME,
    UNITS,
    every_cost,
    item,
    large_problem,
    limits_of,
    problems,
    solved,
    value_of,
    weights,
)


def assert_consistent(problem: Problem, solution: Solution) -> None:
    """Every op has one of its labels, and the cost is that of the labels."""
    assert list(solution.labels) == [each.name for each in problem.items]
    for each in problem.items:
        assert solution.labels[each.name] in each.costs
    np.testing.assert_array_equal(solution.cost, problem.cost(solution.labels))


# the cost of a labelling

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
