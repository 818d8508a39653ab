"""Fused operators as primitive ones, which every opset and every provider has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import LARGEST, constant, drop_unused, shared_constant
from qcompile.passes.matching import is_op, like, name_nodes

from qcompile.errors import ModelError
from qcompile.names import PART_OF_KEY, module_path, set_module_path

SINCE: Final[Mapping[str, int]] = {
    "Attention": 99,
    "RotaryEmbedding": 99,
    "RMSNormalization": 23,
    "Gelu": 20,
    "LayerNormalization": 17,
    "HardSwish": 14,
}
"""The opset from which an op stays; the first two never do: their products are to be quantised."""


class Decompose(ir.passes.InPlacePass):
    """Replace, for an opset, the ops that it lacks, in bodies of If, Loop and Scan too.

    1. ``Attention`` -> ``MatMul, [Mul], [Tanh, Mul], [Where or Add], Softmax, MatMul`` on heads
       that Reshape and Transpose set apart; hidden scores are −65504, so that no value is infinite;
       heads of keys and values that several heads share are repeated by Gather
    2. ``RotaryEmbedding`` -> ``Slice, Mul, Sub, Add, Concat``
    3. ``RMSNormalization``, ``LayerNormalization`` -> ``ReduceMean, …, Sqrt, Div, Mul, [Add]``
    4. ``Gelu`` -> by ``Erf``, or by ``Tanh`` where it is approximate
    5. ``HardSwish`` -> ``HardSigmoid, Mul``

    Args:
        opset: the one that the graph is going to have.

    Raises:
        ModelError: an op in a form that is not known.
    """

    def __init__(self, opset: int) -> None:
        super().__init__()
        self.opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph.all_nodes()):
            rule = _RULES.get(node.op_type) if is_op(node, *_RULES) else None
            # Nothing in a body is quantised, so that what the opset has stays.
            most = SINCE["RMSNormalization"] if node.graph is not model.graph else math.inf
            if rule is not None and self.opset < min(SINCE[node.op_type], most):
                _replace(model.graph, node, rule)
                modified = True
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


class _Builder:
    """Nodes in order, each with the element type of the first operand that is given."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.tape = ir.tape.Tape()

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        value = self.tape.op(kind, list(inputs), attributes or None)
        first = next((v for v in inputs if v is not None), None)
        element = first.dtype if first is not None else None
        value.type = ir.TensorType(element or ir.DataType.FLOAT)
        return value

    def number(self, value: float) -> ir.Value:
        return shared_constant(self.graph, "number", np.array(value, np.float32))

    def ints(self, *values: int) -> ir.Value:
        return shared_constant(self.graph, "ints", np.array(values, np.int64))


def _replace(graph: ir.Graph, node: ir.Node, rule: Callable[[_Builder, ir.Node], ir.Value]) -> None:
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise ModelError(f"{module_path(node)}: {node.op_type} with further outputs is not lowered")
    build = _Builder(graph, node)
    new, old = rule(build, node), node.outputs[0]
    path = module_path(node)
    name_nodes(build.tape.nodes, str(node.name or old.name))
    for made in build.tape.nodes:
        set_module_path(made, f"{path}.{made.op_type}" if path else str(made.name))
        if node.op_type != "Attention":
            made.metadata_props[PART_OF_KEY] = node.op_type
    like(new, old)
    owner = node.graph
    assert isinstance(owner, ir.Graph)
    owner.insert_before(node, list(build.tape.nodes))
    name, was_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=was_output)
    owner.remove(node, safe=True)
    new.name = name


