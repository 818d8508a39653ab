"""Models named by hub id. There is no network here: what was downloaded once lies in a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file

import qcompile
from qcompile.checkpoints import quantized_by
from qcompile.config import CompileConfig
from qcompile.errors import ModelError
from qcompile.frontend.adapter import add_adapter
from qcompile.frontend.huggingface import load_huggingface
from qcompile.hub import is_hub_id, model_folder
from tests.checkpoints import packers
from tests.checkpoints.shipped import shipped_weights
from tests.cli_runner import RunCli

SMALL = CompileConfig(samples=4, seq_len=16, objective="scheme")
Publish = Callable[[str, Path], None]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Puts a folder into a cache as a download of this id leaves it: links to files by hash."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(name: str, folder: Path) -> None:
        kept = cache / f"models--{name.replace('/', '--')}"
        for part in ("blobs", "refs", "snapshots/c0ffee"):
            (kept / part).mkdir(parents=True)
        (kept / "refs" / "main").write_text("c0ffee")
        for at, file in enumerate(path for path in folder.iterdir() if path.is_file()):
            (kept / "blobs" / str(at)).write_bytes(file.read_bytes())
            (kept / "snapshots" / "c0ffee" / file.name).symlink_to(kept / "blobs" / str(at))

    return put


def test_what_is_an_id(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_id("org/model") and is_hub_id("model")
    paths = ("./org/model", "./model", "../model", "~/model", "/org", "a/b/c", "x" * 300, "")
    assert not any(map(is_hub_id, (*paths, "a/b.onnx", "b.onnx", "a/b.gguf", "file.py", "a/b.py")))
    assert not is_hub_id("folder/file.py:make") and not is_hub_id((torch.nn.ReLU(), ()))
    monkeypatch.chdir(tiny_opt.parent.parent)
    local = f"{tiny_opt.parent.name}/{tiny_opt.name}"
    assert not is_hub_id(local) and model_folder(local, weights=True) == Path(local)
    assert not is_hub_id(tiny_opt.parent.name)
    # Mistyped, not published by somebody who is called like the folder.
    assert not is_hub_id(f"{tiny_opt.parent.name}/tinny-opt")


def test_compiled_from_the_hub(publish: Publish, tiny_opt: Path, tmp_path: Path) -> None:
    publish("org/small", tiny_opt)
    artifact = qcompile.compile("org/small", config=SMALL, output=tmp_path / "out")
    assert artifact.report.model == "small"
    for name in ("tokenizer.json", "config.json"):
        copied = tmp_path / "out" / name
        assert not copied.is_symlink() and copied.read_bytes() == (tiny_opt / name).read_bytes()


def test_quantised_already(publish: Publish, tmp_path: Path) -> None:
    packed = packers.gptq(tmp_path / "packed", packers.tiny_llama(num_hidden_layers=1))
    publish("org/small-gptq", packed.path)
    assert quantized_by("org/small-gptq") == "gptq"
    artifact = qcompile.compile("org/small-gptq", config=SMALL, output=tmp_path / "out")
    assert artifact.report.scheme == "checkpoint"
    assert {op.method for op in artifact.report.ops} == {None}  # not by any of ours
    shipped = shipped_weights(artifact.path)
    assert shipped.keys() == packed.weights.keys()


def test_weights_of_the_older_format(publish: Publish, tiny_opt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny_opt / file).read_bytes())
    torch.save(load_file(tiny_opt / "model.safetensors"), folder / "pytorch_model.bin")
    publish("org/older", folder)
    (tmp_path / "work").mkdir()
    assert load_huggingface("org/older", SMALL, tmp_path / "work").name == "older"


def test_code_of_its_own_is_not_run(publish: Publish, tiny_opt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "coded"
    folder.mkdir()
    settings = json.loads((tiny_opt / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    publish("org/coded", folder)
    with pytest.raises(ModelError, match="wants to run Python code of its own"):
        qcompile.compile("org/coded", config=SMALL, output=tmp_path / "out")


def test_an_id_that_cannot_be_had(publish: Publish, run_cli: RunCli, tmp_path: Path) -> None:
    error = run_cli("org/absent", "-o", str(tmp_path / "out")).error
    assert "there is no folder org/absent, and the hub gives no such model" in error
    assert not (tmp_path / "out").exists()
    error = run_cli("absent", "-o", str(tmp_path / "out")).error
    assert "there is no folder absent, and the hub gives no such model" in error


def test_all_that_the_hub_says_is_told(
    publish: Publish, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(f"{'x' * 300} in the end: accept the terms")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert "in the end: accept the terms (give" in run_cli("org/gated").error


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    Path("models").mkdir()
    assert run_cli("models/absent").error == (
        "model models/absent does not exist "
        "(models is a folder here, so it was not looked for on the hub)"
    )


def test_adapters_are_called_by_their_ids(publish: Publish, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="what reads adapters")
    model = packers.tiny_llama(num_hidden_layers=1)
    with pytest.raises(ModelError, match="no folder org/absent, and the hub gives no such adapter"):
        add_adapter(model, None, "org/absent", "merge")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "README.txt").write_text("")
    publish("org/none", tmp_path / "none")
    with pytest.raises(ModelError, match=r"^org/none is no adapter"):
        add_adapter(model, None, "org/none", "merge")
    (tmp_path / "none" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    publish("org/bare", tmp_path / "none")
    with pytest.raises(ModelError, match=r"^adapter org/bare cannot be loaded"):
        add_adapter(model, None, "org/bare", "merge")
