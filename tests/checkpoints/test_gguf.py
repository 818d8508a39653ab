"""GGUF files: every weight is what the format's own library makes of it, to the last bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import qcompile
from qcompile.checkpoints.gguf_blocks import TYPES, read_blocks
from qcompile.checkpoints.gguf_file import open_gguf
from qcompile.errors import ModelError
from tests.checkpoints import packers
from tests.checkpoints.shipped import shipped_weights

gguf = pytest.importorskip("gguf", reason="the format's own library")
pytest.importorskip("accelerate", reason="Transformers reads GGUF with it")

HALVES = {
    "Q2_K": (80, 82),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where in a block its float16 numbers are; elsewhere at its start."""


def random_blocks(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Any codes, with scales of the size of weights, as a file holds them: uint8 [N, bytes]."""
    rng = np.random.default_rng(seed)
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    width, depth = shape
    blocks = rng.integers(0, 256, (width * depth // weights, size), dtype=np.uint8)
    spread = 0.02 if weights == 32 else 0.0004
    for at in HALVES.get(kind, (0,)):
        half = rng.uniform(-spread, spread, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = half.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(width, -1)


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_are_what_the_library_says(kind: str) -> None:
    data = random_blocks(kind, (24, 512))
    weight = read_blocks("w", data, kind, 512)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(weight.dequantized().T, expected)
    assert (weight.offset is not None) == (kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"))


halves = st.floats(-1000, 1000, width=16) | st.sampled_from([0.0, 1e-7, 6e-5])


@given(hnp.arrays(np.float16, (4, 2), elements=halves), st.integers(0, 255))
def test_minima_that_are_no_multiple_of_the_scale(pairs: np.ndarray, byte: int) -> None:
    """Zero scales and subnormal ones among them."""
    data = np.full((4, 20), byte, np.uint8)
    data[:, :4] = np.ascontiguousarray(pairs).view(np.uint8)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_1)
    weight = read_blocks("w", data, "Q4_1", 32)
    np.testing.assert_array_equal(weight.dequantized().T, expected)


def write(path: Path, model: Any, kinds: Mapping[str, str]) -> None:
    """A file of the architecture ``llama``: the layers' tensors by `kinds`, random in them."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for at, (name, tensor) in enumerate(model.state_dict().items()):
        kind = kinds.get(name.split(".")[-2])
        stored = names.get_name(name, try_suffixes=(".weight",))
        if name == "lm_head.weight":
            continue  # tied
        if kind is None:
            writer.add_tensor(stored, tensor.numpy())
        else:
            data = random_blocks(kind, tuple(tensor.shape), at)
            writer.add_tensor(stored, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


MIXED = {
    "embed_tokens": "Q8_0",
    "q_proj": "Q4_0",
    "k_proj": "Q4_1",
    "v_proj": "Q5_0",
    "o_proj": "Q5_1",
    "gate_proj": "Q4_K",
    "up_proj": "Q5_K",
    "down_proj": "Q6_K",
}


@pytest.fixture(scope="module")
def model() -> Any:
    return packers.tiny_llama(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, tie_word_embeddings=True
    )


def test_what_ships_is_the_file(model: Any, tmp_path: Path) -> None:
    """Rows that the format moves about (of q_proj and k_proj), a tied head, and all types."""
    write(tmp_path / "mixed.gguf", model, MIXED)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="mixed.gguf", dtype=torch.float32
    )
    artifact = qcompile.compile(
        tmp_path / "mixed.gguf",
        config=qcompile.CompileConfig(samples=4, seq_len=16),
        output=tmp_path / "out",
    )
    shipped = shipped_weights(artifact.path)
    assert len(shipped) == 8
    for name, weight in shipped.items():
        linear: Any = expected.get_submodule(name)
        np.testing.assert_array_equal(weight, linear.weight.detach().numpy(), err_msg=name)
    stored = stored_bytes(artifact.path)
    report = artifact.report
    assert {op.name: op.bytes for op in report.ops} == stored
    assert report.scheme == "checkpoint" and report.accuracy["kl"] < 0.05
    assert all(op.precision in ("weight4", "weight8") for op in report.ops)
    assert any("Q5_0, Q5_1, Q5_K, Q6_K take eight bits here" in w for w in report.warnings)


def stored_bytes(folder: Path) -> dict[str, int]:
    """Of every MatMulNBits: codes, scales, zero points, and the offsets beside it."""
    graph = ir.load(folder / "model.onnx").graph
    found = {}
    for node in graph:
        if node.op_type == "MatMulNBits":
            values = [*node.inputs[1:4], graph.initializers.get(f"{node.name}.weight_offset")]
            tensors = [value.const_value for value in values if value is not None]
            found[str(node.name)] = sum(t.nbytes for t in tensors if t is not None)
    return found


def test_tensors_that_no_linear_has_are_told(model: Any, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model, MIXED)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    module.model.layers[0].mlp.up_proj.weight.data += 1
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach() + 1)
    checkpoint = open_gguf(tmp_path / "m.gguf", module)
    (told,) = [note for note in checkpoint.notes if "no Linear" in note]
    assert told == "m.gguf: no Linear has the codes of blk.0.ffn_up.weight: float there"


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({}, "holds no quantised tensors"),
        ({"up_proj": "Q2_K"}, "holds tensors of Q2_K, none of which is read"),
    ],
)
def test_what_is_not_read_is_named(
    model: Any, tmp_path: Path, kinds: dict[str, str], message: str
) -> None:
    write(tmp_path / "m.gguf", model, kinds)
    with pytest.raises(ModelError, match=message):
        qcompile.compile(tmp_path / "m.gguf", output=tmp_path / "out")


def test_files_that_are_damaged_or_missing(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(ModelError, match="does not exist"):
        qcompile.compile(path, output=tmp_path / "out")
    write(path, model, MIXED)
    whole = path.read_bytes()
    for damaged in (b"GGUX" + whole[4:], whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"is no GGUF file, or a damaged one$"):
            qcompile.compile(path, output=tmp_path / "out")


def test_what_has_to_be_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    (tmp_path / "m.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'qcompile\[gguf\]'"):
        qcompile.compile(tmp_path / "m.gguf", output=tmp_path / "out")
