"""BatchNormalization and constants per channel, folded into what is before them."""

from __future__ import annotations

import numpy as np
import pytest
from qcompile.passes.fold_affine import FoldAffine

from qcompile.batch_norm import unfolded
from tests.passes.rewriting import HEADER, assert_leaves, assert_rewrites, typed
from tests.support import from_text, ops, run_model

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


X = random(2, 3, 5, 5)
W, B = random(4, 3, 3, 3), random(4)
SCALE, SHIFT, MEAN = random(4), random(4), random(4)
VARIANCE = np.abs(random(4)) + 0.5
A = (SCALE / np.sqrt(VARIANCE + 1e-5)).astype(np.float32)
FOLDED = {"wf": W * A[:, None, None, None], "bf": (B - MEAN) * A + SHIFT}
NORM = "float[4] s, float[4] h, float[4] m, float[4] v"
NORMS = {"s": SCALE, "h": SHIFT, "m": MEAN, "v": VARIANCE}


def test_batch_normalization_behind_a_conv() -> None:
    assert_rewrites(
        FoldAffine(),
        f"""g (float[N,3,5,5] x, float[4,3,3,3] w, float[4] b, {NORM},
          float[4,3,3,3] wf, float[4] bf) => (float[N,4,3,3] y) {{
          t = Conv (x, w, b)
          y = BatchNormalization (t, s, h, m, v)
        }}""",
        """g (float[N,3,5,5] x, float[4,3,3,3] wf, float[4] bf) => (float[N,4,3,3] y) {
          y = Conv (x, wf, bf)
        }""",
        {"x": X},
        atol=1e-5,
        w=W,
        b=B,
        **NORMS,
        **FOLDED,
    )


def test_a_conv_without_a_bias_gets_one_and_constants_per_channel_go_into_it() -> None:
    c = random(1, 4, 1, 1)
    assert_rewrites(
        FoldAffine(),
        """g (float[N,3,5,5] x, float[4,3,3,3] w, float[4,1,1] f, float[1,4,1,1] c,
          float[4,3,3,3] wf, float[4] cf)
          => (float[N,4,3,3] y) {
          t = Conv (x, w)
          u = Mul (f, t)
          y = Add (u, c)
        }""",
        """g (float[N,3,5,5] x, float[4,3,3,3] wf, float[4] cf) => (float[N,4,3,3] y) {
          y = Conv (x, wf, cf)
        }""",
        {"x": X},
        atol=1e-5,
        w=W,
        f=SCALE.reshape(4, 1, 1),
        c=c,
        wf=W * SCALE[:, None, None, None],
        cf=c.reshape(4),
    )


def test_batch_normalization_behind_a_linear() -> None:
    w = random(3, 4)
    assert_rewrites(
        FoldAffine(),
        f"""g (float[N,3] x, float[3,4] w, {NORM}, float[3,4] wf, float[4] bf)
          => (float[N,4] y) {{
          t = MatMul (x, w)
          y = BatchNormalization (t, s, h, m, v)
        }}""",
        """g (float[N,3] x, float[3,4] wf, float[4] bf) => (float[N,4] y) {
          t = MatMul (x, wf)
          y = Add (t, bf)
        }""",
        {"x": random(5, 3)},
        atol=1e-5,
        w=w,
        wf=w * A,
        bf=SHIFT - MEAN * A,
        **NORMS,
    )


def test_a_weight_that_two_convs_share_is_folded_for_one_alone() -> None:
    text = f"""g (float[N,3,5,5] x, float[4,3,3,3] w, float[4] b, {NORM})
      => (float[N,4,3,3] y, float[N,4,3,3] z) {{
      t = Conv (x, w, b)
      y = BatchNormalization (t, s, h, m, v)
      z = Conv (x, w, b)
    }}"""
    model = typed(from_text(HEADER + text, w=W, b=B, **NORMS))
    wanted = run_model(model, {"x": X}, optimise=False)
    assert FoldAffine()(model).modified
    assert ops(model) == ["Conv", "Conv"]
    found = run_model(model, {"x": X}, optimise=False)
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["z"], wanted["z"])


CONV = "float[N,3,5,5] x, float[4,3,3,3] w"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "t = BatchNormalization (x, p, p, p, q) y = Conv (t, w)",
            "it normalises an input of the graph",
        ),
        (
            "t = Conv (x, w) u = BatchNormalization (t, s, h, m, v) y = Add (t, u)",
            "what it normalises (t) is read elsewhere too",
        ),
        (
            "t = Conv (x, w) r = Relu (t) y = BatchNormalization (r, s, h, m, v)",
            "Relu is before it, which is no Conv and no Linear",
        ),
    ],
)
def test_what_stays_says_why(body: str, reason: str) -> None:
    text = f"g ({CONV}, float[3] p, float[3] q, {NORM}) => (float[N,4,3,3] y) {{ {body} }}"
    constants = {"w": W, "p": random(3), "q": np.abs(random(3)) + 1, **NORMS}
    assert_leaves(FoldAffine(), text, **constants)
    (sentence,) = unfolded(typed(from_text(HEADER + text, **constants)).graph)
    assert sentence.endswith(f"BatchNormalization was not folded: {reason}")


@pytest.mark.parametrize("constant", [(4, 3, 3), (3, 3), (1, 1, 3, 1), (1, 1, 1, 1, 1)])
def test_a_constant_that_is_none_per_channel_stays(constant: tuple[int, ...]) -> None:
    dims = ",".join(map(str, constant))
    rank = max(4, len(constant))
    out = ",".join(["1"] * (rank - 4) + ["N", "4", "3", "3"])
    assert_leaves(
        FoldAffine(),
        f"g ({CONV}, float[{dims}] c) => (float[{out}] y) {{ t = Conv (x, w) y = Add (t, c) }}",
        w=W,
        c=random(*constant),
    )


def test_a_linear_that_has_to_stay_keeps_its_weight() -> None:
    text = f"""g (float[N,3] x, float[3,4] w, {NORM}) => (float[N,4] y) {{
      t = MatMul (x, w)
      y = BatchNormalization (t, s, h, m, v)
    }}"""
    model = typed(from_text(HEADER + text, w=random(3, 4), **NORMS))
    model.graph[0].name = "fc"
    assert not FoldAffine(["fc"])(model).modified
