"""The reference functions of the CUDA operators against integers in numpy, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from qcompile.targets.cuda.reference import with_reference
from qcompile.targets.cuda.schema import (
    ACTIVATIONS,
    DOMAIN,
    LARGEST,
    OPERATORS,
    SUFFIX,
    WIDEST_ROW,
    Codes,
    refusal,
)
from qcompile.targets.cuda.variants import BLOCKS
from scipy.special import erf

from tests.targets.cuda_graphs import (
    CODES,
    E4M3,
    Arrays,
    exact_product,
    node_model,
    places,
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


@pytest.mark.parametrize("codes", CODES)
def test_quantize_per_token(codes: Codes) -> None:
    x = normal(2, 5, 64)
    x[0, 1] = 0
    x[0, 2] = 65504
    x[1, 0] = np.float16(6e-8)
    made = reference("Quantize" + SUFFIX[codes], {"x": x})
    expected, scale = token_codes(x, codes)
    np.testing.assert_array_equal(places(made["codes"]), places(expected))
    np.testing.assert_array_equal(made["scale"], scale)
    assert (made["codes"][0, 1] == 0).all()
    largest = np.abs(made["codes"].astype(np.float32)).max(-1)
    assert (largest[scale[..., 0] > 0] == LARGEST[codes]).all()


@pytest.mark.parametrize(
    ("codes", "step", "ends"), [("int8", 0.02, (-128, 127)), ("float8e4m3fn", 0.005, (-448, 448))]
)
def test_quantize_static_saturates(codes: Codes, step: float, ends: tuple[int, int]) -> None:
    x = normal(7, 64) * np.float16(4)
    scale = np.array([step], np.float32)
    made = reference("Quantize" + SUFFIX[codes], {"x": x, "scale": scale}, outputs=["codes"])
    np.testing.assert_array_equal(places(made["codes"]), places(static_codes(x, scale, codes)))
    values = made["codes"].astype(np.float32)
    assert (values.min(), values.max()) == ends


def test_e4m3_of_every_float16() -> None:
    """Halves to even, subnormals, what lies beyond 448, infinities, NaN."""
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 32)
    one = np.ones(1, np.float32)
    made = reference("QuantizeFp8", {"x": x, "scale": one}, outputs=["codes"])["codes"]
    values = made.astype(np.float32)
    grid = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    magnitude = np.abs(x.astype(np.float64))
    at = np.searchsorted(middles, magnitude)
    # On a middle the code is the one whose last bit is 0.
    at += (at < 126) & (magnitude == middles[np.minimum(at, 125)]) & (at % 2 == 1)
    expected = np.where(np.isnan(x), np.nan, np.copysign(grid[at], x))
    np.testing.assert_array_equal(values, expected.astype(np.float32))


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


@pytest.mark.parametrize("fill", [None, -448, 448, 0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_matmul_of_e4m3(fill: int | None, dtype: str) -> None:
    """As the products of the codes' values, but for the order of float32 sums."""
    m, n, k = 5, 48, 96
    x, weight = (
        RNG.integers(0, 127, shape, np.uint8).view(E4M3) * RNG.choice([-1, 1], shape).astype(E4M3)
        for shape in ((m, k), (n, k))
    )
    if fill is not None:
        x[:], weight[:] = fill, -448
    arrays: dict[str, np.ndarray] = {
        "x": x,
        "x_scale": RNG.random((m, 1)).astype(np.float32) / 1000,
        "weight": weight,
        "weight_scale": RNG.random(n).astype(np.float32),
        "bias": RNG.normal(size=n).astype(np.float32),
    }
    made = reference("MatMulFp8", arrays, dtype=dtype)["y"]
    scales = arrays["x_scale"].astype(np.float64) * arrays["weight_scale"]
    expected = exact_product(x, weight) * scales + arrays["bias"]
    size = exact_product(np.abs(x), np.abs(weight)) * scales + np.abs(arrays["bias"])
    bits = {"float16": 11, "bfloat16": 8, "float32": 24}[dtype]
    bound = 2.0**-bits * np.abs(expected) * 1.01 + (k + 4) * 2.0**-24 * size + 2.0**-24
    assert (np.abs(made.astype(np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["none", "up", "packed"])
def test_activation(codes: Codes, kind: str, gate: str) -> None:
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
    made = reference("Activation" + SUFFIX[codes], arrays, kind=kind, packed=int(packed))
    expected, scale = token_codes(value, codes)
    np.testing.assert_allclose(made["scale"], scale, rtol=1e-5)
    assert_close(made["codes"], expected)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_norm(codes: Codes, name: str, residual: bool, static: bool) -> None:
    arrays = {"x": normal(2, 3, 64), "weight": normal(64)}
    total = arrays["x"]
    if name == "LayerNorm":
        arrays["bias"] = normal(64)
    if residual:
        arrays["residual"] = normal(2, 3, 64)
        total = (total.astype(np.float32) + arrays["residual"]).astype(np.float16)
    if static:
        arrays["scale"] = np.array([0.02], np.float32)
    value = total.astype(np.float64)
    if name == "LayerNorm":
        value = value - value.mean(-1, keepdims=True)
    value = value / np.sqrt((value**2).mean(-1, keepdims=True) + 1e-5) * arrays["weight"]
    value = value + arrays.get("bias", np.float64(0))
    outputs = ["codes", "sum"] if static else ["codes", "scale", "sum"]
    made = reference(name + SUFFIX[codes], arrays, outputs=outputs, epsilon=1e-5)
    np.testing.assert_array_equal(made["sum"], total)
    if static:
        expected = static_codes(value, arrays["scale"], codes)
    else:
        expected = token_codes(value, codes)[0]
    assert_close(made["codes"], expected)


def assert_close(made: np.ndarray, expected: np.ndarray) -> None:
    """Neighbours where a value lies between two."""
    difference = np.abs(places(made) - places(expected))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.97


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
