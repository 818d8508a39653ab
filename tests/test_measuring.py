"""What damage is estimated on, and what a weight's bytes are counted as."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.choosing import weight_bytes
from qcompile.errors import CalibrationError
from qcompile.gradients import evaluated, measure_gradients
from qcompile.linears import find_linears
from qcompile.measuring import short_samples
from qcompile.torch_graph import frontier
from qcompile.weight_blocks import BITS, quantize_blocks
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

MODEL = """g (int64[B,S] input_ids, int64[B,S] attention_mask, float[40,16] table)
  => (float[B,S,40] logits) {
  x = Gather (table, input_ids) t = Transpose <perm = [1, 0]> (table) logits = MatMul (x, t) }"""


def tied(folder: Path) -> Path:
    table = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    path = folder / "tied.onnx"
    ir.save(typed(from_text(HEADER + MODEL, table=table)), path)
    return path


def feed(mask: list[int]) -> dict[str, np.ndarray]:
    ids = np.arange(len(mask))[None]
    return {"input_ids": ids, "attention_mask": np.array([mask])}


@pytest.mark.parametrize(
    ("mask", "kept"), [([1] * 8, [0, 1, 2, 3]), ([0] * 5 + [1] * 3, [4, 5, 6, 7])]
)
def test_samples_are_cut_where_they_are_padded(
    mask: list[int], kept: list[int], tmp_path: Path
) -> None:
    (found,) = short_samples(tied(tmp_path), [feed(mask)], 1, 4)
    assert found["input_ids"].tolist() == [kept]
    assert found["attention_mask"].tolist() == [[mask[at] for at in kept]]


def test_nothing_but_padding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"every token of the samples .* is masked"):
        measure_gradients(tied(tmp_path), [feed([0, 0, 0])], "text-generation")


def test_a_tied_weight_is_transposed_as_a_view(tmp_path: Path) -> None:
    """Not computed once per sample and kept."""
    graph = ir.load(tied(tmp_path)).graph
    nodes = evaluated(graph)
    assert [node.op_type for node in nodes] == ["Transpose", "MatMul"]
    assert [str(value.name) for value in frontier(nodes)] == ["x"]


def test_a_weight_that_ops_share_is_stored_once() -> None:
    text = """g (float[B,8] x, float[8,8] w) => (float[B,8] y) {
      a = MatMul (x, w) b = Tanh (a) y = MatMul (b, w) }"""
    model = typed(from_text(HEADER + text, w=np.ones((8, 8), np.float32)))
    linears = find_linears(model.graph)
    assert sum(weight_bytes(linear, "float") for linear in linears) == 4 * 64
    assert sum(weight_bytes(linear, "static") for linear in linears) == 2 * (64 + 4 * 8)
    (alone, _) = linears
    assert weight_bytes(dataclasses.replace(alone, shared=1), "float") == 4 * 64


@pytest.mark.parametrize("depth", [32, 33, 48])
@pytest.mark.parametrize("label", ["weight8", "weight4"])
def test_blocks_are_counted_as_they_are_padded(label: str, depth: int) -> None:
    text = f"""g (float[B,{depth}] x, float[{depth},16] w) => (float[B,16] y) {{
      y = MatMul (x, w) }}"""
    weight = np.random.default_rng(1).standard_normal((depth, 16)).astype(np.float32)
    (linear,) = find_linears(typed(from_text(HEADER + text, w=weight)).graph)
    bits = BITS[label]  # type: ignore[index]
    found = quantize_blocks(weight, bits=bits)
    assert found.block_size is not None
    blocks = -(-depth // found.block_size) * 16
    assert weight_bytes(linear, label) == blocks * found.block_size * bits // 8 + found.scale.nbytes  # type: ignore[arg-type]
