"""Artifacts that generate: what the command line, onnxruntime-genai and the report make of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from qcompile.passes.integer_matmul import KERNEL
from qcompile.targets.ort_cpu import OrtCpu

import qcompile
from qcompile import benching
from qcompile.artifact import read_sample
from qcompile.errors import ConfigError, ModelError
from qcompile.genai import end_tokens
from qcompile.generation import Decoder, generate
from qcompile.metrics import Accuracy
from qcompile.names import apart
from qcompile.running import Stream, check_cache, prompt_tokens
from qcompile.session import HERE, run_outputs
from qcompile.stepping import check_steps
from tests.cli_runner import RunCli

PROMPT = "import "
Cached = Callable[[str], qcompile.Artifact]


@pytest.fixture(scope="module")
def tokenizer(tiny_opt: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_opt)


@pytest.fixture(scope="module")
def expected(tiny_opt: Path, tokenizer: Any) -> list[int]:
    """What Transformers generates after the prompt."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tiny_opt, dtype=torch.float32)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    return whole[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def test_run_streams_what_transformers_generates(
    compile_cached: Cached, run_cli: RunCli, tokenizer: Any, expected: list[int]
) -> None:
    outcome = run_cli("run", compile_cached("fp32").path, PROMPT, "--max-new-tokens", 64)
    assert outcome.status == 0
    assert outcome.stdout == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert "tokens of prompt" in outcome.stderr and "64 generated" in outcome.stderr


def test_run_says_that_positions_ran_out(compile_cached: Cached, run_cli: RunCli) -> None:
    outcome = run_cli("run", compile_cached("fp32").path, PROMPT, "--max-new-tokens", 10**6)
    assert outcome.status == 0 and "no more positions" in outcome.stderr


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ([], "there is no prompt"),
        ([[1], []], "a prompt has no tokens"),
        ([[1, -1]], "holds -1"),
        ([[10**6]], "holds 1000000"),
        ([[1.5]], "holds 1.5"),
        ([[None]], "holds None"),
        ("def", "holds 'd', which is no token of the model .*tokenizer makes them of text"),
        (["def"], "holds 'd'"),
        ([1, 2], "a list with a list of token ids for each"),
        (np.ones(3, np.int64), "a list with a list of token ids for each"),
        (np.ones((0, 3), np.int64), "there is no prompt"),
    ],
)
def test_prompts_that_are_none(compile_cached: Cached, prompts: Any, told: str) -> None:
    session = qcompile.load(compile_cached("fp32").path)
    with pytest.raises(ConfigError, match=told):
        generate(session, prompts, 4)


def test_prompts_in_an_array(compile_cached: Cached) -> None:
    session = qcompile.load(compile_cached("fp32").path)
    prompts: Any = np.array([[17, 200, 5], [90, 14, 3]])
    found, wanted = (list(generate(session, p, 4)) for p in (prompts, prompts.tolist()))
    np.testing.assert_array_equal(found, wanted)


def test_no_sequence_is_no_crash(compile_cached: Cached) -> None:
    with pytest.raises(ConfigError, match="a batch of 0 sequences"):
        Decoder(qcompile.load(compile_cached("fp32").path), 0, 4)


def test_as_many_tokens_as_there_are_positions(compile_cached: Cached) -> None:
    session = qcompile.load(compile_cached("fp32").path)
    prompts = [[17] * 508, [17] * 3]
    # The last of them is not read again.
    assert len(list(generate(session, prompts, 5))) == 5
    with pytest.raises(ConfigError, match=r"508 tokens and 6 new ones .* 512 positions"):
        generate(session, prompts, 6)


