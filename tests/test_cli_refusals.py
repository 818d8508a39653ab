"""What the command line refuses: one line, an exit status, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from qcompile import pipeline
from qcompile.traced import Batch
from tests.cli_runner import RunCli


@pytest.fixture
def model(tiny_opt: Path, tmp_path: Path) -> Path:
    """A copy of the example, to be damaged."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_opt, copy)
    return copy


# What is wrong with the model.


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "absent.onnx"])
def test_a_model_that_does_not_exist(run_cli: RunCli, name: str) -> None:
    assert "does not exist" in run_cli(name).error


def test_a_factory_that_does_not_exist(run_cli: RunCli, tmp_path: Path) -> None:
    assert "does not exist" in run_cli("absent.py:make").error
    (tmp_path / "file.py").write_text("")
    assert "has no function 'make'" in run_cli(f"{tmp_path / 'file.py'}:make").error


@pytest.mark.parametrize("suffix", ["", ".onnx", ".py:make"])
def test_a_name_longer_than_any_file_has(run_cli: RunCli, suffix: str) -> None:
    # As with a folder that may not be entered, the system does not say that it is absent.
    assert run_cli("x" * 300 + suffix, "-o", "out").error


def test_a_folder_without_a_config(run_cli: RunCli, model: Path) -> None:
    (model / "config.json").unlink()
    assert "has no config.json" in run_cli(model).error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", " is damaged: no valid JSON"),
        (b"{", " is damaged: no valid JSON"),
        (b"\xff\xfe", " is damaged: no valid JSON"),
        (b"[]", " names no model_type"),
        (b"{}", " names no model_type"),
        (b'{"model_type": "x"}', ": model type 'x' is none that Transformers"),
    ],
)
def test_a_corrupt_config(run_cli: RunCli, model: Path, content: bytes, said: str) -> None:
    (model / "config.json").write_bytes(content)
    assert f"{model / 'config.json'}{said}" in run_cli(model).error


