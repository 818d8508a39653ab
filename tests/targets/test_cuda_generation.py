"""Generation on a GPU: a cache of tokens alone, wherever the padding was."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from qcompile.targets.ort_cuda import OrtCuda

import qcompile
from qcompile.cache import bind_shared
from qcompile.errors import ModelError
from qcompile.generation import Decoder, generate
from qcompile.session import Runtime, open_session, run_outputs
from tests.targets.cuda_gpu import PROVIDER, needs_gpu
from tests.test_generation import PROMPTS, compile_cached, generated, greedy, save

pytestmark = needs_gpu

Compile = Callable[..., qcompile.Artifact]

SEEDS = {"gpt_neox": 8, "phi": 8}
"""Models of which no two best tokens are as close as float16 rounds: logits of 3 come out up to
0.004 off, in Transformers' own float16 too, and the first GPT-NeoX has two tokens 0.0016 apart."""


@pytest.fixture(scope="module")
def compiled(tiny_onnx: Path, tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """The example for the GPU at hand, by scheme and whether with a cache, each made once."""

    @functools.cache
    def make(scheme: str, *, cache: bool = True) -> qcompile.Artifact:
        return qcompile.compile(
            str(tiny_onnx),
            target="ort-cuda",
            scheme=scheme,
            calibration=tiny_opt / "calibration.txt",
            config=qcompile.CompileConfig(samples=8, seq_len=64, objective="scheme", cache=cache),
            output=tmp_path_factory.mktemp("cuda") / scheme,
        )

    return make


@pytest.mark.parametrize("kind", ["opt", "llama", "mistral", "qwen3", "phi", "gpt_neox", "gemma2"])
def test_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """In float16, one at a time, in a batch padded on the left, on the right and between."""
    reference = save(kind, tmp_path / "source", SEEDS.get(kind, 0))
    compile_cached(tmp_path / "source", tmp_path, OrtCuda(), "float16")
    session = open_session(tmp_path / "model.onnx", OrtCuda().runtime())
    expected = generated(reference)
    assert [greedy(session, [prompt])[0] for prompt in PROMPTS] == expected
    assert greedy(session, PROMPTS) == expected
    for places in (range(5), [0, 1, 4, 9, 11]):
        mask, ids = np.zeros((2, 12), np.int64), np.zeros((2, 12), np.int64)
        mask[0], ids[0] = 1, PROMPTS[0]
        mask[1, places], ids[1, places] = 1, PROMPTS[1]
        decoder = Decoder(session, 2, 76)
        last = [np.flatnonzero(row)[-1] for row in mask]
        tokens = [decoder.step(ids, mask)[[0, 1], last].argmax(-1)]
        while len(tokens) < 64:
            tokens.append(decoder.step(tokens[-1][:, None])[:, -1].argmax(-1))
        assert np.stack(tokens, axis=1).tolist() == expected


@pytest.mark.parametrize("scheme", ["fp16", "w8a8", "w8a16", "w4a16"])
def test_a_cache_changes_no_logits(compiled: Compile, scheme: str) -> None:
    """A prompt, several tokens on top of it, and single ones, against all in one go."""
    whole, cached = compiled(scheme, cache=False), compiled(scheme)
    assert PROVIDER in qcompile.load(cached.path).get_providers()
    ids = np.random.default_rng(0).integers(3, 200, (1, 40))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["position_ids"] = np.arange(40)[None]
    wanted = run_outputs(qcompile.load(whole.path), feed)["logits"].astype(float)
    decoder = Decoder(qcompile.load(cached.path), 1, 40)
    cuts = [0, 10, 24, *range(25, 41)]
    parts = [decoder.step(ids[:, a:b]) for a, b in itertools.pairwise(cuts)]
    # Codes may differ by one where attention's sums are of another order.
    limit = 0.02 if scheme == "fp16" else 0.1
    np.testing.assert_allclose(np.concatenate(parts, axis=1), wanted, atol=limit * wanted.max())


@pytest.mark.parametrize("scheme", ["fp16", "w8a8"])
def test_unequal_prompts_give_the_same_text_together(compiled: Compile, scheme: str) -> None:
    session = qcompile.load(compiled(scheme).path)
    prompts = [list(range(3, 20)), [40, 41, 42], [100]]
    together = np.stack(list(generate(session, prompts, 32)), axis=1)
    for prompt, row in zip(prompts, together, strict=True):
        alone = np.stack(list(generate(session, [prompt], 32)), axis=1)
        assert alone[0].tolist() == row.tolist()


def test_the_report_has_the_speed_of_a_step(compiled: Compile) -> None:
    assert [speed.shape for speed in compiled("w8a8").report.speed] == ["1×128", "1×1 after 128"]
    report = compiled("fp16").report
    assert report.speed == []
    assert any("float32 does not run there" in line for line in report.warnings)


def test_nothing_else_runs_on_the_cpu(compiled: Compile) -> None:
    path = compiled("fp16").path / "model.onnx"
    strict = Runtime((PROVIDER,), hosted=frozenset())
    with pytest.raises(ModelError, match=r"1 nodes of the graph .* cache/total_sequence_length"):
        open_session(path, strict)


def test_graph_capture(compiled: Compile) -> None:
    """A step is captured, and replayed on other tokens at the same place."""
    plain = qcompile.load(compiled("w8a8").path)
    captured = qcompile.load(compiled("w8a8").path, provider_options={"enable_cuda_graph": "1"})

    def values(seed: int) -> dict[str, Any]:
        ids = np.random.default_rng(seed).integers(3, 200, (4, 1))
        mask = np.ones((4, 9), np.int64)
        mask[seed % 4, :3] = 0
        return {"input_ids": ids, "attention_mask": mask, "position_ids": np.full((4, 1), 8)}

    placed = {n: ort.OrtValue.ortvalue_from_numpy(v, "cuda") for n, v in values(0).items()}
    bindings = []
    for session in (plain, captured):
        binding = session.io_binding()
        for name, value in placed.items():
            binding.bind_ortvalue_input(name, value)
        out = np.full((4, 1, session.get_outputs()[0].shape[-1]), np.nan, np.float16)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(out, "cuda"))
        bind_shared(session, binding, 4, 9, "cuda")
        bindings.append((session, binding))
    for seed in range(4):
        for name, array in values(seed).items():
            placed[name].update_inplace(array)
        found = []
        for session, binding in bindings:
            session.run_with_iobinding(binding)
            found.append(binding.copy_outputs_to_cpu()[0])
        np.testing.assert_array_equal(found[1], found[0])
