"""Generation with a cache: token for token what Transformers generates, in batches too."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from qcompile.passes.packed_attention import GUARD, PackedAttention
from qcompile.targets import Target
from qcompile.targets.ort_cpu import OrtCpu

import qcompile
from qcompile import frontend
from qcompile.config import CompileConfig
from qcompile.errors import ModelError
from qcompile.genai import genai_config
from qcompile.generation import Decoder, generate
from qcompile.pipeline import canonicalize, run, with_cache
from qcompile.precision import Floats, PrecisionPlan
from qcompile.session import open_session

NEW = 64
END = 2
PROMPTS = [[17, 200, 5, 78, 33, 120, 9, 64, 250, 31, 77, 8], [90, 14, 3, 141, 58]]

_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2, "intermediate_size": 96}
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": _SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt2": _SIZES,
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 32},
    "phi": _SIZES | {"hidden_size": 128, "intermediate_size": 96},
    "gemma": _GROUPED | {"head_dim": 32},
    "gemma2": _GROUPED | {"head_dim": 32, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    "gpt_neox": _SIZES | {"intermediate_size": 96},
    "bloom": _SIZES,
}

APART = ("qwen3", "gpt_neox", "bloom")
"""A norm of each head; queries, keys and values of a head side by side."""


def save(kind: str, folder: Path, seed: int = 0) -> Any:
    """A model whose next token depends on more than the last one, its weights being large."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    make: Any = transformers.AutoModelForCausalLM.from_config
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.05))
    model.save_pretrained(folder)
    return model


@dataclasses.dataclass(frozen=True)
class Cached:
    """A folder with ``model.onnx`` and ``genai_config.json``, and what Transformers generates."""

    folder: Path
    expected: list[list[int]]


def compile_cached(
    source: Path, folder: Path, target: Target | None = None, floats: Floats = "float32"
) -> None:
    model, target = frontend.load(str(source), CompileConfig(), folder), target or OrtCpu()
    run(model.ir, canonicalize())
    run(model.ir, [*with_cache(), *target.lower(PrecisionPlan(floats=floats))])
    run(model.ir, [PackedAttention(model.max_length)] if target.packs else [])
    ir.save(model.ir, folder / "model.onnx")
    settings = genai_config(model.ir.graph, source, model.max_length)
    (folder / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Cached]:
    """By architecture, each made once."""

    @functools.cache
    def make(kind: str) -> Cached:
        folder = tmp_path_factory.mktemp(kind)
        reference = save(kind, folder / "source")
        compile_cached(folder / "source", folder)
        return Cached(folder, generated(reference))

    return make


def generated(reference: Any) -> list[list[int]]:
    """What Transformers generates after each of `PROMPTS`."""
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        expected.append(whole[0, len(prompt) :].tolist())
    return expected


def greedy(session: ort.InferenceSession, prompts: list[list[int]]) -> list[list[int]]:
    steps = list(generate(session, prompts, NEW))
    return np.stack(steps, axis=1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(
    kind: str, cached: Callable[[str], Cached]
) -> None:
    model = cached(kind)
    session = open_session(model.folder / "model.onnx")
    assert all(len(set(tokens)) > 4 for tokens in model.expected)
    assert [greedy(session, [prompt])[0] for prompt in PROMPTS] == model.expected
    # The shorter prompt is padded on the left.
    assert greedy(session, PROMPTS) == model.expected


@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_takes_one_product(kind: str, cached: Callable[[str], Cached]) -> None:
    graph = ir.load(cached(kind).folder / "model.onnx").graph
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert [node.inputs[1] is None for node in attentions] == [kind not in APART] * 2


@pytest.mark.parametrize("kind", CONFIGS)
def test_and_in_onnxruntime_genai(kind: str, cached: Callable[[str], Cached]) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = cached(kind)
    loaded = genai.Model(str(model.folder))
    for prompt, expected in zip(PROMPTS, model.expected, strict=True):
        options = genai.GeneratorParams(loaded)
        options.set_search_options(max_length=len(prompt) + NEW)
        generator = genai.Generator(loaded, options)
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found = generator.get_sequence(0).tolist()[len(prompt) :]
        # It stops before the token that ends a text.
        ended = expected.index(END) if END in expected else NEW
        assert found == expected[:ended]


def test_padding_behind_a_prompt_and_between_turns(cached: Callable[[str], Cached]) -> None:
    """Wherever padding is left in the history, logits are those of the row alone."""
    session = open_session(cached("llama").folder / "model.onnx")
    rng, turns = np.random.default_rng(0), [PROMPTS[0], PROMPTS[1] + [0] * 7]
    ids = np.concatenate([turns, rng.integers(3, 256, (2, 8))], axis=1)
    mask = np.ones_like(ids)
    mask[1, 5:12] = mask[0, 14:17] = 0
    decoder = Decoder(session, 2, 20)
    logits = [decoder.step(ids[:, :12], mask[:, :12])]
    logits += [decoder.step(ids[:, [at]], mask[:, [at]]) for at in range(12, 20)]
    found = np.concatenate(logits, axis=1)
    for row, real in enumerate(mask == 1):
        alone = Decoder(session, 1, 20).step(ids[[row]][:, real])
        np.testing.assert_allclose(found[row, real], alone[0], rtol=0, atol=1e-4)


def test_padding_between_the_tokens_of_a_prompt_is_an_error(
    cached: Callable[[str], Cached],
) -> None:
    session = open_session(cached("llama").folder / "model.onnx")
    with pytest.raises(RuntimeError, match=GUARD):
        Decoder(session, 1, 8).step(np.array([PROMPTS[1]]), np.array([[1, 1, 0, 1, 1]]))
    # Of what has no rotation it is like any other padding.
    session = open_session(cached("gpt2").folder / "model.onnx")
    found = Decoder(session, 1, 8).step(np.array([PROMPTS[1]]), np.array([[1, 1, 0, 1, 1]]))
    alone = Decoder(session, 1, 8).step(np.delete([PROMPTS[1]], 2, axis=1))
    np.testing.assert_allclose(np.delete(found, 2, axis=1), alone, rtol=0, atol=1e-4)


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    models: Any = transformers
    small = models.MptConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=256, max_seq_len=128)
    models.MptForCausalLM(small).save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match=r"transformer\.blocks\.0\.attn .*not recognised"):
        compile_cached(tmp_path / "source", tmp_path)


def test_codes_with_biases_by_place(tmp_path: Path) -> None:
    """BLOOM's layers share what was made of the mask; what is made of that has other names."""
    save("bloom", tmp_path / "source")
    ids = np.random.default_rng(0).integers(3, 256, (6, 24))
    made = qcompile.compile(
        tmp_path / "source",
        scheme="w8a8",
        calibration=[{"input_ids": ids, "attention_mask": np.ones_like(ids)}],
        config=CompileConfig(samples=4, objective="scheme", cache=True),
        output=tmp_path / "made",
    )
    assert made.report.ops_by_precision["int8"] == 9