@pytest.mark.parametrize("keep", [0, 7, 1000, -1000])
def test_truncated_weights(run_cli: RunCli, model: Path, keep: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    said = f"the weights of {model} are damaged or cut off (copy the files again)"
    assert run_cli(model).error == said


def test_missing_weights(run_cli: RunCli, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert f"{model} holds no weights" in run_cli(model).error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ffn_dim": 1024}, "layers.0.fc1.bias is 512, and config.json makes it 1024"),
        ({"num_hidden_layers": 9}, "has no usable weights for model.decoder.layers.4.fc1.bias"),
        (
            {"num_hidden_layers": 2},
            "has weights of more layers than its config.json says: model.decoder.layers.2.fc1.bias "
            "and 31 more would be left out (put the number of layers right in config.json)",
        ),
        ({"num_attention_heads": 3}, "do not fit its configuration (Transformers says: embed_dim"),
        ({"hidden_size": "x"}, "the configuration of {} cannot be read (Transformers says: "),
    ],
)
def test_a_config_that_contradicts_the_weights(
    run_cli: RunCli, model: Path, change: dict[str, object], said: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    assert said.format(model) in run_cli(model).error


def test_a_corrupt_tokenizer(run_cli: RunCli, model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    assert run_cli(model).error == f"{model / 'tokenizer.json'} is damaged: no valid JSON"
    (model / "tokenizer.json").write_text("{}")
    assert f"the tokenizer of {model} cannot be read" in run_cli(model).error


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(run_cli: RunCli, model: Path, value: float) -> None:
    weights = safetensors.torch.load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.2.fc1.weight"))
    weights[name][3, 5] = value
    safetensors.torch.save_file(weights, model / "model.safetensors", {"format": "pt"})
    error = run_cli(model).error
    assert "layers.2.fc1.weight holds NaN or Inf" in error


def test_a_task_that_the_model_was_not_made_for(run_cli: RunCli, model: Path) -> None:
    error = run_cli(model, "--task", "text-classification").error
    assert "has no usable weights for score.weight" in error
    assert "right task" in error


@pytest.mark.parametrize("task", ["nonsense", "image-classification"])
def test_a_task_that_does_not_exist(run_cli: RunCli, model: Path, task: str) -> None:
    error = run_cli(model, "--task", task).error
    assert f"task {task!r}" in error
    assert "text-generation" in error


def test_custom_code_is_not_run(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    error = run_cli(model).error
    assert "auto_map" in error
    assert "--trust-remote-code" in error
    assert not (tmp_path / "ran").exists()


# What is wrong with the options.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "ort-tpu"], "unknown target 'ort-tpu' (one of "),
        (["--target", ""], "unknown target ''"),
        (["--target", "ort-cpu:z80"], "has no variant 'z80' (one of avx2"),
        (
            ["--scheme", "w3a3"],
            "unknown scheme 'w3a3' (one of fp32, fp16, w8a8, llm-int8, fp8, w8a16, w4a16, w4a8, "
            "mixed, zeroquant, zeroquant4, nf4, fp4, checkpoint; kv8 or kv4 may follow)",
        ),
        (
            ["--scheme", "w8a8kv8", "--no-cache"],
            "scheme w8a8kv8 is for a model with a cache (or w8a8)",
        ),
        (
            ["--scheme", "w8a8kv8", "--target", "ort-cuda:sm90"],
            "the CUDA provider's attention on a cache in codes gives wrong results",
        ),
        (
            ["--scheme", "w8a8:"],
            "scheme 'w8a8:' names no method after its colon (w8a8 alone, or one",
        ),
        (["--scheme", "fp32:"], "scheme 'fp32:' names no method after its colon (fp32 alone)"),
        (["--calibration", ""], "calibration is an empty name (leave it out to have data gener"),
        (["--smooth", "on"], "smooth: 'on'"),
        (["--smooth", "2"], "smooth"),
        (["--samples", "0"], "samples"),
        (["--keep-adapter"], "there is no adapter to keep"),
        (["--scheme", "checkpoint"], "is for a source that is quantised already"),
        (["--seq-len", "1"], "seq_len"),
        (["--opset", "12"], "opset"),
        (["--seed", "-1"], "seed"),
        (["--recipe", "absent.yaml"], "recipe absent.yaml cannot be read"),
    ],
)
def test_a_bad_option(run_cli: RunCli, tiny_opt: Path, words: list[str], said: str) -> None:
    assert said in run_cli(tiny_opt, *words).error


@pytest.mark.parametrize(
    "words",
    [
        ["--activations", "never"],
        ["--ranges", "max"],
        ["--samples", "many"],
        ["--no-such-option"],
        ["--target"],
        ["second-model"],
    ],
)
def test_a_word_that_the_parser_refuses(run_cli: RunCli, tiny_opt: Path, words: list[str]) -> None:
    outcome = run_cli(tiny_opt, *words)
    assert outcome.status == 2
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_an_output_that_exists(run_cli: RunCli, tiny_opt: Path, tmp_path: Path) -> None:
    output = tmp_path / "here" / "tiny-opt-ort-cpu-w8a8"
    output.mkdir()
    assert "tiny-opt-ort-cpu-w8a8 exists (pass --overwrite" in run_cli(tiny_opt).error
    (output / "thesis.txt").write_text("years of work")
    error = run_cli(tiny_opt, "-o", output, "--overwrite").error
    assert "is not a qcompile artifact, and is not replaced" in error


def test_an_output_that_cannot_be_written(run_cli: RunCli, tiny_opt: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write below" in run_cli(tiny_opt, "-o", tmp_path / "file" / "out").error
    assert run_cli(tiny_opt, "-o", tmp_path / ("x" * 300)).error


def test_a_sequence_longer_than_the_positions(
    run_cli: RunCli, tiny_onnx: Path, tiny_opt: Path
) -> None:
    error = run_cli(
        tiny_onnx, "--seq-len", 513, "--calibration", tiny_opt / "calibration.txt"
    ).error
    assert "513 tokens is longer than the 512" in error
    assert "--seq-len 512" in error
    assert "longer than the 512" in run_cli(tiny_onnx, "--seq-len", 4000).error


@pytest.mark.parametrize("text", ["calibration.txt", None])
def test_a_sequence_that_is_too_long_is_refused_before_tracing(
    run_cli: RunCli, tiny_opt: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.setattr(pipeline, "traced", lambda *_: pytest.fail("it is traced"))
    data = ("--calibration", tiny_opt / text) if text else ()
    for words in (("--scheme", "w8a8"), ("--compare", "w8a8,fp32")):
        error = run_cli(tiny_opt, "--seq-len", 100_000, *words, *data).error
        assert error == (
            "a sequence of 100000 tokens is longer than the 512 that tiny-opt takes "
            "(use --seq-len 512 or less)"
        )


def test_a_recipe_that_matches_nothing(
    run_cli: RunCli, tiny_onnx: Path, tiny_opt: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text('"*.fc1": float\n"*.fc7": float\n')
    data = ("--calibration", tiny_opt / "calibration.txt", "--samples", 4, "--seq-len", 32)
    error = run_cli(tiny_onnx, *data, "--recipe", tmp_path / "recipe.yaml").error
    assert "recipe rule '*.fc7' matches no module" in error


def test_a_recipe_without_effect(
    run_cli: RunCli, tiny_onnx: Path, tiny_opt: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text('"*.fc1": {activations: token, ranges: mse}\n')
    data = ("--calibration", tiny_opt / "calibration.txt", "--recipe", tmp_path / "recipe.yaml")
    assert "ranges are static, and token activations have none" in run_cli(tiny_onnx, *data).error
    (tmp_path / "recipe.yaml").write_text('"*.fc1": {ranges: mse}\n')
    error = run_cli(tiny_onnx, "--activations", "token", *data).error
    assert "rule '*.fc1' gives ranges, and the activations that it matches are not static" in error
    (tmp_path / "recipe.yaml").write_text('"*.fc1": float\n')
    error = run_cli(tiny_onnx, "--scheme", "fp32", *data).error
    assert "scheme fp32 quantises nothing, so a recipe has no effect" in error


def test_a_model_without_a_name(run_cli: RunCli) -> None:
    assert run_cli("", "-o", "out").error == "the model is an empty name"


# What is wrong with the calibration data.


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "only white space"),
        ("latin.txt", b"caf\xe9", "is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{', "line 2"),
        ("keys.jsonl", b'{"body": "a"}', "holds no text"),
        ("text.csv", b"a,b", "unknown kind"),
        ("bad.npz", b"PK", "is not a readable .npz"),
        ("x" * 300 + ".txt", None, ""),
    ],
)
def test_a_calibration_file_that_cannot_be_used(
    run_cli: RunCli, tiny_onnx: Path, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    error = run_cli(tiny_onnx, "--calibration", path).error
    assert said in error
    assert name in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--calibration", "latin.txt"), "latin.txt is not UTF-8"),
        (("--calibration", "keys.jsonl"), "holds no text"),
        (("--calibration", "text.csv"), "unknown kind"),
        (("--calibration", "bad.npz"), "is not a readable .npz"),
        (("--calibration", "folder"), "holds no .npz file"),
        (("--shapes", "1x4096"), "shape 1x4096 is longer than the model's 512 positions"),
        (("--target", "onnx-edge", "--scheme", "w4a16:gptq"), "onnx-edge has no scheme w4a16"),
        (("--target", "onnx-edge:vitisai", "--scheme", "w8a8:gptq"), "which profile vitisai has"),
    ],
)
def test_what_needs_no_model_is_said_before_it_is_traced(
    words: tuple[str, ...],
    said: str,
    run_cli: RunCli,
    tiny_opt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "folder").mkdir()
    for name, content in (
        ("latin.txt", b"caf\xe9"),
        ("keys.jsonl", b'{"body": "a"}'),
        ("text.csv", b"a,b"),
        ("bad.npz", b"PK"),
    ):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("qcompile.frontend.load", lambda *_: pytest.fail("was traced"))
    paths = (str(tmp_path / word) if (tmp_path / word).exists() else word for word in words)
    assert said in run_cli(tiny_opt, *paths).error


IDS = np.ones((2, 8), np.int64)
GOOD: Batch = {
    "input_ids": IDS,
    "attention_mask": IDS,
    "position_ids": np.broadcast_to(np.arange(8), (2, 8)),
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": IDS}, "expected attention_mask, input_ids, position_ids; found"),
        ({"input_ids": None}, "does not hold the graph's inputs"),
        ({"input_ids": IDS[0]}, "has shape [8]"),
        ({"attention_mask": IDS[:, :5]}, "has shape [2, 5]"),
        ({"input_ids": IDS.astype(np.float32)}, "is float32, where the graph takes int64"),
        ({name: array[:0] for name, array in GOOD.items()}, "holds no samples"),
    ],
)
def test_arrays_that_do_not_fit_the_graph(
    run_cli: RunCli,
    tiny_onnx: Path,
    tmp_path: Path,
    change: dict[str, np.ndarray | None],
    said: str,
) -> None:
    path = tmp_path / "feeds.npz"
    arrays = {name: array for name, array in (GOOD | change).items() if array is not None}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    error = run_cli(tiny_onnx, "--calibration", path).error
    assert said in error
    assert "feeds.npz" in error