def test_speeds_of_other_kernels_are_none(
    compile_cached: Cached, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compile_cached("fp32").path
    elsewhere = dataclasses.replace(HERE, stand_in="there is no such GPU here")
    monkeypatch.setattr(OrtCpu, "runtime", lambda *_, **__: elsewhere)
    assert "cannot be timed: there is no such GPU here" in run_cli("bench", folder).error
    outcome = run_cli("run", folder, PROMPT, "--max-new-tokens", 2)
    assert outcome.status == 0 and "there is no such GPU here" in outcome.stderr


def test_a_temperature_draws_by_the_seed(compile_cached: Cached, run_cli: RunCli) -> None:
    words = ("run", compile_cached("w8a8").path, PROMPT, "--temperature", 2.0, "--seed")
    texts = [run_cli(*words, seed).stdout for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_run_says_what_is_wrong(
    compile_cached: Cached, compiled_tiny: qcompile.Artifact, run_cli: RunCli, tmp_path: Path
) -> None:
    cached = compile_cached("fp32").path
    assert "compile the model with --cache" in run_cli("run", compiled_tiny.path, PROMPT).error
    assert "is not a qcompile artifact" in run_cli("run", tmp_path, PROMPT).error
    assert run_cli("run", cached, " ").error == "the prompt is empty"
    assert run_cli("run", cached, "\udcff").error == "the prompt is not valid UTF-8"
    assert "no number" in run_cli("run", cached, PROMPT, "--temperature", "nan").error
    assert run_cli("run", cached, PROMPT, "--seed", -1).status == 2
    assert "and the model 512 positions" in run_cli("run", cached, "import os\n" * 200).error
    bare = tmp_path / "bare"
    shutil.copytree(cached, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "has no tokenizer" in run_cli("run", bare, PROMPT).error


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (
            {"kind": "text-generation", "target": "ort-cpu:avx2"},
            "x has no cache to generate with (compile the model with --cache)",
        ),
        (
            {"kind": "text-generation", "target": "onnx-edge:qnn"},
            "x has no cache to generate with, and target onnx-edge:qnn has none "
            "(compile the model with --cache for ort-cpu or ort-cuda)",
        ),
        (
            {"kind": "feature-extraction", "target": "ort-cpu"},
            "x cannot generate: it is no causal language model",
        ),
    ],
)
def test_what_can_be_done_about_a_missing_cache(
    compiled_tiny: qcompile.Artifact, record: dict[str, str], told: str
) -> None:
    with pytest.raises(ModelError) as refused:
        check_cache(Path("x"), record, compiled_tiny.session())
    assert str(refused.value) == told


def test_a_prompt_goes_into_the_chat_template(tiny_opt: Path) -> None:
    load: Any = transformers.AutoTokenizer.from_pretrained
    tokenizer = load(tiny_opt)
    plain = tokenizer("def")["input_ids"]
    assert prompt_tokens(tokenizer, "def") == plain
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    # A template writes the special tokens itself.
    asked = tokenizer("user: def", add_special_tokens=False)["input_ids"]
    assert prompt_tokens(tokenizer, "def") == asked != plain


def test_text_is_streamed_by_whole_characters() -> None:
    class Bytes:
        def decode(self, tokens: list[int], **_: object) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    pieces: list[str] = []
    stream = Stream(Bytes(), pieces.append)
    for byte in "é\n€ a".encode():
        stream.put(byte)
    assert [piece for piece in pieces if piece] == ["é", "\n", "€", " ", "a"]
    stream.put("é".encode()[0])
    stream.finish()
    assert "".join(pieces) == "é\n€ a\ufffd"


def test_bench_compares(
    compile_cached: Cached, compiled_tiny: qcompile.Artifact, run_cli: RunCli
) -> None:
    folders = [compile_cached(scheme).path for scheme in ("fp32", "w8a8")]
    few = ("--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 1)
    table = run_cli("bench", *folders, *few).stdout
    assert table.count("1.00×") >= 2
    rows = json.loads(run_cli("bench", *folders, *few, "--batch", 2, "--json").stdout)
    assert [row["folder"] for row in rows] == [str(folder) for folder in folders]
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in rows)
    assert "compile the model with --cache" in run_cli("bench", compiled_tiny.path, *few).error
    assert (
        "512 positions, fewer than 600" in run_cli("bench", folders[0], "--new-tokens", 472).error
    )


def test_bench_takes_no_more_memory_than_there_is(
    compile_cached: Cached, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 layers of keys and values of 128 floats; 258 logits."""
    folders = (compile_cached("fp32").path, compile_cached("w8a8").path)
    words = ("--batch", 3, "--prompt-tokens", 10, "--new-tokens", 6, "--rounds", 1)
    needed = 2 * 3 * (16 * 4 * 2 * 128 * 4 + 10 * 258 * 4)
    with monkeypatch.context() as patch:
        patch.setattr(benching, "available_bytes", lambda: needed - 1)
        error = run_cli("bench", *folders, *words).error
        assert error.startswith("caches and logits of 3 sequences take 0.5 MB, and 0.5 MB are free")
        patch.setattr(benching, "available_bytes", lambda: needed)
        assert run_cli("bench", *folders, *words).status == 0
    assert "sequences take " in run_cli("bench", folders[0], "--batch", 10_000_000).error


def test_onnxruntime_genai_generates_the_same(
    compile_cached: Cached, tokenizer: Any, expected: list[int]
) -> None:
    """It pads on the right, and stops before the token that ends a text."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = genai.Model(str(compile_cached("fp32").path))
    prompts = [tokenizer(text)["input_ids"] for text in (PROMPT, "def f(x):\n    return")]
    longest, end = max(map(len, prompts)), tokenizer.eos_token_id
    ids = np.array([prompt + [0] * (longest - len(prompt)) for prompt in prompts], np.int32)
    for batch in (ids[:1, : len(prompts[0])], ids):
        options = genai.GeneratorParams(model)
        length = batch.shape[1] + len(expected)
        options.set_search_options(max_length=length, batch_size=len(batch))
        generator = genai.Generator(model, options)
        generator.append_tokens(batch)
        while not generator.is_done():
            generator.generate_next_token()
        found = generator.get_sequence(0).tolist()[batch.shape[1] :]
        ended = expected.index(end) if end in expected else len(expected)
        assert found[:ended] == expected[:ended]


def test_unequal_prompts_give_the_same_text_together(
    compile_cached: Cached, tokenizer: Any, expected: list[int]
) -> None:
    session = compile_cached("fp32").session()
    prompts = [tokenizer(text)["input_ids"] for text in ("def f(x):\n    return", PROMPT, "c")]
    together = np.stack(list(generate(session, prompts, 64)), axis=1)
    assert together[1].tolist() == expected
    for prompt, row in zip(prompts, together, strict=True):
        alone = np.stack(list(generate(session, [prompt], 64)), axis=1)
        assert alone[0].tolist() == row.tolist()


def test_int8_with_a_cache_is_as_close_to_float_as_without(
    compile_cached: Cached, compiled_tiny: qcompile.Artifact, tiny_opt: Path, tokenizer: Any
) -> None:
    """Teacher-forced: one token at a time as in one go, to a rounding; without a cache biases are
    rounded elsewhere, so that some codes are others, as likely better as worse."""
    text = (tiny_opt / "evaluation.txt").read_text(encoding="utf-8")
    ids = np.array([tokenizer(text)["input_ids"][:128]])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["position_ids"] = np.arange(ids.shape[1])[None]
    reference = run_outputs(compile_cached("fp32").session(), feed)["logits"]
    without = run_outputs(compiled_tiny.session(), feed)["logits"]
    decoder = Decoder(compile_cached("w8a8").session(), 1, ids.shape[1])
    whole = decoder.step(ids)
    decoder = Decoder(compile_cached("w8a8").session(), 1, ids.shape[1])
    stepped = np.concatenate([decoder.step(ids[:, at : at + 1]) for at in range(128)], axis=1)
    divergences = []
    for logits in (without, whole, stepped):
        accuracy = Accuracy("text-generation")
        accuracy.add(feed, reference, logits)
        divergences.append(accuracy.result()["kl"])
    assert divergences[2] == pytest.approx(divergences[1], rel=1e-6)
    assert divergences[2] == pytest.approx(divergences[0], rel=0.05)


def test_a_cache_that_changes_the_logits_is_found(
    compile_cached: Cached, float_tiny: qcompile.Artifact, tmp_path: Path
) -> None:
    traced, sound = (a.path / "model.onnx" for a in (float_tiny, compile_cached("fp32")))
    feed = read_sample(float_tiny.path)[0]

    def check(path: Path) -> list[str]:
        return check_steps(traced, path, path, OrtCpu(), "text-generation", feed)[1]

    assert check(sound) == []
    model = ir.load(sound)
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes.add(ir.AttrInt64("local_window_size", 8))
    ir.save(model, tmp_path / "broken.onnx", external_data="broken.data")
    (problem,) = check(tmp_path / "broken.onnx")
    assert "with the cache, the float model's logits differ" in problem


def test_the_report_and_the_record_tell_of_the_cache(compile_cached: Cached) -> None:
    artifact = compile_cached("w8a8")
    assert [speed.shape for speed in artifact.report.speed] == ["1×128", "1×1 after 128"]
    assert artifact.report.decoded["kl"] == pytest.approx(artifact.report.accuracy["kl"], rel=1.0)
    settings = json.loads((artifact.path / "genai_config.json").read_text(encoding="utf-8"))
    decoder = settings["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["head_size"]) == (4, 32)
    assert (settings["model"]["context_length"], settings["model"]["eos_token_id"]) == (512, 1)
    record = json.loads((artifact.path / "qcompile.json").read_text(encoding="utf-8"))
    assert record["max_length"] == 512 and "genai_config.json" in record["sha256"]


def test_a_scale_for_all_that_is_computed_together_is_warned_of(
    tiny_onnx: Path, tiny_opt: Path, small: qcompile.CompileConfig, tmp_path: Path
) -> None:
    def warned(mode: str) -> bool:
        made = qcompile.compile(
            tiny_onnx,
            target="ort-cpu:avx2",
            calibration=tiny_opt / "calibration.txt",
            config=small.model_copy(update={"cache": True, "activations": mode}),
            output=tmp_path / mode,
        )
        return any("depends on the others of its batch" in text for text in made.report.warnings)

    assert warned("dynamic") and not warned("token")


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_a_temperature_is_a_number_from_0_on(compile_cached: Cached, temperature: float) -> None:
    session = compile_cached("w8a8").session()
    with pytest.raises(ConfigError, match="is no number from 0 on"):
        generate(session, [[1, 2]], 3, temperature=temperature)


def test_columns_are_scaled_behind_the_kernel(
    compile_cached: Cached, compiled_tiny: qcompile.Artifact
) -> None:
    """The logits' too. Without a cache the kernel does it: of many rows that is faster."""
    inner, behind = (
        [node for node in ir.load(artifact.path / "model.onnx").graph if node.op_type == KERNEL]
        for artifact in (compiled_tiny, compile_cached("w8a8"))
    )
    sizes = [{node.inputs[3].shape.numpy() for node in nodes} for nodes in (inner, behind)]  # type: ignore[union-attr]
    assert () not in sizes[0] and sizes[1] == {()}


def test_check_knows_a_cached_artifact(compile_cached: Cached, run_cli: RunCli) -> None:
    assert run_cli("check", compile_cached("w8a8").path).status == 0


def test_weights_alone_of_one_activation_are_one_product(
    compile_cached: Cached, run_cli: RunCli
) -> None:
    artifact = compile_cached("w4a16")
    graph = ir.load(artifact.path / "model.onnx").graph
    planned = [op for op in artifact.report.ops if op.precision == "weight4"]
    assert all(op.kernel == "com.microsoft.MatMulNBits" for op in planned)
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    assert len(planned) - len(products) == 2 * 4  # queries, keys and values of each layer
    assert run_cli("check", artifact.path).status == 0


@pytest.mark.parametrize("scheme", ["fp32", "w8a8", "w4a16"])
def test_queries_keys_and_values_are_one_product(compile_cached: Cached, scheme: str) -> None:
    artifact = compile_cached(scheme)
    graph = ir.load(artifact.path / "model.onnx").graph
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    products = [node.inputs[0].producer() for node in attentions]  # type: ignore[union-attr]
    assert all(node.inputs[1] is None and node.inputs[2] is None for node in attentions)
    # Between the product and attention its columns are scaled.
    products = [node.inputs[0].producer() if node.op_type == "Mul" else node for node in products]  # type: ignore[union-attr]
    names = {name for node in products if node is not None for name in apart(str(node.name))}
    assert len(attentions) == 4 and artifact.report.apart == []
    assert (
        scheme == "fp32" or {op.name for op in artifact.report.ops if "v_proj" in op.name} < names
    )


def test_logits_of_the_last_token_alone(
    compile_cached: Cached, tiny_opt: Path, tiny_onnx: Path, tokenizer: Any, tmp_path: Path,
    small: qcompile.CompileConfig, run_cli: RunCli,
) -> None:  # fmt: skip
    """The same text from fewer logits; what they cost in accuracy was measured with all of them."""
    whole = compile_cached("w8a8")
    asked = {"cache": True, "last_logits": True, "plan_in": whole.path / "plan.json"}
    artifact = qcompile.compile(
        tiny_onnx, target="ort-cpu:avx2", calibration=tiny_opt / "calibration.txt",
        config=small.model_copy(update=asked), output=tmp_path / "last",
    )  # fmt: skip
    sessions = (whole.session(), artifact.session())
    ids = np.array([[5, 6, 7], [8, 9, 0]])
    mask = np.array([[1, 1, 1], [1, 1, 0]])  # padded on the right
    every, last = (Decoder(session, 2, 8).step(ids, mask) for session in sessions)
    np.testing.assert_allclose(last[:, 0], every[[0, 1], [2, 1]], rtol=0, atol=1e-4)
    prompts = [tokenizer(text)["input_ids"] for text in ("def f(x):\n    return", PROMPT)]
    texts = [np.stack(list(generate(session, prompts, 32))).tolist() for session in sessions]
    assert texts[0] == texts[1]
    assert artifact.report.accuracy == pytest.approx(whole.report.accuracy)
    assert run_cli("check", artifact.path).status == 0
    with pytest.raises(ConfigError, match="last_logits are for generating"):
        qcompile.compile(
            tiny_onnx, scheme="fp32", output=tmp_path / "no",
            config=small.model_copy(update={"last_logits": True}),
        )  # fmt: skip


def test_a_cache_is_refused_where_it_means_nothing(
    tiny_onnx: Path, tmp_path: Path, small: qcompile.CompileConfig
) -> None:
    config = small.model_copy(update={"cache": True})
    with pytest.raises(ConfigError, match="a cache is for a causal language model"):
        qcompile.compile(
            tiny_onnx, scheme="fp32", output=tmp_path / "no",
            config=config.model_copy(update={"task": "feature-extraction"}),
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"fp32: target ort-cuda has .* a cache in float16"):
        qcompile.compile(
            tiny_onnx, target="ort-cuda:sm90", scheme="fp32", output=tmp_path / "no", config=config
        )
    with pytest.raises(ConfigError, match=r"w8a8kv8: the CUDA provider's attention .* wrong"):
        qcompile.compile(
            tiny_onnx, target="ort-cuda:sm90", scheme="w8a8kv8", output=tmp_path / "no"
        )


def test_no_more_tokens_than_there_is_room_for(compile_cached: Cached) -> None:
    decoder = Decoder(qcompile.load(compile_cached("fp32").path), 1, 4)
    decoder.step(np.array([[1, 2, 3]]))
    with pytest.raises(qcompile.ConfigError, match="made for 4 tokens"):
        decoder.step(np.array([[1, 2]]))


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(qcompile.ModelError, match=r"generation_config\.json cannot be read"):
        end_tokens(tmp_path)
