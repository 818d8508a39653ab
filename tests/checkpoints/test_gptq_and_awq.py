"""GPTQ and AWQ folders: every weight is what the format says, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.checkpoints import quantization_settings, quantized_by
from qcompile.checkpoints.open import open_folder
from qcompile.errors import ModelError
from tests.checkpoints import packers
from tests.checkpoints.shipped import shipped_weights

SMALL = qcompile.CompileConfig(samples=4, seq_len=16)


def assert_read_exactly(packed: packers.Packed) -> None:
    checkpoint, _ = open_folder(packed.path, quantization_settings(packed.path))
    assert checkpoint.weights.keys() == packed.weights.keys()
    for name, read in checkpoint.weights.items():
        np.testing.assert_array_equal(read().dequantized(), packed.weights[name].T)


@pytest.fixture(scope="module")
def model() -> Any:
    return packers.tiny_llama()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_in_groups(model: Any, tmp_path: Path, bits: int, group: int, version: int) -> None:
    assert_read_exactly(packers.gptq(tmp_path, model, bits=bits, group=group, version=version))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_with_channels_out_of_order(model: Any, tmp_path: Path, symmetric: bool) -> None:
    packed = packers.gptq(tmp_path, model, act_order=True, symmetric=symmetric)
    assert_read_exactly(packed)
    checkpoint, _ = open_folder(tmp_path, quantization_settings(tmp_path))
    weight = checkpoint.weights["model.layers.0.mlp.down_proj"]()
    assert weight.order is not None and (weight.zero_point is None) == symmetric


@pytest.mark.parametrize("group", [32, 64])
def test_awq(model: Any, tmp_path: Path, group: int) -> None:
    assert_read_exactly(packers.awq(tmp_path, model, group=group))


def test_groups_are_stored_in_blocks_that_divide_them(model: Any, tmp_path: Path) -> None:
    packed = packers.gptq(tmp_path, model, group=96, bits=8)
    checkpoint, _ = open_folder(packed.path, quantization_settings(packed.path))
    # 96 input channels of 192 share a scale; the largest block that divides them has 32.
    weight = checkpoint.weights["model.layers.0.mlp.down_proj"]()
    assert weight.block_size == 32 and weight.scale.shape == (6, 64)
    assert_read_exactly(packed)


def test_what_ships_is_the_checkpoint(model: Any, tmp_path: Path) -> None:
    packed = packers.gptq(tmp_path / "model", model, act_order=True)
    artifact = qcompile.compile(packed.path, config=SMALL, output=tmp_path / "out")
    shipped = shipped_weights(artifact.path)
    assert shipped.keys() == packed.weights.keys()
    for name, weight in packed.weights.items():
        np.testing.assert_array_equal(shipped[name], weight)
    report = artifact.report
    assert report.scheme == "checkpoint" and report.accuracy["kl"] < 0.05
    reasons = {op.name: op.reason for op in report.ops}
    assert reasons.pop("lm_head") == "no codes of the checkpoint are for it"
    assert set(reasons.values()) == {"from the checkpoint: GPTQ, 4 bit, groups of 32, act-order"}


Change = Callable[[packers.Tensors], object]


def damaged(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.0.mlp.up_proj"


def _drop(part: str) -> Change:
    return lambda tensors: tensors.pop(f"{NAME}.{part}")


def _halve(part: str) -> Change:
    def change(tensors: packers.Tensors) -> None:
        stored = tensors[f"{NAME}.{part}"]
        tensors[f"{NAME}.{part}"] = stored[: len(stored) // 2].contiguous()

    return change


def _fill(part: str, value: int) -> Change:
    return lambda tensors: tensors[f"{NAME}.{part}"].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("scales"), f"has no tensor {NAME}.scales"),
        (_drop("g_idx"), "has no g_idx, and with desc_act nothing else says its groups"),
        (_halve("g_idx"), "g_idx has 32 entries for 64 input channels"),
        (_halve("scales"), "g_idx names a group that has no scale"),
        (_halve("qzeros"), "scales of 2×192 and zero points of 1×192 do not fit codes of 64×192"),
        (_fill("g_idx", 0), "the groups of g_idx are of different sizes"),
        (_fill("qzeros", -1), "a zero point overflows its 4 bits"),
    ],
)
def test_damaged_tensors_are_one_line(
    model: Any, tmp_path: Path, change: Change, message: str
) -> None:
    packed = packers.gptq(tmp_path, model, act_order=True)
    damaged(packed.path, change)
    with pytest.raises(ModelError, match=message):
        qcompile.compile(packed.path, config=SMALL, output=tmp_path / "out")


def test_weights_of_another_shape_than_the_model(model: Any, tmp_path: Path) -> None:
    packed = packers.awq(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(
        ModelError, match="codes make a weight of 64×192, and the model's is 64×256"
    ):
        qcompile.compile(packed.path, config=SMALL, output=tmp_path / "out")


def test_a_shard_that_is_cut_off_or_missing(model: Any, tmp_path: Path) -> None:
    packed = packers.gptq(tmp_path / "model", model)
    whole = (packed.path / "model.safetensors").read_bytes()
    (packed.path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"safetensors is damaged or cut off$"):
        qcompile.compile(packed.path, config=SMALL, output=tmp_path / "out")
    (packed.path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors file"):
        qcompile.compile(packed.path, config=SMALL, output=tmp_path / "out")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (packed.path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="safetensors, which its index names"):
        qcompile.compile(packed.path, config=SMALL, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "aqlm"}, "is quantised by aqlm, which is not read"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ codes of 3 bits are not read"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "packing marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout gemv is not read"),
    ],
)
def test_what_is_not_read_is_named(
    model: Any, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    packed = packers.gptq(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ModelError, match=message):
        qcompile.compile(packed.path, config=SMALL, output=tmp_path / "out")


def test_shards_are_one_checkpoint(model: Any, tmp_path: Path) -> None:
    packed = packers.gptq(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-{at % 3}.safetensors" for at, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model.safetensors").unlink()
    assert_read_exactly(packed)


def test_the_scheme_is_the_checkpoints_own(model: Any, tmp_path: Path, tiny_opt: Path) -> None:
    packed = packers.awq(tmp_path / "model", model)
    assert quantized_by(packed.path) == "awq" and quantized_by(tiny_opt) is None
    with pytest.raises(qcompile.ConfigError, match="w8a8 would round it a second time"):
        qcompile.compile(packed.path, scheme="w8a8", output=tmp_path / "out")
    with pytest.raises(qcompile.ConfigError, match="is for a source that is quantised already"):
        qcompile.compile(tiny_opt, scheme="checkpoint", output=tmp_path / "out")
    for options in ({"recipe": {"*": "float"}}, {"objective": "size"}):
        config = qcompile.CompileConfig(**options)
        with pytest.raises(qcompile.ConfigError, match="leaves nothing to choose"):
            qcompile.compile(packed.path, config=config, output=tmp_path / "out")


def test_fp32_is_the_dequantised_model(model: Any, tmp_path: Path) -> None:
    packed = packers.gptq(tmp_path / "model", model, act_order=True)
    report = qcompile.compile(
        packed.path, scheme="fp32", config=SMALL, output=tmp_path / "out"
    ).report
    assert {op.precision for op in report.ops} == {"float"}
    assert any("its codes are dequantised" in line for line in report.warnings)
