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
from qcompile.errors import ConfigError, ModelError
from qcompile.frontend.onnx_file import load_onnx
from qcompile.frontend.qdq import file_has_scales
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
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
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
    "fake-quantised without a zero point": (
        "c = QuantizeLinear <axis = 1, output_dtype = 3> (w, t) "
        "v = DequantizeLinear <axis = 1> (c, t) y = MatMul (d, v)",
        f"float[{K},{N}] w, float[{N}] t",
        {"w": WEIGHT.astype(np.float32), "t": SCALE},
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


@pytest.mark.parametrize("form", FORMS)
def test_the_artifact_computes_what_the_file_does(tmp_path: Path, form: str) -> None:
    """Scales, zero point and codes are the same, so the outputs are, but for a float's rounding."""
    body, declared, constants = FORMS[form]
    path = write(
        tmp_path / "m.onnx",
        ACTIVATION + body,
        f"{declared}, float s, uint8 z",
        s=np.float32(0.02),
        z=np.uint8(128),
        **constants,
    )
    artifact = compiled(path, tmp_path / "out")
    (op,) = artifact.report.ops
    assert (op.precision, op.kernel) == ("int8", "com.microsoft.MatMulIntegerToFloat")
    x = RNG.standard_normal((7, K)).astype(np.float32)
    wanted = run_model(ir.load(path), {"x": x}, optimise=False)["y"]
    found = outputs(artifact, x)
    # The output's own rounding is left out, which is said.
    left_out = any("not rounded there" in note for note in artifact.report.warnings)
    assert left_out == (form == "output")
    if left_out:
        found = np.clip(found, -128 * 0.02, 127 * 0.02)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.01 + 1e-4 if left_out else 1e-4)


def compiled(path: Path, out: Path) -> qcompile.Artifact:
    return qcompile.compile(
        path,
        target="ort-cpu:vnni",
        calibration=[{"x": RNG.standard_normal((1, K)).astype(np.float32)} for _ in range(8)],
        config=qcompile.CompileConfig(samples=4, strict=False),
        output=out,
    )


def outputs(artifact: qcompile.Artifact, x: np.ndarray) -> np.ndarray:
    (found,) = open_session(artifact.path / "model.onnx", exact=True).run(None, {"x": x})
    return np.asarray(found)


TWO = {"w": CODES, "u": CODES[:, ::-1].copy(), "t": SCALE, "z": np.uint8(128)}
TWO_DECLARED = f"int8[{K},{N}] w, int8[{K},{N}] u, float[{N}] t, uint8 z, float s"
TWO_WEIGHTS = (
    "v = DequantizeLinear <axis = 1> (w, t) r = DequantizeLinear <axis = 1> (u, t) "
    "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) m = MatMul (d, v) "
)


def two_products(path: Path, body: str, declared: str = "", **constants: Any) -> Path:
    """`m` and `n` read x or what rounds it; the nodes have their names."""
    text = f"""{HEADER} g (float[B,{K}] x, {TWO_DECLARED}{declared}) => (float[B,{N}] y) {{
      {TWO_WEIGHTS} {body} y = Add (m, n) }}"""
    model = from_text(text, **TWO, s=np.float32(0.02), **constants)
    for node in model.graph:
        if node.op_type == "MatMul":
            node.name = node.outputs[0].name
    ir.save(model, path)
    return path


def stored(model: Any) -> dict[str, float]:
    return {name: how.scale for name, how in model.checkpoint.activations.items()}


SCALE_S, SCALE_O = float(np.float32(0.02)), float(np.float32(0.03))


def test_two_pairs_of_one_value_keep_their_scales(tmp_path: Path) -> None:
    path = two_products(
        tmp_path / "m.onnx",
        "p = QuantizeLinear (x, o, z) e = DequantizeLinear (p, o, z) n = MatMul (e, r)",
        ", float o",
        o=np.float32(0.03),
    )
    assert stored(load_onnx(path)) == {"m": SCALE_S, "n": SCALE_O}
    artifact = compiled(path, tmp_path / "out")
    assert {op.name: op.label for op in artifact.report.ops} == {"m": "static", "n": "weight8"}
    assert any("another scale beside it" in note for note in artifact.report.warnings)


def test_a_pair_is_of_its_own_readers_alone(tmp_path: Path) -> None:
    path = two_products(tmp_path / "m.onnx", "n = MatMul (x, r)")
    model = load_onnx(path)
    assert stored(model) == {"m": SCALE_S}
    assert model.checkpoint is not None and not model.checkpoint.notes
    artifact = compiled(path, tmp_path / "out")
    assert {op.name: op.label for op in artifact.report.ops} == {"m": "static", "n": "weight8"}


@pytest.mark.parametrize(
    ("body", "declared", "constants"),
    [
        (
            "p = QuantizeLinear (x, o, l) e = DequantizeLinear (p, o, l) n = MatMul (e, r)",
            ", float o, uint16 l",
            {"o": np.float32(0.001), "l": np.uint16(30000)},
        ),
        (
            "p = QuantizeLinear (x, s, z) e = DequantizeLinear (p, s, z) i = Identity (e) "
            "n = MatMul (i, r)",
            "",
            {},
        ),
        # A reader that is no product, beside one that is.
        ("a = Relu (d) n = MatMul (a, r)", "", {}),
    ],
)
def test_rounding_that_no_product_takes_is_told(
    tmp_path: Path, body: str, declared: str, constants: dict[str, Any]
) -> None:
    path = two_products(tmp_path / "m.onnx", body, declared, **constants)
    model = load_onnx(path)
    assert stored(model) == {"m": SCALE_S}
    assert model.checkpoint is not None
    (note,) = model.checkpoint.notes
    left = "d" if "Relu" in body else "e"
    assert note.startswith(f"the graph rounds {left} for readers other than products")


