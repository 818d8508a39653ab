"""Generation with a cache: token for token what Transformers generates, in batches too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from qcompile.passes.kv_cache import KvCache
from qcompile.targets.ort_cpu import OrtCpu

from qcompile import frontend
from qcompile.config import CompileConfig
from qcompile.errors import ModelError
from qcompile.generation import generate
from qcompile.pipeline import CANONICALIZE, run
from qcompile.precision import PrecisionPlan
from qcompile.session import open_session

NEW = 64
PROMPTS = [[17, 200, 5, 78, 33, 120, 9, 64, 250, 31, 77, 8], [90, 14, 3, 141, 58]]

_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
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
    "phi": _SIZES | {"intermediate_size": 96},
    "gemma": _GROUPED | {"head_dim": 32},
    "gpt_neox": _SIZES | {"intermediate_size": 96},
    "bloom": _SIZES,
}


def save(kind: str, folder: Path) -> Any:
    """A model whose next token depends on more than the last one, its weights being large."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    make: Any = transformers.AutoModelForCausalLM.from_config
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.05))
    model.save_pretrained(folder)
    return model


def cached_session(folder: Path, work: Path) -> ort.InferenceSession:
    model = frontend.load(str(folder), CompileConfig(), work)
    run(model.ir, [pass_() for pass_ in CANONICALIZE])
    run(model.ir, [KvCache(), *OrtCpu().lower(PrecisionPlan())])
    ir.save(model.ir, work / "cached.onnx")
    return open_session(work / "cached.onnx")


def greedy(session: ort.InferenceSession, prompts: list[list[int]]) -> list[list[int]]:
    steps = list(generate(session, prompts, NEW))
    return np.stack(steps, axis=1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "bloom"])
def test_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    reference = save(kind, tmp_path / "model")
    session = cached_session(tmp_path / "model", tmp_path)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        expected.append(whole[0, len(prompt) :].tolist())
    assert all(len(set(tokens)) > 4 for tokens in expected)
    assert [greedy(session, [prompt])[0] for prompt in PROMPTS] == expected
    # The shorter prompt is padded on the left.
    assert greedy(session, PROMPTS) == expected


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    save("bloom", tmp_path / "model")
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.self_attention .*not recognised"):
        cached_session(tmp_path / "model", tmp_path)
