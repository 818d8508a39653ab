"""What recognition passes share: walking the graph backwards, and putting one node for many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import derived

from qcompile.linears import is_constant
from qcompile.names import MODULE_PATH_KEY, module_path, set_module_path

_ONNX = ("", "ai.onnx")
HEADS_FIRST: Final = (0, 2, 1, 3)
"""What moves the heads of [batch, tokens, heads, channels] in front of the tokens, or back."""


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """True for a node of ONNX's own domain that is one of `op_types`."""
    return node is not None and node.domain in _ONNX and node.op_type in op_types


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that produces `value` as its first output, if it is one of `op_types`."""
    node = value.producer() if value is not None else None
    if value is None or node is None or not is_op(node, *op_types) or value.index() != 0:
        return None
    return node


def array_of(value: ir.Value | None) -> Any:
    """The array of an initializer or Constant node, or None. Meant for small ones."""
    if value is None:
        return None
    if value.is_graph_input():  # a caller can override it
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar_of(value: ir.Value | None) -> float | None:
    """The number that a one-element constant holds, or None."""
    if value is None:
        return None
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    # The size is asked first: reading a weight to learn that it is no scalar would load it.
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))


def is_scalar(value: ir.Value | None, wanted: float) -> bool:
    """True for a constant equal to `wanted` up to float32 rounding."""
    found = scalar_of(value)
    return found is not None and abs(found - wanted) <= 1e-6 * abs(wanted)


def same(a: ir.Value | None, b: ir.Value | None) -> bool:
    """True where `a` and `b` are one value, or the same op of the same values."""
    if a is b:
        return True
    first, second = a.producer() if a else None, b.producer() if b else None
    if first is None or second is None or first.op_identifier() != second.op_identifier():
        return False
    if {k: v.value for k, v in first.attributes.items()} != {
        k: v.value for k, v in second.attributes.items()
    }:
        return False
    if len(first.inputs) != len(second.inputs):
        return False
    return all(
        x is y or (array_of(x) is not None and np.array_equal(array_of(x), array_of(y)))
        for x, y in zip(first.inputs, second.inputs, strict=True)
    )


def operands(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of a two-operand node's inputs."""
    a, b = node.inputs[0], node.inputs[1]
    if a is not None and b is not None:
        yield a, b
        yield b, a


def ints(node: ir.Node, name: str, at: int) -> list[int] | None:
    """Integers given as attribute `name` or, in later opsets, as constant input `at`."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return [int(i) for i in attribute.as_ints()]
    array = array_of(node.inputs[at]) if len(node.inputs) > at else None
    return None if array is None else [int(i) for i in np.ravel(array)]


def on_last_axis(axes: Sequence[int] | None, value: ir.Value | None) -> bool:
    """True where `axes` names the last axis of `value` and no other."""
    if axes is None or len(axes) != 1:
        return False
    if axes[0] == -1:
        return True
    return value is not None and value.shape is not None and axes[0] == len(value.shape) - 1


def skip_noops(value: ir.Value) -> ir.Value:
    """`value` without Identity, inference-time Dropout, and Casts from float32 to float32."""
    while True:
        node = made_by(value, "Identity", "Dropout", "Cast")
        source = node.inputs[0] if node is not None else None
        if node is None or source is None:
            return value
        if node.op_type == "Cast" and not (
            node.attributes.get_int("to", 0) == ir.DataType.FLOAT
            and source.dtype == ir.DataType.FLOAT
        ):
            return value
        if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
            training = array_of(node.inputs[2])
            if training is None or bool(np.any(training)):
                return value
        value = source


def channel_vector(value: ir.Value | None) -> bool:
    """True for a float32 constant of shape [D], or [1, …, 1, D], with D > 1."""
    if value is None or not is_constant(value) or value.dtype != ir.DataType.FLOAT:
        return False
    dims = list(value.shape or ())
    return bool(dims) and all(d == 1 for d in dims[:-1]) and dims[-1] != 1


def flat(value: ir.Value) -> ir.Value:
    """A channel vector in shape [D]."""
    assert value.shape is not None
    if len(value.shape) == 1:
        return value
    return derived(value, "flat", np.ravel, (int(value.shape[-1]),))  # type: ignore[arg-type]


def like(value: ir.Value, source: ir.Value) -> ir.Value:
    """Give `value` the type and shape of `source`."""
    value.type = source.type
    value.shape = source.shape.copy() if source.shape is not None else None
    return value


def turns_heads(transpose: ir.Node) -> bool:
    """Whether a Transpose moves the heads in front of the tokens, or back."""
    return tuple(transpose.attributes.get_ints("perm", ())) == HEADS_FIRST


def name_nodes(nodes: Iterable[ir.Node], prefix: str) -> None:
    """Name `nodes` by their places under `prefix`, and what they make where it has no name yet."""
    for at, node in enumerate(nodes):
        node.name = f"{prefix}/{at}/{node.op_type}"
        made = node.outputs[0]
        made.name = made.name or f"{node.name}/output"


def build(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    origin: ir.Node,
) -> ir.Node:
    """A node that stands where `origin` stood and keeps its module path."""
    node = ir.node(op_type, inputs, attributes=dict(attributes))
    name = origin.name or ""
    node.name = name if not name or name.endswith(op_type) else f"{name}/{op_type}"
    node.metadata_props.update(origin.metadata_props)
    if MODULE_PATH_KEY not in node.metadata_props:
        path = module_path(origin)
        if (origin.name or "").startswith("/"):
            # torch's older exporter names a node by its module and then its op.
            path = str(origin.name).rsplit("/", 1)[0].strip("/").replace("/", ".")
        if path:
            set_module_path(node, path)
    return node


def put_kernel(
    graph: ir.Graph,
    matmul: ir.Node,
    last: ir.Node,
    nodes: Sequence[ir.Node],
    result: ir.Value,
    kernel: str,
) -> None:
    """Put `nodes`, which make `result`, for `matmul` and the addition of its bias.

    Args:
        graph: the graph that owns them.
        matmul: the Linear; the node of type `kernel` takes its name.
        last: the addition, or `matmul` itself.
        nodes: in order.
        result: what stands for the output of `last`.
        kernel: op type.
    """
    for node in nodes:
        node.metadata_props.update(matmul.metadata_props)
        node.name = str(matmul.name) if node.op_type == kernel else f"{matmul.name}/{node.op_type}"
    old = [matmul] if last is matmul else [matmul, last]
    ir.convenience.replace_nodes_and_values(graph, last, old, nodes, last.outputs, [result])


def put_for(graph: ir.Graph, old: ir.Value, nodes: Sequence[ir.Node], new: ir.Value) -> None:
    """Insert `nodes` where `old` is made, and let everything read `new` instead of `old`.

    What made `old` stays, unread, until unused nodes are dropped.
    """
    anchor = old.producer()
    assert anchor is not None
    like(new, old)
    graph.insert_before(anchor, nodes)
    name = old.name
    was_output = old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=was_output)
    # The new value takes the name: a graph output must keep it, and reports read better so.
    old.name = f"{name}/replaced"
    new.name = name
