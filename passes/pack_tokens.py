"""Padding moves behind the tokens, where a causal model does not see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused, sole_use
from qcompile.passes.known_mask import MaskMeaning, meaning_of
from qcompile.passes.matching import ints, is_op, like, scalar_of
from qcompile.passes.per_token import DEQUANTIZE, DOMAIN, QUANTIZE
from qcompile.passes.symbolic_shapes import dims_of

from qcompile.linears import is_constant

_ELEMENTWISE: Final = frozenset(
    [
        "Abs",
        "Add",
        "Cast",
        "Clip",
        "Cos",
        "Div",
        "Erf",
        "Exp",
        "Gelu",
        "Identity",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Pow",
        "Reciprocal",
        "Relu",
        "Sigmoid",
        "Sin",
        "Sqrt",
        "Sub",
        "Tanh",
    ]
)
_NORMS: Final = ("LayerNormalization", "RMSNormalization")
_BOOL, _INT32, _INT64 = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64

Rows: TypeAlias = Sequence[int | str | None]
"""Batch and sequence."""


class PackTokens(ir.passes.InPlacePass):
    """``Attention`` under a mask of causality and padding -> causal, on rows with tokens first.

    Every input of tokens [batch, sequence] is reordered, tokens before padding, and what the graph
    gives is put back: under causality a token sees nothing that comes later, so attention needs no
    mask. For that all between inputs and outputs but attention has to work on each token by itself:
    products with constant matrices, norms, element-wise ops, embeddings, rotary positions.

    Left as it is: a graph where anything else reaches an output, or with attention that is not
    causal, has a window, or is not under the same padding in all layers. Rows of padding give what
    the next token gives, or other padding.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        masks = {_mask(node) for node in model.graph if is_op(node, "Attention")}
        meanings = {None if mask is None else meaning_of(model, mask) for mask in masks}
        meaning = meanings.pop() if len(meanings) == 1 else None
        padding = meaning.padding if meaning is not None else None
        if padding is None or meaning != MaskMeaning(causal=True, padding=padding):
            return ir.passes.PassResult(model, modified=False)
        rows = dims_of(padding)
        if rows is None or None in rows or not _tokenwise(model.graph, padding, rows):
            return ir.passes.PassResult(model, modified=False)
        for node in model.graph:
            if is_op(node, "Attention"):
                node.resize_inputs(3)
                node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
        drop_unused(model)
        _reorder(model.graph, padding, rows)
        return ir.passes.PassResult(model, modified=True)


def _mask(attention: ir.Node) -> ir.Value | None:
    return attention.inputs[3] if len(attention.inputs) > 3 else None


def _tokenwise(graph: ir.Graph, padding: ir.Value, rows: Rows) -> bool:
    """Whether attention alone lets the outputs of one token depend on another."""
    tokens = {v for v in graph.inputs if v is not padding and dims_of(v) == list(rows)}
    fixed: set[ir.Value] = set()
    for node in graph:
        given = [v for v in node.inputs if v is not None]
        computed = given and all(is_constant(v) or v in fixed for v in given)
        if computed or is_op(node, "Constant"):
            fixed.update(node.outputs)
        elif _works_on_rows(node, tokens, fixed, rows):
            tokens.update(node.outputs)
    return all(v in tokens for v in graph.outputs)


