"""Untie: a weight of its own for what is going to be quantised."""

from __future__ import annotations

import numpy as np
import pytest
from qcompile.passes.untie import Untie

from qcompile.linears import find_linears
from tests.passes.rewriting import HEADER, assert_leaves, assert_rewrites, typed
from tests.support import Feed, assert_idempotent, from_text, run_model

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((5, 4)).astype(np.float32)
SQUARE = RNG.standard_normal((4, 4)).astype(np.float32)
FEED: Feed = {
    "x": RNG.standard_normal((2, 3, 4)).astype(np.float32),
    "i": np.array([3, 0], np.int64),
}
INPUTS = "float[M,N,4] x, int64[T] i"
NAME = "unnamed"  # of a Linear whose node has neither a name nor a module path

CASES = {
    "behind a Transpose": (
        f"({INPUTS}, float[5,4] e, float[4,5] own) => (float[M,N,5] y, float[T,4] z)",
        "z = Gather (e, i) t = Transpose <perm = [1, 0]> (e) y = MatMul (x, t)",
        TABLE,
        TABLE.T,
    ),
    "as it is": (
        f"({INPUTS}, float[4,4] e, float[4,4] own) => (float[M,N,4] y, float[T,4] z)",
        "z = Gather (e, i) y = MatMul (x, e)",
        SQUARE,
        SQUARE,
    ),
}
AFTER = "z = Gather (e, i) y = MatMul (x, own)"


@pytest.mark.parametrize(("head", "before", "table", "own"), CASES.values(), ids=CASES)
def test_the_linear_gets_a_copy(head: str, before: str, table: np.ndarray, own: np.ndarray) -> None:
    before, after = (f"g {head} {{ {body} }}" for body in (before, AFTER))
    assert_rewrites(Untie([NAME]), before, after, FEED, atol=0, e=table, own=own)


@pytest.mark.parametrize(("head", "before", "table", "own"), CASES.values(), ids=CASES)
def test_what_is_not_named_stays_tied(
    head: str, before: str, table: np.ndarray, own: np.ndarray
) -> None:
    assert_leaves(Untie(["another"]), f"g {head} {{ {before} }}", e=table, own=own)


def test_a_weight_of_its_own_stays() -> None:
    text = "g (float[M,N,4] x, float[4,5] w) => (float[M,N,5] y) { y = MatMul (x, w) }"
    assert_leaves(Untie([NAME]), text, w=TABLE.T)


def test_two_linears_of_one_embedding() -> None:
    """One is named: the other stays on the embedding's weight."""
    text = f"""g ({INPUTS}, float[5,4] e) => (float[M,N,5] y, float[M,N,5] u, float[T,4] z) {{
      z = Gather (e, i) t = Transpose <perm = [1, 0]> (e) n = Neg (x)
      y = MatMul (x, t) u = MatMul (n, t) }}"""
    model = typed(from_text(HEADER + text, e=TABLE))
    wanted = run_model(model, FEED, optimise=False)
    first, second = find_linears(model.graph)
    assert first.tied and second.tied
    assert Untie([second.name])(model).modified
    first, second = find_linears(model.graph)
    assert (first.tied, second.tied) == (True, False)
    found = run_model(model, FEED, optimise=False)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    assert_idempotent(Untie([second.name]), model)
