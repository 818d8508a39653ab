"""Decomposed scaled dot-product attention becomes the ONNX op."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from qcompile.passes.constants import constant, sole_use
from qcompile.passes.matching import (
    HEADS_FIRST,
    build,
    made_by,
    operands,
    put_for,
    scalar_of,
    skip_noops,
)
from qcompile.passes.symbolic_shapes import SymbolicShapes, broadcast, dims_of

_SWAP_LAST = (0, 1, 3, 2)
_HEADS_FIRST_KEYS_LAST = (0, 2, 3, 1)


class FuseAttention(ir.passes.InPlacePass):
    """Recognise attention over Q, K, V of shape [batch, heads, sequence, channels].

    1. ``MatMul(Softmax(MatMul(Q, Kᵀ) · c + mask), V)`` -> ``Attention(Q, K, V, mask, scale=c)``.
       c is the product of all constant scalars by which Q, Kᵀ or the scores are multiplied or
       divided. Scores that are capped before the mask, ``Tanh(scores / cap) · cap``, make the op's
       ``softcap``. The mask may be absent, or a sum, which layers then share. Kᵀ is a Transpose of
       the last two axes, or one that also brings [batch, sequence, heads, channels] into order.
       After the Softmax, Identity, Dropout and ``Where(IsNaN(p), 0, p)`` are passed over.
    2. With that Where, a mask ``Where(keep, 0, -inf)`` -> the boolean mask `keep`: the op gives
       zero for a row that is masked entirely, as the Where does.
    3. A mask whose last two dimensions may be one is expanded to the scores' size, which ONNX
       Runtime asks for; layers that share a mask share the Expand.
    4. com.microsoft ``MultiHeadAttention`` of 3-D Q, K, V [, attention_bias], without bias,
       padding mask, past or present -> ``Attention`` in the 3-D form.

    Left as it is: scores or probabilities that something else reads, a scale that is not constant
    and positive, unknown ranks, batches that differ, K and V that are broadcast over heads.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        refined = SymbolicShapes()(model).modified
        modified = False
        expanded: _Made = {}
        for node in list(model.graph):
            if node.op_type == "MatMul" and node.domain in ("", "ai.onnx"):
                modified |= _fuse(model.graph, node, expanded)
            elif node.domain == "com.microsoft" and node.op_type == "MultiHeadAttention":
                modified |= _replace_multi_head(model.graph, node)
        if modified:
            RemoveUnusedNodesPass()(model)
            SymbolicShapes()(model)
        return ir.passes.PassResult(model, modified=modified or refined)


_Made: TypeAlias = dict[tuple[object, ...], ir.Value]
"""Masks that layers share, by what they are made of."""


def _fuse(graph: ir.Graph, node: ir.Node, expanded: _Made) -> bool:
    weights, v = node.inputs[0], node.inputs[1]
    if weights is None or v is None:
        return False
    softmax, guarded = _softmax(weights)
    scores = softmax.inputs[0] if softmax is not None else None
    if scores is None or not sole_use(scores):
        return False
    for scaled, masks in _unmasked(scores):
        found = _unscaled(scaled)
        if found is None:
            continue
        product, scale, cap = found
        q, k_transposed = product.inputs[0], product.inputs[1]
        if q is None or k_transposed is None:
            continue
        q, q_scale = _strip_scale(q)
        k, k_scale, perm = _untransposed(k_transposed)
        scale *= q_scale * k_scale * (cap or 1.0)
        if k is None or not math.isfinite(scale) or scale <= 0.0:
            continue
        if any(_rank(mask) not in (1, 2, 3, 4) for mask in masks):
            continue
        k_dims = dims_of(k)
        mask_dims = broadcast([dims_of(mask) for mask in masks]) if masks else None
        if k_dims is None or not _shapes_fit(dims_of(q), k_dims, perm, dims_of(v), mask_dims):
            continue
        mask = _summed(graph, node, masks, expanded)
        attributes = {"scale": scale, "is_causal": 0} | ({"softcap": cap} if cap else {})
        _put(graph, node, q, k, v, mask, attributes, perm, guarded, expanded)
        return True
    return False


