"""ONNX graphs with Q/DQ nodes: the trained scales and codes ship as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile.checkpoints import StoredActivation, quantized_by
from qcompile.errors import ModelError
from qcompile.frontend.onnx_file import load_onnx
from qcompile.session import open_session
from tests.checkpoints.shipped import shipped_weights
from tests.support import from_text, run_model

RNG = np.random.default_rng(0)
K, N = 64, 32
CODES = RNG.integers(-127, 128, (K, N)).astype(np.int8)
SCALE = RNG.uniform(0.001, 0.002, N).astype(np.float32)
WEIGHT = CODES * SCALE
HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


def write(path: Path, body: str, declared: str, **constants: Any) -> Path:
    text = f"{HEADER} g (float[B,{K}] x, {declared}) => (float[B,{N}] y) {{ {body} }}"
    model = from_text(text, **constants)
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            node.name = f"/block/fc/{node.op_type}"
    ir.save(model, path)
    return path


ACTIVATION = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
FORMS = {
    "codes": (
        "v = DequantizeLinear <axis = 1> (w, t) y = MatMul (d, v)",
        f"int8[{K},{N}] w, float[{N}] t",
        {"w": CODES, "t": SCALE},
    ),
    "fake-quantised": (
        "c = QuantizeLinear <axis = 0> (w, t, p) v = DequantizeLinear <axis = 0> (c, t, p) "
        "r = Transpose <perm = [1, 0]> (v) y = MatMul (d, r)",
        f"float[{N},{K}] w, float[{N}] t, int8[{N}] p",
        # As trained: near the codes, not on them.
        {
            "w": (WEIGHT + 0.3 * SCALE * RNG.uniform(-1, 1, (K, N))).T.astype(np.float32),
            "t": SCALE,
            "p": np.zeros(N, np.int8),
        },
    ),
    "output": (
        "v = DequantizeLinear <axis = 1> (w, t) m = MatMul (d, v) "
        "a = QuantizeLinear (m, s, z) y = DequantizeLinear (a, s, z)",
        f"int8[{K},{N}] w, float[{N}] t",
        {"w": CODES, "t": SCALE},
    ),
    "gemm": (
        "v = DequantizeLinear <axis = 0> (w, t) y = Gemm <transB = 1> (d, v, b)",
        f"int8[{N},{K}] w, float[{N}] t, float[{N}] b",
        {"w": CODES.T.copy(), "t": SCALE, "b": np.ones(N, np.float32)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("zero", "point"), [(np.uint8(120), -8), (np.int8(-8), -8), (np.int8(0), 0)]
)
def test_pairs_become_the_plan(tmp_path: Path, form: str, zero: Any, point: int) -> None:
    body, declared, constants = FORMS[form]
    kind = "uint8" if zero.dtype == np.uint8 else "int8"
    path = write(
        tmp_path / "m.onnx",
        ACTIVATION + body,
        f"{declared}, float s, {kind} z",
        s=np.float32(0.05),
        z=zero,
        **constants,
    )
    assert quantized_by(path) == "Q/DQ nodes"
    model = load_onnx(path)
    assert model.checkpoint is not None
    assert model.checkpoint.weights.keys() == {"block.fc"}
    np.testing.assert_array_equal(model.checkpoint.weights["block.fc"]().dequantized(), WEIGHT)
    expected = StoredActivation("static", float(np.float32(0.05)), point)
    assert model.checkpoint.activations == {"block.fc": expected}
    assert not {n.op_type for n in model.ir.graph} & {"QuantizeLinear", "DequantizeLinear"}
    x = RNG.uniform(-1, 1, (5, K)).astype(np.float32)
    found = run_model(model.ir, {"x": x})["y"]
    bias = 1.0 if form == "gemm" else 0.0
    np.testing.assert_allclose(found, x @ WEIGHT + bias, rtol=0, atol=1e-5)


def test_the_artifact_computes_what_the_file_does(tmp_path: Path) -> None:
    """Scales, zero point and codes are the same, so the outputs are, but for a float's rounding."""
    body, declared, constants = FORMS["gemm"]
    path = write(
        tmp_path / "m.onnx",
        ACTIVATION + body,
        f"{declared}, float s, uint8 z",
        s=np.float32(0.02),
        z=np.uint8(128),
        **constants,
    )
    artifact = qcompile.compile(
        path,
        target="ort-cpu:vnni",
        calibration=[{"x": RNG.standard_normal((1, K)).astype(np.float32)} for _ in range(8)],
        config=qcompile.CompileConfig(samples=4),
        output=tmp_path / "out",
    )
    (op,) = artifact.report.ops
    assert (op.precision, op.kernel) == ("int8", "com.microsoft.MatMulIntegerToFloat")
    x = RNG.standard_normal((7, K)).astype(np.float32)
    wanted = run_model(ir.load(path), {"x": x}, optimise=False)["y"]
    compiled = open_session(artifact.path / "model.onnx", exact=True)
    (found,) = compiled.run(None, {"x": x})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_weights_in_blocks_of_four_bits(tmp_path: Path) -> None:
    codes = RNG.integers(0, 16, (K, N)).astype(np.uint8)
    scale = RNG.uniform(0.01, 0.02, (K // 16, N)).astype(np.float32)
    zero = RNG.integers(0, 16, (K // 16, N)).astype(np.uint8)
    path = write(
        tmp_path / "m.onnx",
        "v = DequantizeLinear <axis = 0, block_size = 16> (w, t, p) y = MatMul (x, v)",
        f"uint4[{K},{N}] w, float[{K // 16},{N}] t, uint4[{K // 16},{N}] p",
        w=codes.astype(ml_dtypes.uint4),
        t=scale,
        p=zero.astype(ml_dtypes.uint4),
    )
    artifact = qcompile.compile(
        path,
        calibration=[{"x": RNG.standard_normal((1, K)).astype(np.float32)} for _ in range(8)],
        config=qcompile.CompileConfig(samples=4),
        output=tmp_path / "out",
    )
    wanted = (codes.astype(np.float32) - zero.repeat(16, axis=0)) * scale.repeat(16, axis=0)
    np.testing.assert_array_equal(shipped_weights(artifact.path)["block.fc"], wanted.T)


@pytest.mark.parametrize(
    ("body", "declared", "constants", "message"),
    [
        (
            "v = DequantizeLinear <axis = 0> (w, t) y = MatMul (x, v)",
            f"int8[{K},{N}] w, float[{K}] t",
            {"w": CODES, "t": np.linspace(0.1, 0.2, K).astype(np.float32)},
            "its input channels have scales of their own",
        ),
        (
            "v = DequantizeLinear (w, t) y = Add (x, v)",
            f"int8[{N}] w, float t",
            {"w": CODES[0], "t": np.float32(0.1)},
            "no matrix product reads a weight in 4- or 8-bit codes",
        ),
        (
            "v = DequantizeLinear <axis = 1> (w, t) q = QuantizeLinear (x, s) "
            "d = DequantizeLinear (q, u) y = MatMul (d, v)",
            f"int8[{K},{N}] w, float[{N}] t, float s, float u",
            {"w": CODES, "t": SCALE, "s": np.float32(0.1), "u": np.float32(0.2)},
            "is no pair with one constant scale",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(
    tmp_path: Path, body: str, declared: str, constants: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "m.onnx", body, declared, **constants)
    with pytest.raises(ModelError, match=message):
        qcompile.compile(path, output=tmp_path / "out")
