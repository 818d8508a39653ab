"""bitsandbytes folders: every weight is what the codes stand for, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.checkpoints import quantization_settings
from qcompile.checkpoints.open import open_folder
from qcompile.errors import ModelError
from qcompile.float4 import Float4
from tests.checkpoints import packers
from tests.checkpoints.shipped import shipped_weights

SMALL = qcompile.CompileConfig(samples=4, seq_len=16)
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model() -> Any:
    return packers.tiny_llama(num_hidden_layers=1)


def read(folder: Path) -> dict[str, Any]:
    checkpoint, _ = open_folder(folder, quantization_settings(folder))
    return {name: own() for name, own in checkpoint.weights.items()}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("block", "sizes"),
    [
        (64, {64: 64, 192: 64}),
        # Blocks that are longer than a row, or run over its end, are stored in parts.
        (128, {64: 64, 192: 64}),
        (4096, {64: 64, 192: 64}),
        (32, {64: 32, 192: 32}),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(
    model: Any, tmp_path: Path, kind: Float4, block: int, sizes: dict[int, int], double: bool
) -> None:
    packed = packers.float4(tmp_path, model, kind=kind, block=block, double=double)
    found = read(tmp_path)
    assert found.keys() == packed.weights.keys()
    for name, weight in found.items():
        np.testing.assert_array_equal(weight.dequantized(), packed.weights[name].T)
        assert weight.block_size == sizes[len(weight.codes)]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_those_of_the_library(
    model: Any, tmp_path: Path, kind: Float4, double: bool, storage: torch.dtype
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the library itself")

    def pack(weight: np.ndarray) -> tuple[packers.Tensors, np.ndarray]:
        codes, state = functional.quantize_4bit(
            torch.from_numpy(weight),
            blocksize=64,
            compress_statistics=double,
            quant_type=kind,
            quant_storage=storage,
        )
        parts = {f"weight.{k}": v.clone() for k, v in state.as_dict(packed=True).items()}
        restored = functional.dequantize_4bit(codes, state).numpy()
        return {"weight": codes.clone(), **parts}, restored

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    packed = packers.save(model, tmp_path, settings, pack)
    for name, weight in read(tmp_path).items():
        np.testing.assert_array_equal(weight.dequantized(), packed.weights[name].T)


def test_what_ships_is_the_checkpoint(model: Any, tmp_path: Path) -> None:
    packed = packers.float4(tmp_path / "model", model, double=True)
    artifact = qcompile.compile(packed.path, config=SMALL, output=tmp_path / "out")
    shipped = shipped_weights(artifact.path)
    assert shipped.keys() == packed.weights.keys()
    for name, weight in packed.weights.items():
        np.testing.assert_array_equal(shipped[name], weight)
    report = artifact.report
    # The kernel leaves the activation in float: what is left is the order of sums.
    assert report.scheme == "checkpoint" and report.accuracy["kl"] < 1e-6
    ops = {op.name: op for op in report.ops}
    assert ops.pop("lm_head").reason == "no codes of the checkpoint are for it"
    assert {op.kernel for op in ops.values()} == {"com.microsoft.MatMulBnb4"}
    said = "from the checkpoint: bitsandbytes, NF4, scales quantised too"
    assert {op.reason for op in ops.values()} == {said}


def test_eight_bits(model: Any, tmp_path: Path) -> None:
    packed = packers.llm_int8(tmp_path, model)
    found = read(tmp_path)
    assert found.keys() == packed.weights.keys()
    for name, weight in found.items():
        np.testing.assert_array_equal(weight.dequantized(), packed.weights[name].T)
        assert weight.bits == 8 and weight.table is None


def _state(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    part = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[part].numpy())) | changes
    tensors[part] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _part(folder: Path, part: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    stored = tensors.pop(f"{NAME}.{part}")
    if change is not None:
        tensors[f"{NAME}.{part}"] = change(stored).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [192, 64, 1]}, "bitsandbytes__nf4 is damaged"),
        ({"shape": None}, "bitsandbytes__nf4 is damaged"),
        ({"blocksize": 0}, "bitsandbytes__nf4 is damaged"),
        ({"quant_type": "fp4"}, "bitsandbytes__nf4 is damaged"),
        ({"shape": [191, 64]}, "12288 codes and 192 scales do not make a weight of 191×64"),
        ({"blocksize": 32}, "12288 codes and 192 scales do not make a weight of 192×64"),
        ({"nested_blocksize": 1}, "absmax: its codes and their scales do not go together"),
        ({"nested_blocksize": 0}, "bitsandbytes__nf4 is damaged"),
        (
            {"shape": [1536, 8]},
            "blocks of 64 run over the ends of rows of 8 input channels, and parts of them with "
            "one scale each are of 8, which no kernel takes",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_one_line(
    model: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    packers.float4(tmp_path, model, double=True)
    _state(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        qcompile.compile(tmp_path, config=SMALL, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight.quant_map", lambda t: t.flip(0), "quant_map is not the table of nf4"),
        ("weight.absmax", lambda t: t.int(), "absmax is int32, and uint8 was expected"),
        ("weight.nested_absmax", None, "has no tensor .*nested_absmax"),
        ("weight.quant_state.bitsandbytes__nf4", None, "no quant_state, which says its shape"),
        ("weight.quant_state.bitsandbytes__nf4", lambda t: t[1:], "bitsandbytes__nf4 is damaged"),
        ("weight", lambda t: t[1:], "12286 codes and 192 scales do not make"),
    ],
)
def test_damaged_tensors_are_one_line(
    model: Any, tmp_path: Path, part: str, change: Any, message: str
) -> None:
    packers.float4(tmp_path, model, double=True)
    _part(tmp_path, part, change)
    with pytest.raises(ModelError, match=message):
        qcompile.compile(tmp_path, config=SMALL, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("SCB", lambda t: t[1:], "191 scales for a weight of 192×64"),
        ("weight_format", lambda t: t + 2, "is in the order of an old GPU kernel"),
    ],
)
def test_eight_bits_that_do_not_fit(
    model: Any, tmp_path: Path, part: str, change: Any, message: str
) -> None:
    packers.llm_int8(tmp_path, model)
    _part(tmp_path, part, change)
    with pytest.raises(ModelError, match=message):
        qcompile.compile(tmp_path, config=SMALL, output=tmp_path / "out")


def test_a_folder_that_says_no_bits(model: Any, tmp_path: Path) -> None:
    packers.save(model, tmp_path, {"quant_method": "bitsandbytes"}, lambda w: ({}, w))
    with pytest.raises(ModelError, match="neither load_in_4bit nor load_in_8bit"):
        qcompile.compile(tmp_path, config=SMALL, output=tmp_path / "out")