def _works_on_rows(
    node: ir.Node,
    tokens: set[ir.Value],
    fixed: set[ir.Value],
    rows: Rows,
) -> bool:
    if node.domain == DOMAIN and node.op_type in (QUANTIZE, DEQUANTIZE):
        return all(v in tokens for v in node.inputs)
    if is_op(node, "QuantizeLinear", "DequantizeLinear"):
        return node.inputs[0] in tokens and all(scalar_of(v) is not None for v in node.inputs[1:])
    dims = dims_of(node.outputs[0])
    if dims is None or dims[:2] != list(rows):
        return False
    if is_op(node, "Attention"):
        plain = all(v is None for v in node.inputs[4:]) and len(node.outputs) == 1
        return plain and len(dims) == 3 and all(v in tokens for v in node.inputs[:3])
    by_row = [v in tokens for v in node.inputs]
    constant_from = [v is None or is_constant(v) or v in fixed for v in node.inputs]
    if not all(a or b for a, b in zip(by_row, constant_from, strict=True)):
        return False
    rank = len(dims)
    if is_op(node, "Gather"):
        axis = node.attributes.get_int("axis", 0)
        channels = axis in (-1, rank - 1) and rank > 2 and by_row == [True, False]
        return channels or (axis == 0 and by_row == [False, True])
    if is_op(node, "Slice"):
        return rank > 2 and by_row[0] and not any(by_row[1:]) and ints(node, "axes", 3) == [-1]
    if is_op(node, "Reshape", "ReduceSum"):
        # Channels in blocks, and what is summed of them.
        return by_row == [True, False] and _keeps_rows(node, rank)
    if is_op(node, "MatMul"):
        other = node.inputs[1]
        return by_row == [True, False] and other is not None and len(other.shape or ()) == 2
    if is_op(node, *_NORMS):
        return by_row[0] and rank > 2 and node.attributes.get_int("axis", -1) in (-1, rank - 1)
    if is_op(node, "Unsqueeze"):
        return by_row[0]
    if is_op(node, "RotaryEmbedding"):
        return len(node.inputs) == 3 and all(by_row)
    return is_op(node, *_ELEMENTWISE) and all(
        len(value.shape or ()) == rank if value in tokens else _same_for_all(value, rank)
        for value in node.inputs
        if value is not None
    )


def _keeps_rows(node: ir.Node, rank: int) -> bool:
    """Whether the constant of a Reshape or a ReduceSum says that it is about channels alone."""
    constants = node.inputs[1].const_value if node.inputs[1] is not None else None
    numbers = constants.numpy().tolist() if constants is not None else []
    if node.op_type == "Reshape":
        return rank > 2 and numbers[:2] == [0, 0]
    return rank > 2 and numbers == [-1] and not node.attributes.get_int("keepdims", 1)


def _same_for_all(value: ir.Value, rank: int) -> bool:
    """Whether every row of a value of `rank` dimensions meets `value` alike."""
    dims = dims_of(value)
    return dims is not None and all(d == 1 for d in ([1] * rank + dims)[-rank:][:2])


def _reorder(graph: ir.Graph, padding: ir.Value, rows: Rows) -> None:
    tape = ir.tape.Tape()
    keep = tape.op("Cast", [padding], {"to": int(_BOOL)})
    kept = tape.op("Cast", [keep], {"to": int(_INT32)})
    sort_tokens(graph, tape, rows, padding, keep, kept, negative(tape, padding))


def negative(tape: ir.tape.Tape, value: ir.Value) -> ir.Value:
    """int32 in the shape of `value`, -1 everywhere: sums of it are places, and how long an axis is.

    What computes with a shape ONNX Runtime moves to the CPU; this it does not.
    """
    shape = tape.op("Shape", [value])
    return tape.op("ConstantOfShape", [shape], {"value": ir.tensor(np.array([-1], np.int32))})


def name_places(nodes: Sequence[ir.Node], prefix: str) -> None:
    """Name `nodes`, which compute places of tokens, and what they make; and give it its type."""
    for at, node in enumerate(nodes):
        node.name = f"{prefix}/{at}"
        made, source = node.outputs[0], node.inputs[1 if node.op_type == "Where" else 0]
        made.name = f"{node.name}/{node.op_type}"
        if made.dtype is None:
            given = {"Shape": _INT64, "ConstantOfShape": _INT32}.get(node.op_type)
            if given is None:
                assert source is not None and source.dtype is not None, node.op_type
                given = source.dtype
            made.dtype = ir.DataType(node.attributes.get_int("to", int(given)))


