"""The graph in float16, but for what float16's range or its steps cannot hold."""

from __future__ import annotations

import functools
from typing import Any, Final

import ml_dtypes  # noqa: F401  (registers the types that onnx_ir reads)
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from qcompile.passes.constants import (
    LARGEST,
    constant,
    drop_unused,
    unique_initializer_name,
)
from qcompile.targets.cuda.schema import BY_NAME, DOMAIN, Operator

from qcompile.cache import is_past
from qcompile.errors import ModelError
from qcompile.linears import is_constant

_MASK: Final = 1e30
"""A constant beyond it stands for infinity."""

_WIDE: Final = frozenset(
    [
        "Cos",
        "Sin",
        "Tan",
        "Pow",
        "Exp",
        "Log",
        "Sqrt",
        "Reciprocal",
        "Softmax",
        "LogSoftmax",
        "ReduceSum",
        "ReduceMean",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        "ReduceLogSumExp",
        "CumSum",
        "Range",
        "ConstantOfShape",
        "Cast",
        "Einsum",
    ]
)
"""Ops that compute in float32: sums and powers leave float16's range, angles its steps."""

_HEAVY: Final = frozenset(["MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "LSTM", "GRU"])
"""Ops that are what float16 is for: a wide op before them changes nothing."""

_STAYS: Final = {"GroupQueryAttention": (12, 13)}
"""Inputs that are float32 whatever the others are: scales of a cache of codes."""

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class ToFloat16(ir.passes.InPlacePass):
    """Float32 becomes float16, in subgraphs too.

    1. An op of `_WIDE`, and one whose computed inputs are all float32 and that is no product, stays
       float32 (positions and the angles made from them, means, norms that no fused kernel was found
       for); so does what ONNX does not define on float16.
    2. Any other op reads and gives float16; constants are stored so. Numbers that stand for
       infinity become the largest float16.
    3. A Cast stands only where a value crosses, one for all readers. Inputs of the graph stay
       float32, but those of a cache, which come out as they go in; outputs are what computes them.
    4. The custom operators' scales and biases stay float32, and their `dtype` follows.

    Raises:
        ModelError: a weight is larger than float16 can hold.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not _has_float32(model.graph):
            return ir.passes.PassResult(model, modified=False)
        before = _signature(model.graph)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        for value in model.graph.inputs:
            if is_past(str(value.name)) and value.dtype == _FLOAT:
                value.type = ir.TensorType(_HALF)
        opset = model.opset_imports.get("", onnx.defs.onnx_opset_version())
        _Converter(model.graph, opset).run(model.graph)
        drop_unused(model)
        return ir.passes.PassResult(model, modified=_signature(model.graph) != before)


def _has_float32(graph: ir.Graph) -> bool:
    return any(v.dtype == _FLOAT for node in graph.all_nodes() for v in node.outputs)


def _signature(graph: ir.Graph) -> list[Any]:
    return [
        (n.op_type, [v and (v.name, v.dtype) for v in n.inputs], [v.dtype for v in n.outputs])
        for n in graph.all_nodes()
    ]


class _Converter:
    """One conversion: what was cast or stored anew already."""

    def __init__(self, main: ir.Graph, opset: int) -> None:
        self.main = main
        self.opset = opset
        self.constants: dict[ir.Value, ir.Value] = {}
        self.casts: dict[tuple[ir.Value, ir.DataType, bool, ir.Graph], ir.Value] = {}

    def run(self, graph: ir.Graph) -> None:
        for node in list(graph):
            branches = [
                a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH
            ]
            for branch in branches:
                self.run(branch)
            if branches:
                _follow(node, branches)
            elif node.domain == DOMAIN and node.op_type in BY_NAME:
                self._custom(graph, node, BY_NAME[node.op_type])
            else:
                self._convert(graph, node)

    def _convert(self, graph: ir.Graph, node: ir.Node) -> None:
        floats = [
            (at, v)
            for at, v in enumerate(node.inputs)
            if v is not None and _is_float(v) and at not in _STAYS.get(node.op_type, ())
        ]
        floats = [(at, v) for at, v in floats if _takes_half(node, at, self.opset)] or floats
        computed = [v for _, v in floats if not is_constant(v)]
        inherited = bool(computed) and all(v.dtype == _FLOAT for v in computed)
        wide = node.domain in ("", "ai.onnx") and (
            (node.op_type in _WIDE and not _to_half(node))
            or (inherited and node.op_type not in _HEAVY)
            or not any(_takes_half(node, at, self.opset) for at, _ in floats)
        )
        if wide and any(v.is_graph_input() for v in computed):
            wide = node.op_type in _WIDE or not _takes_half(node, floats[0][0], self.opset)
        if wide:
            for at, value in floats:
                if value.dtype == _HALF and not is_constant(value) and node.op_type != "Cast":
                    node.replace_input_with(at, self._cast(graph, node, value, _FLOAT))
            _type_outputs(node, _FLOAT)
            return
        for at, value in floats:
            if value.dtype == _FLOAT and node.op_type != "Cast":
                node.replace_input_with(at, self._half(graph, node, value))
        if floats:
            _type_outputs(node, _HALF)

    def _custom(self, graph: ir.Graph, node: ir.Node, operator: Operator) -> None:
        for at, (parameter, value) in enumerate(zip(operator.inputs, node.inputs, strict=False)):
            if parameter.type == "T" and value is not None and value.dtype != _HALF:
                node.replace_input_with(at, self._half(graph, node, value))
        for parameter, value in zip(operator.outputs, node.outputs, strict=False):
            if parameter.type == "T":
                value.type = ir.TensorType(_HALF)
        if operator.result_type:
            node.attributes["dtype"] = ir.AttrInt64("dtype", int(_HALF))

    def _half(self, graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
        if not is_constant(value):
            return self._cast(graph, node, value, _HALF)
        if value not in self.constants:
            self.constants[value] = _stored(self.main, value)
        return self.constants[value]

    def _cast(
        self, graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType
    ) -> ir.Value:
        mask = dtype == _HALF and _is_mask(node, value)
        key = (value, dtype, mask, graph)
        if key not in self.casts:
            source = value
            nodes = []
            if mask:
                # -inf in a whole row would make it NaN.
                name = unique_initializer_name(self.main, "lowest")
                low = constant(self.main, name, np.array(-LARGEST, np.float32))
                clip = ir.node("Clip", [value, low])
                clip.outputs[0].type, clip.outputs[0].shape = value.type, value.shape
                clip.name = f"{value.name}/clipped"
                nodes.append(clip)
                source = clip.outputs[0]
            cast = ir.node("Cast", [source], attributes={"to": int(dtype)})
            cast.name = f"{value.name}/{dtype.name.lower()}{'/mask' if mask else ''}"
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
            graph.insert_before(node, [*nodes, cast])
            self.casts[key] = cast.outputs[0]
        return self.casts[key]


def _type_outputs(node: ir.Node, dtype: ir.DataType) -> None:
    """Of an op that reads floats, an output of unknown type is one."""
    if node.op_type == "Cast" and node.domain in ("", "ai.onnx"):
        return
    for value in node.outputs:
        if value.dtype in (_FLOAT, None) and value.name != "":
            # A new type: clones of a value share theirs.
            value.type = ir.TensorType(dtype)


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (_FLOAT, _HALF)


def _takes_half(node: ir.Node, at: int, opset: int) -> bool:
    """Whether the op's definition allows float16 for an input."""
    return node.domain not in ("", "ai.onnx") or _is_half_allowed(node.op_type, at, opset)


@functools.cache
def _is_half_allowed(op_type: str, at: int, opset: int) -> bool:
    inputs = onnx.defs.get_schema(op_type, opset).inputs
    return bool(inputs) and "tensor(float16)" in inputs[min(at, len(inputs) - 1)].types


def _to_half(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(_HALF)


def _is_mask(node: ir.Node, value: ir.Value) -> bool:
    places = {"MultiHeadAttention": 5, "Attention": 3}
    at = places.get(node.op_type)
    return at is not None and len(node.inputs) > at and node.inputs[at] is value


def _follow(node: ir.Node, branches: list[ir.Graph]) -> None:
    """A control-flow op's outputs have the types that its branches give."""
    for at, value in enumerate(node.outputs):
        kinds = {branch.outputs[at].dtype for branch in branches}
        if len(kinds) != 1:
            raise ModelError(f"the branches of {node.name} give different types: {kinds}")
        value.type = ir.TensorType(kinds.pop() or _FLOAT)


def _stored(graph: ir.Graph, value: ir.Value) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None
    name = unique_initializer_name(graph, f"{value.name}/float16")
    shape = ir.Shape(tensor.shape.numpy())

    def evaluate(tensor: ir.TensorProtocol = tensor) -> ir.Tensor[Any]:
        return ir.Tensor(np.clip(tensor.numpy(), -LARGEST, LARGEST).astype(np.float16), name=name)

    # Asked now: what fails while a file is written is no error of one line.
    array = tensor.numpy()
    if max(array.max(initial=0), -array.min(initial=0)) > LARGEST:
        size = np.abs(array)
        if np.any((size > LARGEST) & (size <= _MASK)):
            raise ModelError(f"{value.name} holds numbers that float16 does not")

    lazy = ir.LazyTensor(evaluate, dtype=_HALF, shape=shape, name=name)
    made = ir.Value(name=name, shape=shape, type=ir.TensorType(_HALF), const_value=lazy)
    graph.register_initializer(made)
    return made
