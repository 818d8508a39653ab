"""compressed-tensors folders, packed by that library: every weight is what it dequantises to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.checkpoints import quantization_settings
from qcompile.checkpoints.open import open_folder
from qcompile.errors import ModelError
from tests.checkpoints import packers

pytest.importorskip("compressed_tensors", reason="the library that packs these folders")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

SCALES = {64: 0.05, 192: 0.5}
"""Of static activations, by their channels."""
SMALL = qcompile.CompileConfig(samples=4, seq_len=16)
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def folder(
    path: Path,
    model: Any,
    layout: str,
    *,
    bits: int,
    strategy: str = "channel",
    group: int | None = None,
    symmetric: bool = True,
    inputs: dict[str, Any] | None = None,
    largest: int | None = None,
) -> packers.Packed:
    """Quantised and packed by the library; `largest` bounds the codes."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    weights["group_size"] = group
    body = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    scheme = QuantizationScheme(**body)
    compressor = BaseCompressor.get_value_from_registry(layout)

    def pack(weight: np.ndarray) -> tuple[packers.Tensors, np.ndarray]:
        tensor = torch.from_numpy(weight)
        grouped = tensor.reshape(len(tensor), -1, group or tensor.shape[1])
        if strategy == "tensor":
            grouped = tensor.reshape(1, 1, -1)
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale, zero = calculate_qparams(low, high, scheme.weights)
        scale = scale.half().float()
        if largest is not None:
            scale = scale * (127 / largest)
        if strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        state = {"weight": tensor, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        parts = compressor.compress(state, scheme)
        restored = compressor.decompress(parts, scheme)["weight"].numpy()
        if inputs is not None and not inputs["dynamic"]:
            parts["input_scale"] = torch.tensor([SCALES[tensor.shape[1]]])
        return parts, restored

    settings = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": body},
        "ignore": ["lm_head"],
    }
    return packers.save(model, path, settings, pack)


@pytest.fixture(scope="module")
def model() -> Any:
    return packers.tiny_llama(num_hidden_layers=1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("pack-quantized", {"bits": 4, "strategy": "group", "group": 32}),
        ("pack-quantized", {"bits": 8, "strategy": "group", "group": 64}),
        ("pack-quantized", {"bits": 4}),
        ("int-quantized", {"bits": 8}),
        ("int-quantized", {"bits": 8, "strategy": "group", "group": 32}),
        ("naive-quantized", {"bits": 8, "strategy": "tensor"}),
    ],
)
def test_weights_are_read_exactly(
    model: Any, tmp_path: Path, layout: str, options: dict[str, Any], symmetric: bool
) -> None:
    packed = folder(tmp_path, model, layout, symmetric=symmetric, **options)
    checkpoint, _ = open_folder(tmp_path, quantization_settings(tmp_path))
    assert checkpoint.weights.keys() == packed.weights.keys() and not checkpoint.activations
    for name, read in checkpoint.weights.items():
        np.testing.assert_array_equal(read().dequantized(), packed.weights[name].T)


Compiled = Callable[..., tuple[packers.Packed, qcompile.Artifact]]


@pytest.fixture
def compiled(model: Any, tmp_path: Path) -> Compiled:
    def compile_with(
        target: str, layout: str, **options: Any
    ) -> tuple[packers.Packed, qcompile.Artifact]:
        packed = folder(tmp_path / "model", model, layout, **options)
        out = tmp_path / "out"
        return packed, qcompile.compile(packed.path, target=target, config=SMALL, output=out)

    return compile_with


@pytest.mark.parametrize(
    ("target", "inputs", "mode", "largest"),
    [
        # Codes so small that no pair can saturate.
        ("ort-cpu:avx2", DYNAMIC, "token", 63),
        ("ort-cpu:vnni", STATIC, "static", None),
    ],
)
def test_w8a8_runs_in_int8(
    compiled: Compiled, target: str, inputs: dict[str, Any], mode: str, largest: int | None
) -> None:
    packed, artifact = compiled(target, "int-quantized", bits=8, inputs=inputs, largest=largest)
    for op in artifact.report.ops[:-1]:
        assert (op.precision, op.kernel) == ("int8", "com.microsoft.MatMulIntegerToFloat")
        assert largest is None or op.saturation_safe == "always"
    plan = json.loads((artifact.path / "plan.json").read_text())
    assert set(plan["ops"].values()) == {mode, "float"}
    weights = integer_weights(artifact.path)
    assert weights.keys() == packed.weights.keys()
    for name, weight in packed.weights.items():
        np.testing.assert_array_equal(weights[name], weight)
    if mode == "static":
        record = json.loads((artifact.path / "qcompile.json").read_text())["plan"]["ops"]
        rows = [row for row in record if row["precision"] == "int8"]
        for row in rows:
            assert row["scale"] == np.float32(SCALES[row["shape"][0]]) and row["zero_point"] == 128


def integer_weights(path: Path) -> dict[str, np.ndarray]:
    """Of every MatMulIntegerToFloat: the float32 weight [out, in]."""
    found = {}
    for node in ir.load(path / "model.onnx").graph:
        if node.op_type == "MatMulIntegerToFloat":
            codes, scale = node.inputs[1], node.inputs[3]
            assert codes is not None and codes.const_value is not None
            assert scale is not None and scale.const_value is not None
            weight = codes.const_value.numpy().astype(np.float32) * scale.const_value.numpy()
            found[str(node.name)] = weight.T
    return found


def test_zero_points_that_are_no_codes_are_refused(model: Any, tmp_path: Path) -> None:
    folder(tmp_path, model, "int-quantized", bits=4, symmetric=False)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight_zero_point"][0] = 9
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name}.weight_zero_point holds values of more than 4"):
        qcompile.compile(tmp_path, config=SMALL, output=tmp_path / "out")


def test_a_zero_point_of_activations_that_is_no_code_is_refused(
    model: Any, tmp_path: Path
) -> None:  # fmt: skip
    folder(tmp_path, model, "int-quantized", bits=8, inputs=STATIC)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.input_zero_point"] = torch.tensor([200])
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="input_zero_point is 200, which is no int8"):
        open_folder(tmp_path, quantization_settings(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "float-quantized"}, "the format float-quantized is not read"),
        ({"config_groups": {}}, "there are no config_groups"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse format sparse-24-bitmask"),
        ({"weights": {"num_bits": 2}}, "int2 weights are not read"),
        ({"weights": {"strategy": "block"}}, "weight scales by block are not read"),
        ({"inputs": DYNAMIC | {"type": "float"}}, "float8 activations are not read"),
        ({"inputs": DYNAMIC | {"strategy": "tensor"}}, "dynamic activation scales by tensor"),
    ],
)
def test_what_is_not_read_is_named(
    model: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder(tmp_path, model, "int-quantized", bits=8)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config["quantization_config"]
    group = settings["config_groups"]["group_0"]
    group["weights"] |= change.pop("weights", {})
    group["input_activations"] = change.pop("inputs", None)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": settings | change})
    )
    with pytest.raises(ModelError, match=message):
        qcompile.compile(tmp_path, config=SMALL, output=tmp_path / "out")