def _softmax(value: ir.Value) -> tuple[ir.Node | None, bool]:
    """The Softmax that `value` is, and whether rows of NaN are made zero after it."""
    if not sole_use(value):
        return None, False
    bare, guarded = skip_noops(value), False
    where = made_by(bare, "Where")
    if where is not None:
        condition, zero, kept = where.inputs
        nan = made_by(condition, "IsNaN")
        if kept is None or nan is None or nan.inputs[0] is not kept or _constant(zero) != {0.0}:
            return None, False
        if any(use.node not in (where, nan) for use in kept.uses()) or kept.is_graph_output():
            return None, False
        bare, guarded = skip_noops(kept), True
    elif bare is not value and not sole_use(bare):
        return None, False
    node = made_by(bare, "Softmax")
    axis = node.attributes.get_int("axis", -1) if node is not None else 0
    return (node, guarded) if axis in (-1, 3) else (None, False)


def _unmasked(scores: ir.Value) -> list[tuple[ir.Value, list[ir.Value]]]:
    """The ways in which `scores` may be read as scaled product plus masks."""
    add = made_by(scores, "Add")
    if add is None:
        return [(scores, [])]
    return [
        (product, [mask, *more])
        for rest, mask in operands(add)
        if sole_use(rest)
        for product, more in _unmasked(rest)
    ]


def _summed(graph: ir.Graph, node: ir.Node, masks: list[ir.Value], made: _Made) -> ir.Value | None:
    """The sum of `masks`, made once for all layers, before the first that adds it."""
    if len(masks) < 2:
        return masks[0] if masks else None
    key = tuple(sorted(masks, key=id))
    if key not in made:
        total = masks[0]
        for mask in masks[1:]:
            add = build("Add", [total, mask], {}, node)
            graph.insert_before(node, add)
            total = _typed(add.outputs[0], mask, broadcast([dims_of(total), dims_of(mask)]) or [])
        made[key] = total
    return made[key]


def _unscaled(scores: ir.Value) -> tuple[ir.Node, float, float | None] | None:
    """The product in `scores`, its factor, and the cap that a Tanh puts on them: cap · tanh(·)."""
    value, scale = _strip_scale(scores)
    cap, tanh = None, made_by(value, "Tanh")
    if tanh is not None and tanh.inputs[0] is not None:
        if not sole_use(value) or not math.isfinite(scale) or scale <= 0.0:
            return None
        cap = scale
        value, scale = _strip_scale(tanh.inputs[0])
    product = made_by(value, "MatMul")
    return (product, scale, cap) if product is not None and sole_use(value) else None


def _strip_scale(value: ir.Value) -> tuple[ir.Value, float]:
    """`value` without multiplications and divisions by constants, and their product."""
    scale = 1.0
    while True:
        value = skip_noops(value)
        mul, div = made_by(value, "Mul"), made_by(value, "Div")
        if div is not None and div.inputs[0] is not None:
            factor = scalar_of(div.inputs[1])
            if factor:
                value, scale = div.inputs[0], scale / factor
                continue
        elif mul is not None:
            for other, number in operands(mul):
                factor = scalar_of(number)
                if factor is not None and _rank(other) != 0:
                    value, scale = other, scale * factor
                    break
            else:
                return value, scale
            continue
        return value, scale


def _untransposed(value: ir.Value) -> tuple[ir.Value | None, float, tuple[int, ...]]:
    """K, the scalars on its way, and the permutation that made `value` of it."""
    value, scale = _strip_scale(value)
    transpose = made_by(value, "Transpose")
    if transpose is None or transpose.inputs[0] is None:
        return None, scale, ()
    perm = tuple(transpose.attributes.get_ints("perm", ()))
    if perm not in (_SWAP_LAST, _HEADS_FIRST_KEYS_LAST):
        return None, scale, ()
    source, more = _strip_scale(transpose.inputs[0])
    return source, scale * more, perm


def _shapes_fit(
    q: list[int | str | None] | None,
    k: list[int | str | None],
    perm: tuple[int, ...],
    v: list[int | str | None] | None,
    mask: list[int | str | None] | None,
) -> bool:
    """Four axes each, and nothing known that would make one of them broadcast."""
    if q is None or v is None or not len(q) == len(k) == len(v) == 4:
        return False
    if perm == _HEADS_FIRST_KEYS_LAST:
        k = [k[i] for i in HEADS_FIRST]
    pairs = [(q[0], k[0]), (q[1], k[1]), (q[3], k[3]), (k[0], v[0]), (k[1], v[1]), (k[2], v[2])]
    if mask is not None:
        # A mask that is wider than the scores would broadcast them.
        whole = [None] * (4 - len(mask)) + mask
        pairs += [(a, b) for a, b in zip(whole[:2], q[:2], strict=True) if a != 1]
    return not any(_broadcasts(a, b) or _broadcasts(b, a) for a, b in pairs)


