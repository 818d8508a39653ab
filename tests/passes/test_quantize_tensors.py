"""QuantizeTensors: an edge plan becomes Q/DQ around tensors."""

from __future__ import annotations

import numpy as np
from qcompile.passes.quantize_tensors import QuantizeTensors

from qcompile.edge.plan import ConstantQuant, EdgePlan, TensorQuant, UnitPlan
from tests.passes.rewriting import HEADER, typed
from tests.support import (
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 3)).astype(np.float32)
B = RNG.standard_normal(3).astype(np.float32)
SCALES = np.abs(W).max(axis=0) / np.float32(127)
CODES = np.rint(W / SCALES).astype(np.int32)
BEFORE = """
    g (float[2,4] x, float[4,3] w, float[3] b) => (float[2,3] y, float[2,3] s) {
      [first] h = Gemm (x, w, b)
      [second] y = Relu (h)
      [third] s = Sqrt (y)
    }"""
AFTER = """
    g (float[2,4] x, float xs, uint8 xz, float ys, uint8 yz, int8[4,3] w, float[3] ws, int8[3] wz,
       int32[3] b, float[3] bs) => (float[2,3] y, float[2,3] s) {
      xq = QuantizeLinear (x, xs, xz)
      xd = DequantizeLinear (xq, xs, xz)
      wd = DequantizeLinear <axis=1> (w, ws, wz)
      bd = DequantizeLinear <axis=0> (b, bs)
      h = Gemm (xd, wd, bd)
      f = Relu (h)
      yq = QuantizeLinear (f, ys, yz)
      y = DequantizeLinear (yq, ys, yz)
      s = Sqrt (y)
    }"""


def tensor(name: str, scale: float, zero_point: int) -> TensorQuant:
    return TensorQuant(name, "uint8", scale, zero_point, name, -1.0, 1.0, 40.0)


def plan() -> EdgePlan:
    bias_scale = (np.float32(0.03) * SCALES).astype(np.float32)
    bias = np.rint(B / bias_scale).astype(np.int32)
    zeros = np.zeros(3, np.int32)
    return EdgePlan(
        tensors=(tensor("x", 0.03, 128), tensor("y", 0.02, 0)),
        constants=(
            ConstantQuant("first", 1, "w", "weight", CODES, "int8", SCALES, zeros, 1),
            ConstantQuant("first", 2, "b", "bias", bias, "int32", bias_scale, None, 0),
        ),
        units=(
            UnitPlan("first", ("first", "second"), "Gemm", "uint8", "", ("x",), "y"),
            UnitPlan("third", ("third",), "Sqrt", None, "no kernel", ("y",), "s"),
        ),
    )


def test_codes_around_a_unit_and_nothing_inside_it() -> None:
    model = typed(from_text(HEADER + BEFORE, w=W, b=B))
    x = RNG.uniform(-3.0, 3.0, (2, 4)).astype(np.float32)
    wanted = run_model(model, {"x": x})
    given = plan()
    assert QuantizeTensors(given)(model).modified
    weight, bias = given.constants
    expected = from_text(
        HEADER + AFTER, xs=np.float32(0.03), xz=np.uint8(128), ys=np.float32(0.02), yz=np.uint8(0),
        w=CODES.astype(np.int8), ws=SCALES, wz=np.zeros(3, np.int8), b=bias.codes, bs=bias.scale,
    )  # fmt: skip
    assert_same_graph(model, expected)
    check_model(model)
    found = run_model(model, {"x": x}, optimise=False)
    # Half a step of x and of every weight, through the product, and half a step of y.
    error = 0.015 * np.abs(W).sum(axis=0) + np.abs(x).sum(axis=1).max() * SCALES / 2 + 0.011
    assert (np.abs(found["y"] - wanted["y"]) <= error).all()
    np.testing.assert_allclose(found["s"], np.sqrt(found["y"]), rtol=1e-6)
    assert weight.dequantized().shape == W.shape
    assert_idempotent(QuantizeTensors(given), model)


def test_float_ops_beside_keep_what_no_quantised_op_computes() -> None:
    """Two ops read x; only one of them as codes."""
    text = """
      g (float[2,4] x) => (float[2,4] y, float[2,4] z) {
        [a] y = Relu (x)
        [b] z = Neg (x)
      }"""
    model = typed(from_text(HEADER + text))
    unit = UnitPlan("a", ("a",), "Relu", "uint8", "", ("x",), "y")
    pass_ = QuantizeTensors(EdgePlan((tensor("x", 0.5, 128), tensor("y", 0.5, 0)), (), (unit,)))
    pass_(model)
    x = np.array([[0.3, -0.3, 0.7, -0.7], [1.0, 2.0, 3.0, 4.0]], np.float32)
    found = run_model(model, {"x": x}, optimise=False)
    np.testing.assert_array_equal(found["z"], -x)
    assert (found["y"] % 0.5 == 0).all()


def test_an_empty_plan_changes_nothing() -> None:
    model = typed(from_text(HEADER + BEFORE, w=W, b=B))
    assert not QuantizeTensors(EdgePlan())(model).modified
    assert ops(model) == ["Gemm", "Relu", "Sqrt"]


def test_a_constant_that_one_node_reads_twice() -> None:
    text = "g (float[2,4] x, float[2,4] c) => (float[2,12] y) { y = Concat <axis=1> (c, x, c) }"
    c = np.ones((2, 4), np.float32)
    model = typed(from_text(HEADER + text, c=c))
    model.graph[0].name = "join"
    codes, scale, point = np.full((2, 4), 100), np.array(0.01, np.float32), np.array(0)
    twice = [
        ConstantQuant("join", at, "c", "constant", codes, "uint8", scale, point) for at in (0, 2)
    ]
    unit = UnitPlan("join", ("join",), "Concat", "uint8", "", ("x",), "y")
    pass_ = QuantizeTensors(EdgePlan(constants=tuple(twice), units=(unit,)))
    x = RNG.standard_normal((2, 4)).astype(np.float32)
    assert pass_(model).modified and not pass_(model).modified
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names) == 3
    check_model(model)
    np.testing.assert_allclose(run_model(model, {"x": x})["y"], np.hstack([c, x, c]), atol=1e-6)
