"""The plan of a quantised checkpoint: its codes, or a reason."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.targets.base import Target
from qcompile.targets.ort_cpu import OrtCpu

from qcompile.checkpoints import Checkpoint, StoredActivation
from qcompile.errors import ModelError
from qcompile.keeping import keep_plan
from qcompile.linears import find_sites
from qcompile.precision import QuantizedWeight
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

K, N = 64, 8
LOUD = np.full((K, N), 127, np.int8)
QUIET = np.full((K, N), 63, np.int8)


def in_blocks(codes: np.ndarray, **others: Any) -> QuantizedWeight:
    return QuantizedWeight(codes, np.full((2, N), 0.01, np.float32), 32, 8, **others)


def _same(weight: QuantizedWeight) -> QuantizedWeight:
    return weight


def planned(
    weights: dict[str, QuantizedWeight],
    activations: dict[str, StoredActivation] | None = None,
    target: Target | None = None,
    traced: dict[str, QuantizedWeight] | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Label of the ops a and b, which read x, and the notes."""
    floats = {
        name: w.dequantized() if w is not None else np.ones((K, N), np.float32)
        for name, w in {"a": None, "b": None, **weights, **(traced or {})}.items()
        if name in "ab"
    }
    text = f"""g (float[B,{K}] x, float[{K},{N}] wa, float[{K},{N}] wb) => (float[B,{N}] y) {{
      ma = MatMul (x, wa) mb = MatMul (x, wb) y = Add (ma, mb) }}"""
    model: ir.Model = typed(from_text(HEADER + text, wa=floats["a"], wb=floats["b"]))
    for node, name in zip(model.graph, "ab", strict=False):
        node.name = name
    reads = {name: partial(_same, weight) for name, weight in weights.items()}
    checkpoint = Checkpoint("a test", reads, activations or {})
    plan, notes = keep_plan(find_sites(model.graph), checkpoint, target or OrtCpu("vnni"))
    return {op.name: plan.label(op) for op in plan.ops}, notes


TOKEN = StoredActivation("token")


def test_codes_and_what_is_left_in_float() -> None:
    assert planned({"a": in_blocks(LOUD)}) == ({"a": "weight8", "b": "float"}, [])


def test_activations_are_quantised_where_the_kernel_takes_the_codes() -> None:
    both = {"a": in_blocks(LOUD), "b": in_blocks(QUIET)}
    labels, notes = planned(both, {"a": TOKEN, "b": TOKEN})
    assert labels == {"a": "token", "b": "token"} and not notes
    labels, notes = planned(both, {"a": TOKEN, "b": TOKEN}, OrtCpu("avx2"))
    assert labels == {"a": "weight8", "b": "token"}
    assert notes == [
        "1 ops are not computed as the checkpoint has them; the first, a: from the checkpoint: "
        f"a test; {K // 2 * N} pairs of codes could saturate the INT8 kernel, so weight8 with the "
        "same codes"
    ]


def test_scales_in_blocks_are_no_weight_of_the_int8_kernel() -> None:
    blocks = QuantizedWeight(QUIET, np.array([[0.01] * N, [0.02] * N], np.float32), 32, 8)
    labels, notes = planned({"a": blocks}, {"a": TOKEN})
    assert labels["a"] == "weight8" and "one scale an output channel" in notes[0]


def test_one_activation_has_one_scale() -> None:
    activations = {"a": StoredActivation("static", 0.1), "b": StoredActivation("static", 0.2)}
    labels, notes = planned({"a": in_blocks(LOUD), "b": in_blocks(LOUD)}, activations)
    assert labels == {"a": "static", "b": "weight8"}
    assert "b: from the checkpoint: a test; its activation has another scale beside it" in notes[0]


def test_a_weight_that_a_rewrite_changed_is_refused() -> None:
    with pytest.raises(ModelError, match="a: its weight in the graph is not what its codes stand"):
        planned({"a": in_blocks(LOUD)}, traced={"a": in_blocks(QUIET)})


def test_codes_without_a_linear_are_told() -> None:
    _, notes = planned({"a": in_blocks(LOUD), "c": in_blocks(LOUD), "d": in_blocks(LOUD)})
    assert notes == ["no Linear of the graph for the codes of c and 1 more: float there"]
