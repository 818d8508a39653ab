"""The front of time and damage: no labelling is better than its points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings

from qcompile.labelling import Problem, front
from tests.labelling_problems import (
    DAMAGE,
    GAP,
    TIME,
    every_cost,
    item,
    large_problem,
    problems,
    solved,
    value_of,
)


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
