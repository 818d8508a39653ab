"""What a backward pass gives for every op, against gradients written out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile import gradients
from qcompile.gradients import Gradients, kept_columns, measure_gradients
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

IN, MIDDLE, OUT = 6, 8, 5
# `h` is read by two Linears and by a residual.
NETWORK = """g (float[B,S,6] x, float[6,8] w, float[8,5] a, float[8,5] b, float[8,5] r)
  => (float[B,S,5] y) {
  h = MatMul (x, w) p = MatMul (h, a) q = MatMul (h, b)
  t = Tanh (h) s = ReduceMean <keepdims = 1> (t) u = Add (p, q) y = Add (u, s) }"""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"w": (IN, MIDDLE), "a": (MIDDLE, OUT), "b": (MIDDLE, OUT), "r": (MIDDLE, OUT)}
    return {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}


def network(folder: Path) -> Path:
    model = typed(from_text(HEADER + NETWORK, **weights()))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    path = folder / "float.onnx"
    ir.save(model, path)
    return path


def inputs(seed: int, rows: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, rows, IN)).astype(np.float32)


def found(folder: Path, feeds: int = 2, rows: int = 7) -> Gradients:
    return measure_gradients(
        network(folder), [{"x": inputs(seed, rows)} for seed in range(feeds)], "other", seed=5
    )


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Up to the digits of bfloat16."""
    np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=2**-7 * float(np.abs(wanted).max()))


def test_an_input_s_gradient_is_through_the_op_alone(tmp_path: Path) -> None:
    known = weights()
    result = found(tmp_path)
    assert set(result.seen) == {"h", "p", "q"}
    for name, weight in (("h", "w"), ("p", "a"), ("q", "b")):
        for each in result.seen[name]:
            g = each.gradients.float().numpy()
            assert g.shape == (gradients.DRAWS, 7, known[weight].shape[1])
            assert_close(each.back.float().numpy(), g @ known[weight].T)
    for seed, each in enumerate(result.seen["p"]):
        np.testing.assert_allclose(each.x.numpy(), inputs(seed)[0] @ known["w"], rtol=1e-5)


def test_importance_sums_squares_and_sites_count_all_their_readers(tmp_path: Path) -> None:
    result = found(tmp_path)
    p, q = (result.seen[name] for name in ("p", "q"))
    both = sum(
        (a.back.float() + b.back.float()).square().sum((0, 1)) for a, b in zip(p, q, strict=True)
    )
    assert_close(result.importance.inputs["{p,q}"], np.asarray(both))
    outputs = sum(each.gradients.float().square().sum((0, 1)) for each in p)
    assert_close(result.importance.outputs["p"], np.asarray(outputs))


def test_rows_are_thinned_and_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = found(tmp_path, feeds=1, rows=10)
    monkeypatch.setattr(gradients, "ROWS", 4)
    thinned = found(tmp_path, feeds=1, rows=10)
    (all_rows,), (some,) = whole.seen["p"], thinned.seen["p"]
    np.testing.assert_array_equal(some.x, all_rows.x[::3])
    np.testing.assert_array_equal(some.back.float(), all_rows.back.float()[:, ::3])
    np.testing.assert_array_equal(some.extremes, all_rows.extremes)
    assert some.share == 10 / 4
    for name, squares in whole.importance.outputs.items():
        np.testing.assert_array_equal(thinned.importance.outputs[name], squares)


@pytest.mark.parametrize(
    ("width", "kept"), [(5, 5), (128, 128), (383, 192), (768, 128), (6000, 1000)]
)
def test_wide_ops_keep_some_outputs(width: int, kept: int) -> None:
    assert len(range(width)[kept_columns(width)]) == kept