def test_codes_that_no_product_reads_are_told(tmp_path: Path) -> None:
    path = two_products(
        tmp_path / "m.onnx",
        "k = DequantizeLinear (c, s) h = DequantizeLinear (f, s) g = Gather (h, i) "
        "b = MatMul (x, r) o = Add (b, k) n = Add (o, g)",
        f", int8[{N}] c, int8[5,{N}] f, int64 i",
        c=CODES[0],
        f=CODES[:5],
        i=np.int64(2),
    )
    checkpoint = load_onnx(path).checkpoint
    assert checkpoint is not None
    assert checkpoint.notes == ("no matrix product reads the codes of k: float there",)


def test_generated_inputs_are_said_to_measure_accuracy_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def once(path: Path) -> bool:
        opened.append(path)
        return file_has_scales(path)

    monkeypatch.setattr("qcompile.frontend.qdq.file_has_scales", once)
    path = two_products(tmp_path / "m.onnx", "n = MatMul (x, r)")
    small = qcompile.CompileConfig(samples=4, strict=False)
    artifact = qcompile.compile(path, target="ort-cpu:vnni", config=small, output=tmp_path / "out")
    assert opened == [path]
    told = "accuracy was measured on random inputs, not on real data; give --calibration"
    assert told in artifact.report.warnings
    assert not any("--activations" in warning for warning in artifact.report.warnings)
    with pytest.raises(ConfigError, match="already says how activations are, so activations has"):
        qcompile.compile(
            path, config=qcompile.CompileConfig(activations="dynamic"), output=tmp_path / "o"
        )


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


@pytest.mark.parametrize("least", ["", "l"])
def test_codes_that_stop_at_127_clip_the_activation(tmp_path: Path, least: str) -> None:
    body = (
        "q = QuantizeLinear (x, s, z) "
        f"c = Clip (q, {least}, h) d = DequantizeLinear (c, s, z) "
        "v = DequantizeLinear <axis = 1> (w, t) y = MatMul (d, v)"
    )
    declared = f"int8[{K},{N}] w, float[{N}] t, float s, uint8 z, uint8 l, uint8 h"
    constants = {
        "w": CODES, "t": SCALE, "s": np.float32(0.05), "z": np.uint8(60),
        "l": np.uint8(0), "h": np.uint8(127),
    }  # fmt: skip
    path = write(tmp_path / "m.onnx", body, declared, **constants)
    x = RNG.normal(0, 3, (7, K)).astype(np.float32)
    expected = run_model(ir.load(path), {"x": x})["y"]
    traced = load_onnx(path)
    assert traced.checkpoint is not None
    (activation,) = traced.checkpoint.activations.values()
    assert activation == StoredActivation("static", np.float32(0.05).item(), -68, 127)
    # No pair of seven bits can saturate: the INT8 kernel takes it without VNNI.
    artifact = qcompile.compile(path, target="ort-cpu:avx2", output=tmp_path / "out")
    assert [op.precision for op in artifact.report.ops] == ["int8"]
    (found,) = qcompile.load(artifact.path).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, atol=1e-5)


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
            "c = Clip (q, l, h) d = DequantizeLinear (c, s) y = MatMul (d, v)",
            f"int8[{K},{N}] w, float[{N}] t, float s, uint8 l, uint8 h",
            {"w": CODES, "t": SCALE, "s": np.float32(0.1), "l": np.uint8(5), "h": np.uint8(127)},
            "is no pair with one constant scale",
        ),
        (
            "v = DequantizeLinear <axis = 1> (w, t) q = QuantizeLinear (x, s) "
            "d = DequantizeLinear (q, u) y = MatMul (d, v)",
            f"int8[{K},{N}] w, float[{N}] t, float s, float u",
            {"w": CODES, "t": SCALE, "s": np.float32(0.1), "u": np.float32(0.2)},
            "is no pair with one constant scale",
        ),
        *(
            (
                "v = DequantizeLinear (w, t) y = MatMul (x, v)",
                f"{kind}[{K},{N}] w, float t",
                {"w": CODES.astype(dtype), "t": np.float32(0.1)},
                f"v is dequantised from {kind}, which is not read",
            )
            for kind, dtype in (
                ("uint16", np.uint16),
                ("int16", np.int16),
                ("float8e4m3fn", ml_dtypes.float8_e4m3fn),
            )
        ),
        (
            "c = QuantizeLinear <output_dtype = 5> (w, t) v = DequantizeLinear (c, t) "
            "y = MatMul (x, v)",
            f"float[{K},{N}] w, float t",
            {"w": WEIGHT.astype(np.float32), "t": np.float32(0.1)},
            "v is dequantised from int16, which is not read",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(
    tmp_path: Path, body: str, declared: str, constants: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "m.onnx", body, declared, **constants)
    with pytest.raises(ModelError, match=message):
        qcompile.compile(path, output=tmp_path / "out")
