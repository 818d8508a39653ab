"""PermuteChannels: outliers become the last channels, where a Linear makes them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcompile.passes.permute_channels import PermuteChannels
from qcompile.passes.smooth_quant import SmoothQuant

from qcompile.linears import find_linears, find_sites
from qcompile.permuting import Permutation, find_permutable, last_places
from qcompile.producers import inserted_mul
from qcompile.smoothing import Smoothing, SmoothingPlan
from tests.passes.rewriting import HEADER, typed
from tests.support import (
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    run_model,
)

RNG = np.random.default_rng(0)


def _random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


V, U, W, B = _random(3, 6), _random(3, 6), _random(6, 5), _random(6)
X = _random(2, 4, 3)
OUTLIERS = np.array([1, 4])
ORDER = np.array([0, 5, 2, 3, 1, 4])
HEAD = "g (float[N,S,3] x, float[3,6] v, float[3,6] u, float[6] b, float[6,5] w)"
PLAIN = f"""{HEAD} => (float[N,S,5] y) {{
  m = MatMul (x, v) h = Add (m, b) r = Relu (h) y = MatMul (r, w) }}"""
GATED = f"""{HEAD} => (float[N,S,5] y) {{
  m = MatMul (x, v) h = Add (m, b) s = Sigmoid (h) a = Mul (h, s) k = MatMul (x, u)
  r = Mul (a, k) y = MatMul (r, w) }}"""


def named(text: str) -> ir.Model:
    declared = [v.name for v in ir.from_onnx_text(HEADER + text).graph.inputs]
    weights = {"v": V, "u": U, "b": B, "w": W}
    model = typed(from_text(HEADER + text, **{k: a for k, a in weights.items() if k in declared}))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    return model


def last_site(model: ir.Model) -> tuple[str, tuple[str, ...] | str]:
    site = next(s for s in find_sites(model.graph) if s.linears[0].output.name == "y")
    return site.name, find_permutable(site, find_linears(model.graph))


@pytest.mark.parametrize(("text", "makers"), [(PLAIN, ("m",)), (GATED, ("m", "k"))])
def test_weights_change_and_the_function_does_not(text: str, makers: tuple[str, ...]) -> None:
    model = named(text)
    wanted = run_model(model, {"x": X}, optimise=False)["y"]
    site, found = last_site(model)
    assert not isinstance(found, str) and set(found) == set(makers)
    entry = Smoothing(
        site, None, "", np.ones(6), consumers=("y",), permutation=Permutation(ORDER, found)
    )
    pass_ = PermuteChannels(SmoothingPlan((entry,)))
    assert pass_(model).modified
    after = {"v": V[:, ORDER], "u": U[:, ORDER] if len(makers) > 1 else U, "b": B[ORDER]}
    # A constant that nothing reads stays in neither graph's nodes.
    assert_same_graph(model, from_text(HEADER + text, **after, w=W[ORDER]))
    check_model(model)
    np.testing.assert_allclose(
        run_model(model, {"x": X}, optimise=False)["y"], wanted, rtol=1e-5, atol=1e-5
    )
    assert_idempotent(pass_, model)


def test_a_mul_that_smoothing_put_in_follows() -> None:
    """GELU does not commute with a scale, so that outliers are divided out behind it."""
    text = PLAIN.replace("Relu", "Gelu")
    model = named(text)
    wanted = run_model(model, {"x": X}, optimise=False)["y"]
    site = next(s for s in find_sites(model.graph) if s.linears[0].output.name == "y")
    scale = np.array([1.0, 4.0, 1.0, 1.0, 2.0, 1.0])
    plan = SmoothingPlan(
        (
            Smoothing(
                site.name, None, "", scale, producer=inserted_mul(site), producer_scale=scale,
                consumers=("y",), permutation=Permutation(ORDER, ("m",)),
            ),
        )
    )  # fmt: skip
    SmoothQuant(plan)(model)
    pass_ = PermuteChannels(plan)
    assert pass_(model).modified
    inverse = (1.0 / scale)[ORDER].astype(np.float32)
    rows = (W * scale[:, None].astype(np.float32))[ORDER]
    after = from_text(
        HEADER + HEAD.replace("float[6,5] w", "float[6,5] w, float[6] s")
        + """ => (float[N,S,5] y) {
          m = MatMul (x, v) h = Add (m, b) r = Gelu (h) t = Mul (r, s) y = MatMul (t, w) }""",
        v=V[:, ORDER], u=U, b=B[ORDER], w=rows, s=inverse,
    )  # fmt: skip
    assert_same_graph(model, after)
    check_model(model)
    np.testing.assert_allclose(
        run_model(model, {"x": X}, optimise=False)["y"], wanted, rtol=1e-5, atol=1e-5
    )
    assert_idempotent(pass_, model)


NORM = """g (float[N,S,6] x, float[6] b, float[6,5] w) => (float[N,S,5] y) {
  r = LayerNormalization <axis = -1> (x, b) y = MatMul (r, w) }"""
READ = f"""{HEAD} => (float[N,S,5] y, float[N,S,6] r) {{
  m = MatMul (x, v) h = Add (m, b) r = Relu (h) y = MatMul (r, w) }}"""
SHAPED = f"""{HEAD} => (float[N,S,5] y) {{
  m = MatMul (x, v) k = MatMul (x, u) h = Add (m, b) s = Mul (h, b) r = Mul (s, k)
  y = MatMul (r, w) }}"""
OUTSIDE = "g (float[N,S,6] x, float[6,5] w) => (float[N,S,5] y) { y = MatMul (x, w) }"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (NORM, "LayerNormalization (r) does not work on each channel alike"),
        (READ, "a value on the way is read elsewhere too"),
        (SHAPED, "Mul (s) reads a constant per channel"),
        (OUTSIDE, "its input is a graph input"),
    ],
)
def test_what_cannot_be_permuted(text: str, reason: str) -> None:
    assert last_site(named(text))[1] == reason


def test_a_plan_without_permutations_changes_nothing() -> None:
    model = named(PLAIN)
    plan = SmoothingPlan((Smoothing("y", None, "", np.ones(6), consumers=("y",)),))
    assert_idempotent(PermuteChannels(plan), model)


@given(width=st.integers(1, 40), data=st.data())
def test_outliers_end_up_last_and_few_others_move(width: int, data: st.DataObject) -> None:
    drawn = data.draw(st.sets(st.integers(0, width - 1), max_size=width))
    outliers = np.array(sorted(drawn), np.int64)
    order = last_places(width, outliers)
    assert sorted(order) == list(range(width))
    assert order[width - len(outliers) :].tolist() == outliers.tolist()
    moved = order[: width - len(outliers)] != np.arange(width - len(outliers))
    assert moved.sum() <= len(outliers)
