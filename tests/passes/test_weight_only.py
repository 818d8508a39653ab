"""Weight-only Linears: blocks in standard ONNX, and ONNX Runtime's kernel in their place."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qcompile.passes.integer_matmul import CONTRIB, IntegerMatMul
from qcompile.passes.weight_only import KERNEL, WeightOnlyMatMul, pack

from qcompile.kernels import read_back
from qcompile.weight_blocks import BLOCK_SIZE, quantize_blocks
from tests.passes.block_weights import (
    BIAS,
    BOTH,
    DEQUANTIZE,
    WEIGHT,
    Bits,
    K,
    N,
    activation,
    close,
    restored,
    rounded,
    stored,
)
from tests.passes.rewriting import HEADER, assert_leaves, typed
from tests.support import (
    Feed,
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

# the pass

INPUTS = "float[B,M,80] x, int{bits}[80,20] wq, float[3,20] ws"
BODIES = {
    "none": (INPUTS, DEQUANTIZE + " y = MatMul (x, v)"),
    "right": (INPUTS + ", float[20] b", DEQUANTIZE + " m = MatMul (x, v) y = Add (m, b)"),
    "left": (INPUTS + ", float[20] b", DEQUANTIZE + " m = MatMul (x, v) y = Add (b, m)"),
}
AFTER = """g (float[B,M,80] x, uint8[20,3,{bytes}] wp, float[60] wt{declared})
  => (float[B,M,20] y) {{
  y = com.microsoft.MatMulNBits <K = 80, N = 20, bits = {bits}, block_size = 32,
    accuracy_level = 4> (x, wp, wt{bias}) }}"""


def qdq(bias: str, bits: Bits) -> ir.Model:
    """The pattern, its MatMul named."""
    inputs, body = BODIES[bias]
    weight = quantize_blocks(WEIGHT, bits=bits)
    constants = {"wq": stored(weight), "ws": weight.scale}
    if bias != "none":
        constants["b"] = BIAS
    text = f"g ({inputs.format(bits=bits)}) => (float[B,M,20] y) {{ {body} }}"
    model = typed(from_text(HEADER + text, **constants))
    for node in model.graph:
        if node.op_type == "MatMul":
            node.name = "model.fc"
    return model


@pytest.mark.parametrize("bits", BOTH)
@pytest.mark.parametrize("bias", list(BODIES))
def test_pattern(bias: str, bits: Bits) -> None:
    model = qdq(bias, bits)
    assert WeightOnlyMatMul()(model).modified
    weight = quantize_blocks(WEIGHT, bits=bits)
    after = AFTER.format(
        bits=bits,
        bytes=32 * bits // 8,
        declared="" if bias == "none" else ", float[20] b",
        bias="" if bias == "none" else ", , , b",
    )
    constants = {"wp": pack(weight.codes, bits, BLOCK_SIZE), "wt": weight.scale.T.reshape(-1)}
    if bias != "none":
        constants["b"] = BIAS
    expected = from_text(HEADER + after, **constants)
    assert_same_graph(model, expected)
    check_model(model)
    assert_idempotent(WeightOnlyMatMul(), model)


@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (4, 33)])
@pytest.mark.parametrize("bits", BOTH)
@pytest.mark.parametrize("bias", list(BODIES))
def test_equals_the_reference_with_activations_rounded(
    bias: str, bits: Bits, rows: tuple[int, int]
) -> None:
    """The Q/DQ graph keeps activations in float; with them rounded the two are the same.

    One row and many go through different kernels of the runtime.
    """
    feed: Feed = {"x": activation(*rows, K)}
    reference = qdq(bias, bits)
    wanted = run_model(reference, {"x": rounded(feed["x"]).astype(np.float32)}, optimise=False)
    exact = rounded(feed["x"]) @ restored(quantize_blocks(WEIGHT, bits=bits))
    close(wanted["y"], exact + (BIAS if bias != "none" else 0))
    in_float = run_model(reference, feed, optimise=False)["y"]
    WeightOnlyMatMul()(reference)
    for optimise in (True, False):
        found = run_model(reference, feed, optimise=optimise)["y"]
        close(found, wanted["y"])
        assert np.abs(found - in_float).max() > 1e-4 * np.abs(in_float).max()


@pytest.mark.parametrize("bits", BOTH)
def test_a_width_that_is_one(bits: Bits) -> None:
    weight = quantize_blocks(WEIGHT[:, :1], bits=bits)
    text = f"""g (float[M,80] x, int{bits}[80,1] wq, float[3,1] ws) => (float[M,1] y) {{
      {DEQUANTIZE} y = MatMul (x, v) }}"""
    model = typed(from_text(HEADER + text, wq=stored(weight), ws=weight.scale))
    assert WeightOnlyMatMul()(model).modified
    x = activation(7, K)
    close(run_model(model, {"x": x})["y"], rounded(x) @ restored(weight))


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("bits", BOTH)
def test_other_sizes_of_block(bits: Bits, block_size: int) -> None:
    weight = quantize_blocks(WEIGHT, bits=bits, block_size=block_size)
    blocks = len(weight.scale)
    text = f"""g (float[M,80] x, int{bits}[80,20] wq, float[{blocks},20] ws) => (float[M,20] y) {{
      v = DequantizeLinear <axis = 0, block_size = {block_size}> (wq, ws) y = MatMul (x, v) }}"""
    model = typed(from_text(HEADER + text, wq=stored(weight), ws=weight.scale))
    assert WeightOnlyMatMul()(model).modified
    (node,) = model.graph
    assert node.attributes.get_int("block_size") == block_size
    x = activation(7, K, block_size=block_size)
    close(run_model(model, {"x": x})["y"], rounded(x, block_size) @ restored(weight))


ASYMMETRIC = """g (float[M,80] x, int{bits}[80,20] wq, float[{blocks},20] ws,
  int{bits}[{blocks},20] wz) => (float[M,20] y) {{
  v = DequantizeLinear <axis = 0, block_size = {size}> (wq, ws, wz) y = MatMul (x, v) }}"""


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("bits", BOTH)
def test_zero_points(bits: Bits, block_size: int) -> None:
    """An odd number of blocks, the last of 32 half empty."""
    weight = quantize_blocks(WEIGHT + 1, bits=bits, block_size=block_size, symmetric=False)
    assert weight.zero_point is not None and weight.zero_point.any()
    points = weight.zero_point if bits == 8 else weight.zero_point.astype(ml_dtypes.int4)
    text = ASYMMETRIC.format(bits=bits, blocks=len(weight.scale), size=block_size)
    model = typed(from_text(HEADER + text, wq=stored(weight), ws=weight.scale, wz=points))
    feed: Feed = {"x": activation(7, K, block_size=block_size)}
    wanted = rounded(feed["x"], block_size) @ restored(weight)
    close(run_model(model, {"x": rounded(feed["x"], block_size).astype(np.float32)})["y"], wanted)
    assert WeightOnlyMatMul()(model).modified
    assert ops(model) == [f"{CONTRIB}.{KERNEL}"]
    close(run_model(model, feed)["y"], wanted)
    check_model(model)
    assert_idempotent(WeightOnlyMatMul(), model)


@pytest.mark.parametrize("bits", BOTH)
@pytest.mark.parametrize("bias", ["none", "right"])
def test_the_kernel_runs_under_the_name_of_the_linear(
    bias: str, bits: Bits, tmp_path: Path
) -> None:
    model = qdq(bias, bits)
    WeightOnlyMatMul()(model)
    ir.save(model, tmp_path / "model.onnx")
    kernels = read_back(tmp_path / "model.onnx")
    assert kernels.by_name == {"model.fc": f"{CONTRIB}.{KERNEL}"}
    assert kernels.counts == {f"{CONTRIB}.{KERNEL}": 1}


@pytest.mark.parametrize("bits", BOTH)
def test_linears_that_share_codes(bits: Bits) -> None:
    weight = quantize_blocks(WEIGHT, bits=bits)
    text = f"""g ({INPUTS.format(bits=bits)}) => (float[B,M,20] y) {{
      {DEQUANTIZE} m = MatMul (x, v) n = MatMul (x, v) y = Sub (m, n) }}"""
    model = typed(from_text(HEADER + text, wq=stored(weight), ws=weight.scale))
    assert WeightOnlyMatMul()(model).modified
    assert ops(model) == [f"{CONTRIB}.{KERNEL}"] * 2 + ["Sub"]
    check_model(model)
    x = activation(2, 3, K)
    np.testing.assert_array_equal(run_model(model, {"x": x})["y"], np.zeros((2, 3, N)))
    assert_idempotent(WeightOnlyMatMul(), model)


@pytest.mark.parametrize(
    ("bias", "changed"),
    [
        pytest.param("m, r", np.ones((7, N), np.float32), id="constant-with-rows"),
        pytest.param("m, r", np.ones(1, np.float32), id="one-number"),
    ],
)
def test_other_additions_stay(bias: str, changed: np.ndarray) -> None:
    weight = quantize_blocks(WEIGHT, bits=4)
    declared = ",".join(map(str, changed.shape))
    text = f"""g ({INPUTS.format(bits=4)}, float[{declared}] r) => (float[B,M,20] y) {{
      {DEQUANTIZE} m = MatMul (x, v) y = Add ({bias}) }}"""
    model = typed(from_text(HEADER + text, wq=stored(weight), ws=weight.scale, r=changed))
    assert WeightOnlyMatMul()(model).modified
    assert ops(model) == [f"{CONTRIB}.{KERNEL}", "Add"]
    x = activation(2, 7, K)
    close(run_model(model, {"x": x})["y"], rounded(x) @ restored(weight) + 1)


def test_a_product_read_twice_keeps_its_addition() -> None:
    weight = quantize_blocks(WEIGHT, bits=8)
    text = f"""g ({INPUTS.format(bits=8)}, float[20] b) => (float[B,M,20] y) {{
      {DEQUANTIZE} m = MatMul (x, v) a = Add (m, b) y = Mul (a, m) }}"""
    model = typed(from_text(HEADER + text, wq=stored(weight), ws=weight.scale, b=BIAS))
    assert WeightOnlyMatMul()(model).modified
    assert ops(model) == [f"{CONTRIB}.{KERNEL}", "Add", "Mul"]
    x = activation(2, 7, K)
    product = rounded(x) @ restored(weight)
    close(run_model(model, {"x": x})["y"], (product + BIAS) * product)


CODES = quantize_blocks(WEIGHT, bits=8).codes
SCALE = quantize_blocks(WEIGHT, bits=8).scale


@pytest.mark.parametrize(
    ("dequantize", "declared", "constants"),
    [
        pytest.param(
            "v = DequantizeLinear <axis = 1> (wq, ws)",
            "int8[80,20] wq, float[20] ws",
            {"wq": CODES, "ws": SCALE[0]},
            id="scale-per-output-channel",
        ),
        pytest.param(
            "v = DequantizeLinear <axis = 1, block_size = 10> (wq, ws)",
            "int8[80,20] wq, float[80,2] ws",
            {"wq": CODES, "ws": np.ones((K, 2), np.float32)},
            id="blocks-of-output-channels",
        ),
        pytest.param(
            "v = DequantizeLinear <axis = 0, block_size = 32> (wq, ws, wz)",
            "int8[80,20] wq, float[3,20] ws, int8[3,20] wz",
            {"wq": CODES, "ws": SCALE},
            id="computed-zero-point",
        ),
        pytest.param(
            "v = DequantizeLinear <axis = 0, block_size = 32> (wq, ws)",
            "uint8[80,20] wq, float[3,20] ws",
            {"wq": CODES.view(np.uint8), "ws": SCALE},
            id="unsigned",
        ),
        pytest.param(
            "v = DequantizeLinear <axis = 0, block_size = 32> (wq, ws)",
            "int8[80,20] wq, float[3,20] ws",
            {"ws": SCALE},
            id="codes-that-are-an-input",
        ),
        pytest.param(
            "v = DequantizeLinear <axis = 0, block_size = 32> (wq, ws)",
            "int8[80,20] wq, float[3,20] ws",
            {"wq": CODES},
            id="scale-that-is-an-input",
        ),
        pytest.param(
            "c = Abs (wq) v = DequantizeLinear <axis = 0, block_size = 32> (c, ws)",
            "int8[80,20] wq, float[3,20] ws",
            {"wq": CODES, "ws": SCALE},
            id="codes-that-are-computed",
        ),
        pytest.param("v = Neg (w)", "float[80,20] w", {"w": WEIGHT}, id="weight-in-float"),
    ],
)
def test_what_the_kernel_cannot_do_is_left(
    dequantize: str, declared: str, constants: dict[str, np.ndarray]
) -> None:
    text = f"g (float[M,80] x, {declared}) => (float[M,20] y) {{ {dequantize} y = MatMul (x, v) }}"
    assert_leaves(WeightOnlyMatMul(), text, **constants)


def test_blocks_on_the_left_are_left() -> None:
    text = f"""g (float[80,6] x, int8[20,80] wq, float[1,80] ws) => (float[20,6] y) {{
      {DEQUANTIZE} y = MatMul (v, x) }}"""
    assert_leaves(WeightOnlyMatMul(), text, wq=CODES.T.copy(), ws=np.ones((1, K), np.float32))


@pytest.mark.parametrize("bits", BOTH)
def test_the_integer_kernel_leaves_blocks_alone(bits: Bits) -> None:
    """A target runs both passes."""
    model = qdq("right", bits)
    assert_idempotent(IntegerMatMul(), model)
    assert ops(model) == ["DequantizeLinear", "MatMul", "Add"]


# how codes are stored


def unpacked(packed: np.ndarray, bits: int, depth: int) -> np.ndarray:
    """Signed codes [K, N] from the bytes, one at a time."""
    width = len(packed)
    codes = np.zeros((depth, width), np.int8)
    flat = packed.reshape(width, -1)
    for channel in range(depth):
        if bits == 8:
            code = flat[:, channel].astype(int) - 128
        else:
            byte = flat[:, channel // 2].astype(int)
            code = (byte >> 4 if channel % 2 else byte & 15) - 8
        codes[channel] = code
    return codes


@given(
    st.sampled_from(BOTH),
    st.sampled_from([16, 32]),
    st.integers(1, 70),
    st.integers(1, 4),
    st.data(),
)
def test_codes_come_back(
    bits: Bits, size: int, depth: int, width: int, data: st.DataObject
) -> None:
    half = 2 ** (bits - 1)
    codes = data.draw(hnp.arrays(np.int8, (depth, width), elements=st.integers(-half, half - 1)))
    packed = pack(codes, bits, size)
    blocks = -(-depth // size)
    assert packed.dtype == np.uint8 and packed.shape == (width, blocks, size * bits // 8)
    np.testing.assert_array_equal(unpacked(packed, bits, depth), codes)
    # What fills the last block stands for zero.
    rest = unpacked(packed, bits, blocks * size)[depth:]
    np.testing.assert_array_equal(rest, np.zeros_like(rest))


def test_known_bytes() -> None:
    codes = np.array([[-8], [7], [0], [1]], np.int8)
    packed = pack(codes, 4, 16)
    assert packed[0, 0].tolist() == [0xF0, 0x98, *[0x88] * 6]
    assert pack(codes, 8, 16)[0, 0].tolist() == [120, 135, 128, 129, *[128] * 12]