def _attention(build: _Builder, node: ir.Node) -> ir.Value:
    inputs = [*node.inputs, *[None] * 7]
    q, k, v, mask = inputs[:4]
    assert q is not None and k is not None and v is not None
    if any(value is not None for value in inputs[4:]):
        raise ModelError(f"{module_path(node)}: Attention with a cache is not lowered")
    heads = node.attributes.get_int("q_num_heads", 0)
    shared = node.attributes.get_int("kv_num_heads", 0)
    flat = heads > 0
    size = _size(q, -1) // (heads or 1)
    if flat:
        q, k, v = (
            build.op(
                "Transpose", build.op("Reshape", x, build.ints(0, 0, n, -1)), perm=[0, 2, 1, 3]
            )
            for x, n in ((q, heads), (k, shared), (v, shared))
        )
    else:
        heads, shared = _size(q, 1), _size(k, 1)
    if heads != shared:
        index = build.ints(*np.repeat(np.arange(shared), heads // shared).tolist())
        k, v = (build.op("Gather", x, index, axis=1) for x in (k, v))
    scores = build.op("MatMul", q, build.op("Transpose", k, perm=[0, 1, 3, 2]))
    scale = node.attributes.get_float("scale", 0.0) or 1.0 / math.sqrt(size)
    cap = node.attributes.get_float("softcap", 0.0)
    if scale != 1.0 or cap:
        scores = build.op("Mul", scores, build.number(scale / (cap or 1.0)))
    if cap:
        scores = build.op("Mul", build.op("Tanh", scores), build.number(cap))
    if node.attributes.get_int("is_causal", 0):
        scores = _hidden(build, _causal(build, q, k), scores)
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        scores = _hidden(build, mask, scores)
    elif mask is not None:
        scores = build.op("Add", scores, build.op("Max", mask, build.number(-LARGEST)))
    result = build.op("MatMul", build.op("Softmax", scores, axis=-1), v)
    if not flat:
        return result
    together = build.op("Transpose", result, perm=[0, 2, 1, 3])
    return build.op("Reshape", together, build.ints(0, 0, -1))


def _hidden(build: _Builder, seen: ir.Value, scores: ir.Value) -> ir.Value:
    result = build.op("Where", seen, scores, build.number(-LARGEST))
    result.dtype = ir.DataType.FLOAT
    return result


def _causal(build: _Builder, q: ir.Value, k: ir.Value) -> ir.Value:
    """True where a query may see a key, [1, 1, S, T]."""
    places = []
    for value, axes in ((q, (0, 1, 3)), (k, (0, 1, 2))):
        shape = build.op("Shape", value)
        shape.dtype = ir.DataType.INT64
        length = build.op("Squeeze", build.op("Gather", shape, build.ints(2), axis=0))
        start, step = (constant(build.graph, "index", np.array(n, np.int64)) for n in (0, 1))
        places.append(
            build.op("Unsqueeze", build.op("Range", start, length, step), build.ints(*axes))
        )
    rows, columns = places
    seen = build.op("LessOrEqual", columns, rows)
    seen.dtype = ir.DataType.BOOL
    return seen


def _rotary(build: _Builder, node: ir.Node) -> ir.Value:
    x, cos, sin, *rest = node.inputs
    assert x is not None and cos is not None and sin is not None
    positions = rest[0] if rest else None
    if positions is not None:
        cos, sin = build.op("Gather", cos, positions), build.op("Gather", sin, positions)
    heads = node.attributes.get_int("num_heads", 0)
    flat = x.shape is not None and len(x.shape) == 3
    size = _size(x, -1) // (heads if flat else 1)
    turned = node.attributes.get_int("rotary_embedding_dim", 0) or size
    # Angles are [B, S, D / 2]; heads lie behind or before the sequence.
    cos, sin = (build.op("Unsqueeze", v, build.ints(2 if flat else 1)) for v in (cos, sin))
    if flat:
        x = build.op("Reshape", x, build.ints(0, 0, heads, size))

    def part(start: int, end: int, step: int = 1) -> ir.Value:
        return build.op(
            "Slice", x, build.ints(start), build.ints(end), build.ints(-1), build.ints(step)
        )

    paired = bool(node.attributes.get_int("interleaved", 0))
    if paired:
        first, second = part(0, turned, 2), part(1, turned, 2)
    else:
        first, second = part(0, turned // 2), part(turned // 2, turned)
    real = build.op("Sub", build.op("Mul", first, cos), build.op("Mul", second, sin))
    imaginary = build.op("Add", build.op("Mul", first, sin), build.op("Mul", second, cos))
    if paired:
        both = [build.op("Unsqueeze", v, build.ints(-1)) for v in (real, imaginary)]
        joined = build.op("Concat", *both, axis=-1)
        parts = [build.op("Reshape", joined, build.ints(0, 0, 0, turned))]
    else:
        parts = [real, imaginary]
    if turned < size:
        parts.append(part(turned, size))
    result = build.op("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0]
    return build.op("Reshape", result, build.ints(0, 0, -1)) if flat else result


def _rms_norm(build: _Builder, node: ir.Node) -> ir.Value:
    x, scale = node.inputs[0], node.inputs[1]
    assert x is not None
    return _normalised(build, node, x, x, scale, None)


def _layer_norm(build: _Builder, node: ir.Node) -> ir.Value:
    x, scale, *rest = node.inputs
    assert x is not None
    mean = build.op("ReduceMean", x, build.ints(*_axes(node, x)))
    return _normalised(build, node, x, build.op("Sub", x, mean), scale, rest[0] if rest else None)


def _normalised(
    build: _Builder,
    node: ir.Node,
    x: ir.Value,
    centred: ir.Value,
    scale: ir.Value | None,
    bias: ir.Value | None,
) -> ir.Value:
    square = build.op("Mul", centred, centred)
    mean = build.op("ReduceMean", square, build.ints(*_axes(node, x)))
    epsilon = build.number(node.attributes.get_float("epsilon", 1e-5))
    result = build.op("Div", centred, build.op("Sqrt", build.op("Add", mean, epsilon)))
    result = build.op("Mul", result, scale)
    return result if bias is None else build.op("Add", result, bias)


def _gelu(build: _Builder, node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    if node.attributes.get_string("approximate", "none") == "tanh":
        cube = build.op("Mul", build.op("Mul", x, x), x)
        inner = build.op("Add", x, build.op("Mul", cube, build.number(0.044715)))
        curve = build.op("Tanh", build.op("Mul", inner, build.number(math.sqrt(2.0 / math.pi))))
    else:
        curve = build.op("Erf", build.op("Mul", x, build.number(math.sqrt(0.5))))
    half = build.op("Mul", x, build.number(0.5))
    return build.op("Mul", half, build.op("Add", curve, build.number(1.0)))


def _hard_swish(build: _Builder, node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    return build.op(
        "Mul", x, build.op("HardSigmoid", x, alpha=float(np.float32(1.0 / 6.0)), beta=0.5)
    )


_RULES: Final[Mapping[str, Callable[[_Builder, ir.Node], ir.Value]]] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "RMSNormalization": _rms_norm,
    "LayerNormalization": _layer_norm,
    "Gelu": _gelu,
    "HardSwish": _hard_swish,
}


def _axes(node: ir.Node, x: ir.Value) -> Sequence[int]:
    axis = node.attributes.get_int("axis", -1)
    if axis == -1:
        return (-1,)
    if x.shape is None:
        raise ModelError(f"{module_path(node)}: the rank of what it normalises is not known")
    rank = len(x.shape)
    return tuple(range(axis - rank if axis >= 0 else axis, 0))


def _size(value: ir.Value, axis: int) -> int:
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise ModelError(f"the shape of {value.name} is not known well enough to lower attention")
    return size