def _broadcasts(a: object, b: object) -> bool:
    """Whether two dimensions differ, or may: 1 beside one that has another name or none."""
    return a != b and isinstance(a, int) and (isinstance(b, int) or a == 1)


def _put(
    graph: ir.Graph,
    node: ir.Node,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value | None,
    attributes: dict[str, int | float],
    perm: tuple[int, ...],
    guarded: bool,
    expanded: _Made,
) -> None:
    nodes: list[ir.Node] = []
    if perm == _HEADS_FIRST_KEYS_LAST:
        transpose = build("Transpose", [k], {"perm": list(HEADS_FIRST)}, node)
        before = dims_of(k) or []
        k = _typed(transpose.outputs[0], k, [before[i] for i in HEADS_FIRST])
        nodes.append(transpose)
    inputs: list[ir.Value | None] = [q, k, v]
    if mask is not None:
        mask = _boolean(mask) if guarded else mask
        inputs.append(_full_size(graph, node, mask, q, k, nodes, expanded))
    attention = build("Attention", inputs, attributes, node)
    put_for(graph, node.outputs[0], [*nodes, attention], attention.outputs[0])
    q_dims, v_dims = dims_of(q) or [], dims_of(v) or []
    attention.outputs[0].shape = ir.Shape([*q_dims[:3], v_dims[3]])


def _boolean(mask: ir.Value) -> ir.Value:
    """`keep` of ``Where(keep, 0, -inf)``, or the mask itself."""
    where = made_by(mask, "Where")
    if where is None or where.inputs[0] is None:
        return mask
    kept = _constant(where.inputs[1]) == {0.0} and _constant(where.inputs[2]) == {-math.inf}
    return where.inputs[0] if kept else mask


def _full_size(
    graph: ir.Graph,
    node: ir.Node,
    mask: ir.Value,
    q: ir.Value,
    k: ir.Value,
    nodes: list[ir.Node],
    expanded: _Made,
) -> ir.Value:
    """The mask with its last two dimensions those of the scores, not one."""
    dims, rows, columns = dims_of(mask), (dims_of(q) or [])[2], (dims_of(k) or [])[2]
    if dims is not None and dims[-2:] == [rows, columns] and None not in (rows, columns):
        return mask
    named = rows is not None and columns is not None
    if named and (mask, rows, columns) in expanded:
        return expanded[mask, rows, columns]
    ones = constant(graph, "attention_mask/ones", np.ones(2, dtype=np.int64))
    sizes = [build("Shape", [x], {"start": 2, "end": 3}, node) for x in (q, k)]
    target = build("Concat", [ones, *(s.outputs[0] for s in sizes)], {"axis": 0}, node)
    expand = build("Expand", [mask, target.outputs[0]], {}, node)
    for made in (*sizes, target):
        made.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    nodes += [*sizes, target, expand]
    lead = [None] * (4 - len(dims)) + dims if dims is not None else [None] * 4
    result = _typed(expand.outputs[0], mask, [*lead[:2], rows, columns])
    if named:
        expanded[mask, rows, columns] = result
    return result


def _replace_multi_head(graph: ir.Graph, node: ir.Node) -> bool:
    padded = [*node.inputs, *[None] * 10][:10]
    q, k, v, bias, padding, relative, *rest = padded
    if any(v is None or _rank(v) != 3 for v in (q, k, v)):
        return False
    if any(v is not None for v in (bias, padding, *rest)):
        return False
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return False
    heads = node.attributes.get_int("num_heads", 0)
    attributes: dict[str, int | float] = {
        "is_causal": node.attributes.get_int("unidirectional", 0),
        "q_num_heads": heads,
        "kv_num_heads": heads,
    }
    scale = node.attributes.get_float("scale", 0.0)
    if scale:
        attributes["scale"] = scale
    if heads <= 0 or (relative is not None and attributes["is_causal"]):
        return False
    inputs = [q, k, v] if relative is None else [q, k, v, relative]
    attention = build("Attention", inputs, attributes, node)
    put_for(graph, node.outputs[0], [attention], attention.outputs[0])
    return True


def _typed(value: ir.Value, source: ir.Value, dims: list[int | str | None]) -> ir.Value:
    value.type = source.type
    value.shape = ir.Shape(dims)
    return value


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _constant(value: ir.Value | None) -> set[float]:
    """The one number that a constant holds, as a set; empty where it holds another count."""
    number = scalar_of(value)
    return set() if number is None else {number}
