"""Attention reads what the projections write: the 3-D form of the op."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from qcompile.passes.constants import shared_constant
from qcompile.passes.matching import build, ints, is_op, like, made_by, put_for, turns_heads
from qcompile.passes.symbolic_shapes import SymbolicShapes, dims_of

_Dims = list[int | str | None]


class AttentionTo3D(ir.passes.InPlacePass):
    """Remove the Reshapes, Transposes and repeated heads around Attention.

    1. ``K`` and ``V`` that are ``Reshape(Expand(Unsqueeze(x, 2)))``, each head repeated r times
       -> x; the op repeats heads by itself.
    2. Q, K and V each ``Transpose(Reshape(x, [B, S, heads, D]), 0213)``, and the output
       ``Reshape(Transpose(·, 0213), [B, S, heads·D])`` -> ``Attention(x…)`` in the 3-D form, with
       q_num_heads and kv_num_heads.
    3. As 2, with RotaryEmbedding between Transpose and Attention -> its 3-D form (num_heads).
    4. As 2 and 3, with more between Reshape and Transpose, such as a norm of each head -> a Reshape
       in the place of the Transpose.

    The op takes all three inputs in 3-D or all in 4-D: where one cannot be converted, or where
    batch and sequence are not known to stay the first two dimensions, all stay as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        refined = SymbolicShapes()(model).modified
        modified = False
        for node in list(model.graph):
            if is_op(node, "Attention") and _plain(node):
                modified |= _absorb_repeat(node)
                modified |= _convert(model.graph, node)
        if modified:
            RemoveUnusedNodesPass()(model)
            SymbolicShapes()(model)
        return ir.passes.PassResult(model, modified=modified or refined)


@dataclasses.dataclass(frozen=True)
class _Split:
    """``Transpose(Reshape(x))``, possibly rotated after.

    Attributes:
        x: [B, S, heads · D], or [B, S, heads, D] where it is more than a view of such a value.
        heads: of x.
        size: D.
        rotary: what rotates it after, if anything.
    """

    x: ir.Value
    heads: int
    size: int
    rotary: ir.Node | None


def _plain(node: ir.Node) -> bool:
    """4-D inputs, no cache."""
    if any(v is not None for v in node.inputs[4:]):
        return False
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return False
    return all(len(dims_of(v) or ()) == 4 for v in node.inputs[:3])


def _absorb_repeat(node: ir.Node) -> bool:
    sources = [_repeated(node.inputs[at]) for at in (1, 2)]
    (k, k_times), (v, v_times) = sources
    if k is None or v is None or k_times != v_times:
        return False
    node.replace_input_with(1, k)
    node.replace_input_with(2, v)
    return True


