"""Products of one activation become one: fewer kernels to start."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused, unique_initializer_name
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.symbolic_shapes import dims_of
from qcompile.passes.weight_only import KERNEL

from qcompile.linears import is_constant
from qcompile.names import joined_name

_WEIGHT: Final = 1
_STRUNG: Final = (_WEIGHT, 2, 5)
"""Codes, scales and biases: by output channel, along their first axis. The rest is shared."""


class JoinProducts(ir.passes.InPlacePass):
    """Emit one product for all that read one activation, for steps of few tokens.

    ``y = MatMulNBits(x, W)``, ``z = MatMulNBits(x, V)`` -> ``y, z = Split(MatMulNBits(x, [W V]))``;
    codes, scales and biases of the outputs stay what they were.

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
            if node.name in self.names and node.domain == CONTRIB and node.op_type == KERNEL:
                key = _key(node)
                if key is not None:
                    groups.setdefault(key, []).append(node)
        joined = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in joined:
            _join(model.graph, nodes)
        if joined:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=bool(joined))


def _key(node: ir.Node) -> object:
    """What products have in common that can be joined; None: this one cannot."""
    weight = node.inputs[_WEIGHT]
    if weight is None or len(weight.uses()) != 1 or node.outputs[0].is_graph_output():
        return None
    common: list[object] = []
    for at, value in enumerate(node.inputs):
        if value is None or at not in _STRUNG:
            common.append(value)
            continue
        if not is_constant(value):
            return None
        # Scales are flat: as many of them for each output channel where the blocks are as many.
        common.append((value.dtype, len(dims_of(value) or ())))
    common += sorted((k, v.value) for k, v in node.attributes.items() if k != "N")
    return tuple(common)


def _join(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    first = nodes[0]
    widths = [node.attributes["N"].as_int() for node in nodes]
    inputs = list(first.inputs)
    for at in _STRUNG:
        if at < len(inputs) and inputs[at] is not None:
            inputs[at] = _strung(graph, [node.inputs[at] for node in nodes])
    attributes: dict[str, Any] = {k: v.value for k, v in first.attributes.items()}
    attributes["N"] = sum(widths)
    name = joined_name([str(node.name) for node in nodes])
    product = ir.node(KERNEL, inputs, attributes, domain=CONTRIB, name=name)
    sizes = constant(graph, f"{name}/widths", np.array(widths, np.int64))
    split = ir.node(
        "Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes),
        name=f"{first.name}/Split",
    )  # fmt: skip
    dims = dims_of(first.outputs[0])
    whole = product.outputs[0]
    whole.name, whole.type = f"{name}/output", first.outputs[0].type
    whole.shape = ir.Shape([*dims[:-1], sum(widths)]) if dims else None
    graph.insert_before(first, [product, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.type, part.shape, label = old.type, old.shape, old.name
        old.replace_all_uses_with(part)
        old.name, part.name = f"{label}/replaced", label


def _strung(graph: ir.Graph, values: Sequence[ir.Value | None]) -> ir.Value:
    """A new initializer: `values` one after the other, read when it is written."""
    tensors = [v.const_value for v in values if v is not None and v.const_value is not None]
    name = unique_initializer_name(graph, joined_name([str(v.name) for v in values if v]))
    first = tensors[0].shape.numpy()
    shape = ir.Shape([sum(tensor.shape.numpy()[0] for tensor in tensors), *first[1:]])

    def evaluate() -> ir.Tensor[Any]:
        return ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors]), name=name)

    dtype = tensors[0].dtype
    lazy = ir.LazyTensor(evaluate, dtype=dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(value)
    return value
