"""The CUDA library without a GPU: kernels compile, it links, its operators register."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from qcompile.targets.cuda import build as building
from qcompile.targets.cuda.schema import DOMAIN, OPERATORS
from qcompile.targets.cuda.tiles import ANY_ROWS, CHOICES
from qcompile.targets.cuda.variants import ARCHITECTURES, all_variants

from qcompile.errors import ConfigError
from tests.targets.cuda_graphs import CODES, E4M3, Arrays, library, node_model

ELF_MACHINE_CUDA = 190
SHARED_PER_BLOCK = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def test_variants_are_distinct_and_complete() -> None:
    variants = list(all_variants())
    assert len({variant.name for variant in variants}) == len(variants)
    for architecture in ARCHITECTURES:
        families = {v.family for v in variants if v.architecture == architecture}
        assert {"activation_rows", "norm_rows", "gemm"} <= families
        # Whatever the number of rows, some tile takes it, and one that writes float32.
        assert set(CHOICES[architecture]) == set(CODES if architecture >= 89 else CODES[:1])
        for choices in CHOICES[architecture].values():
            plain = [c for c in choices if not c.tile.consumers]
            for rows in (1, 16, 17, 32, 33, 64, 65, 128, 129, 4096, ANY_ROWS):
                assert any(c.fewest_rows <= rows <= c.most_rows for c in plain), rows


def test_every_cubin_is_code_for_its_architecture() -> None:
    pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")
    from qcompile.targets.cuda.aot import compile_all

    seen = set()
    for binary in compile_all(all_variants(), building.cache_folder() / "kernels"):
        variant = binary.variant
        assert binary.cubin[:4] == b"\x7fELF"
        assert int.from_bytes(binary.cubin[18:20], "little") == ELF_MACHINE_CUDA
        # The architecture is one byte of the header's flags: which one, the format's version says.
        assert variant.architecture in binary.cubin[48:52]
        assert 0 < binary.shared + 1 <= SHARED_PER_BLOCK[variant.architecture], variant.name
        assert binary.threads <= 1024
        assert len(binary.boxes) == (3 if variant.family == "gemm_hopper" else 0)
        seen.add(variant.architecture)
    assert seen == set(ARCHITECTURES)


def test_library_loads_without_a_driver() -> None:
    assert hasattr(ctypes.CDLL(str(library())), "RegisterCustomOps")


@pytest.mark.parametrize(("name", "element"), [("MatMulInt8", np.int8), ("MatMulFp8", E4M3)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_operators_register(name: str, element: np.dtype, dtype: str) -> None:
    """A graph resolves: what then fails is that the CPU provider has no kernel."""
    arrays: Arrays = {
        "x": np.zeros((2, 32), element),
        "x_scale": np.ones((2, 1), np.float32),
        "weight": np.zeros((16, 32), element),
        "weight_scale": np.ones(16, np.float32),
    }
    model = node_model(name, arrays, dtype=dtype)
    with pytest.raises(Exception, match=name) as caught:
        open_session(model)
    assert "is not a registered function/op" not in str(caught.value)


def test_every_operator_is_known() -> None:
    for operator in OPERATORS:
        inputs = ", ".join("x" for _ in operator.inputs)
        outputs = ", ".join(f"y{i}" for i in range(len(operator.outputs)))
        model = ir.from_onnx_text(
            f"""<ir_version: 10, opset_import: ["" : 23, "{DOMAIN}" : 1]>
            one (double[4, 32] x) => (double y0) {{
            {outputs} = {DOMAIN}.{operator.name}({inputs})
            }}"""
        )
        # Doubles are nothing that they take, and only a known operator can say so.
        with pytest.raises(Exception, match=r"tensor\(double\)"):
            open_session(model)


def test_result_type_is_the_attribute() -> None:
    arrays: Arrays = {
        "x": np.zeros((2, 32), np.int8),
        "x_scale": np.ones((2, 1), np.float32),
        "weight": np.zeros((16, 32), np.int8),
        "weight_scale": np.ones(16, np.float32),
    }
    model = node_model("MatMulInt8", arrays, dtype="float16")
    model.graph.outputs[0].dtype = ir.DataType.FLOAT
    with pytest.raises(Exception, match=r"\(float\).*expected type \(tensor\(float16\)\)"):
        open_session(model)


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(building.HEADERS_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match="libonnxruntime-dev"):
        building.find_headers()


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler"):
        building.find_compiler()


def open_session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library()))
    options.log_severity_level = 4
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
