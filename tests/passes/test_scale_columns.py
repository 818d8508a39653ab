"""ScaleColumns: the kernel sums codes, a Mul behind it scales the columns."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from qcompile.passes.integer_matmul import KERNEL, IntegerMatMul
from qcompile.passes.scale_columns import ScaleColumns

from qcompile.config import Activations
from tests.passes.rewriting import HEADER, assert_leaves, assert_rewrites
from tests.passes.test_integer_matmul import BIAS as FC_BIAS
from tests.passes.test_integer_matmul import FEED, integer_reference, qdq
from tests.support import Feed, from_text, ops, run_model

RNG = np.random.default_rng(0)
K, N = 32, 12
PRODUCT = f"com.microsoft.{KERNEL}"
X = RNG.integers(0, 256, (2, 3, K)).astype(np.uint8)
# Of 7 bits, so that no kernel saturates.
CODES = RNG.integers(-63, 64, (K, N)).astype(np.int8)
SCALE = RNG.uniform(0.001, 0.02, N).astype(np.float32)
BIAS = RNG.standard_normal(N).astype(np.float32)
STEP, ZERO = np.float32(0.03), np.uint8(120)
GIVEN = f"uint8[B,S,{K}] x, int8[{K},{N}] w, float s, float[{N}] t, uint8 z"
ARRAYS = {"w": CODES, "s": STEP, "t": SCALE, "z": ZERO}
ONE = np.float32(1.0)
OUT = f"(float[B,S,{N}] y)"


def test_static_codes_to_the_bit() -> None:
    """Of a graph's output, too: it keeps its name."""
    model = assert_rewrites(
        ScaleColumns(["op"]),
        f"g ({GIVEN}, float one, float[{N}] f) => {OUT} {{ [op] y = {PRODUCT} (x, w, s, t, z) }}",
        f"""g ({GIVEN}, float one, float[{N}] f) => {OUT} {{
            c = {PRODUCT} (x, w, one, one, z) y = Mul (c, f) }}""",
        {"x": X},
        atol=0,
        **ARRAYS,
        one=ONE,
        f=SCALE * STEP,
    )
    assert [node.name for node in model.graph] == ["op", "op/Scale"]


def test_a_bias_is_divided() -> None:
    assert_rewrites(
        ScaleColumns(["op"]),
        f"""g ({GIVEN}, float one, float[{N}] f, float[{N}] b, float[{N}] d) => {OUT} {{
            [op] h = {PRODUCT} (x, w, s, t, z, , b) y = Relu (h) }}""",
        f"""g ({GIVEN}, float one, float[{N}] f, float[{N}] b, float[{N}] d) => {OUT} {{
            c = {PRODUCT} (x, w, one, one, z, , d) h = Mul (c, f) y = Relu (h) }}""",
        {"x": X},
        atol=1e-6,
        **ARRAYS,
        one=ONE,
        f=SCALE * STEP,
        b=BIAS,
        d=BIAS / (SCALE * STEP),
    )


def test_a_scale_found_at_run_time_stays() -> None:
    given = f"float[B,S,{K}] x, int8[{K},{N}] w, float[{N}] t, float one"
    assert_rewrites(
        ScaleColumns(["op"]),
        f"""g ({given}) => {OUT} {{
            q, s, z = DynamicQuantizeLinear (x) [op] y = {PRODUCT} (q, w, s, t, z) }}""",
        f"""g ({given}) => {OUT} {{
            q, s, z = DynamicQuantizeLinear (x)
            [op] c = {PRODUCT} (q, w, s, one, z) y = Mul (c, t) }}""",
        {"x": RNG.standard_normal((2, 3, K)).astype(np.float32)},
        atol=1e-6,
        w=CODES,
        t=SCALE,
        one=ONE,
    )


