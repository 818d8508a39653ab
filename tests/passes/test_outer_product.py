"""OuterProduct: angles of positions without a matrix product, and without a shape."""

from __future__ import annotations

import numpy as np
from qcompile.passes.outer_product import OuterProduct

from tests.passes.rewriting import assert_leaves, assert_rewrites

C = np.linspace(1, 0, 8, dtype=np.float32).reshape(1, 8, 1)
FEED = {"p": np.array([[0, 1, 2], [7, 500, 2047]])}


def test_expanded_by_a_computed_shape() -> None:
    assert_rewrites(
        OuterProduct(),
        """g (int64[B,S] p, float[1,8,1] c, int64[1] one, int64[1] last, int64[1] tail,
            float[8] factors)
        => (float[B,S,8] y) {
        n = Shape <start = 0, end = 1> (p)
        shape = Concat <axis = 0> (n, tail, one)
        e = Expand (c, shape)
        u = Unsqueeze (p, one)
        x = Cast <to = 1> (u)
        m = MatMul (e, x)
        t = Transpose <perm = [0, 2, 1]> (m)
        y = Cos (t)
        }""",
        """g (int64[B,S] p, int64[1] last, float[8] factors) => (float[B,S,8] y) {
        u = Unsqueeze (p, last)
        x = Cast <to = 1> (u)
        t = Mul (x, factors)
        y = Cos (t)
        }""",
        FEED,
        atol=1e-6,
        c=C,
        one=np.array([1]),
        last=np.array([2]),
        tail=np.array([8]),
        factors=C.ravel(),
    )


def test_what_is_no_outer_product() -> None:
    head = "g (int64[B,S] p, float[1,8,2] c, int64[1] one) => (float[B,S,8] y) {"
    assert_leaves(
        OuterProduct(),
        f"""{head}
        u = Unsqueeze (p, one)
        x = Cast <to = 1> (u)
        two = Concat <axis = 1> (x, x)
        m = MatMul (c, two)
        y = Transpose <perm = [0, 2, 1]> (m)
        }}""",
        c=np.repeat(C, 2, axis=2),
        one=np.array([1]),
    )
