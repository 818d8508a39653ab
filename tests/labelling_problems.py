"""Problems of labels: drawn, large, and solved by trying all labellings."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

from qcompile.labelling import Cost, Item, Problem, Solution, solve

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


def item(name: str, group: str, **found: float) -> Item:
    """Labels with a time alone."""
    return Item(
        name,
        group,
        {label: np.array([time, 0.0, 0.0]) for label, time in found.items()},
        {label: NEEDS[label] for label in found},
    )
