"""Per-token quantisation: the two model-local functions, run by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qcompile.passes.per_token import (
    DEQUANTIZE,
    DOMAIN,
    LEVELS,
    QUANTIZE,
    ZERO_POINT,
    per_token_functions,
)

from tests.passes.rewriting import HEADER
from tests.support import from_text, run_model

RNG = np.random.default_rng(0)
TEXT = """g (float[B,S,C] x) => (uint8[B,S,C] codes, float[B,S,1] scale, float[B,S,C] back) {
  codes, scale = qcompile.QuantizePerToken (x)
  back = qcompile.DequantizePerToken (codes, scale) }"""


def _model() -> ir.Model:
    model = from_text(HEADER.replace("]", ', "qcompile" : 1]') + TEXT)
    for function in per_token_functions():
        model.functions[function.identifier()] = function
    return model


MODEL = _model()


def quantize(x: np.ndarray, *, optimise: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    results = run_model(MODEL, {"x": x.astype(np.float32)}, optimise=optimise)
    return results["codes"], results["scale"], results["back"]


def test_the_model_and_its_functions_are_valid_onnx() -> None:
    onnx.checker.check_model(ir.to_proto(MODEL), full_check=True)
    assert [f.identifier() for f in per_token_functions()] == [
        (DOMAIN, QUANTIZE, ""),
        (DOMAIN, DEQUANTIZE, ""),
    ]


def test_bodies_are_standard_ops() -> None:
    quantizer, dequantizer = per_token_functions()
    assert {node.domain for function in (quantizer, dequantizer) for node in function} == {""}
    assert [n.op_type for n in quantizer if n.op_type != "Constant"] == [
        "Abs",
        "ReduceMax",
        "Max",
        "Div",
        "Div",
        "QuantizeLinear",
    ]
    assert [n.op_type for n in dequantizer if n.op_type != "Constant"] == [
        "DequantizeLinear",
        "Mul",
    ]


@pytest.mark.parametrize("optimise", [True, False])
def test_equals_numpy(optimise: bool) -> None:
    x = (RNG.standard_normal((3, 7, 16)) * np.exp(RNG.normal(0, 4, (3, 7, 1)))).astype(np.float32)
    codes, scale, back = quantize(x, optimise=optimise)
    wanted_scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(LEVELS)
    wanted = np.rint(x / wanted_scale) + ZERO_POINT
    np.testing.assert_array_equal(scale, wanted_scale)
    np.testing.assert_array_equal(codes, wanted.astype(np.uint8))
    np.testing.assert_array_equal(back, (wanted - ZERO_POINT).astype(np.float32) * wanted_scale)


def test_known_codes() -> None:
    x = np.array([[[127.0, -127.0, 0.0, 1.0, 2.5, -1.5]]])
    codes, scale, _ = quantize(x)
    assert scale.item() == 1.0
    np.testing.assert_array_equal(codes, [[[255, 1, 128, 129, 130, 126]]])


def test_rows_do_not_see_each_other() -> None:
    x = RNG.standard_normal((2, 3, 8)).astype(np.float32)
    loud = x.copy()
    loud[1, 2] *= 1e6
    quiet_codes, _, quiet_back = quantize(x)
    codes, _, back = quantize(loud)
    np.testing.assert_array_equal(codes[0], quiet_codes[0])
    np.testing.assert_array_equal(back[1, :2], quiet_back[1, :2])


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_a_row_of_zeros_comes_back_as_zeros(value: float) -> None:
    codes, scale, back = quantize(np.full((1, 2, 4), value))
    assert (codes == ZERO_POINT).all()
    assert (scale > 0).all()
    np.testing.assert_array_equal(back, np.zeros((1, 2, 4), np.float32))


def test_extreme_rows() -> None:
    x = np.array([[[3e38, -3e38, 1.0], [1e-19, -5e-20, 0.0], [1e-38, 0.0, -1e-38]]])
    codes, scale, back = quantize(x)
    assert np.isfinite(scale).all() and np.isfinite(back).all()
    assert (np.abs(back - x.astype(np.float32)) <= scale.astype(np.float64) * 0.5001).all()
    assert codes.min() >= 1


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=6),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_the_error_is_half_a_step_at_most(x: np.ndarray) -> None:
    codes, scale, back = quantize(x)
    assert codes.min() >= 1
    # Division and product round once each, up to 127 steps from zero.
    step = scale.astype(np.float64) * (0.5 + 2 * LEVELS * 2.0**-23)
    assert (np.abs(back.astype(np.float64) - x) <= step).all()
