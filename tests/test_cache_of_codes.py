"""Artifacts that keep keys and values in codes, end to end on the CPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import qcompile.targets.ort_cpu_cache
import transformers
from qcompile.targets.ort_cpu_cache import cached_codes_obstacle

import qcompile
from qcompile.cache import PAST, after, is_past
from qcompile.cache_planning import REACH, plan_cache
from qcompile.errors import CalibrationError, ConfigError, ModelError
from qcompile.generation import Decoder, generate
from qcompile.limits import check_cache_bits
from qcompile.metrics import Accuracy
from qcompile.session import run_outputs
from tests.cli_runner import RunCli
from tests.passes.rewriting import HEADER
from tests.passes.test_kv_cache import BOTH, CONSTANTS, model_of, tokens
from tests.support import from_text

TEXTS = ("import ", "def f(x):\n    return", "c")
TYPES = {8: "tensor(int8)", 4: "tensor(uint8)"}
HEADS, SIZE, LAYERS = 4, 32, 4
Cached = Callable[[str], qcompile.Artifact]


@pytest.fixture(scope="module")
def compiled(
    tiny_opt: Path,
    tiny_onnx: Path,
    small: qcompile.CompileConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int], qcompile.Artifact]:
    """w8a8 with a cache of so many bits; nobody asks for the cache itself."""

    @functools.cache
    def compile_(bits: int) -> qcompile.Artifact:
        return qcompile.compile(
            tiny_onnx,
            target="ort-cpu:avx2",
            scheme=f"w8a8kv{bits}",
            calibration=tiny_opt / "calibration.txt",
            config=small,
            output=tmp_path_factory.mktemp("codes") / f"kv{bits}",
        )

    return compile_


@pytest.fixture(scope="module")
def prompts(tiny_opt: Path) -> list[list[int]]:
    load: Any = transformers.AutoTokenizer.from_pretrained
    return [load(tiny_opt)(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("bits", TYPES)
def test_what_the_artifact_says(compiled: Callable[[int], qcompile.Artifact], bits: int) -> None:
    artifact = compiled(bits)
    pasts = [i for i in artifact.session().get_inputs() if is_past(i.name)]
    assert {i.type for i in pasts} == {TYPES[bits]}
    assert {tuple(i.shape[1::2]) for i in pasts} == {(HEADS, SIZE * bits // 8)}
    (note,) = artifact.report.apart
    assert "and 3 more: keys and values in codes" in note
    kept = artifact.report.cache
    assert kept is not None
    assert kept.bytes_per_token == sum(i.shape[1] * i.shape[3] for i in pasts)
    assert kept.bytes_per_token / kept.bytes_per_token_float == bits / 32
    record = json.loads((artifact.path / "qcompile.json").read_text(encoding="utf-8"))
    assert (record["scheme"], record["config"]["cache"]) == (f"w8a8kv{bits}", True)
    assert record["cache"]["bits"] == bits and len(record["cache"]["scales"]) == LAYERS
    for layer in record["cache"]["scales"]:
        assert all(0 < low < high for low, high in layer.values())


def test_the_report_tells_keys_from_values(
    compiled: Callable[[int], qcompile.Artifact], compile_cached: Cached
) -> None:
    """The samples have 64 tokens: all are in the first range of positions."""
    plain = compile_cached("w8a8").report
    found = {}
    for bits in TYPES:
        report = compiled(bits).report
        assert report.cache is not None and report.cache.samples == report.held_back
        (row,) = report.cache.effect
        assert (row.first, row.last) == (0, 63)
        assert row.kl["float"] == pytest.approx(plain.accuracy["kl"], rel=1e-3)
        assert row.kl["both"] == pytest.approx(report.accuracy["kl"], rel=1e-6)
        found[bits] = row.kl
    assert found[4]["float"] < min(found[4]["keys"], found[4]["values"])
    assert max(found[4]["keys"], found[4]["values"]) < found[4]["both"]
    assert found[8]["both"] - found[8]["float"] < 0.002 < found[4]["both"] - found[4]["float"]


@pytest.mark.parametrize("bits", TYPES)
def test_token_by_token_as_in_one_go(
    compiled: Callable[[int], qcompile.Artifact], prompts: list[list[int]], bits: int
) -> None:
    ids = np.array([prompts[1] * 4])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["position_ids"] = np.arange(ids.shape[1])[None]
    session = compiled(bits).session()
    whole = run_outputs(session, feed)["logits"]
    decoder = Decoder(session, 1, ids.shape[1])
    steps = [decoder.step(ids[:, at : at + 1]) for at in range(ids.shape[1])]
    accuracy = Accuracy("text-generation")
    accuracy.add(feed, whole, np.concatenate(steps, axis=1))
    assert accuracy.result()["kl"] < 1e-3


@pytest.mark.parametrize("bits", TYPES)
def test_unequal_prompts_give_the_same_text_together_and_in_genai(
    compiled: Callable[[int], qcompile.Artifact], prompts: list[list[int]], bits: int
) -> None:
    artifact, new = compiled(bits), 32
    together = np.stack(list(generate(artifact.session(), prompts, new)), axis=1).tolist()
    alone = [
        [int(step[0]) for step in generate(artifact.session(), [prompt], new)] for prompt in prompts
    ]
    assert together == alone
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = genai.Model(str(artifact.path))
    for prompt, expected in zip(prompts, alone, strict=True):
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(prompt) + new)
        generator = genai.Generator(model, options)
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found = generator.get_sequence(0).tolist()[len(prompt) :]
        ended = expected.index(1) if 1 in expected else new
        assert found[:ended] == expected[:ended]


def test_two_channels_of_four_bits_share_a_byte(tmp_path: Path) -> None:
    check_cache_bits(_with_heads_of(8, tmp_path), 4)
    odd = _with_heads_of(7, tmp_path)
    check_cache_bits(odd, 8)
    with pytest.raises(ModelError, match="its heads have 7 channels, and two share a byte"):
        check_cache_bits(odd, 4)


def _with_heads_of(size: int, folder: Path) -> Path:
    past = f"float[B,2,P,{size}] past_key_values_0_key"
    model = from_text(
        f"{HEADER}m ({past}) => (float[B,2,P,{size}] y) {{ y = Relu (past_key_values_0_key) }}"
    )
    model.graph.inputs[0].name = PAST.format(0, "key")
    ir.save(model, folder / "float.onnx")
    return folder / "float.onnx"


def test_run_bench_and_check(
    compiled: Callable[[int], qcompile.Artifact], compile_cached: Cached, run_cli: RunCli
) -> None:
    path = compiled(8).path
    assert run_cli("run", path, TEXTS[0], "--max-new-tokens", 8).status == 0
    few = ("--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 1)
    assert run_cli("bench", compile_cached("w8a8").path, path, *few).status == 0
    assert run_cli("check", path).status == 0


def test_a_filled_cache_has_the_type_of_the_session(
    compiled: Callable[[int], qcompile.Artifact],
) -> None:
    ids = np.ones((1, 1), np.int64)
    feed = {"input_ids": ids, "attention_mask": ids, "position_ids": ids - 1}
    for bits, dtype in ((8, np.int8), (4, np.uint8)):
        filled = after(compiled(bits).session(), feed, 16)
        caches = [value for name, value in filled.items() if is_past(name)]
        assert len(caches) == 2 * LAYERS
        assert all(value.dtype == dtype and len(np.unique(value)) > 64 for value in caches)
        assert filled["attention_mask"].shape == (1, 17)


@pytest.mark.parametrize("bits", TYPES)
def test_scales_are_of_the_largest_magnitudes(bits: int, tmp_path: Path) -> None:
    model = model_of(BOTH)
    table = CONSTANTS["wk"].copy()
    table[:, 3] = 0.0
    model.graph.initializers["wk"].const_value = ir.tensor(table, name="wk")
    feeds = [tokens([[1] * 3, [0, 1, 1]]), tokens([[1] * 5])]
    plan = plan_cache(model, bits, feeds, tmp_path)
    seen = np.concatenate([feed["input_ids"].reshape(-1) for feed in feeds])
    scale = REACH[bits] * np.abs(table[seen]).max(axis=0) / (2 ** (bits - 1) - 1)
    scale[3] = 1.0  # a channel that is always zero
    for found in (*plan.keys, *plan.values):
        np.testing.assert_allclose(found, scale.reshape(2, 8), rtol=1e-6)
    assert (plan.bytes_per_token, plan.bytes_per_token_float) == (32 * bits // 8, 128)
    assert not list(tmp_path.iterdir())


def test_infinite_keys_are_refused(tmp_path: Path) -> None:
    model = model_of(BOTH)
    table = np.where(np.arange(16) == 5, np.inf, CONSTANTS["wk"]).astype(np.float32)
    model.graph.initializers["wk"].const_value = ir.tensor(table, name="wk")
    with pytest.raises(CalibrationError, match="keys of layer 0 are infinite"):
        plan_cache(model, 8, [tokens([[1] * 3])], tmp_path)


@pytest.mark.parametrize("bits", TYPES)
def test_this_build_has_the_kernel(bits: int) -> None:
    assert cached_codes_obstacle(bits) is None


class _Broken:
    """The real kernel, with one of its outputs changed."""

    def __init__(self, session: Any, output: int) -> None:
        self.session, self.output = session, output

    def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
        outputs = list(self.session.run(names, feed))
        outputs[self.output] = outputs[self.output] + 1
        return outputs


@pytest.mark.parametrize(
    ("output", "reason"), [(0, "computes with other codes"), (2, "makes other codes")]
)
def test_a_kernel_that_does_otherwise_is_found_out(
    output: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = qcompile.targets.ort_cpu_cache._session
    monkeypatch.setattr(
        "qcompile.targets.ort_cpu_cache._session", lambda *a: _Broken(made(*a), output)
    )
    found = cached_codes_obstacle.__wrapped__(8)
    assert found is not None and reason in found


def test_without_the_kernel_it_is_refused(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("no such attribute\nkv_cache_bit_width")

    monkeypatch.setattr("qcompile.targets.ort_cpu_cache._session", none)
    monkeypatch.setattr(
        "qcompile.targets.ort_cpu.cached_codes_obstacle", cached_codes_obstacle.__wrapped__
    )
    with pytest.raises(ConfigError, match=r"w4a16kv8: .* no such attribute kv_cache_bit_width$"):
        qcompile.compile(tiny_onnx, scheme="w4a16kv8", output=tmp_path / "no")
    assert not (tmp_path / "no").exists()
