"""Cross-layer equalisation: another graph, the same function."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from qcompile.passes.equalize import Equalize

from qcompile.equalization import EqualizationPlan, Equalized
from qcompile.weighted import find_weighted
from tests.passes.rewriting import HEADER, assert_rewrites, typed
from tests.support import assert_idempotent, from_text, run_model

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


S = np.array([0.5, 4.0, 1.0, 0.25])
X = random(2, 3, 4, 4)


def plan(*pairs: tuple[str, str, np.ndarray, np.ndarray]) -> EqualizationPlan:
    return EqualizationPlan(tuple(Equalized(*pair, gain=0.5) for pair in pairs))


def test_scales_move_from_the_rows_of_one_conv_into_the_columns_of_the_next() -> None:
    w, b, v = random(4, 3, 1, 1), random(4), random(2, 4, 1, 1)
    f = S.astype(np.float32)
    assert_rewrites(
        Equalize(plan(("unnamed", "unnamed#1", S, np.arange(4)))),
        """g (float[N,3,4,4] x, float[4,3,1,1] w, float[4] b, float[2,4,1,1] v,
          float[4,3,1,1] ws, float[4] bs, float[2,4,1,1] vs) => (float[N,2,4,4] y) {
          t = Conv (x, w, b)
          r = Relu (t)
          y = Conv (r, v)
        }""",
        """g (float[N,3,4,4] x, float[4,3,1,1] ws, float[4] bs, float[2,4,1,1] vs)
          => (float[N,2,4,4] y) {
          t = Conv (x, ws, bs)
          r = Relu (t)
          y = Conv (r, vs)
        }""",
        {"x": X},
        atol=1e-5,
        w=w,
        b=b,
        v=v,
        ws=w / f[:, None, None, None],
        bs=b / f,
        vs=v * f[None, :, None, None],
    )


DEPTHWISE = """g (float[N,3,4,4] x, float[4,3,1,1] w, float[4,1,3,3] d, float[6,2,1,1] v,
  float[24,5] u) => (float[N,5] y) {
  a = Conv (x, w)
  b = Relu (a)
  c = Conv <pads=[1,1,1,1], group=4> (b, d)
  e = LeakyRelu (c)
  f = Conv <group=2> (e, v)
  p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (f)
  shape = Constant <value=int64[2] {-1, 24}> ()
  q = Reshape (p, shape)
  y = MatMul (q, u)
}"""
WEIGHTS = {
    "w": random(4, 3, 1, 1),
    "d": random(4, 1, 3, 3),
    "v": random(6, 2, 1, 1),
    "u": random(24, 5),
}
SCALES = st.lists(st.floats(0.01, 100), min_size=6, max_size=6).map(np.array)


@settings(max_examples=20, deadline=None)
@given(one=SCALES, two=SCALES, three=SCALES)
def test_any_scales_leave_the_function_as_it_was(
    one: np.ndarray, two: np.ndarray, three: np.ndarray
) -> None:
    """Through a depthwise and a grouped Conv, LeakyRelu, pooling and a flattened image."""
    model = typed(from_text(HEADER + DEPTHWISE, **WEIGHTS))
    wanted = run_model(model, {"x": X}, optimise=False)["y"]
    names = [op.name for op in find_weighted(model.graph)]
    equalize = Equalize(
        plan(
            (names[0], names[1], one[:4], np.arange(4)),
            (names[1], names[2], two[:4], np.arange(4)),
            (names[2], names[3], three, np.repeat(np.arange(6), 4)),
        )
    )
    assert equalize(model).modified
    found = run_model(model, {"x": X}, optimise=False)["y"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert_idempotent(equalize, model)
