"""Int8Linear and Int8Rows: Q/DQ patterns become the CUDA operators, with the same results."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from qcompile.passes.int8_linear import Int8Linear
from qcompile.passes.int8_rows import Int8Rows
from qcompile.passes.per_token import E4M3 as E4M3_OVERLOAD
from qcompile.passes.per_token import per_token_functions
from qcompile.passes.to_float16 import ToFloat16
from qcompile.targets.cuda.reference import with_reference

from qcompile.e4m3 import E4M3
from tests.passes.rewriting import HEADER, typed
from tests.support import assert_idempotent, from_text, ops, run_model

RNG = np.random.default_rng(0)
OPSETS = HEADER.replace("]", ', "qcompile" : 1]')
K, N = 64, 32
X = RNG.standard_normal((2, 7, K)).astype(np.float32)
FEED = {"x": X, "r": RNG.standard_normal((2, 7, K)).astype(np.float32)}
CONSTANTS = {
    "wq": RNG.integers(-127, 128, (K, N), np.int8),
    "ws": (RNG.random(N) / 100).astype(np.float32),
    "bias": RNG.standard_normal(N).astype(np.float32),
    "g": RNG.standard_normal(K).astype(np.float32),
    "s": np.array(0.03, np.float32),
    "z": np.array(128, np.uint8),
    "z7": np.array(7, np.uint8),
    "we": RNG.standard_normal((K, N)).astype(E4M3),
    "ze": np.array(0, E4M3),
}
DECLARED = "int8[64,32] wq, float[32] ws, float[32] bias, float[64] g, float s, uint8 z, uint8 z7"
DECLARED += ", float8e4m3fn[64,32] we, float8e4m3fn ze"
TOKEN = "q, t = qcompile.QuantizePerToken ({0}) d = qcompile.DequantizePerToken (q, t)"
STATIC = "q = QuantizeLinear ({0}, s, z) d = DequantizeLinear (q, s, z)"
TOKEN_E4M3 = TOKEN.replace("Token", "Token : e4m3")
STATIC_E4M3 = STATIC.replace("s, z", "s, ze")
PRODUCT = "v = DequantizeLinear <axis = 1> (wq, ws) m = MatMul (d, v) y = Add (m, bias)"


def model_of(body: str) -> ir.Model:
    text = f"""{OPSETS}graph (float[B,S,64] x, float[B,S,64] r, {DECLARED})
        => (float[B,S,32] y, float[B,S,64] o) {{ {body} }}"""
    model = from_text(text, **CONSTANTS)
    for function in (*per_token_functions(), *per_token_functions(E4M3_OVERLOAD)):
        model.functions[function.identifier()] = function
    return typed(model)


def lowered(body: str) -> ir.Model:
    model = model_of(body)
    for pass_ in (Int8Linear(), Int8Rows()):
        assert pass_(model).modified
        assert_idempotent(pass_, model)
    return model


def assert_equal(body: str, model: ir.Model) -> None:
    """In float16, which the operators want; codes may differ where a value lies between two."""
    ToFloat16()(model)
    wanted, found = as_written(model_of(body)), run_model(with_reference(model), FEED)
    for name in wanted:
        scale = np.abs(wanted[name]).max()
        assert np.abs(wanted[name] - found[name]).max() < 0.01 * scale, name


def as_written(model: ir.Model) -> dict[str, np.ndarray]:
    """ONNX Runtime's optimisations would take e4m3 for int8."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    feed = {value.name: FEED[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(None, feed), strict=True))


@pytest.mark.parametrize("quantizer", [TOKEN, STATIC])
def test_a_linear(quantizer: str) -> None:
    body = f"o = Relu (x) {quantizer.format('x')} {PRODUCT}"
    model = model_of(body)
    assert Int8Linear()(model).modified
    assert_idempotent(Int8Linear(), model)
    assert ops(model) == ["Relu", "qcompile.QuantizeInt8", "qcompile.MatMulInt8"]
    assert_equal(body, model)


@pytest.mark.parametrize("quantizer", [TOKEN_E4M3, STATIC_E4M3])
def test_a_linear_in_e4m3(quantizer: str) -> None:
    product = PRODUCT.replace("wq", "we")
    body = f"o = Identity (r) h = Relu (x) {quantizer.format('h')} {product}"
    model = model_of(body)
    assert Int8Linear()(model).modified
    assert_idempotent(Int8Linear(), model)
    assert ops(model) == ["Identity", "Relu", "qcompile.QuantizeFp8", "qcompile.MatMulFp8"]
    assert Int8Rows()(model).modified
    assert ops(model) == ["Identity", "qcompile.ActivationFp8", "qcompile.MatMulFp8"]
    assert_equal(body, model)


