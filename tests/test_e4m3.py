"""e4m3 codes: weights, activations, and the errors that are predicted of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from qcompile.passes.per_token import E4M3 as OVERLOAD
from qcompile.passes.per_token import per_token_functions

from qcompile.e4m3 import E4M3, LARGEST, RELATIVE, quantize_e4m3, rounded, squared_error
from qcompile.precision import ActivationQuant, OpPlan, PrecisionPlan, SitePlan
from qcompile.sensitivity import quantized_activation
from tests.support import from_text, run_model

RNG = np.random.default_rng(0)
FLOATS = st.floats(-1e4, 1e4, width=32)


@given(arrays.arrays(np.float32, (6, 4), elements=FLOATS))
def test_weights(weight: np.ndarray) -> None:
    made = quantize_e4m3(weight)
    assert made.codes.dtype == E4M3 and made.scale.dtype == np.float32
    largest = np.abs(weight).max(axis=0)
    coded = largest / np.float32(LARGEST) >= np.finfo(np.float32).tiny
    assert (np.abs(made.codes.astype(np.float32)).max(axis=0)[coded] == LARGEST).all()
    # Half a step: a sixteenth of the value, or half of the smallest code.
    bound = np.maximum(np.abs(weight) / 16, made.scale * 2.0**-10) * (1 + 1e-5)
    assert (np.abs(made.dequantized() - weight)[:, coded] <= bound[:, coded]).all()


def test_a_channel_of_zeros_has_a_scale() -> None:
    made = quantize_e4m3(np.zeros((3, 2), np.float32))
    np.testing.assert_array_equal(made.scale, 1.0)
    np.testing.assert_array_equal(made.dequantized(), 0.0)


def test_rounding_saturates_as_the_kernels_do() -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = x[np.isfinite(x)]
    made = rounded(torch.from_numpy(x)).numpy()
    wanted = np.clip(x, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(made, wanted)


def test_predicted_errors() -> None:
    """Of many values the mean is what was found, normal and subnormal ones alike."""
    scale = 0.37
    for low, high in ((1.0, 400.0), (1e-4, 2.0**-6), (2.0**-6, 2.0**-3)):
        values = scale * np.exp(RNG.uniform(np.log(low), np.log(high), 200_000))
        values *= RNG.choice([-1, 1], values.size)
        found = np.square(rounded(torch.from_numpy(values / scale)).numpy() * scale - values)
        np.testing.assert_allclose(squared_error(values, scale).mean(), found.mean(), rtol=0.1)
    # Whole powers of two: nothing else is spread evenly.
    values = np.exp2(RNG.uniform(-5, 8, 200_000))
    relative = np.square(rounded(torch.from_numpy(values)).numpy() / values - 1)
    np.testing.assert_allclose(relative.mean(), RELATIVE, rtol=0.02)


def test_damage_is_of_the_codes_that_the_graph_makes() -> None:
    """The same x̂ as the functions give that stand in the graph."""
    model = from_text(
        """<ir_version: 10, opset_import: ["" : 23, "qcompile" : 1]>
        g (float[B,8] x) => (float[B,8] y) {
        q, t = qcompile.QuantizePerToken : e4m3 (x)
        y = qcompile.DequantizePerToken : e4m3 (q, t) }"""
    )
    for function in per_token_functions(OVERLOAD):
        model.functions[function.identifier()] = function
    x = (RNG.standard_normal((50, 8)) * np.exp(RNG.standard_normal((50, 1)) * 4)).astype(np.float32)
    x[3] = 0
    op = OpPlan("m", "m", "fp8", "test", 8, 8, "y")
    for mode, scale, wanted in (
        ("token", None, run_model(model, {"x": x})["y"]),
        ("static", 0.01, rounded(torch.from_numpy(x / np.float32(0.01))).numpy() * 0.01),
    ):
        activation = ActivationQuant(mode, scale, None, np.full(8, 255), fp8=True)  # type: ignore[arg-type]
        plan = PrecisionPlan((SitePlan("m", "x", activation, ("m",)),), (op,))
        found = quantized_activation(torch.from_numpy(x), op, plan).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert plan.label(op) == {"token": "fp8", "static": "fp8-static"}[mode]
