"""Products of one activation become one: fewer kernels to start."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused, unique_initializer_name
from qcompile.passes.integer_matmul import CONTRIB, constant_bias
from qcompile.passes.integer_matmul import KERNEL as INTEGER
from qcompile.passes.symbolic_shapes import dims_of
from qcompile.passes.weight_only import KERNEL as NBITS

from qcompile.linears import is_constant
from qcompile.names import joined_name, module_path

_WEIGHT: Final = 1
_JOINED: Final = {
    ("", "MatMul"): {_WEIGHT: 1},
    (CONTRIB, INTEGER): {_WEIGHT: 1, 3: 0, 6: 0},
    (CONTRIB, NBITS): {_WEIGHT: 0, 2: 0, 5: 0},
}
"""By kernel: the inputs that are strung together, and along which axis. All share the others."""


class JoinProducts(ir.passes.InPlacePass):
    """Emit one product for all that read one activation, for steps of few tokens.

    1. ``y = MatMul(x, W)``, ``z = MatMul(x, V)`` -> ``y, z = Split(MatMul(x, [W V]), axis=-1)``
    2. the same with constant biases, ``MatMul(x, W) + b``, where all have one
    3. the same of ``MatMulIntegerToFloat`` and ``MatMulNBits``: codes, scales and biases of the
       outputs stay what they were

    Left as it is: a weight that something else reads too, an output of the graph.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups: dict[object, list[_Product]] = {}
        for node in model.graph:
            product = _product(node)
            if product is not None:
                groups.setdefault(product.key, []).append(product)
        joined = [products for products in groups.values() if len(products) > 1]
        for products in joined:
            _join(model.graph, products)
        if joined:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=bool(joined))


@dataclasses.dataclass(frozen=True)
class _Product:
    """One product that may be joined.

    Attributes:
        node: the kernel.
        last: the Add of a bias that follows it, or `node`.
        bias: which the Add adds, or None.
        axes: the inputs of the kernel that are strung together.
        width: output channels.
        key: what those have in common that can be joined.
    """

    node: ir.Node
    last: ir.Node
    bias: ir.Value | None
    axes: dict[int, int]
    width: int
    key: object


def _product(node: ir.Node) -> _Product | None:
    axes = _JOINED.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
    if axes is None or len(node.inputs[_WEIGHT].uses() if node.inputs[_WEIGHT] else ()) != 1:
        return None
    common: list[object] = [node.op_type]
    for at, value in enumerate(node.inputs):
        if value is None or at not in axes:
            common.append(value)
            continue
        dims = dims_of(value) or []
        if not is_constant(value) or len(dims) <= axes[at]:
            return None
        common.append((value.dtype, *dims[: axes[at]], *dims[axes[at] + 1 :]))
    bias, last = constant_bias(node) if node.op_type == "MatMul" else (None, node)
    if last.outputs[0].is_graph_output():
        return None
    common += [bias is None, *sorted((k, v.value) for k, v in node.attributes.items() if k != "N")]
    shape = dims_of(node.inputs[_WEIGHT]) or []
    width = shape[axes[_WEIGHT]]
    assert isinstance(width, int)
    return _Product(node, last, bias, axes, width, tuple(common))


def _join(graph: ir.Graph, products: Sequence[_Product]) -> None:
    first = products[0]
    nodes = [product.node for product in products]
    name = joined_name([_name(node) for node in nodes])
    widths = [product.width for product in products]
    inputs = list(first.node.inputs)
    for at, axis in first.axes.items():
        if at < len(inputs) and inputs[at] is not None:
            inputs[at] = _strung(graph, [node.inputs[at] for node in nodes], axis)
    attributes: dict[str, Any] = {k: v.value for k, v in first.node.attributes.items()}
    if "N" in attributes:
        attributes["N"] = sum(widths)
    made = [ir.node(first.node.op_type, inputs, attributes, domain=first.node.domain, name=name)]
    if first.bias is not None:
        bias = _strung(graph, [product.bias for product in products], 0)
        made.append(ir.node("Add", [made[0].outputs[0], bias], name=f"{_name(nodes[0])}/Add"))
    sizes = constant(graph, f"{name}/widths", np.array(widths, np.int64))
    made.append(
        ir.node(
            "Split", [made[-1].outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes),
            name=f"{_name(nodes[0])}/Split",
        )
    )  # fmt: skip
    dims = dims_of(first.last.outputs[0])
    for node in made[:-1]:
        node.outputs[0].type = first.last.outputs[0].type
        node.outputs[0].shape = ir.Shape([*dims[:-1], sum(widths)]) if dims else None
        node.outputs[0].name = f"{node.name}/output"
    graph.insert_before(first.node, made)
    for product, part in zip(products, made[-1].outputs, strict=True):
        old = product.last.outputs[0]
        part.type, part.shape, label = old.type, old.shape, old.name
        old.replace_all_uses_with(part)
        old.name, part.name = f"{label}/replaced", label


def _name(node: ir.Node) -> str:
    """What reports call it: a float Linear goes by its module's path."""
    return module_path(node) if node.op_type == "MatMul" else str(node.name)


def _strung(graph: ir.Graph, values: Sequence[ir.Value | None], axis: int) -> ir.Value:
    """A new initializer: `values` one after the other along `axis`, read when it is written."""
    tensors = [value.const_value for value in values if value is not None]
    name = unique_initializer_name(graph, joined_name([str(v.name) for v in values if v]))
    shapes = [tensor.shape.numpy() for tensor in tensors if tensor is not None]
    dims = list(shapes[0])
    dims[axis] = sum(shape[axis] for shape in shapes)
    dtype = tensors[0].dtype if tensors[0] is not None else ir.DataType.UNDEFINED

    def evaluate() -> ir.Tensor[Any]:
        arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
        return ir.Tensor(np.concatenate(arrays, axis), name=name)

    lazy = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(dims), name=name)
    value = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(value)
    return value