def _repeated(value: ir.Value | None) -> tuple[ir.Value | None, int]:
    """x and r, where `value` is x [B, G, S, D] with each head r times in a row."""
    reshape = made_by(value, "Reshape")
    expand = made_by(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = made_by(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if value is None or reshape is None or expand is None or unsqueeze is None:
        return None, 0
    x = unsqueeze.inputs[0]
    before, wide, after = dims_of(x), dims_of(expand.outputs[0]), dims_of(value)
    if x is None or before is None or wide is None or after is None:
        return None, 0
    if ints(unsqueeze, "axes", 1) not in ([2], [-3]) or (len(before), len(wide)) != (4, 5):
        return None, 0
    groups, times = wide[1], wide[2]
    if not isinstance(groups, int) or not isinstance(times, int) or None in after:
        return None, 0
    kept = before == [wide[0], groups, wide[3], wide[4]]
    merged = after == [before[0], groups * times, before[2], before[3]]
    return (x, times) if kept and merged else (None, 0)


def _convert(graph: ir.Graph, node: ir.Node) -> bool:
    splits = [_split(v) for v in node.inputs[:3]]
    merged = _merge(node.outputs[0])
    if merged is None:
        return False
    q, k, v = splits
    if q is None or k is None or v is None or v.rotary is not None or k.heads != v.heads:
        return False
    nodes: list[ir.Node] = []
    inputs: list[ir.Value | None] = []
    for split in (q, k, v):
        value = split.x
        if len(dims_of(value) or ()) == 4:
            nodes.append(_merged(graph, split, node))
            value = nodes[-1].outputs[0]
        if split.rotary is not None:
            nodes.append(_rotary_3d(split, value, split.rotary))
            value = nodes[-1].outputs[0]
        inputs.append(value)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {"q_num_heads": q.heads, "kv_num_heads": k.heads}
    attention = build("Attention", [*inputs, *node.inputs[3:4]], attributes, node)
    put_for(graph, merged, [*nodes, attention], attention.outputs[0])
    return True


def _split(value: ir.Value | None) -> _Split | None:
    rotary = made_by(value, "RotaryEmbedding")
    transpose = made_by(rotary.inputs[0] if rotary is not None else value, "Transpose")
    if transpose is None or not turns_heads(transpose):
        return None
    apart = transpose.inputs[0]
    dims = dims_of(apart)
    if apart is None or dims is None or len(dims) != 4 or None in dims[:2]:
        return None
    heads, size = dims[2:]
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    reshape = made_by(apart, "Reshape")
    if reshape is None:
        return _Split(apart, heads, size, rotary)
    x = reshape.inputs[0]
    if x is None or _heads(dims_of(x), dims) is None:
        return None
    return _Split(x, heads, size, rotary)


def _heads(flat: _Dims | None, split: _Dims | None) -> int | None:
    """H, where [B, S, H·D] and [B, S, H, D] are two views of the same data, H and D known."""
    if flat is None or split is None or (len(flat), len(split)) != (3, 4):
        return None
    if flat[:2] != split[:2] or None in flat[:2]:
        return None
    heads, size = split[2:]
    if not isinstance(heads, int) or not isinstance(size, int) or flat[2] != heads * size:
        return None
    return heads


def _merge(value: ir.Value) -> ir.Value | None:
    """The Reshape's output of ``Reshape(Transpose(value, 0213), [B, S, heads·D])``."""
    transpose = _only_data_user(value)
    if transpose is not None and is_op(transpose, "Reshape"):
        # torch's older exporter writes the 4-D shape once more, though it is the same.
        again = transpose.outputs[0]
        if transpose.inputs[0] is not value or None in (dims_of(again) or [None]):
            return None
        transpose = _only_data_user(again) if dims_of(again) == dims_of(value) else None
    if transpose is None or not is_op(transpose, "Transpose") or not turns_heads(transpose):
        return None
    reshape = _only_data_user(transpose.outputs[0])
    if reshape is None or not is_op(reshape, "Reshape"):
        return None
    if reshape.inputs[0] is not transpose.outputs[0]:
        return None
    found = _heads(dims_of(reshape.outputs[0]), dims_of(transpose.outputs[0]))
    return reshape.outputs[0] if found is not None else None


def _only_data_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads what `value` holds, where the others read only its shape."""
    users = {user for user in value.consumers() if not is_op(user, "Shape")}
    if len(users) != 1 or value.is_graph_output():
        return None
    return users.pop()


def _merged(graph: ir.Graph, split: _Split, origin: ir.Node) -> ir.Node:
    """`split.x` [B, S, heads, D] as [B, S, heads · D]."""
    width = split.heads * split.size
    shape = shared_constant(graph, "attention/merged", np.array([0, 0, width]))
    node = build("Reshape", [split.x, shape], {}, origin)
    node.name = f"{split.x.name}/merged"
    node.outputs[0].type = split.x.type
    node.outputs[0].shape = ir.Shape([*(dims_of(split.x) or [])[:2], width])
    return node


def _rotary_3d(split: _Split, x: ir.Value, rotary: ir.Node) -> ir.Node:
    attributes = {name: attribute.value for name, attribute in rotary.attributes.items()}
    attributes["num_heads"] = split.heads
    node = build("RotaryEmbedding", [x, *rotary.inputs[1:]], attributes, rotary)
    like(node.outputs[0], x)
    return node
