"""Attention in ONNX Runtime's flash kernel, whatever the mask allows."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import LARGEST, drop_unused, shared_constant
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.known_mask import MaskMeaning, meaning_of
from qcompile.passes.matching import is_op, name_nodes, put_for
from qcompile.passes.symbolic_shapes import dims_of

_INT32: Final = int(ir.DataType.INT32)
_BOOL: Final = int(ir.DataType.BOOL)


class MultiHead(ir.passes.InPlacePass):
    """``Attention`` of 3-D inputs -> com.microsoft ``MultiHeadAttention``, the kernel that is fast.

    1. no mask, or one that is causal and nothing else -> without mask, `unidirectional`
    2. a mask of padding, causal or not -> ``If(padding harmless, 1, 3)``. The flash kernel takes no
       mask. Padding is harmless under causality where it comes after the tokens: a token sees
       nothing that comes later, and what rows of padding compute is nobody's. Without causality
       it is where there is none. The condition and the bias are computed once for all layers.
    3. any other mask, that of a sliding window or with ALiBi's biases too -> as
       `attention_bias`, in the memory-efficient kernel

    Keys and values of fewer heads than the queries are repeated first. Left as it is: attention
    with a cache, with softcap, with more than one output, in the 4-D form, or under an unknown mask
    that is not [batch or 1, heads or 1, queries, keys].
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        known: dict[ir.Value, MaskMeaning | None] = {}
        shared: dict[MaskMeaning, tuple[ir.Value, ir.Value]] = {}
        biases: dict[ir.Value, ir.Value] = {}
        modified = False
        for node in list(model.graph):
            if not is_op(node, "Attention") or not _plain(node):
                continue
            mask = node.inputs[3] if len(node.inputs) > 3 else None
            if mask is not None and mask not in known:
                known[mask] = meaning_of(model, mask) if _is_square(node) else None
            if mask is not None and known[mask] is None and not _is_full(node, mask):
                continue
            _lower(model.graph, node, mask, known, shared, biases)
            modified = True
        if modified:
            model.graph.opset_imports[CONTRIB] = 1
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _plain(node: ir.Node) -> bool:
    if any(v is not None for v in node.inputs[4:]) or _number(node, "softcap", 0.0):
        return False
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return False
    heads = node.attributes.get_int("q_num_heads", 0)
    widths = [(dims_of(v) or [None])[-1] for v in node.inputs[:3]]
    return heads > 0 and all(isinstance(width, int) for width in widths)


def _is_square(node: ir.Node) -> bool:
    """Whether there are as many keys as queries; masks are tried on such alone."""
    queries, keys = ((dims_of(v) or [None] * 2)[1] for v in node.inputs[:2])
    return queries is not None and queries == keys


def _is_full(node: ir.Node, mask: ir.Value) -> bool:
    """Whether `mask` has the size of the scores, which the kernel does not broadcast it to."""
    dims, sizes = dims_of(mask) or [], [(dims_of(v) or [None] * 2)[1] for v in node.inputs[:2]]
    return len(dims) == 4 and dims[2:] == sizes and None not in sizes


