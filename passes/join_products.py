"""Products of one activation become one: fewer kernels to start."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused, unique_initializer_name
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.integer_matmul import KERNEL as INTEGER
from qcompile.passes.symbolic_shapes import dims_of
from qcompile.passes.weight_only import KERNEL as NBITS

from qcompile.linears import is_constant
from qcompile.names import joined_name

_WEIGHT: Final = 1
_STRUNG: Final[dict[tuple[str, str], dict[int, int]]] = {
    (CONTRIB, NBITS): {_WEIGHT: 0, 2: 0, 5: 0},
    (CONTRIB, INTEGER): {_WEIGHT: 1, 3: 0, 6: 0},
    ("", "MatMul"): {_WEIGHT: 1},
}
"""By kernel: the inputs by output channel (weights or codes, scales, biases), and the axis of it.
The rest is shared."""


class JoinProducts(ir.passes.InPlacePass):
    """Emit one product for all that read one activation, for steps of few tokens.

    ``y = MatMulNBits(x, W)``, ``z = MatMulNBits(x, V)`` -> ``y, z = Split(MatMulNBits(x, [W V]))``;
    codes, scales and biases of the outputs stay what they were. ``MatMulIntegerToFloat`` likewise.

    Left as it is: another block size or number of bits, a bias that only some have, a weight that
    something else reads too, an output of the graph.

    Args:
        names: of the products that may be joined.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups: dict[object, list[ir.Node]] = {}
        for node in model.graph:
            key = join_key(node) if node.name in self.names else None
            if key is not None:
                groups.setdefault(key, []).append(node)
        joined = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in joined:
            _split(model.graph, nodes)
        if joined:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=bool(joined))


def join_key(node: ir.Node) -> object:
    """What products have in common that `join` can make one; None: this one cannot be joined.

    Products are ``MatMulNBits``, ``MatMulIntegerToFloat`` and ``MatMul``, with constant weights.
    """
    strung = _STRUNG.get((node.domain, node.op_type))
    weight = node.inputs[_WEIGHT] if strung else None
    if strung is None or weight is None or len(weight.uses()) != 1:
        return None
    if node.outputs[0].is_graph_output():
        return None
    if node.domain == "" and len(dims_of(weight) or ()) != 2:
        return None
    common: list[object] = [node.op_type]
    for at, value in enumerate(node.inputs):
        if value is None or at not in strung:
            common.append(value)
            continue
        if not is_constant(value):
            return None
        # Scales are flat: as many of them for each output channel where the blocks are as many.
        common.append((value.dtype, len(dims_of(value) or ())))
    common += sorted((k, v.value) for k, v in node.attributes.items() if k != "N")
    return tuple(common)


def join(graph: ir.Graph, nodes: Sequence[ir.Node]) -> ir.Value:
    """What `nodes`, all of one `join_key`, give side by side; they themselves stay as they are."""
    first = nodes[0]
    inputs = list(first.inputs)
    for at, axis in _STRUNG[first.domain, first.op_type].items():
        if at < len(inputs) and inputs[at] is not None:
            inputs[at] = strung(graph, [node.inputs[at] for node in nodes], axis)
    attributes: dict[str, Any] = {k: v.value for k, v in first.attributes.items()}
    widths = [_width(node) for node in nodes]
    if "N" in attributes:
        attributes["N"] = sum(widths)
    name = joined_name([str(node.name) for node in nodes])
    product = ir.node(first.op_type, inputs, attributes, domain=first.domain, name=name)
    dims = dims_of(first.outputs[0])
    whole = product.outputs[0]
    whole.name, whole.type = f"{name}/output", first.outputs[0].type
    whole.shape = ir.Shape([*dims[:-1], sum(widths)]) if dims else None
    graph.insert_before(min(nodes, key=list(graph).index), product)
    return whole


def strung(graph: ir.Graph, values: Sequence[ir.Value | None], axis: int) -> ir.Value:
    """A new initializer: `values` one after the other, read when it is written."""
    tensors = [v.const_value for v in values if v is not None and v.const_value is not None]
    name = unique_initializer_name(graph, joined_name([str(v.name) for v in values if v]))
    dims = list(tensors[0].shape.numpy())
    dims[axis] = sum(tensor.shape.numpy()[axis] for tensor in tensors)

    def evaluate() -> ir.Tensor[Any]:
        return ir.Tensor(np.concatenate([t.numpy() for t in tensors], axis), name=name)

    dtype, shape = tensors[0].dtype, ir.Shape(dims)
    lazy = ir.LazyTensor(evaluate, dtype=dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(value)
    return value


def _width(node: ir.Node) -> int:
    """Output channels."""
    weight = node.inputs[_WEIGHT]
    assert weight is not None and weight.shape is not None
    axis = _STRUNG[node.domain, node.op_type][_WEIGHT]
    return int(weight.shape[axis])  # type: ignore[arg-type]


def _split(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Let one product give what `nodes` gave."""
    first, whole = nodes[0], join(graph, nodes)
    sizes = constant(graph, f"{whole.name}/widths", np.array([_width(n) for n in nodes]))
    split = ir.node(
        "Split", [whole, sizes], {"axis": -1}, num_outputs=len(nodes), name=f"{first.name}/Split",
    )  # fmt: skip
    graph.insert_before(first, split)
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.type, part.shape, label = old.type, old.shape, old.name
        old.replace_all_uses_with(part)
        old.name, part.name = f"{label}/replaced", label
