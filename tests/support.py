"""What the tests of passes share: graphs from text, runs in ONNX Runtime, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

Feed = dict[str, np.ndarray]


def from_text(text: str, **weights: Any) -> ir.Model:
    """A model from ONNX text. `weights` turn inputs that the text declares into initializers."""
    model = ir.from_onnx_text(text)
    graph = model.graph
    inputs = {v.name: v for v in graph.inputs}
    for name, array in weights.items():
        value = inputs[name]
        assert value is not None
        graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        value.shape = ir.Shape(array.shape)
        graph.register_initializer(value)
    return model


def run_model(model: ir.Model, feed: Feed, *, optimise: bool = True) -> dict[str, np.ndarray]:
    """All outputs of `model`, by name, from a CPU session."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    outputs = session.run(names, {k: v for k, v in feed.items() if k in wanted})
    return dict(zip(names, outputs, strict=True))


def narrow(folder: Path) -> Path:
    """A file of one Linear of 96 input channels, ``y = x @ w``."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
      g (float[B,96] x, float[96,16] w) => (float[B,16] y) { y = MatMul (x, w) }"""
    weight = np.random.default_rng(0).standard_normal((96, 16)).astype(np.float32)
    ir.save(from_text(text, w=weight), folder / "narrow.onnx")
    return folder / "narrow.onnx"


def ops(model: ir.Model) -> list[str]:
    """Op types in graph order, with the domain where it is not ONNX's own."""
    return [f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph]


def assert_same_graph(actual: ir.Model, expected: ir.Model) -> None:
    """Same ops, attributes, wiring and constants; names of intermediate values do not count."""
    ids: dict[ir.Value, ir.Value] = {}

    def match(a: ir.Value | None, b: ir.Value | None, where: str) -> None:
        if a is None or b is None:
            assert a is b, f"{where}: one side has no value"
            return
        if a in ids:
            assert ids[a] is b, f"{where}: {a.name} is wired differently"
            return
        assert (a.const_value is None) == (b.const_value is None), f"{where}: {a.name}"
        if a.const_value is not None and b.const_value is not None:
            np.testing.assert_allclose(
                a.const_value.numpy(), b.const_value.numpy(), rtol=1e-6, err_msg=where
            )
        ids[a] = b

    assert [v.name for v in actual.graph.inputs] == [v.name for v in expected.graph.inputs]
    for left, right in zip(actual.graph.inputs, expected.graph.inputs, strict=True):
        match(left, right, "inputs")
    assert ops(actual) == ops(expected)
    for i, (x, y) in enumerate(zip(actual.graph, expected.graph, strict=True)):
        where = f"node {i} ({x.op_type})"
        assert len(x.inputs) == len(y.inputs), where
        for read_x, read_y in zip(x.inputs, y.inputs, strict=True):
            match(read_x, read_y, where)
        assert _attributes(x) == _attributes(y), where
        for made_x, made_y in zip(x.outputs, y.outputs, strict=True):
            match(made_x, made_y, where)
    for left, right in zip(actual.graph.outputs, expected.graph.outputs, strict=True):
        match(left, right, "outputs")


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: _attribute(a) for name, a in node.attributes.items()}


def _attribute(attribute: ir.Attr) -> Any:
    """What can be compared; of a graph, its ops in their order."""
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.value.numpy().tolist()
    if attribute.type == ir.AttributeType.GRAPH:
        return [(node.op_identifier(), _attributes(node)) for node in attribute.value]
    return attribute.value


def check_model(model: ir.Model) -> None:
    """The ONNX checker, contrib domains left out of it."""
    onnx.checker.check_model(ir.to_proto(model), full_check=False)


def assert_idempotent(pass_: ir.passes.PassBase, model: ir.Model) -> None:
    """A second run says, and does, nothing."""
    before = ir.to_onnx_text(model)
    result = pass_(model)
    assert not result.modified
    assert ir.to_onnx_text(result.model) == before
