"""IntegerMatMul: Q/DQ patterns become the integer kernel, with the same results."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.integer_matmul import CONTRIB, KERNEL, IntegerMatMul
from qcompile.passes.per_token import per_token_functions

from qcompile.config import Activations
from qcompile.kernels import Kernels, read_back
from qcompile.weights import quantize_weight
from tests.passes.rewriting import HEADER, typed
from tests.support import (
    Feed,
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

RNG = np.random.default_rng(0)
OPSETS = HEADER.replace("]", ', "qcompile" : 1]')
MODES: tuple[Activations, ...] = get_args(Activations)
K, N = 48, 20
X = (RNG.standard_normal((2, 7, K)) + 0.5).astype(np.float32)
FLOAT_WEIGHT = RNG.standard_normal((K, N)).astype(np.float32)
# Safe from saturation with any input: exact in the kernel of every machine.
WEIGHT = quantize_weight(FLOAT_WEIGHT, highest=np.full(K, 255))
BIAS = RNG.standard_normal(N).astype(np.float32)
STEP, ZERO = 0.03125, 101
FEED: Feed = {"x": X}

WEIGHTS: dict[str, np.ndarray] = {"wq": WEIGHT.codes, "ws": WEIGHT.scale}
STATIC: dict[str, np.ndarray] = {
    "s": np.array(STEP, np.float32),
    "z": np.array(ZERO, np.uint8),
}
QUANTIZER: dict[Activations, str] = {
    "static": "q = QuantizeLinear (x, s, z)",
    "dynamic": "q, s, z = DynamicQuantizeLinear (x)",
    "token": "q, s = qcompile.QuantizePerToken (x)",
}
DEQUANTIZER: dict[Activations, str] = {
    "static": "d = DequantizeLinear (q, s, z)",
    "dynamic": "d = DequantizeLinear (q, s, z)",
    "token": "d = qcompile.DequantizePerToken (q, s)",
}
PRODUCT = "v = DequantizeLinear <axis = 1> (wq, ws) m = MatMul (d, v)"
OUTPUTS: dict[Activations, str] = {
    "static": "float[B,M,20] y, uint8[B,M,48] q",
    "dynamic": "float[B,M,20] y, uint8[B,M,48] q, float s, uint8 z",
    "token": "float[B,M,20] y, uint8[B,M,48] q, float[B,M,1] s",
}


def graph(mode: Activations, body: str, constants: dict[str, np.ndarray]) -> str:
    kinds = {np.dtype(np.int8): "int8", np.dtype(np.uint8): "uint8", np.dtype(np.float32): "float"}
    declared = "".join(
        f", {kinds[a.dtype]}{list(a.shape) if a.shape else ''} {name}"
        for name, a in constants.items()
    )
    return f"g (float[B,M,48] x{declared}) => ({OUTPUTS[mode]}) {{ {body} }}"


def model_of(mode: Activations, body: str, **constants: np.ndarray) -> ir.Model:
    """The quantised graph; codes and run-time scales are outputs too."""
    model = from_text(OPSETS + graph(mode, body, constants), **constants)
    if mode == "token":
        for function in per_token_functions():
            model.functions[function.identifier()] = function
    typed(model)
    for node in model.graph:
        if node.op_type == "MatMul":
            first = node.outputs[0].name == "m"
            node.name = "model.fc" if first else str(node.outputs[0].name)
    return model


def constants_of(mode: Activations, *, bias: bool = True) -> dict[str, np.ndarray]:
    return WEIGHTS | (STATIC if mode == "static" else {}) | ({"b": BIAS} if bias else {})


def qdq(mode: Activations, bias: str = "m, b") -> ir.Model:
    """The pattern, with a bias that is added as `bias` says."""
    add = f"y = Add ({bias})" if bias else "y = Identity (m)"
    body = f"{QUANTIZER[mode]} {DEQUANTIZER[mode]} {PRODUCT} {add}"
    return model_of(mode, body, **constants_of(mode, bias=bool(bias)))


def integer_reference(outputs: dict[str, np.ndarray], mode: Activations) -> np.ndarray:
    """x̂ @ Ŵ from the codes, the sums in int64 and the rest in float64."""
    scale = outputs["s"].astype(np.float64) if mode != "static" else STEP
    zero = {"static": ZERO, "token": 128}.get(mode) if mode != "dynamic" else int(outputs["z"])
    assert zero is not None
    sums = (outputs["q"].astype(np.int64) - zero) @ WEIGHT.codes.astype(np.int64)
    result: np.ndarray = sums * scale * WEIGHT.scale.astype(np.float64)
    return result


def read(model: ir.Model, folder: Path) -> Kernels:
    """The optimised graph of what a target writes: functions inlined."""
    ir.passes.common.InlinePass()(model)
    ir.save(model, folder / "model.onnx")
    return read_back(folder / "model.onnx")


AFTER: dict[Activations, str] = {
    "static": "y = com.microsoft.MatMulIntegerToFloat (q, wq, s, ws, z, , b)",
    "dynamic": "y = com.microsoft.MatMulIntegerToFloat (q, wq, s, ws, z, , b)",
    "token": """p = com.microsoft.MatMulIntegerToFloat (q, wq, one, ws, middle)
      r = Mul (p, s) y = Add (r, b)""",
}


@pytest.mark.parametrize("bias", ["m, b", "b, m"])
@pytest.mark.parametrize("mode", MODES)
def test_pattern(mode: Activations, bias: str) -> None:
    result = IntegerMatMul()(qdq(mode, bias))
    assert result.modified
    constants = constants_of(mode)
    if mode == "token":
        constants |= {"one": np.array(1.0, np.float32), "middle": np.array(128, np.uint8)}
    expected = graph(mode, f"{QUANTIZER[mode]} {AFTER[mode]}", constants)
    assert_same_graph(result.model, from_text(OPSETS + expected, **constants))
    check_model(result.model)
    assert_idempotent(IntegerMatMul(), result.model)


@pytest.mark.parametrize("mode", MODES)
def test_pattern_without_bias(mode: Activations) -> None:
    result = IntegerMatMul()(qdq(mode, bias=""))
    assert result.modified
    kernels = [node for node in result.model.graph if node.op_type == KERNEL]
    assert len(kernels) == 1
    assert "MatMul" not in ops(result.model) and "DequantizeLinear" not in ops(result.model)
    outputs = run_model(result.model, FEED)
    wanted = integer_reference(outputs, mode)
    np.testing.assert_allclose(
        outputs["y"], wanted, rtol=1e-6, atol=1e-6 * float(np.abs(wanted).max())
    )
    assert_idempotent(IntegerMatMul(), result.model)


@pytest.mark.parametrize("optimise", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_integer_reference_and_the_graph_before(
    mode: Activations, optimise: bool
) -> None:
    model = qdq(mode)
    before = run_model(model, FEED, optimise=False)
    after = run_model(IntegerMatMul()(model).model, FEED, optimise=optimise)
    assert list(after) == list(before)
    for name in set(before) - {"y"}:
        np.testing.assert_array_equal(after[name], before[name])
    wanted = integer_reference(after, mode) + BIAS
    size = float(np.abs(wanted).max())
    np.testing.assert_allclose(after["y"], wanted, rtol=1e-6, atol=1e-6 * size)
    # The float product rounds at every one of its K additions.
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (4, 33)])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_rows(mode: Activations, rows: tuple[int, int]) -> None:
    """One row and many go through different kernels of the runtime."""
    x = RNG.standard_normal((*rows, K)).astype(np.float32)
    outputs = run_model(IntegerMatMul()(qdq(mode)).model, {"x": x})
    wanted = integer_reference(outputs, mode) + BIAS
    np.testing.assert_allclose(
        outputs["y"], wanted, rtol=1e-6, atol=1e-6 * float(np.abs(wanted).max())
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_runs_under_the_name_of_the_linear(mode: Activations, tmp_path: Path) -> None:
    """A float bias must not turn it into a Gemm."""
    kernels = read(IntegerMatMul()(qdq(mode)).model, tmp_path)
    assert kernels.by_name["model.fc"] == f"{CONTRIB}.{KERNEL}"
    assert kernels.counts[f"{CONTRIB}.{KERNEL}"] == 1
    floats = {"Gemm", "MatMul", f"{CONTRIB}.FusedGemm", f"{CONTRIB}.FusedMatMul"}
    assert not floats & set(kernels.counts)
    assert kernels.mismatches({"model.fc": (f"{CONTRIB}.{KERNEL}",)}) == []


def test_what_runs_in_float_is_found_out(tmp_path: Path) -> None:
    text = """g (float[M,48] x, float[48,20] w, float[20] b) => (float[M,20] y) {
      m = MatMul (x, w) y = Add (m, b) }"""
    model = typed(from_text(HEADER + text, w=FLOAT_WEIGHT, b=BIAS))
    model.graph[0].name = "model.fc"
    kernels = read(model, tmp_path)
    mismatch = kernels.mismatches({"model.fc": (f"{CONTRIB}.{KERNEL}",), "model.gone": (KERNEL,)})
    assert [m.name for m in mismatch] == ["model.fc", "model.gone"]
    assert mismatch[0].expected == f"{CONTRIB}.{KERNEL}"
    assert KERNEL not in mismatch[0].found
    assert mismatch[1].found == "nothing of that name"


def test_linears_that_share_codes() -> None:
    body = f"""{QUANTIZER["static"]} {DEQUANTIZER["static"]}
      v = DequantizeLinear <axis = 1> (wq, ws) m = MatMul (d, v) n = MatMul (d, v)
      y = Sub (m, n)"""
    model = model_of("static", body, **constants_of("static", bias=False))
    assert IntegerMatMul()(model).modified
    assert ops(model).count(f"{CONTRIB}.{KERNEL}") == 2
    assert "DequantizeLinear" not in ops(model)
    outputs = run_model(model, FEED)
    np.testing.assert_array_equal(outputs["y"], np.zeros_like(outputs["y"]))
    assert_idempotent(IntegerMatMul(), model)


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        pytest.param("m, r", {"r": np.ones((7, N), np.float32)}, id="constant-with-rows"),
        pytest.param("m, r", {"r": np.ones(1, np.float32)}, id="one-number"),
    ],
)
def test_other_additions_stay(body: str, changed: dict[str, np.ndarray]) -> None:
    text = f"{QUANTIZER['static']} {DEQUANTIZER['static']} {PRODUCT} y = Add ({body})"
    model = model_of("static", text, **constants_of("static", bias=False), **changed)
    assert IntegerMatMul()(model).modified
    assert ops(model) == ["QuantizeLinear", f"{CONTRIB}.{KERNEL}", "Add"]
    outputs = run_model(model, FEED)
    wanted = integer_reference(outputs, "static") + 1
    np.testing.assert_allclose(outputs["y"], wanted, rtol=1e-6, atol=1e-5)


def test_a_product_read_twice_keeps_its_addition() -> None:
    text = f"""{QUANTIZER["static"]} {DEQUANTIZER["static"]} {PRODUCT}
      a = Add (m, b) y = Mul (a, m)"""
    model = model_of("static", text, **constants_of("static"))
    assert IntegerMatMul()(model).modified
    assert ops(model) == ["QuantizeLinear", f"{CONTRIB}.{KERNEL}", "Add", "Mul"]
    outputs = run_model(model, FEED)
    product = integer_reference(outputs, "static")
    size = float(np.abs(product).max())
    np.testing.assert_allclose(
        outputs["y"], (product + BIAS) * product, rtol=1e-5, atol=1e-6 * size**2
    )


SQUARE = quantize_weight(RNG.standard_normal((K, K)).astype(np.float32), highest=np.full(K, 255))


@pytest.mark.parametrize(
    ("product", "constants"),
    [
        pytest.param(
            "v = DequantizeLinear <axis = 1> (wq, ws, wz) y = MatMul (d, v)",
            WEIGHTS | {"wz": np.arange(N).astype(np.int8)},
            id="weight-with-zero-points",
        ),
        pytest.param(
            "v = DequantizeLinear <axis = 0> (wq, ws) y = MatMul (d, v)",
            {"wq": WEIGHT.codes, "ws": np.linspace(0.1, 1, K, dtype=np.float32)},
            id="scale-per-input-channel",
        ),
        pytest.param(
            "v = DequantizeLinear <axis = 0> (wq, ws) f = MatMul (d, v) y = MatMul (f, o)",
            {
                "wq": SQUARE.codes,
                "ws": np.linspace(0.1, 1, K, dtype=np.float32),
                "o": FLOAT_WEIGHT,
            },
            id="scale-per-input-channel-of-a-square-weight",
        ),
        pytest.param(
            "v = DequantizeLinear <axis = 0, block_size = 16> (wq, ws) y = MatMul (d, v)",
            {"wq": WEIGHT.codes, "ws": np.linspace(0.1, 1, 3 * N, dtype=np.float32).reshape(3, N)},
            id="scale-per-block",
        ),
        pytest.param("y = MatMul (d, w)", {"w": FLOAT_WEIGHT}, id="weight-in-float"),
        pytest.param(
            "v = DequantizeLinear <axis = 1> (wq, ws) y = MatMul (x, v)",
            WEIGHTS,
            id="activation-in-float",
        ),
    ],
)
def test_what_the_kernel_cannot_do_is_left(
    product: str, constants: dict[str, np.ndarray]
) -> None:  # fmt: skip
    text = f"{QUANTIZER['static']} {DEQUANTIZER['static']} {product}"
    model = model_of("static", text, **constants, **STATIC)
    before = ops(model)
    wanted = run_model(model, FEED, optimise=False)["y"]
    assert not IntegerMatMul()(model).modified
    assert ops(model) == before
    np.testing.assert_array_equal(run_model(model, FEED, optimise=False)["y"], wanted)


def test_a_scale_per_channel_of_the_activation_is_left() -> None:
    text = f"""q = QuantizeLinear <axis = 2> (x, s, z)
      d = DequantizeLinear <axis = 2> (q, s, z) {PRODUCT} y = Identity (m)"""
    per_channel: dict[str, np.ndarray] = {
        "s": np.linspace(0.01, 0.1, K, dtype=np.float32),
        "z": np.full(K, 99, np.uint8),
    }
    model = model_of("static", text, **WEIGHTS, **per_channel)
    assert not IntegerMatMul()(model).modified
    assert f"{CONTRIB}.{KERNEL}" not in ops(model)


def test_a_float_graph_is_left() -> None:
    model = typed(
        from_text(
            HEADER + "g (float[M,48] x, float[48,20] w) => (float[M,20] y) { y = MatMul (x, w) }",
            w=FLOAT_WEIGHT,
        )
    )
    assert_idempotent(IntegerMatMul(), model)
    assert ops(model) == ["MatMul"]
