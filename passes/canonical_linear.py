"""Bring every constant-weight matrix product into one form: MatMul(x, W[K, N]) [+ Add(bias[N])]."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import derived, drop_unused, sole_use

from qcompile.linears import find_linears, is_constant, is_matrix_transpose
from qcompile.names import module_path, set_module_path


class CanonicalLinear(ir.passes.InPlacePass):
    """One form for Linears, so that every later pass matches one pattern.

    1. ``Gemm(x, B, C)`` with alpha = beta = 1, x not transposed, B constant
       -> ``Add(MatMul(x, B or Bᵀ), C)``
    2. ``MatMul(x, Transpose(W))``, W constant and read only so -> ``MatMul(x, Wᵀ)``, one Wᵀ for
       all. A W that something else reads too (a tied embedding) stays, and stays stored once.
    3. ``Add(MatMul(x, W), b)`` with b of shape [1, N] or [1, 1, N] -> b of shape [N]
    4. every Linear's MatMul is named by its module path
    5. ``Mul(Linear, c)`` with c a constant scalar, the Linear read by nothing else
       -> the Linear with its weight and bias multiplied by c

    Args:
        kept: module paths of Linears whose weights have to stay as they are, bit for bit.
    """

    def __init__(self, kept: Collection[str] = ()) -> None:
        super().__init__()
        self.kept = frozenset(kept)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type == "Gemm":
                modified |= _split_gemm(model.graph, node)
        for node in list(model.graph):
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type == "MatMul":
                modified |= _absorb_transpose(node)
            elif node.op_type == "Add":
                modified |= _flatten_bias(node)
            elif node.op_type == "Mul":
                modified |= _fold_scalar(model.graph, node, self.kept)
        if modified:
            drop_unused(model)
        for linear in find_linears(model.graph):
            # The op's name is how its kernel is found again in the optimised graph; the path is
            # recorded too, so that a second call of a module keeps its number.
            if (linear.matmul.name, module_path(linear.matmul)) != (linear.name, linear.name):
                linear.matmul.name = linear.name
                set_module_path(linear.matmul, linear.name)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _split_gemm(graph: ir.Graph, node: ir.Node) -> bool:
    get = node.attributes.get_float
    if get("alpha", 1.0) != 1.0 or get("beta", 1.0) != 1.0:
        return False
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.attributes.get_int("transA", 0) or weight is None or not is_constant(weight):
        return False
    tape = ir.tape.Tape()
    if node.attributes.get_int("transB", 0):
        if sole_use(weight):
            weight = derived(weight, "transposed", np.transpose, _reversed(weight))
        else:
            weight = tape.op("Transpose", [weight], {"perm": [1, 0]})
    result = tape.op("MatMul", [x, weight])
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    if bias is not None:
        result = tape.op("Add", [result, bias])
    for made in tape.nodes:
        made.metadata_props.update(node.metadata_props)
        set_module_path(made, module_path(node))
        made.name = f"{node.name}/{made.op_type}"
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], list(tape.nodes), node.outputs, [result]
    )
    return True


def _absorb_transpose(node: ir.Node) -> bool:
    weight = node.inputs[1]
    transpose = weight.producer() if weight is not None else None
    if transpose is None or transpose.op_type != "Transpose":
        return False
    source = transpose.inputs[0]
    if source is None or not is_constant(source) or source.is_graph_output():
        return False
    transposes = [use.node for use in source.uses()]
    if not all(is_matrix_transpose(t) and _read_by_products_only(t) for t in transposes):
        return False
    made = derived(source, "transposed", np.transpose, _reversed(source))
    for each in transposes:
        each.outputs[0].replace_all_uses_with(made)
    return True


def _read_by_products_only(transpose: ir.Node) -> bool:
    output = transpose.outputs[0]
    return not output.is_graph_output() and all(
        use.node.op_type == "MatMul" and use.idx == 1 for use in output.uses()
    )


def _flatten_bias(node: ir.Node) -> bool:
    for at, other in ((0, 1), (1, 0)):
        product, bias = node.inputs[at], node.inputs[other]
        producer = product.producer() if product is not None else None
        if producer is None or producer.op_type != "MatMul" or not is_constant(bias):
            continue
        weight = producer.inputs[1]
        if bias is None or bias.shape is None or weight is None or weight.shape is None:
            continue
        dims = [int(d) for d in bias.shape]  # type: ignore[arg-type]
        if product is None or product.shape is None or len(product.shape) < len(dims):
            continue  # the bias would add an axis
        width = weight.shape[-1]
        if 1 < len(dims) <= 3 and dims == [1] * (len(dims) - 1) + [width]:
            flat = derived(bias, "flat", np.ravel, (dims[-1],))
            node.replace_input_with(other, flat)
            return True
    return False


def _fold_scalar(graph: ir.Graph, node: ir.Node, kept: Collection[str]) -> bool:
    for at, other in ((0, 1), (1, 0)):
        product, factor = node.inputs[at], node.inputs[other]
        if product is None or factor is None or not is_constant(factor) or not sole_use(product):
            continue
        tensor = factor.const_value
        if tensor is None or tensor.size != 1 or tensor.dtype != ir.DataType.FLOAT:
            continue
        if len(tensor.shape) > 1 and (
            product.shape is None or len(product.shape) < len(tensor.shape)
        ):
            continue  # the factor would add an axis
        add = product.producer()
        bias: ir.Value | None = None
        matmul = add
        if add is not None and add.op_type == "Add":
            matmul, bias_at = _linear_below(add)
            bias = add.inputs[bias_at] if matmul is not None else None
        if matmul is None or matmul.op_type != "MatMul" or module_path(matmul) in kept:
            continue
        weight = matmul.inputs[1]
        if weight is None or not is_constant(weight) or not sole_use(weight):
            continue
        c = np.float32(tensor.numpy().reshape(()))
        matmul.replace_input_with(
            1, derived(weight, "scaled", partial(np.multiply, c), weight.shape)
        )
        if bias is not None and add is not None:
            scaled = derived(bias, "scaled", partial(np.multiply, c), bias.shape)
            add.replace_input_with(bias_at, scaled)
        result, name = node.outputs[0], node.outputs[0].name
        result.replace_all_uses_with(product, replace_graph_outputs=result.is_graph_output())
        graph.remove(node, safe=True)
        product.name = name
        return True
    return False


def _linear_below(add: ir.Node) -> tuple[ir.Node | None, int]:
    """The MatMul of ``Add(MatMul(x, W), bias)`` and the position of the bias."""
    for at, other in ((0, 1), (1, 0)):
        product, bias = add.inputs[at], add.inputs[other]
        producer = product.producer() if product is not None else None
        if (
            product is not None
            and producer is not None
            and producer.op_type == "MatMul"
            and sole_use(product)
            and is_constant(bias)
            and bias is not None
            and bias.shape is not None
            and len(bias.shape) == 1
        ):
            return producer, other
    return None, 0


def _reversed(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(d) for d in reversed(value.shape.dims))  # type: ignore[arg-type]
