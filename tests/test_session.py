"""Sessions: what may run on the CPU where there is another provider."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from qcompile.errors import ModelError
from qcompile.session import Runtime, open_session


def test_nodes_on_the_cpu_are_named(tmp_path: Path) -> None:
    """The CPU provider stands for another one that leaves it nodes."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (float[2] x) => (float[2] z) { y = Relu (x) z = Erf (y) }"""
    )
    for node, name in zip(model.graph, ("kept", "allowed"), strict=True):
        node.name = name
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    open_session(path, Runtime(hosted=frozenset({"kept", "allowed"})))
    with pytest.raises(ModelError, match=r"1 nodes of the graph would .* kept \(Relu\)"):
        open_session(path, Runtime(hosted=frozenset({"allowed"})))
