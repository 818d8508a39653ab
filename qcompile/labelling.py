"""One label per op at least total cost, where ops that read one activation share its conversion.

Every op takes one of its labels; a label costs time (at each timed shape), damage and bytes. It may
need a conversion of the op's input (quantise to uint8): ops of one group that need the same
conversion pay for it once, and a group has at most one conversion. A part of its cost may be saved
where all ops of the group take it: then what makes the activation converts it as well, and nothing
reads it as it was. Minimising a weighted sum is

- with two labels an op, a minimum s-t cut: a node per op and per conversion, an infinite edge from
  an op to the conversion that it needs, and from a saving to each of its ops (a submodular
  labelling; exact, solved by `networkx`);
- with more, the best of each group for each of its conversions (exact: nothing joins two groups);
- under limits, a mixed-integer program (HiGHS through `scipy`), with the bound that it proves.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Final

import networkx as nx
import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse

from qcompile.errors import PlanningError

Cost = npt.NDArray[np.float64]
"""Times at each shape, then damage, then bytes."""

_RESOLUTION: Final = 1 << 40
"""Costs become integers of this resolution in a cut, so that no rounding can end in a cycle."""

_MAGNITUDE: Final = 1e3

_SECONDS: Final = 10.0
_GAP: Final = 1e-4
_INFEASIBLE: Final = 2


@dataclasses.dataclass(frozen=True)
class Item:
    """One op: what each of its labels costs, and which conversion of its input a label needs."""

    name: str
    group: str
    costs: Mapping[str, Cost]
    needs: Mapping[str, str | None]


@dataclasses.dataclass(frozen=True)
class Problem:
    """All ops, and what the conversions of a group's activation cost: group -> conversion -> cost.

    Every cost is a vector of the same length. `savings` are the parts of a conversion's cost, not
    negative, that a group is spared where all of its items take it.
    """

    items: tuple[Item, ...]
    conversions: Mapping[str, Mapping[str, Cost]]
    savings: Mapping[str, Mapping[str, Cost]] = dataclasses.field(default_factory=dict)

    @property
    def width(self) -> int:
        """Length of the cost vectors."""
        return len(next(iter(self.items[0].costs.values()))) if self.items else 0

    def cost(self, labels: Mapping[str, str]) -> Cost:
        """The cost vector of a whole labelling.

        Raises:
            ValueError: two conversions of one group.
        """
        total = np.zeros(self.width)
        used: dict[str, str] = {}
        for item in self.items:
            label = labels[item.name]
            total += item.costs[label]
            need = item.needs[label]
            if need is not None and used.setdefault(item.group, need) != need:
                raise ValueError(f"{item.group} cannot be both {used[item.group]} and {need}")
        for group, need in used.items():
            total += self.conversions[group][need]
            if all(item.needs[labels[item.name]] == need for item in self.members(group)):
                total -= self.savings.get(group, {}).get(need, 0.0)
        return total

    def members(self, group: str) -> list[Item]:
        """The items of `group`."""
        return [item for item in self.items if item.group == group]


@dataclasses.dataclass(frozen=True)
class Solution:
    """A labelling.

    Attributes:
        labels: op -> label.
        cost: its cost vector.
        gap: how far, at most and relative to its value, it is from the optimum.
        method: ``cut``, ``groups`` or ``milp``.
    """

    labels: Mapping[str, str]
    cost: Cost
    gap: float
    method: str


def solve(problem: Problem, weights: Cost, limits: Cost | None = None) -> Solution | None:
    """The labelling of least ``weights @ cost`` with ``cost <= limits``; None where there is none.

    Args:
        problem: what can be chosen.
        weights: non-negative, one for each part of a cost vector.
        limits: upper bounds, one for each part; inf where there is none.

    Raises:
        PlanningError: the solver ran out of time before it found any.
    """
    if not problem.items:
        return Solution({}, np.zeros(0), 0.0, "cut")
    if limits is not None and not np.isinf(limits).all():
        return _program(problem, weights, limits)
    binary = _is_binary(problem)
    labels = _cut(problem, weights) if binary else _by_group(problem, weights)
    if labels is None:
        return None
    return Solution(labels, problem.cost(labels), 0.0, "cut" if binary else "groups")


def front(problem: Problem, time: Cost, damage: Cost, *, most: int = 64) -> list[Solution]:
    """The supported Pareto front between two objectives, from the least `time` to least `damage`.

    Every point is the optimum for some price of damage in time; between two neighbours no labelling
    lies below the line that joins them.
    """
    ends = [solve(problem, time + 1e-9 * damage), solve(problem, damage + 1e-9 * time)]
    fast, exact = (_required(end) for end in ends)
    points = [fast, *_between(problem, time, damage, fast, exact, most), exact]
    unique: list[Solution] = []
    places: list[Cost] = []
    for point in points:
        place = np.array([time @ point.cost, damage @ point.cost])
        if not places or not np.allclose(place, places[-1], rtol=1e-9, atol=0.0):
            unique.append(point)
            places.append(place)
    return unique


def _between(
    problem: Problem, time: Cost, damage: Cost, fast: Solution, exact: Solution, most: int
) -> Iterator[Solution]:
    t0, t1 = float(time @ fast.cost), float(time @ exact.cost)
    d0, d1 = float(damage @ fast.cost), float(damage @ exact.cost)
    if most <= 2 or t1 - t0 <= 1e-9 * abs(t1) or d0 - d1 <= 1e-9 * abs(d0):
        return
    price = (t1 - t0) / (d0 - d1)
    middle = _required(solve(problem, time + price * damage))
    value = float(time @ middle.cost) + price * float(damage @ middle.cost)
    if value >= (t0 + price * d0) * (1.0 - 1e-9):
        return
    yield from _between(problem, time, damage, fast, middle, most // 2)
    yield middle
    yield from _between(problem, time, damage, middle, exact, most // 2)


def _required(solution: Solution | None) -> Solution:
    assert solution is not None  # without limits there always is one
    return solution


def _is_binary(problem: Problem) -> bool:
    """Two labels an op, one of them without a conversion, and one conversion a group."""
    conversions: dict[str, set[str]] = {}
    for item in problem.items:
        needs = [need for need in item.needs.values() if need is not None]
        if len(item.costs) - len(needs) > 1 or len(set(needs)) < len(needs):
            return False
        conversions.setdefault(item.group, set()).update(needs)
    return all(len(found) <= 1 for found in conversions.values())


def _cut(problem: Problem, weights: Cost) -> dict[str, str]:
    """Source side: converted. Edges into the source side or out of it cost what they stand for."""
    graph: nx.DiGraph[tuple[str, str] | str] = nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    values = [float(weights @ cost) for item in problem.items for cost in item.costs.values()]
    total = sum(values)
    unit = _RESOLUTION / total if total > 0.0 else 0.0
    for item in problem.items:
        node = ("op", item.name)
        for label, cost in item.costs.items():
            capacity = round(float(weights @ cost) * unit)
            if item.needs[label] is None:
                graph.add_edge("source", node, capacity=capacity)
            else:
                conversion = ("conversion", item.group)
                price = float(weights @ problem.conversions[item.group][str(item.needs[label])])
                graph.add_edge(node, "sink", capacity=capacity)
                graph.add_edge(node, conversion)  # no capacity: infinite
                graph.add_edge(conversion, "sink", capacity=round(price * unit))
        if len(item.costs) == 1:
            only = next(iter(item.needs.values()))
            graph.add_edge(*(("source", node) if only is not None else (node, "sink")))
    for group, savings in problem.savings.items():
        for item in problem.members(group) if savings else ():
            graph.add_edge(("saving", group), ("op", item.name))
        for saving in savings.values():
            capacity = round(float(weights @ saving) * unit)
            graph.add_edge("source", ("saving", group), capacity=capacity)
    _, (converted, _) = nx.minimum_cut(graph, "source", "sink")
    labels = {}
    for item in problem.items:
        wanted = ("op", item.name) in converted
        labels[item.name] = next(k for k, n in item.needs.items() if (n is not None) == wanted)
    return labels


def _by_group(problem: Problem, weights: Cost) -> dict[str, str] | None:
    """For each group and each conversion that it may have, or none: the best label of every op."""
    groups: dict[str, list[Item]] = {}
    for item in problem.items:
        groups.setdefault(item.group, []).append(item)
    found: dict[str, str] = {}
    for group, items in groups.items():
        needs = {need for item in items for need in item.needs.values() if need is not None}
        ways: list[tuple[set[str | None], float]] = [({None}, 0.0)]
        for need in sorted(needs):
            price = float(weights @ problem.conversions[group][need])
            saving = problem.savings.get(group, {}).get(need, np.zeros(problem.width))
            ways += [({None, need}, price), ({need}, price - float(weights @ saving))]
        priced = []
        for allowed, value in ways:
            best = [_cheapest(item, weights, allowed) for item in items]
            labels = [label for _, label in filter(None, best)]
            if len(labels) == len(items):
                priced.append((value + sum(cost for cost, _ in filter(None, best)), labels))
        if not priced:
            return None
        labels = min(priced, key=lambda way: way[0])[1]
        found |= {item.name: label for item, label in zip(items, labels, strict=True)}
    return {item.name: found[item.name] for item in problem.items}


def _cheapest(item: Item, weights: Cost, allowed: set[str | None]) -> tuple[float, str] | None:
    """The best label of `item` that needs one of the conversions in `allowed`."""
    costs = item.costs.items()
    values = [(float(weights @ c), label) for label, c in costs if item.needs[label] in allowed]
    return min(values, default=None)


def _program(problem: Problem, weights: Cost, limits: Cost) -> Solution | None:
    """A binary variable per op and label, per group and conversion, and per saving."""
    columns: list[Cost] = []
    index: dict[tuple[str, ...], int] = {}
    for item in problem.items:
        for label, cost in item.costs.items():
            index["op", item.name, label] = len(columns)
            columns.append(cost)
    for group, conversions in problem.conversions.items():
        for conversion, cost in conversions.items():
            index["conversion", group, conversion] = len(columns)
            columns.append(cost)
    for group, savings in problem.savings.items():
        for conversion, saving in savings.items():
            index["saving", group, conversion] = len(columns)
            columns.append(-saving)
    costs = np.stack(columns, axis=1)
    rows: list[dict[int, float]] = []
    bounds: list[tuple[float, float]] = []
    for item in problem.items:
        rows.append({index["op", item.name, label]: 1.0 for label in item.costs})
        bounds.append((1.0, 1.0))
        for label, need in item.needs.items():
            if need is not None:
                at = index["conversion", item.group, need]
                rows.append({index["op", item.name, label]: 1.0, at: -1.0})
                bounds.append((-np.inf, 0.0))
    for group, conversions in problem.conversions.items():
        rows.append({index["conversion", group, conversion]: 1.0 for conversion in conversions})
        bounds.append((0.0, 1.0))
    for group, savings in problem.savings.items():
        for conversion, item in itertools.product(savings, problem.members(group)):
            row = {index["saving", group, conversion]: 1.0}
            labels = [label for label, need in item.needs.items() if need == conversion]
            rows.append(row | {index["op", item.name, label]: -1.0 for label in labels})
            bounds.append((-np.inf, 0.0))
    for part, limit in enumerate(limits):
        if np.isfinite(limit):
            # In units of the limit: bytes and seconds differ by fifteen orders of magnitude.
            unit = max(abs(float(limit)), float(costs[part].max(initial=0.0)), 1e-300)
            rows.append(dict(enumerate(costs[part] / unit)))
            bounds.append((-np.inf, float(limit) / unit))
    objective = weights @ costs
    # HiGHS's tolerances are absolute: values well above them.
    scale = max(float(np.abs(objective).sum()), 1e-300) / _MAGNITUDE
    result = optimize.milp(
        objective / scale,
        constraints=optimize.LinearConstraint(_sparse(rows, len(columns)), *np.transpose(bounds)),
        integrality=np.ones(len(columns), np.int64),
        bounds=optimize.Bounds(0, 1),
        options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
    )
    if result.status == _INFEASIBLE:
        return None
    if result.x is None:
        raise PlanningError(f"no plan was found in {_SECONDS:g} seconds: {result.message}")
    found = {
        item.name: max(item.costs, key=lambda label, i=item: result.x[index["op", i.name, label]])  # type: ignore[misc]
        for item in problem.items
    }
    return Solution(found, problem.cost(found), float(result.mip_gap or 0.0), "milp")


def _sparse(rows: list[dict[int, float]], width: int) -> sparse.csr_array:
    data = [value for row in rows for value in row.values()]
    column = [at for row in rows for at in row]
    row = [number for number, entries in enumerate(rows) for _ in entries]
    return sparse.csr_array((data, (row, column)), shape=(len(rows), width))
