"""PEFT adapters: added to the weights, or kept beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.errors import ConfigError, ModelError
from qcompile.frontend.adapter import add_adapter
from tests.checkpoints import packers
from tests.checkpoints.shipped import shipped_weights

peft = pytest.importorskip("peft", reason="what makes adapters")

# PEFT still asks for what Transformers calls otherwise now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]


def tiny() -> Any:
    return packers.tiny_llama(num_hidden_layers=1)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA of rank 4 on q and v, its second factor not zero."""
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny(), settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merged_it_is_part_of_the_weights(adapter: Path) -> None:
    wanted = peft.PeftModel.from_pretrained(tiny(), adapter)
    tokens = torch.arange(12).reshape(2, 6)
    merged, _, added = add_adapter(tiny(), None, adapter, "merge")
    torch.testing.assert_close(merged(tokens).logits, wanted(tokens).logits, rtol=0, atol=1e-5)
    assert not added
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert not torch.equal(merged(tokens).logits, tiny()(tokens).logits)


def test_kept_beside_codes(adapter: Path, tmp_path: Path) -> None:
    packed = packers.gptq(tmp_path / "model", tiny())
    with pytest.raises(ModelError, match="cannot be merged into weights that are codes"):
        qcompile.compile(
            packed.path,
            config=qcompile.CompileConfig(adapter=adapter, seq_len=16),
            output=tmp_path / "out",
        )
    config = qcompile.CompileConfig(
        adapter=adapter, adapter_mode="keep", samples=4, seq_len=16, strict=False
    )
    artifact = qcompile.compile(packed.path, config=config, output=tmp_path / "out")
    shipped = shipped_weights(artifact.path)
    for name, weight in packed.weights.items():
        inner = f"{name}.base_layer" if name in NAMES else name
        np.testing.assert_array_equal(shipped[inner], weight)
    floats = {op.name for op in artifact.report.ops if op.precision == "float"}
    factors = {f"{name}.lora_{half}.default" for name in NAMES for half in "AB"}
    assert floats == {*factors, "lm_head"}


def save(settings: Any, path: Path) -> Path:
    peft.get_peft_model(tiny(), settings).save_pretrained(path)
    return path


def test_modules_that_an_adapter_replaces_stay_in_float(tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["o_proj"])
    config = qcompile.CompileConfig(
        adapter=save(settings, tmp_path / "adapter"), adapter_mode="keep", samples=4, seq_len=16,
        strict=False, objective="scheme",
    )  # fmt: skip
    tiny().save_pretrained(tmp_path / "model")
    artifact = qcompile.compile(
        tmp_path / "model", scheme="w8a16", config=config, output=tmp_path / "out"
    )
    floats = {op.name: op.reason for op in artifact.report.ops if op.precision == "float"}
    block = "model.layers.0.self_attn"
    assert floats == dict.fromkeys(
        [
            f"{block}.q_proj.lora_A.default",
            f"{block}.q_proj.lora_B.default",
            f"{block}.o_proj.modules_to_save.default",
        ],
        "adapter",
    )


def test_kinds_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    prompt = peft.PromptTuningConfig(
        num_virtual_tokens=2, task_type="CAUSAL_LM", prompt_tuning_init="RANDOM"
    )
    folder = save(prompt, tmp_path / "prompt")
    for mode in ("merge", "keep"):
        with pytest.raises(ModelError, match="of type PROMPT_TUNING: learned prompts"):
            add_adapter(tiny(), None, folder, mode)
    scaled = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=[])
    folder = save(scaled, tmp_path / "scaled")
    with pytest.raises(ModelError, match="of type IA3, and only LoRA can be kept"):
        add_adapter(tiny(), None, folder, "keep")
    add_adapter(tiny(), None, folder, "merge")
    folder = save(
        peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), tmp_path / "decomposed"
    )
    with pytest.raises(ModelError, match="of type DORA, and only LoRA can be kept"):
        add_adapter(tiny(), None, folder, "keep")


def test_a_merge_that_fails_is_told(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: torch.full_like(value, torch.nan) for name, value in tensors.items()}, path)
    with pytest.raises(ModelError, match="cannot be loaded: NaNs detected"):
        add_adapter(tiny(), None, adapter, "merge")


def test_what_is_no_adapter(adapter: Path, tmp_path: Path, tiny_onnx: Path) -> None:
    with pytest.raises(ModelError, match="is no adapter"):
        add_adapter(tiny(), None, tmp_path, "merge")
    with pytest.raises(ModelError, match=r"^adapter \./absent does not exist"):
        add_adapter(tiny(), None, "./absent", "merge")
    (adapter / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be loaded"):
        add_adapter(tiny(), None, adapter, "merge")
    config = qcompile.CompileConfig(adapter=adapter)
    with pytest.raises(ConfigError, match="an adapter is for a Transformers model"):
        qcompile.compile(tiny_onnx, config=config, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no adapter to keep"):
        qcompile.CompileConfig(adapter_mode="keep")


@pytest.mark.parametrize(
    ("settings", "base"),
    [('{"base_model_name_or_path": "org/base"}', ", org/base,"), ("{}", ""), ("", ""), ("[]", "")],
)
def test_an_adapter_is_no_model(tmp_path: Path, settings: str, base: str) -> None:
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(ModelError) as refused:
        qcompile.compile(tmp_path, output=tmp_path / "out")
    assert str(refused.value) == (
        f"{tmp_path} is an adapter, and no model by itself "
        f"(give its base model{base} and --adapter {tmp_path})"
    )


def test_an_adapter_of_another_model(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"target_modules": ["q_proj", "o_proj"]}
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="cannot be loaded"):
        add_adapter(tiny(), None, adapter, "merge")