def _lower(
    graph: ir.Graph,
    node: ir.Node,
    mask: ir.Value | None,
    known: dict[ir.Value, MaskMeaning | None],
    shared: dict[MaskMeaning, tuple[ir.Value, ir.Value]],
    biases: dict[ir.Value, ir.Value],
) -> None:
    heads = node.attributes.get_int("q_num_heads", 0)
    groups = node.attributes.get_int("kv_num_heads", heads)
    q, k, v = node.inputs[:3]
    assert q is not None and k is not None and v is not None
    width = (dims_of(q) or [0])[-1]
    assert isinstance(width, int)
    scale = _number(node, "scale", 1.0 / math.sqrt(width // heads))
    before = ir.tape.Tape()
    if groups != heads:
        k, v = (_repeated(graph, before, x, groups, heads // groups) for x in (k, v))
    attributes = {"num_heads": heads, "scale": scale}
    causal = bool(node.attributes.get_int("is_causal", 0))
    meaning = known.get(mask) if mask is not None else MaskMeaning(causal, None)
    if mask is None or (meaning is not None and {meaning.padding, meaning.window} == {None}):
        one_way = causal or (meaning is not None and meaning.causal)
        result = _attend(before, [q, k, v], attributes | {"unidirectional": int(one_way)})
    elif meaning is None or _adds_more(meaning) or (causal and not meaning.causal):
        if mask not in biases:
            biases[mask] = _bias_of(graph, before, mask)
        bias = [q, k, v, None, None, biases[mask]]
        result = _attend(before, bias, attributes | {"unidirectional": int(causal)})
    else:
        if meaning not in shared:
            shared[meaning] = _padding(graph, before, meaning)
        harmless, lazy = shared[meaning]
        fast, slow = ir.tape.Tape(), ir.tape.Tape()
        flash = _attend(fast, [q, k, v], attributes | {"unidirectional": int(meaning.causal)})
        masked = _attend(slow, [q, k, v, None, None, lazy], attributes | {"unidirectional": 0})
        result = _either(before, harmless, (fast, flash), (slow, masked), str(node.outputs[0].name))
    nodes = list(before.nodes)
    for made in nodes:
        made.metadata_props.update(node.metadata_props)
    name_nodes(nodes, str(node.name))
    put_for(graph, node.outputs[0], nodes, result)


def _adds_more(meaning: MaskMeaning) -> bool:
    return meaning.window is not None or meaning.slopes is not None


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def _attend(
    tape: ir.tape.Tape, inputs: list[ir.Value | None], attributes: dict[str, int | float]
) -> ir.Value:
    made = tape.op("MultiHeadAttention", inputs, attributes, domain=CONTRIB)
    made.type = inputs[0].type if inputs[0] is not None else None
    return made


def _either(
    tape: ir.tape.Tape,
    condition: ir.Value,
    then: tuple[ir.tape.Tape, ir.Value],
    otherwise: tuple[ir.tape.Tape, ir.Value],
    name: str,
) -> ir.Value:
    branches = []
    for key, (part, result) in (("then_branch", then), ("else_branch", otherwise)):
        nodes = list(part.nodes)
        for at, made in enumerate(nodes):
            for value in made.outputs:
                value.name = f"{name}/{key}/{at}"
            made.name = f"{name}/{key}/{at}"
        branches.append(ir.AttrGraph(key, ir.Graph([], [result], nodes=nodes, name=key)))
    result = tape.op("If", [condition], {b.name: b.value for b in branches})
    result.type = then[1].type
    return result


def _repeated(
    graph: ir.Graph, tape: ir.tape.Tape, x: ir.Value, groups: int, times: int
) -> ir.Value:
    """x [batch, sequence, groups · D], each head as often as queries share it."""
    dims = dims_of(x)
    assert dims is not None and isinstance(dims[-1], int)
    size = dims[-1] // groups
    split = shared_constant(graph, "heads.split", np.array([0, 0, groups, 1, size]))
    wide = shared_constant(graph, "heads.repeat", np.array([1, 1, 1, times, 1]))
    merged = shared_constant(graph, "heads.merge", np.array([0, 0, groups * times * size]))
    parts = tape.op("Expand", [tape.op("Reshape", [x, split]), wide])
    result = tape.op("Reshape", [parts, merged])
    for made in tape.nodes:
        made.outputs[0].type = x.type
    result.shape = ir.Shape([*dims[:-1], groups * times * size])
    return result


def _bias_of(graph: ir.Graph, tape: ir.tape.Tape, mask: ir.Value) -> ir.Value:
    if mask.dtype != ir.DataType.BOOL:
        return mask
    return _bias(graph, tape, mask)


def _bias(graph: ir.Graph, tape: ir.tape.Tape, keep: ir.Value) -> ir.Value:
    zero = shared_constant(graph, "score.kept", np.array(0.0, np.float32))
    lowest = shared_constant(graph, "score.masked", np.array(-LARGEST, np.float32))
    bias = tape.op("Where", [keep, zero, lowest])
    bias.dtype = ir.DataType.FLOAT
    return bias


def _padding(
    graph: ir.Graph, tape: ir.tape.Tape, meaning: MaskMeaning
) -> tuple[ir.Value, ir.Value]:
    """Whether padding is harmless, and the bias [batch, 1, S, S] where it is not.

    No op here computes with a shape: ONNX Runtime would move it, and what follows, to the CPU.
    """
    mask = meaning.padding
    assert mask is not None
    axis = shared_constant(graph, "axis", np.array(1))
    axes = shared_constant(graph, "axes", np.array([1]))
    keep = _typed(tape.op("Cast", [mask], {"to": _BOOL}), ir.DataType.BOOL)
    ones = tape.op("Cast", [tape.op("Equal", [mask, mask])], {"to": _INT32})
    places = _typed(tape.op("CumSum", [ones, axis]), ir.DataType.INT32)
    if meaning.causal:
        count = tape.op("ReduceSum", [tape.op("Cast", [keep], {"to": _INT32}), axes])
        packed = tape.op("LessOrEqual", [places, count])
        fine = tape.op("Equal", [packed, keep])
    else:
        fine = keep
    least = tape.op("ReduceMin", [tape.op("Cast", [fine], {"to": _INT32})], {"keepdims": 0})
    harmless = _typed(tape.op("Cast", [least], {"to": _BOOL}), ir.DataType.BOOL)
    for at, made in enumerate(tape.nodes):
        for value in made.outputs:
            value.name = value.name or f"{mask.name}/{made.op_type}{at}"
            if value.dtype is None:
                boolean = made.op_type in ("Equal", "LessOrEqual")
                value.dtype = ir.DataType.BOOL if boolean else ir.DataType.INT32

    none, some = ir.tape.Tape(), ir.tape.Tape()
    nothing = shared_constant(graph, "score.none", np.zeros((1, 1, 1, 1), np.float32))
    empty = _typed(none.op("Identity", [nothing]), ir.DataType.FLOAT)
    rows = some.op("Unsqueeze", [places, shared_constant(graph, "axes", np.array([1, 3]))])
    columns = shared_constant(graph, "axes", np.array([1, 2]))
    keys = some.op("Unsqueeze", [keep, columns])
    earlier = (
        some.op("LessOrEqual", [some.op("Unsqueeze", [places, columns]), rows])
        if meaning.causal
        else some.op("Equal", [rows, rows])
    )
    bias = _bias(graph, some, some.op("And", [earlier, keys]))
    lazy = _either(tape, harmless, (none, empty), (some, bias), f"{mask.name}/bias")
    lazy.name = f"{mask.name}/bias"
    return harmless, lazy


def _typed(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    value.dtype = dtype
    return value