@pytest.mark.parametrize(
    ("name", "declared", "scale"),
    [
        ("op", "float t", np.float32(0.01)),
        ("op", f"float[{N}] t", np.where(np.arange(N) == 3, 0, SCALE).astype(np.float32)),
        ("another", f"float[{N}] t", SCALE),
    ],
    ids=["one scale for all", "a bias over a scale of zero", "not asked for"],
)
def test_left_as_it_is(name: str, declared: str, scale: np.ndarray) -> None:
    assert_leaves(
        ScaleColumns([name]),
        f"""g (uint8[B,S,{K}] x, int8[{K},{N}] w, float s, {declared}, uint8 z, float[{N}] b)
            => {OUT} {{ [op] y = {PRODUCT} (x, w, s, t, z, , b) }}""",
        **ARRAYS | {"t": scale, "b": BIAS},
    )


def test_scales_that_are_computed_stay() -> None:
    assert_leaves(
        ScaleColumns(["op"]),
        f"""g (uint8[B,S,{K}] x, int8[{K},{N}] w, float s, float[{N}] u, uint8 z)
            => {OUT} {{ v = Exp (u) [op] y = {PRODUCT} (x, w, s, v, z) }}""",
        **{k: v for k, v in ARRAYS.items() if k != "t"} | {"u": SCALE},
    )


@pytest.mark.parametrize("named", [True, False])
def test_products_share_what_they_read(named: bool) -> None:
    """Scales and biases of both, several readers, a scale per row behind: names stay unique."""
    text = f"""g ({GIVEN}, float[{N}] b, float[B,S,1] r) => (float[B,S,{N}] o, float[B,S,{N}] k) {{
        [one] y = {PRODUCT} (x, w, s, t, z, , b) [one_scaled] u = Mul (y, r)
        [two] k = {PRODUCT} (x, w, s, t, z, , b) e = Relu (y) a = Add (u, e) o = Add (a, k) }}"""
    model = from_text(HEADER + text, **ARRAYS, b=BIAS)
    for node in model.graph:
        node.name = (node.name or f"other/{node.outputs[0].name}") if named else ""
    feed: Feed = {"x": X, "r": RNG.uniform(1, 2, (2, 3, 1)).astype(np.float32)}
    wanted = run_model(model, feed, optimise=False)
    assert ScaleColumns(["one", "two", ""])(model).modified
    names = [str(node.name) for node in model.graph if node.name]
    assert len(set(names)) == len(names) and ops(model).count("Mul") == 3
    for name, array in run_model(model, feed).items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["static", "token"])
def test_names_beside_those_of_the_lowering(mode: Activations) -> None:
    """A product with a scale per row has a Mul of its own already."""
    model = IntegerMatMul()(qdq(mode)).model
    assert ScaleColumns(["model.fc"])(model).modified
    names = [str(node.name) for node in model.graph]
    assert len(set(names)) == len(names) and "model.fc" in names
    outputs = run_model(model, FEED)
    wanted = integer_reference(outputs, mode) + FC_BIAS
    size = float(np.abs(wanted).max())
    np.testing.assert_allclose(outputs["y"], wanted, rtol=1e-6, atol=1e-6 * size)


FLOATS = st.floats(2.0**-20, 1024, width=32)


@given(
    scale=arrays.arrays(np.float32, N, elements=FLOATS),
    bias=arrays.arrays(np.float32, N, elements=st.floats(-1024, 1024, width=32)),
    step=st.floats(2.0**-14, 1.0, width=32),
)
def test_a_divided_bias_is_rounded_no_worse(
    scale: np.ndarray, bias: np.ndarray, step: float
) -> None:
    """Two roundings more of the larger of the two that are added."""
    body = f"g ({GIVEN}, float[{N}] b) => {OUT} {{ [op] y = {PRODUCT} (x, w, s, t, z, , b) }}"
    constants = ARRAYS | {"t": scale, "s": np.float32(step), "b": bias}
    model: ir.Model = from_text(HEADER + body, **constants)
    assert ScaleColumns(["op"])(model).modified and "Mul" in ops(model)
    found = run_model(model, {"x": X})["y"]
    sums = (X.astype(np.int64) - int(ZERO)) @ CODES.astype(np.int64)
    product = sums * np.float64(np.float32(step)) * scale.astype(np.float64)
    float32 = np.finfo(np.float32)
    bound = 4 * float32.eps * np.maximum(np.abs(product), np.abs(bias)) + float32.tiny
    assert (np.abs(found - (product + bias)) <= bound).all()
