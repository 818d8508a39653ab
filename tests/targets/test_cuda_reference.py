"""The reference functions of the CUDA operators against integers in numpy, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from qcompile.targets.cuda.reference import with_reference
from qcompile.targets.cuda.schema import ACTIVATIONS, DOMAIN, OPERATORS, WIDEST_ROW, refusal
from qcompile.targets.cuda.variants import BLOCKS
from scipy.special import erf

from tests.targets.cuda_graphs import (
    Arrays,
    exact_product,
    node_model,
    run,
    static_codes,
    token_codes,
)

RNG = np.random.default_rng(4)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float16)


def reference(name: str, arrays: Arrays, **options: Any) -> dict[str, np.ndarray]:
    model = node_model(name, arrays, **options)
    return run(with_reference(model), arrays)


def test_quantize_per_token() -> None:
    x = normal(2, 5, 64)
    x[0, 1] = 0
    x[0, 2] = 65504
    x[1, 0] = np.float16(6e-8)
    made = reference("QuantizeInt8", {"x": x})
    codes, scale = token_codes(x)
    np.testing.assert_array_equal(made["codes"], codes)
    np.testing.assert_array_equal(made["scale"], scale)
    assert (made["codes"][0, 1] == 0).all()


def test_quantize_static_saturates() -> None:
    x = normal(7, 64) * np.float16(4)
    scale = np.array([0.02], np.float32)
    made = reference("QuantizeInt8", {"x": x, "scale": scale}, outputs=["codes"])
    np.testing.assert_array_equal(made["codes"], static_codes(x, scale))
    assert made["codes"].min() == -128 and made["codes"].max() == 127


@pytest.mark.parametrize("fill", [None, -128, 127, 0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("biased", [True, False])
def test_matmul(fill: int | None, dtype: str, biased: bool) -> None:
    m, n, k = 5, 48, 96
    x = RNG.integers(-128, 128, (m, k)).astype(np.int8)
    weight = RNG.integers(-128, 128, (n, k)).astype(np.int8)
    if fill is not None:
        x[:], weight[:] = fill, -128
    arrays: dict[str, np.ndarray] = {
        "x": x,
        "x_scale": RNG.random((m, 1)).astype(np.float32) / 1000,
        "weight": weight,
        "weight_scale": RNG.random(n).astype(np.float32),
    }
    bias = RNG.normal(size=n).astype(np.float32) if biased else np.zeros(n, np.float32)
    if biased:
        arrays["bias"] = bias
    made = reference("MatMulInt8", arrays, dtype=dtype)["y"]
    expected = exact_product(x, weight).astype(np.float32) * arrays["x_scale"]
    expected = expected * arrays["weight_scale"] + bias
    if dtype == "bfloat16":
        np.testing.assert_allclose(made, expected, rtol=2**-8)
    else:
        np.testing.assert_array_equal(made, expected.astype(dtype))


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["none", "up", "packed"])
def test_activation(kind: str, gate: str) -> None:
    x, up = normal(3, 32), normal(3, 32)
    packed = gate == "packed"
    arrays = {"x": np.concatenate([x, up], -1) if packed else x}
    if gate == "up":
        arrays["up"] = up
    value = x.astype(np.float64)
    value = {
        "none": value,
        "relu": np.maximum(value, 0),
        "gelu": value * (1 + erf(value / np.sqrt(2))) / 2,
        "gelu_tanh": value * (1 + np.tanh(np.sqrt(2 / np.pi) * (value + 0.044715 * value**3))) / 2,
        "silu": value / (1 + np.exp(-value)),
    }[kind]
    if gate != "none":
        value = value * up
    made = reference("ActivationInt8", arrays, kind=kind, packed=int(packed))
    codes, scale = token_codes(value)
    np.testing.assert_allclose(made["scale"], scale, rtol=1e-5)
    assert np.abs(made["codes"].astype(int) - codes).max() <= 1
    assert (made["codes"] == codes).mean() > 0.97


@pytest.mark.parametrize("name", ["LayerNormInt8", "RMSNormInt8"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_norm(name: str, residual: bool, static: bool) -> None:
    arrays = {"x": normal(2, 3, 64), "weight": normal(64)}
    total = arrays["x"]
    if name == "LayerNormInt8":
        arrays["bias"] = normal(64)
    if residual:
        arrays["residual"] = normal(2, 3, 64)
        total = (total.astype(np.float32) + arrays["residual"]).astype(np.float16)
    if static:
        arrays["scale"] = np.array([0.02], np.float32)
    value = total.astype(np.float64)
    if name == "LayerNormInt8":
        value = value - value.mean(-1, keepdims=True)
    value = value / np.sqrt((value**2).mean(-1, keepdims=True) + 1e-5) * arrays["weight"]
    value = value + arrays.get("bias", np.float64(0))
    outputs = ["codes", "sum"] if static else ["codes", "scale", "sum"]
    made = reference(name, arrays, outputs=outputs, epsilon=1e-5)
    np.testing.assert_array_equal(made["sum"], total)
    codes = static_codes(value, arrays["scale"]) if static else token_codes(value)[0]
    assert np.abs(made["codes"].astype(int) - codes).max() <= 1
    assert (made["codes"] == codes).mean() > 0.97


def test_a_reference_names_what_is_there() -> None:
    """Two nodes that differ in what they leave out have two functions; the original stays."""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "{DOMAIN}" : 1]>
        two (float16[m, 32] x, float[1] s) => (int8[m, 32] a, int8[m, 32] b, float[m, 1] t) {{
        a = {DOMAIN}.QuantizeInt8(x, s)
        b, t = {DOMAIN}.QuantizeInt8(x)
        }}"""
    )
    made = with_reference(model)
    assert len(made.functions) == 2
    assert {node.overload for node in model.graph} == {""}
    assert {node.op_type for node in made.graph} == {"QuantizeInt8"}
    assert {node.op_identifier() for node in made.graph} == set(made.functions)
    onnx.checker.check_model(ir.to_proto(made))


def test_schema() -> None:
    """Optional parameters come last, in both lists: a node can leave them away."""
    for operator in OPERATORS:
        for parameters in (operator.inputs, operator.outputs):
            optional = [parameter.optional for parameter in parameters]
            assert optional == sorted(optional), operator.name


def test_refusals() -> None:
    assert refusal(4096, 11008) is None
    assert refusal(4096, WIDEST_ROW) is None
    assert BLOCKS[-1] == WIDEST_ROW
    for channels_out, channels_in, reason in (
        (50257, 4096, "50257 output channels"),
        (64, 80, "80 input channels"),
        (64, 2 * WIDEST_ROW, "in rows of"),
    ):
        assert reason in str(refusal(channels_out, channels_in))