@pytest.mark.parametrize(
    ("quantizer", "weight"),
    [(TOKEN, "we"), (STATIC, "we"), (TOKEN_E4M3, "wq"), (STATIC_E4M3, "wq")],
)
def test_codes_of_two_types_stay(quantizer: str, weight: str) -> None:
    body = f"o = Identity (r) {quantizer.format('x')} {PRODUCT.replace('wq', weight)}"
    assert not Int8Linear()(model_of(body)).modified


def test_readers_share_the_codes() -> None:
    body = f"""{TOKEN.format("x")} {PRODUCT.replace(" y ", " y1 ")}
        u = DequantizeLinear <axis = 1> (wq, ws) y2 = MatMul (d, u) y = Add (y1, y2)
        o = Identity (x)"""
    model = model_of(body)
    Int8Linear()(model)
    assert ops(model).count("qcompile.QuantizeInt8") == 1
    assert ops(model).count("qcompile.MatMulInt8") == 2
    assert_equal(body, model)


def test_codes_are_made_before_their_first_reader() -> None:
    body = f"""{TOKEN.format("x")} v = DequantizeLinear <axis = 1> (wq, ws)
        u = DequantizeLinear <axis = 1> (wq, ws) m = MatMul (d, v) n = MatMul (d, u)
        a = Add (m, bias) y = Add (a, n) o = Identity (x)"""
    model = model_of(body)
    Int8Linear()(model)
    made: set[ir.Value | None] = {None, *model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        assert made.issuperset(node.inputs), node.name
        made.update(node.outputs)
    assert_equal(body, model)


@pytest.mark.parametrize("quantizer", [TOKEN, STATIC])
@pytest.mark.parametrize(
    ("maker", "operator"),
    [
        ("h = LayerNormalization <axis = -1> (x, g, g) o = Relu (x)", "LayerNormInt8"),
        ("h = RMSNormalization <axis = -1> (x, g) o = Relu (x)", "RMSNormInt8"),
        ("o = Add (x, r) h = LayerNormalization <axis = -1> (o, g, g)", None),
        ("a = Add (x, r) h = RMSNormalization <axis = -1> (a, g) o = Relu (a)", "RMSNormInt8"),
        ("h = Relu (x) o = Relu (r)", "ActivationInt8"),
        ('h = Gelu <approximate = "tanh"> (x) o = Relu (r)', "ActivationInt8"),
        ("i = Sigmoid (x) j = Mul (x, i) h = Mul (j, r) o = Relu (r)", "ActivationInt8"),
        ("j = Relu (x) h = Mul (r, j) o = Relu (r)", "ActivationInt8"),
    ],
)
def test_what_makes_an_activation_quantises_it(
    maker: str, operator: str | None, quantizer: str
) -> None:
    body = f"{maker} {quantizer.format('h')} {PRODUCT}"
    model = lowered(body)
    found = [op for op in ops(model) if op.startswith("qcompile.")]
    assert found == [f"qcompile.{operator or 'LayerNormInt8'}", "qcompile.MatMulInt8"]
    assert ("Add" in ops(model)) == (operator is None)  # a graph's output stays where it is
    assert_equal(body, model)


def test_what_something_else_reads_is_quantised_alone() -> None:
    model = model_of(f"o = Relu (x) {TOKEN.format('o')} {PRODUCT}")
    Int8Linear()(model)
    assert not Int8Rows()(model).modified


@pytest.mark.parametrize(
    "body",
    [
        "q = QuantizeLinear (x, s, z7) d = DequantizeLinear (q, s, z7)",
        "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s)",
        "e = Add (s, s) q = QuantizeLinear (x, e, z) d = DequantizeLinear (q, s, z)",
        "q, t, k = DynamicQuantizeLinear (x) d = DequantizeLinear (q, t, k)",
        "d = Relu (x)",
    ],
)
def test_other_codes_stay(body: str) -> None:
    model = model_of(f"{body} {PRODUCT} o = Relu (r)")
    before = ops(model)
    assert not Int8Linear()(model).modified
    assert ops(model) == before
