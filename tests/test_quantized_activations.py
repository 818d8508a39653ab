"""Activations rounded in PyTorch as ONNX Runtime rounds them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qcompile.passes.per_token import per_token_functions

from qcompile.config import Activations
from qcompile.precision import (
    MODES,
    ActivationQuant,
    OpPlan,
    PrecisionPlan,
    QuantizedWeight,
    SitePlan,
    uint8_affine,
)
from qcompile.sensitivity import quantized_activation
from qcompile.weight_blocks import quantize_blocks
from qcompile.weights import quantize_weight
from tests.networks import IN, inputs, weights
from tests.passes.rewriting import HEADER
from tests.support import from_text, run_model

QUANTIZERS: dict[Activations, str] = {
    "static": "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)",
    "dynamic": "q, t, n = DynamicQuantizeLinear (x) y = DequantizeLinear (q, t, n)",
    "token": "q, t = qcompile.QuantizePerToken (x) y = qcompile.DequantizePerToken (q, t)",
}


def planned(activation: ActivationQuant | None, weight: QuantizedWeight) -> PrecisionPlan:
    """A plan of one op."""
    depth, width = weight.codes.shape
    precision = "int8" if activation is not None else "weight8"
    op = OpPlan("m", "m", precision, "test", depth, width, "y", weight)  # type: ignore[arg-type]
    sites = (SitePlan("m", "x", activation, ("m",)),) if activation is not None else ()
    return PrecisionPlan(sites, (op,))


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("mode", MODES)
def test_activations_are_rounded_as_onnx_runtime_rounds_them(
    mode: Activations, shift: float
) -> None:
    x = inputs(2, 9) + np.float32(shift)
    # The range leaves some of them out, on both sides.
    scale, zero = uint8_affine(float(x.min()) / 2, float(x.max()) / 2)
    text = (
        f"""g (float[B,S,48] x, float s, uint8 z) => (float[B,S,48] y) {{ {QUANTIZERS[mode]} }}"""
    )
    model = from_text(
        HEADER.replace("]", ', "qcompile" : 1]') + text,
        s=np.array(scale, np.float32),
        z=np.array(zero, np.uint8),
    )
    if mode == "token":
        for function in per_token_functions():
            model.functions[function.identifier()] = function
    wanted = run_model(model, {"x": x}, optimise=False)["y"]
    static = mode == "static"
    activation = ActivationQuant(
        mode, scale if static else None, zero if static else None, np.full(IN, 255)
    )
    weight = quantize_weight(weights()["w"])
    plan = planned(activation, weight)
    found = quantized_activation(torch.from_numpy(x), plan.op("m"), plan).numpy()
    assert np.abs(x - wanted).max() > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(np.abs(x).max()))


@pytest.mark.parametrize("mode", MODES)
def test_zeros_stay_zeros(mode: Activations) -> None:
    static = mode == "static"
    activation = ActivationQuant(
        mode, 0.5 if static else None, 7 if static else None, np.full(IN, 255)
    )
    plan = planned(activation, quantize_weight(weights()["w"]))
    found = quantized_activation(torch.zeros(3, IN), plan.op("m"), plan)
    np.testing.assert_array_equal(found.numpy(), np.zeros((3, IN)))


@pytest.mark.parametrize("block_size", [16, 32])
def test_without_a_mode_they_are_rounded_in_blocks(block_size: int) -> None:
    """As the weight-only kernel does it; the last block of 48 channels by 32 is short."""
    x = inputs(2, 9)
    weight = quantize_blocks(weights()["w"], bits=8, block_size=block_size)
    plan = planned(None, weight)
    found = quantized_activation(torch.from_numpy(x), plan.op("m"), plan).numpy()
    wanted = np.zeros_like(x)
    for start in range(0, IN, block_size):
        block = x[..., start : start + block_size].astype(np.float64)
        step = np.abs(block).max(axis=-1, keepdims=True) / 127
        wanted[..., start : start + block_size] = np.rint(block / step) * step
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(np.abs(x).max()))
