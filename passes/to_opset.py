"""Write a graph of opset 23 in an older opset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs
from qcompile.passes.constants import constant, drop_unused, shared_constant
from qcompile.passes.matching import array_of, is_op, like

from qcompile.errors import ModelError
from qcompile.names import module_path

NEWEST: Final = 23


class ToOpset(ir.passes.InPlacePass):
    """State a graph of primitive ops, and the bodies in it, in `opset`.

    1. axes of a reduction: an input -> an attribute (before 18)
    2. ``Split`` into equal parts -> without `num_outputs` (before 18)
    3. ``Pad`` of some axes -> of all (before 18)
    4. ``Shape`` of some axes -> ``Slice(Shape)`` (before 15)
    5. ``Reshape`` with `allowzero` -> without (before 14)
    6. ``BitwiseAnd``, ``Or`` and ``Not`` of bools -> ``And``, ``Or``, ``Not`` (before 18)
    7. ``GridSample`` by its modes' older names (before 20)
    8. attributes that the opset does not know, where they say what it does anyway -> left out

    Args:
        opset: 13 to 23.

    Raises:
        ModelError: the opset lacks an op, or what one does.
    """

    def __init__(self, opset: int) -> None:
        super().__init__()
        self.opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        before = model.opset_imports.get("", NEWEST)
        if before == self.opset:
            return ir.passes.PassResult(model, modified=False)
        for node in list(model.graph.all_nodes()):
            for since, kinds, rule in _RULES:
                if self.opset < since and is_op(node, *kinds):
                    rule(model.graph, node)
                    break
        drop_unused(model)
        for node in model.graph.all_nodes():
            _fit(node, before, self.opset)
            node.version = None
        model.opset_imports[""] = self.opset
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        model.ir_version = max(7, onnx.helper.find_min_ir_version_for(opsets))
        return ir.passes.PassResult(model, modified=True)


def _fit(node: ir.Node, before: int, opset: int) -> None:
    """Leave out attributes that mean nothing, or refuse.

    Raises:
        ModelError: the opset cannot say what the node does.
    """
    if node.domain not in ("", "ai.onnx"):
        raise ModelError(
            f"{module_path(node) or node.name} is {node.domain}.{node.op_type}, and only operators "
            "of ONNX itself are standard"
        )
    where = f"{node.op_type} ({module_path(node) or node.name})"
    try:
        new = defs.get_schema(node.op_type, opset, "")
    except defs.SchemaError:
        new = None
    if new is None or new.deprecated:  # of a deprecated one the meaning changed
        first = defs.get_schema(node.op_type, before, "").since_version
        raise ModelError(f"opset {opset} has no {where}", hint=f"--opset {first} or later")
    old = defs.get_schema(node.op_type, before, "")
    for name in [name for name in node.attributes if name not in new.attributes]:
        default = old.attributes[name].default_value if name in old.attributes else None
        attribute = node.attributes[name]
        if (
            default is None
            or not default.name
            or onnx.helper.get_attribute_value(default) != _plain(attribute.value)
        ):
            raise ModelError(
                f"opset {opset} has no attribute {name} of {where}",
                hint=f"--opset {old.since_version} or later",
            )
        del node.attributes[name]
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    if given > new.max_input:
        raise ModelError(
            f"opset {opset} has {where} with fewer inputs",
            hint=f"--opset {old.since_version} or later",
        )


def _plain(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value


def _axes_to_attribute(graph: ir.Graph, node: ir.Node) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    noop = node.attributes.get_int("noop_with_empty_axes", 0)
    if axes is None:
        if noop:
            raise ModelError(f"{module_path(node)}: a reduction of no axis is not lowered")
        return
    array = array_of(axes)
    if array is None:
        raise ModelError(f"{module_path(node)}: the axes of a reduction are computed")
    if noop and not array.size:
        raise ModelError(f"{module_path(node)}: a reduction of no axis is not lowered")
    node.attributes["axes"] = ir.AttrInt64s("axes", [int(i) for i in np.ravel(array)])
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)


def _equal_split(graph: ir.Graph, node: ir.Node) -> None:
    parts = node.attributes.get_int("num_outputs", 0)
    x, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    size = x.shape[axis] if x is not None and x.shape is not None else None
    if parts and (not isinstance(size, int) or size % parts):
        raise ModelError(f"{module_path(node)}: the parts of a Split are not equal")
    node.attributes.pop("num_outputs", None)


def _whole_pad(graph: ir.Graph, node: ir.Node) -> None:
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    if axes is None:
        return
    pads, chosen, x = array_of(node.inputs[1]), array_of(axes), node.inputs[0]
    if pads is None or chosen is None or x is None or x.shape is None:
        raise ModelError(f"{module_path(node)}: the axes of a Pad are computed")
    rank = len(x.shape)
    whole = np.zeros((2, rank), np.int64)
    whole[:, np.ravel(chosen) % rank] = pads.reshape(2, -1)
    node.replace_input_with(1, constant(graph, f"{node.name}.pads", whole.ravel()))
    node.resize_inputs(3)


def _sliced_shape(graph: ir.Graph, node: ir.Node) -> None:
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", 2**31 - 1)
    node.attributes.pop("start", None)
    node.attributes.pop("end", None)
    if start == 0 and end == 2**31 - 1:
        return
    old = node.outputs[0]
    ends = [shared_constant(graph, "axes", np.array([n], np.int64)) for n in (start, end)]
    sliced = ir.node("Slice", [old, *ends], name=f"{node.name}/Slice")
    new = like(sliced.outputs[0], old)
    old.shape = None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    sliced.replace_input_with(0, old)
    owner = node.graph
    assert isinstance(owner, ir.Graph)
    owner.insert_after(node, [sliced])
    new.name, old.name = old.name, f"{old.name}/whole"


def _plain_reshape(graph: ir.Graph, node: ir.Node) -> None:
    shape = array_of(node.inputs[1])
    if node.attributes.get_int("allowzero", 0) and shape is not None and (shape == 0).any():
        raise ModelError(f"{module_path(node)}: a Reshape to an empty tensor is not lowered")
    node.attributes.pop("allowzero", None)


def _logical(graph: ir.Graph, node: ir.Node) -> None:
    if node.outputs[0].dtype == ir.DataType.BOOL:
        node.op_type = node.op_type.removeprefix("Bitwise")


def _older_mode(graph: ir.Graph, node: ir.Node) -> None:
    mode = node.attributes.get_string("mode", "linear")
    older = {"linear": "bilinear", "cubic": "bicubic"}.get(mode or "linear", mode)
    node.attributes["mode"] = ir.AttrString("mode", older or "bilinear")


_REDUCTIONS: Final = (
    *("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
)
_Rule = Callable[[ir.Graph, ir.Node], None]
_RULES: Final[tuple[tuple[int, tuple[str, ...], _Rule], ...]] = (
    (20, ("GridSample",), _older_mode),
    (18, _REDUCTIONS, _axes_to_attribute),
    (18, ("Split",), _equal_split),
    (18, ("Pad",), _whole_pad),
    (18, ("BitwiseAnd", "BitwiseOr", "BitwiseNot"), _logical),
    (15, ("Shape",), _sliced_shape),
    (14, ("Reshape",), _plain_reshape),
)
