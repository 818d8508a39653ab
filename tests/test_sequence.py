"""A graph walked once: what each site sees, and that nothing runs twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.errors import CalibrationError
from qcompile.linears import Linear
from qcompile.planning import weight_of
from qcompile.precision import QuantizedWeight
from qcompile.sequence import _parts, parts_before, round_in_sequence
from qcompile.weight_blocks import quantize_blocks
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

RNG = np.random.default_rng(0)
W = {n: RNG.standard_normal((16, 16)).astype(np.float32) / 4 for n in ("w1", "w2", "w3", "w4")}
TEXT = """g (float[B,S,16] x, float[B,1,1] m, float[16,16] w1, float[16,16] w2, float[16,16] w3,
  float[16,16] w4) => (float[B,S,16] y) {
  a = MatMul (x, w1) c = MatMul (x, w2) h = Mul (a, m) r = Relu (h) d = MatMul (r, w3)
  s = Add (d, x) t = Tanh (s) e = MatMul (t, w4) u = Add (e, s) y = Add (u, c) }"""
BATCHES = [
    {
        "x": RNG.standard_normal((2, 5, 16)).astype(np.float32),
        "m": RNG.uniform(0.5, 1.5, (2, 1, 1)).astype(np.float32),
    }
    for _ in range(3)
]


def residual() -> ir.Model:
    """Two Linears that share an input, one in the middle, one behind a residual."""
    model = typed(from_text(HEADER + TEXT, **W))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    return model


def inputs(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the four Linears read, of all batches, [rows, 16], computed apart."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in "acde"}
    for batch in BATCHES:
        x = batch["x"]
        r = np.maximum((x @ weights["w1"]) * batch["m"], 0)
        t = np.tanh(r @ weights["w3"] + x)
        for name, value in zip("acde", (x, x, r, t), strict=True):
            rows[name].append(value.reshape(-1, 16))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def test_each_site_sees_what_the_rounded_ones_before_make(tmp_path: Path) -> None:
    seen: dict[str, np.ndarray] = {}

    def round_(linear: Linear, gram: np.ndarray) -> QuantizedWeight:
        seen[linear.name] = gram
        return quantize_blocks(weight_of(linear), bits=4, block_size=16)

    model = residual()
    before = ir.to_onnx_text(model)
    found = round_in_sequence(model, frozenset("acde"), BATCHES, tmp_path, round_)
    assert ir.to_onnx_text(model) == before
    assert list(found) == ["a", "c", "d", "e"]
    rounded = {f"w{at}": found[name].dequantized() for at, name in enumerate("acde", 1)}
    given = inputs(rounded)
    for name, gram in seen.items():
        x = given[name].astype(np.float64)
        np.testing.assert_allclose(gram, x.T @ x, rtol=0, atol=1e-4)
    exact = inputs(W)["e"].astype(np.float64)
    assert np.abs(seen["e"] - exact.T @ exact).max() > 0.1


def test_parts_are_disjoint_and_lead_to_the_sites() -> None:
    from qcompile.linears import find_sites

    model = residual()
    parts = list(_parts(model, find_sites(model.graph)))
    known = [part[0] for _, part in parts]
    made = [part[1] for _, part in parts]
    assert [site.name for site, _ in parts][1:] == ["d", "e"]
    # What later nodes read is made once: c waits for the end, s is read twice.
    assert made == [[], ["c", "r"], ["s", "t"]]
    assert known == [["x", "m"], ["x", "m"], ["x", "c", "r"]]
    assert [part[2] for _, part in parts] == [["x", "m"], ["x", "c", "r"], ["c", "s", "t"]]


TIED = """g (int64[B,S] i, float[16,16] w1, float[16,16] w2) => (float[B,S,16] y) {
  k = Transpose <perm = [1, 0]> (w1) x = Gather (w1, i) a = MatMul (x, w2) r = Relu (a)
  y = MatMul (r, k) }"""


def test_what_no_input_changes_is_not_kept_for_every_batch(tmp_path: Path) -> None:
    """An output head's transposed weight may be a third of a model."""
    from qcompile.linears import find_sites

    model = typed(from_text(HEADER + TIED, w1=W["w1"], w2=W["w2"]))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    parts = [part for _, part in _parts(model, find_sites(model.graph))]
    assert parts == [(["i"], ["x"], ["x"]), (["x"], ["r"], ["r"])]
    names = ["a", "y"]
    assert [*parts_before(model, [4, 5])][1] == (["r"], ["y"], ["y"])
    seen: dict[str, np.ndarray] = {}

    def round_(linear: Linear, gram: np.ndarray) -> QuantizedWeight:
        seen[linear.name] = gram
        return quantize_blocks(weight_of(linear), bits=4, block_size=16)

    ids = RNG.integers(0, 16, (2, 5))
    found = round_in_sequence(model, frozenset(names), [{"i": ids}], tmp_path, round_)
    assert list(found) == names
    r = np.maximum(W["w1"][ids.ravel()] @ found["a"].dequantized(), 0).astype(np.float64)
    np.testing.assert_allclose(seen["y"], r.T @ r, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(
        found["y"].codes, quantize_blocks(W["w1"].T, bits=4, block_size=16).codes
    )


def test_a_site_that_no_input_changes(tmp_path: Path) -> None:
    """The table of relative positions in DeBERTa."""
    text = """g (float[B,16,16] x, float[16,16] w1, float[16,16] w2) => (float[B,16,16] y) {
      t = Tanh (w1) a = MatMul (t, w2) y = Add (x, a) }"""
    model = typed(from_text(HEADER + text, w1=W["w1"], w2=W["w2"]))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    grams: list[np.ndarray] = []

    def round_(linear: Linear, gram: np.ndarray) -> QuantizedWeight:
        grams.append(gram)
        return quantize_blocks(weight_of(linear), bits=4, block_size=16)

    round_in_sequence(
        model, frozenset("a"), [{"x": np.zeros((1, 16, 16), np.float32)}], tmp_path, round_
    )
    t = np.tanh(W["w1"]).astype(np.float64)
    np.testing.assert_allclose(grams, [t.T @ t], rtol=0, atol=1e-4)


def test_some_linears_alone(tmp_path: Path) -> None:
    model = residual()
    found = round_in_sequence(
        model,
        frozenset({"c", "e"}),
        BATCHES,
        tmp_path,
        lambda linear, gram: quantize_blocks(weight_of(linear), bits=8, block_size=16),
    )
    assert list(found) == ["c", "e"]
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    batch = {**BATCHES[0], "m": np.full((2, 1, 1), np.nan, np.float32)}
    with pytest.raises(CalibrationError, match="input of d is NaN"):
        round_in_sequence(
            residual(),
            frozenset("ad"),
            [batch],
            tmp_path,
            lambda linear, gram: quantize_blocks(weight_of(linear), bits=8, block_size=16),
        )
