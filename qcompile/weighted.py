"""Convs and Linears in one view: ops with a constant weight, channels in and channels out.

Derived from the graph each time it is needed, as `qcompile.linears` is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.linears import Linear, find_linears, is_constant
from qcompile.names import module_path, set_module_path, unique_name

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Weighted:
    """One Conv, or one Linear, written as MatMul or as Gemm.

    Attributes:
        name: module path.
        node: the Conv, the MatMul or the Gemm.
        weight: [out, in / groups, …] of a Conv, [in, out] of a Linear.
        bias: [out], or None.
        output: what the rest of the graph reads: the bias's Add is a part of a Linear.
        groups: of a Conv; a depthwise one has as many as channels.
        linear: of a MatMul.
    """

    name: str
    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value
    in_channels: int
    out_channels: int
    groups: int = 1
    linear: Linear | None = None

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def convolves(self) -> bool:
        return self.node.op_type == "Conv"

    @property
    def axis(self) -> int:
        """Of the channels, in what it reads and in what it computes."""
        return 1 if self.convolves else -1

    @property
    def out_axis(self) -> int:
        """Of the output channels in its weight."""
        return 0 if self.convolves else 1

    def blocks(self) -> Array:
        """The weight as float64 [groups, out / groups, in / groups, taps]."""
        tensor = self.weight.const_value
        assert tensor is not None
        array = tensor.numpy().astype(np.float64)
        if not self.convolves:
            return np.ascontiguousarray(array.T)[None, :, :, None]
        return array.reshape(
            self.groups, self.out_channels // self.groups, self.in_channels // self.groups, -1
        )

    def with_weight(self, weight: ir.Value) -> Weighted:
        """The op after it was made to read another weight."""
        self.node.replace_input_with(1, weight)
        return dataclasses.replace(self, weight=weight)


def find_weighted(graph: ir.Graph) -> list[Weighted]:
    """Every Conv of a constant weight and every Linear whose weight is its own, in graph order.

    A Gemm is a Linear in the form that `ToGemm` gives it, and no other.
    """
    linears = {linear.matmul: linear for linear in find_linears(graph)}
    found: list[Weighted] = []
    taken = {linear.name for linear in linears.values()}
    for node in graph:
        if node in linears:
            if not linears[node].tied:
                found.append(_of_linear(linears[node]))
            continue
        op = _of_node(node)
        if op is None:
            continue
        found.append(dataclasses.replace(op, name=unique_name(op.name or "unnamed", taken)))
    return found


def set_bias(graph: ir.Graph, op: Weighted, bias: ir.Value) -> Weighted:
    """`op` with `bias` [out] for its own: a Linear that has none gets an Add, which takes the name
    of what the Linear computed."""
    if op.linear is None:
        if len(op.node.inputs) < 3:
            op.node.resize_inputs(3)
        op.node.replace_input_with(2, bias)
        return dataclasses.replace(op, bias=bias)
    add = op.linear.bias_add
    if add is not None:
        add.replace_input_with(1 if add.inputs[1] is op.bias else 0, bias)
        return dataclasses.replace(op, bias=bias)
    product = op.output
    node = ir.node("Add", [product, bias], name=f"{op.name}/bias")
    result = node.outputs[0]
    result.shape, result.type = product.shape, product.type
    set_module_path(node, module_path(op.node))
    product.replace_all_uses_with(result, replace_graph_outputs=product.is_graph_output())
    node.replace_input_with(0, product)
    graph.insert_after(op.node, node)
    result.name, product.name = product.name, f"{product.name}/product"
    linear = dataclasses.replace(op.linear, bias=bias, output=result)
    return dataclasses.replace(op, bias=bias, output=result, linear=linear)


def _of_linear(linear: Linear) -> Weighted:
    return Weighted(
        linear.name, linear.matmul, linear.weight, linear.bias, linear.output,
        linear.in_features, linear.out_features, linear=linear,
    )  # fmt: skip


def _of_node(node: ir.Node) -> Weighted | None:
    if node.op_type not in ("Conv", "Gemm") or node.domain not in ("", "ai.onnx"):
        return None
    weight = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or not is_constant(weight) or (bias is not None and not is_constant(bias)):
        return None
    if weight.shape is None or weight.dtype != ir.DataType.FLOAT or is_constant(node.inputs[0]):
        return None
    if node.op_type == "Gemm":
        numbers = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        turned = [node.attributes.get_int(name, 0) for name in ("transA", "transB")]
        vector = bias is not None and bias.shape is not None and len(bias.shape) == 1
        if numbers != [1.0, 1.0] or any(turned) or not vector:
            return None
        depth, out_channels = (int(d) for d in weight.shape)  # type: ignore[arg-type]
        return Weighted(module_path(node), node, weight, bias, node.outputs[0], depth, out_channels)
    out_channels, depth = (int(d) for d in weight.shape[:2])  # type: ignore[arg-type]
    groups = node.attributes.get_int("group", 1)
    return Weighted(
        module_path(node), node, weight, bias, node.outputs[0], depth * groups, out_channels, groups
    )
