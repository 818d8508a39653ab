"""Biases that take what rounding shifts: the pass, and the graph in which that is measured."""

from __future__ import annotations

import numpy as np
from qcompile.passes.correct_bias import CorrectBias
from qcompile.passes.observe_bias import ObserveBias, output_name

from qcompile.correction import CorrectionPlan
from tests.passes.rewriting import HEADER, assert_rewrites, typed
from tests.support import assert_idempotent, from_text, run_model

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


TINY = np.full(4, 1e-7)


def test_the_shift_is_added_to_a_bias_or_becomes_one() -> None:
    b = random(4)
    assert_rewrites(
        CorrectBias(CorrectionPlan({"unnamed": TINY, "unnamed#1": TINY, "unnamed#2": 2 * TINY})),
        """g (float[N,3,4,4] x, float[4,3,4,4] w, float[4] b, float[4,4,1,1] v, float[4,4] u,
          float[4] one, float[4] two, float[4] three) => (float[N,4] y) {
          s = Conv (x, w, b)
          t = Conv (s, v)
          f = Flatten (t)
          p = MatMul (f, u)
          y = Add (p, b)
        }""",
        """g (float[N,3,4,4] x, float[4,3,4,4] w, float[4,4,1,1] v, float[4,4] u,
          float[4] one, float[4] two, float[4] three) => (float[N,4] y) {
          s = Conv (x, w, one)
          t = Conv (s, v, two)
          f = Flatten (t)
          p = MatMul (f, u)
          y = Add (p, three)
        }""",
        {"x": random(2, 3, 4, 4)},
        atol=1e-4,
        w=random(4, 3, 4, 4),
        b=b,
        v=random(4, 4, 1, 1),
        u=random(4, 4),
        one=b + TINY.astype(np.float32),
        two=2 * TINY.astype(np.float32),
        three=b + TINY.astype(np.float32),
    )


def test_a_linear_without_a_bias_gets_an_add() -> None:
    assert_rewrites(
        CorrectBias(CorrectionPlan({"unnamed": TINY})),
        "g (float[N,3] x, float[3,4] w, float[4] c) => (float[N,4] y) { y = MatMul (x, w) }",
        """g (float[N,3] x, float[3,4] w, float[4] c) => (float[N,4] y) {
          p = MatMul (x, w)
          y = Add (p, c)
        }""",
        {"x": random(5, 3)},
        atol=1e-6,
        w=random(3, 4),
        c=TINY.astype(np.float32),
    )


def test_no_shift_changes_nothing() -> None:
    text = "g (float[N,3] x, float[3,4] w) => (float[N,4] y) { y = MatMul (x, w) }"
    model = typed(from_text(HEADER + text, w=random(3, 4)))
    plan = CorrectionPlan({"unnamed": np.zeros(4), "another": TINY})
    assert not CorrectBias(plan)(model).modified


TWO = """g (float[N,3,4,4] x, float[4,3,1,1] w, float[2,4,1,1] v) => (float[N,2,4,4] y) {
  [one] t = Conv (x, w)
  [act] r = Relu (t)
  [two] y = Conv (r, v)
}"""


def test_each_op_is_measured_with_those_before_it_corrected() -> None:
    w, v, x = random(4, 3, 1, 1), random(2, 4, 1, 1), random(5, 3, 4, 4)
    w_off, v_off = w + 0.3 * random(4, 3, 1, 1), v + 0.3 * random(2, 4, 1, 1)
    reference = typed(from_text(HEADER + TWO, w=w, v=v))
    measured = typed(from_text(HEADER + TWO, w=w_off, v=v_off))
    observe = ObserveBias(reference, [("one", "one", 1, 4), ("two", "two", 1, 2)])
    assert observe(measured).modified
    found = run_model(measured, {"x": x}, optimise=False)

    def conv(image: np.ndarray, weight: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.einsum("nchw,oc->nohw", image, weight[..., 0, 0])
        return result

    off = conv(x, w) - conv(x, w_off)
    mean = off.mean((0, 2, 3))
    corrected = np.maximum(conv(x, w_off) + mean[:, None, None], 0)
    after = conv(np.maximum(conv(x, w), 0), v) - conv(corrected, v_off)
    for at, wanted in enumerate([off, after]):
        for part, values in [("mean", wanted), ("squares", np.square(wanted))]:
            array = found[output_name(at, part)]
            np.testing.assert_allclose(array, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        assert int(found[output_name(at, "rows")][0]) == 5 * 4 * 4
    assert_idempotent(observe, measured)
    assert [node.name for node in reference.graph] == ["one", "act", "two"]  # as it was