def sort_tokens(
    graph: ir.Graph,
    tape: ir.tape.Tape,
    rows: Rows,
    padding: ir.Value,
    keep: ir.Value,
    kept: ir.Value,
    minus: ir.Value,
) -> None:
    """Let the graph read its inputs tokens first, and give its outputs in the order they came in.

    Args:
        graph: its inputs of `rows` are reordered, its outputs of `rows` and more put back.
        tape: what makes the values below; all its nodes go to the start of the graph.
        rows: batch and sequence.
        padding: the input that stays as it is.
        keep: bool of `rows`, which places hold tokens.
        kept: int32 of `rows`, the same.
        minus: int32 of `rows`, -1 everywhere.
    """
    axis = constant(graph, "pack.axis", np.array(1))
    # Tokens go to the front in their order, padding to the end: places from the end are negative.
    front = tape.op("CumSum", [kept, axis], {"exclusive": 1})
    back = tape.op("CumSum", [tape.op("Add", [kept, minus]), axis], {"reverse": 1})
    place = tape.op("Where", [keep, front, back])
    own = set(tape.nodes)
    for value in graph.inputs:
        if value is padding or dims_of(value) != list(rows):
            continue
        readers = [use for use in value.uses() if use.node not in own]
        packed = tape.op("ScatterElements", [value, place, value], {"axis": 1})
        packed.type, packed.shape = value.type, value.shape
        for use in readers:
            use.node.replace_input_with(use.idx, packed)

    # Where each row's result lies among all of the batch.
    length = tape.op("ReduceSum", [minus, constant(graph, "pack.axes", np.array([1]))])
    first = tape.op(
        "CumSum", [length, constant(graph, "pack.batch", np.array(0))], {"exclusive": 1}
    )
    source = tape.op("Sub", [front, first])
    nodes = list(tape.nodes)
    name_places(nodes, f"{padding.name}/pack")
    graph.insert_before(graph[0], nodes)
    results = [v for v in graph.outputs if (dims_of(v) or [])[:2] == list(rows)]
    for value in dict.fromkeys(map(_narrowest, results)):
        _unpack(graph, value, source)


def _narrowest(output: ir.Value) -> ir.Value:
    """The narrowest value that `output` alone is made from: putting back costs the least there."""
    best = output
    value = _sole_source(output)
    while value is not None:
        # Quantising, dequantising and the product stay together: they become one kernel.
        apart = not _is_quantization(value.producer()) and len(value.shape or ()) == 3
        if apart and _width(value) <= _width(best):
            best = value
        value = _sole_source(value)
    return best


def _sole_source(value: ir.Value) -> ir.Value | None:
    """The one value that `value` is made from, if nothing else is made from it."""
    node = value.producer()
    if node is None:
        return None
    given = dict.fromkeys(v for v in node.inputs if v is not None and not _is_fixed(v))
    makers = {v.producer() for v in given}
    if len(makers) != 1 or not all(sole_use(v) for v in given):
        return None
    if len(given) > 1:
        return _sole_source(next(iter(given))) if _is_quantization(next(iter(makers))) else None
    return next(iter(given))


def _is_quantization(node: ir.Node | None) -> bool:
    if node is None:
        return False
    return node.domain == DOMAIN or is_op(node, "QuantizeLinear", "DequantizeLinear")


def _is_fixed(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return is_constant(value)
    return all(v is None or _is_fixed(v) for v in node.inputs)


def _width(value: ir.Value) -> int:
    width = (dims_of(value) or [None])[-1]
    return width if isinstance(width, int) else 1


def _unpack(graph: ir.Graph, value: ir.Value, source: ir.Value) -> None:
    """Let what reads `value` read its rows in the order that the graph's inputs had."""
    producer, dims = value.producer(), dims_of(value) or []
    assert producer is not None
    tape = ir.tape.Tape()
    flat = constant(graph, "pack.flat", np.array([-1, *dims[2:]]))
    lined = tape.op("Reshape", [value, flat])
    back = tape.op("Gather", [lined, source])
    lined.type, lined.shape = value.type, ir.Shape([None, *dims[2:]])
    like(back, value)
    for node in tape.nodes:
        node.name = f"{value.name}/unpack/{node.op_type}"
    lined.name = f"{value.name}/lined"
    if value.is_graph_output():
        # What else reads it makes another output of it, from packed rows.
        graph.outputs[:] = [back if output is value else output for output in graph.outputs]
    else:
        value.replace_all_uses_with(back)
        tape.nodes[0].replace_input_with(0, value)
    graph.insert_after(producer, tape.nodes)
    # The new value takes the name: a graph output must keep it, and reports read better so.
    value.name, back.name = f"{value.name}/packed", value.name
