"""find_leftovers: every heavy op that stays in float has a reason."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.leftovers import find_leftovers
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

W = np.ones((4, 4), np.float32)
GEMM = "this form of Gemm is not rewritten to MatMul and Add"


def reasons(text: str, **weights: np.ndarray) -> dict[str, str]:
    return {
        left.op: left.reason
        for left in find_leftovers(typed(from_text(HEADER + text, **weights)).graph)
    }


@pytest.mark.parametrize(
    ("body", "weight", "reason"),
    [
        ("y = MatMul (x, x)", W, "its right operand is no constant"),
        ("y = MatMul (w, x)", W, "its constant is the left operand"),
        ("y = MatMul (x, w)", np.stack([W, W]), "its weight has 3 dimensions, and two are needed"),
        (
            "y = Gemm <alpha = 2.0> (x, w)",
            W,
            "this form of Gemm is not rewritten to MatMul and Add",
        ),
        ('y = Einsum <equation = "ij,jk->ik"> (x, w)', W, "no INT8 form of Einsum is compiled"),
    ],
)
def test_each_has_its_reason(body: str, weight: np.ndarray, reason: str) -> None:
    shape = ",".join(map(str, weight.shape))
    text = f"g (float[4,4] x, float[{shape}] w) => (float y) {{ {body} }}"
    assert list(reasons(text, w=weight).values()) == [reason]


def test_the_type_of_the_weight() -> None:
    text = "g (double[4,4] x, double[4,4] w) => (double[4,4] y) { y = MatMul (x, w) }"
    assert reasons(text, w=W.astype(np.float64)) == {"MatMul": "its weight is double"}


def test_bodies_are_looked_into() -> None:
    text = """g (bool c, float[4,4] x, float[4,4] w) => (float[4,4] y) {
      y = If (c) <then_branch = a () => (float[4,4] p) { p = MatMul (x, w) },
                  else_branch = b () => (float[4,4] q) { q = Identity (x) }> }"""
    assert reasons(text, w=W) == {
        "MatMul": "it is in the body of a control-flow op, and only the main graph is quantised"
    }


def test_linears_and_cheap_ops_are_none() -> None:
    text = """g (float[M,4] x, float[4,4] w) => (float[M,4] y) {
      m = MatMul (x, w) y = Relu (m) }"""
    assert reasons(text, w=W) == {}
