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


def test_bodies_are_emptied_and_released_too(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (bool c, float[64,64] x, float[64,64] w) => (float[64,64] y) {
      y = If (c) <then_branch = a () => (float[64,64] p) { p = MatMul (x, w) },
                  else_branch = b () => (float[64,64] q) { q = Identity (x) }> }"""
    model = from_text(text, w=W)
    (product,) = (node for node in model.graph.all_nodes() if node.op_type == "MatMul")
    body, own = product.graph, ir.Value(name="w", const_value=ir.tensor(W, name="w"))
    assert isinstance(body, ir.Graph)
    product.replace_input_with(1, own)
    del model.graph.initializers["w"]
    body.register_initializer(own)
    spilled = spill(model, tmp_path, "g")
    assert body.initializers["w"].const_value is None
    (tensor,) = (g.initializers["w"].const_value for g in spilled.graphs() if g.initializers)
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), W)
    release(spilled)
    assert tensor.raw is None


def test_released_weights_are_read_again(tmp_path: Path) -> None:
    model = spill(from_text(TEXT, w=W), tmp_path, "g")
    (tensor,) = (v.const_value for v in model.graph.initializers.values())
    assert isinstance(tensor, ir.ExternalTensor)
    in_use = tensor.numpy()
    release(model)  # in use: it stays
    np.testing.assert_array_equal(in_use, W)
    del in_use
    tensor.numpy()  # maps it
    release(model)
    assert tensor.raw is None
    np.testing.assert_array_equal(tensor.numpy(), W)
