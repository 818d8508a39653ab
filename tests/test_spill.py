"""Weights on disk: what is written, what stays in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.session import open_session
from qcompile.spill import release, spill
from tests.support import from_text, run_model

W = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
TEXT = """<ir_version: 10, opset_import: ["" : 23]>
g (float[M,64] x, float[64,64] w) => (float[M,64] y) { y = MatMul (x, w) }"""


def test_the_graph_computes_what_it_did(tmp_path: Path) -> None:
    feed = {"x": W[:3]}
    expected = run_model(from_text(TEXT, w=W), feed)
    spill(from_text(TEXT, w=W), tmp_path, "g")
    found = open_session(tmp_path / "g.onnx").run(None, feed)
    np.testing.assert_array_equal(found[0], expected["y"])
    assert (tmp_path / "g.onnx.data").stat().st_size >= W.nbytes


def test_the_model_given_holds_no_weights(tmp_path: Path) -> None:
    model = from_text(TEXT, w=W)
    spill(model, tmp_path, "g")
    assert [v.const_value for v in model.graph.initializers.values()] == [None]


def test_released_weights_are_read_again(tmp_path: Path) -> None:
    model = spill(from_text(TEXT, w=W), tmp_path, "g")
    (tensor,) = (v.const_value for v in model.graph.initializers.values())
    assert isinstance(tensor, ir.ExternalTensor)
    in_use = tensor.numpy()
    release(model)  # in use: it stays
    np.testing.assert_array_equal(in_use, W)
    del in_use
    assert tensor.numpy() is not None
    release(model)
    assert tensor.raw is None
    np.testing.assert_array_equal(tensor.numpy(), W)
