"""find_leftovers: every heavy op that stays in float has a name and a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.leftovers import Leftover, find_leftovers
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

W = np.ones((4, 4), np.float32)
COMPUTED = "its operands are computed"
GEMM = "this form of Gemm is not rewritten to MatMul and Add"
RANK = "its weight is of rank 3, and has to be a matrix"


def leftovers(text: str, **weights: Any) -> list[Leftover]:
    model = typed(from_text(HEADER + text, **weights))
    for at, node in enumerate(model.graph.all_nodes()):
        node.name = f"{node.op_type}{at}"
    return find_leftovers(model.graph)


@pytest.mark.parametrize(
    ("body", "weight", "left"),
    [
        ("y = MatMul (x, x)", W, Leftover("MatMul0", "MatMul", COMPUTED)),
        ("y = Gemm (x, x)", W, Leftover("Gemm0", "Gemm", COMPUTED)),
        (
            "y = MatMul (w, x)",
            W,
            Leftover("MatMul0", "MatMul", "its constant is the left operand"),
        ),
        ("y = MatMul (x, w)", np.stack([W, W]), Leftover("MatMul0", "MatMul", RANK)),
        ("y = Gemm <alpha = 2.0> (x, w)", W, Leftover("Gemm0", "Gemm", GEMM)),
        (
            'y = Einsum <equation = "ij,jk->ik"> (x, w)',
            W,
            Leftover("Einsum0", "Einsum", "no INT8 form of Einsum is compiled"),
        ),
        (
            "y = com.microsoft.FusedMatMul (x, w)",
            W,
            Leftover("FusedMatMul0", "FusedMatMul", "no INT8 form of FusedMatMul is compiled"),
        ),
    ],
)
def test_each_has_its_reason(body: str, weight: np.ndarray, left: Leftover) -> None:
    shape = ",".join(map(str, weight.shape))
    text = f"g (float[4,4] x, float[{shape}] w) => (float y) {{ {body} }}"
    assert leftovers(text, w=weight) == [left]


def test_the_type_of_the_weight() -> None:
    text = """g (double[4,4] x, double[4,4] w) => (double[4,4] z) {
      y = MatMul (x, w) t = Transpose <perm = [1, 0]> (w) z = MatMul (y, t) }"""
    assert leftovers(text, w=W.astype(np.float64)) == [
        Leftover("MatMul0", "MatMul", "its weight is double"),
        Leftover("MatMul2", "MatMul", "its weight is double"),
    ]


def test_attention_and_convolution() -> None:
    text = """g (float[1,3,8] x, float[2,3,1] w) => (float[1,3,8] y, float[1,2,8] z) {
      y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x) z = Conv (x, w) }"""
    assert leftovers(text, w=np.ones((2, 3, 1), np.float32)) == [
        Leftover("Attention0", "Attention", "its products are of computed operands"),
        Leftover("Conv1", "Conv", "no INT8 form of Conv is compiled"),
    ]


def test_bodies_are_looked_into() -> None:
    text = """g (bool c, float[4,4] x, float[4,4] w) => (float[4,4] y) {
      y = If (c) <then_branch = a () => (float[4,4] p) { p = MatMul (x, w) },
                  else_branch = b () => (float[4,4] q) { q = Identity (x) }> }"""
    (left,) = leftovers(text, w=W)
    assert left.op == "MatMul"
    assert left.reason.startswith("it is in the body of a control-flow op")


def test_linears_and_cheap_ops_are_none() -> None:
    text = """g (float[M,4] x, float[4,4] w) => (float[M,4] y) {
      m = MatMul (x, w) y = Relu (m) }"""
    assert leftovers(text, w=W) == []
