"""Self-attention that keeps its keys and values: one graph for the prompt and for what follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import LARGEST, constant, drop_unused, shared_constant
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.known_mask import MaskMeaning, meaning_of
from qcompile.passes.matching import (
    HEADS_FIRST,
    build,
    is_op,
    made_by,
    name_nodes,
    put_for,
    turns_heads,
)
from qcompile.passes.symbolic_shapes import dims_of

from qcompile.cache import KINDS, PAST, PRESENT, TOKENS
from qcompile.cache_plan import CachePlan
from qcompile.errors import ModelError
from qcompile.names import module_path

_BOOL: Final = int(ir.DataType.BOOL)
_INT32: Final = int(ir.DataType.INT32)
_MIXING: Final = ("Attention", "Conv", "CumSum", "GRU", "LSTM", "Range", "Trilu")


class KvCache(ir.passes.InPlacePass):
    """Every causal ``Attention`` -> com.microsoft ``GroupQueryAttention`` with a cache.

    Inputs ``past_key_values.N.key`` and ``.value`` [batch, heads, past, D] come in, outputs
    ``present.N.key`` and ``.value`` [batch, heads, total, D] go out, and ``attention_mask`` becomes
    [batch, total], of what is in the cache and of the new tokens. N counts the layers in the order
    of the graph. What the mask means is known (`known_mask`), so its subgraph goes:

    - causality is the op's own, a sliding window its ``local_window_size``
    - padding, on either side or between, is an `attention_bias` that all layers share; ALiBi's
      biases are in it, by a token's place in its row

    Shapes that were read off ``attention_mask`` are read off ``input_ids``. A model that has a
    cache already is left as it is.

    Args:
        plan: how keys and values become codes; None: they stay float. Codes of 8 bits are int8, two
            of 4 bits make one uint8, so that the last axis of the cache is half as long.

    Raises:
        ModelError: an attention that cannot be cached, or anything else that mixes tokens, with
            its module path. All or nothing.
    """

    def __init__(self, plan: CachePlan | None = None) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        names = {value.name for value in model.graph.inputs}
        if PAST.format(0, "key") in names:
            return ir.passes.PassResult(model, modified=False)
        found = list(_attentions(model))
        if not found:
            raise ModelError(f"the model cannot have a cache: {_unrecognised(model.graph)}")
        padding = found[0].meaning.padding
        tokens = next((v for v in model.graph.inputs if v.name == TOKENS), None)
        assert padding is not None
        if tokens is None or tokens is padding:
            raise ModelError(f"the model cannot have a cache: it has no input {TOKENS}")
        shared = _shared(model.graph, padding, tokens, found[0].meaning.slopes)
        for layer, attention in enumerate(found):
            _put(model.graph, attention, layer, shared, self.plan)
        for node in padding.consumers():
            if is_op(node, "Shape") and node not in shared.nodes:
                node.replace_input_with(0, tokens)
        model.graph.opset_imports[CONTRIB] = 1
        drop_unused(model)
        _check_rest(model.graph, padding, shared.nodes)
        dims = dims_of(padding) or [None, None]
        padding.shape = ir.Shape([dims[0], "total_sequence"])
        return ir.passes.PassResult(model, modified=True)


@dataclasses.dataclass(frozen=True)
class _Attention:
    node: ir.Node
    meaning: MaskMeaning
    heads: int
    groups: int
    size: int

    @property
    def flat(self) -> bool:
        """Inputs [batch, sequence, heads · D], not [batch, heads, sequence, D]."""
        return len(dims_of(self.node.inputs[0]) or ()) == 3


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What all layers read.

    Attributes:
        last: int32 [batch], the index of the newest token.
        total: int32 scalar, tokens in the cache after this step.
        bias: float [batch, 1 or heads, sequence, total], zero or ALiBi's, or the lowest float16.
        nodes: that make them.
    """

    last: ir.Value
    total: ir.Value
    bias: ir.Value
    nodes: tuple[ir.Node, ...]


def _attentions(model: ir.Model) -> Iterator[_Attention]:
    known: dict[ir.Value, MaskMeaning | None] = {}
    for node in model.graph:
        if not is_op(node, "Attention"):
            continue
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is not None and mask not in known:
            known[mask] = meaning_of(model, mask)
        meaning = known[mask] if mask is not None else None
        causal = bool(node.attributes.get_int("is_causal", 0))
        if meaning is not None and causal:
            meaning = dataclasses.replace(meaning, causal=True)
        where = f"{module_path(node)} cannot have a cache: "
        if mask is None:
            raise ModelError(f"{where}its attention takes no mask of padding")
        if meaning is None:
            raise ModelError(f"{where}its mask is neither causality nor padding nor a window")
        if meaning.padding is None or not meaning.causal:
            lacks = "is not causal" if not meaning.causal else "does not follow attention_mask"
            raise ModelError(f"{where}its mask {lacks}")
        if any(other.padding is not meaning.padding for other in known.values() if other):
            raise ModelError(f"{where}another layer takes its padding from another input")
        if any(other.slopes != meaning.slopes for other in known.values() if other):
            raise ModelError(f"{where}another layer's ALiBi has other slopes")
        attention = _sized(node, meaning)
        if attention is None:
            raise ModelError(f"{where}the form of its attention has no cached op")
        yield attention


def _sized(node: ir.Node, meaning: MaskMeaning) -> _Attention | None:
    if any(v is not None for v in node.inputs[4:]) or len(node.inputs) < 3:
        return None
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return None
    sizes = [
        _heads(node, v, f"{x}_num_heads")
        for v, x in zip(node.inputs, ("q", "kv", "kv"), strict=False)
    ]
    if None in sizes or len({len(dims_of(v) or ()) for v in node.inputs[:3]}) != 1:
        return None
    lengths = [(dims_of(v) or [None])[-2] for v in node.inputs[:2]]
    if None in lengths or len(set(lengths)) > 1:
        return None  # of something else than the tokens themselves
    (heads, size), *rest = (s for s in sizes if s is not None)
    groups = rest[0][0]
    # The op has one size for keys and values, and as many of the one as of the other.
    if rest != [(groups, size)] * 2 or heads % groups:
        return None
    return _Attention(node, meaning, heads, groups, size)


def _heads(node: ir.Node, value: ir.Value | None, attribute: str) -> tuple[int, int] | None:
    """Number and size of the heads of one input, where they are known."""
    dims = dims_of(value) or []
    if len(dims) == 4:
        return (dims[1], dims[3]) if isinstance(dims[1], int) and isinstance(dims[3], int) else None
    count = node.attributes.get_int(attribute, 0)
    known = len(dims) == 3 and isinstance(dims[2], int) and count > 0
    return (count, int(dims[2]) // count) if known else None  # type: ignore[arg-type]


def _shared(
    graph: ir.Graph, padding: ir.Value, tokens: ir.Value, slopes: tuple[float, ...] | None
) -> _Shared:
    """The values that all layers read, made at the start of the graph."""
    one = constant(graph, "cache/one", np.array(1, np.int32))
    zero = constant(graph, "cache/kept", np.array(0.0, np.float32))
    hidden = constant(graph, "cache/hidden", np.array(-LARGEST, np.float32))
    axes = constant(graph, "cache/axes", np.array([1, 2]))
    ones = constant(graph, "cache/ones", np.ones(1, np.int64))
    tape = ir.tape.Tape()
    batch = tape.op("Shape", [padding], {"start": 0, "end": 1})
    length = tape.op("Shape", [padding], {"start": 1, "end": 2})
    total = tape.op("Squeeze", [tape.op("Cast", [length], {"to": _INT32})])
    last = tape.op("Expand", [tape.op("Sub", [total, one]), batch])
    keep = tape.op("Unsqueeze", [tape.op("Cast", [padding], {"to": _BOOL}), axes])
    sequence = tape.op("Shape", [tokens], {"start": 1, "end": 2})
    size = tape.op("Concat", [ones, ones, sequence, ones], {"axis": 0})
    kept = zero if slopes is None else _by_place(graph, tape, padding, axes, slopes)
    bias = tape.op("Expand", [tape.op("Where", [keep, kept, hidden]), size])
    nodes = tuple(tape.nodes)
    name_nodes(nodes, "cache")
    first = next(iter(graph))
    graph.insert_before(first, nodes)
    return _Shared(last, total, bias, nodes)


def _by_place(
    graph: ir.Graph,
    tape: ir.tape.Tape,
    padding: ir.Value,
    axes: ir.Value,
    slopes: tuple[float, ...],
) -> ir.Value:
    """ALiBi's biases, float [batch, heads, 1, total]: a head's slope times a token's place."""
    axis = constant(graph, "cache/axis", np.array(1))
    by_head = constant(graph, "cache/slopes", np.array(slopes, np.float32)[:, None, None])
    before = tape.op("CumSum", [padding, axis], {"exclusive": 1})
    places = tape.op("Cast", [before], {"to": int(ir.DataType.FLOAT)})
    return tape.op("Mul", [tape.op("Unsqueeze", [places, axes]), by_head])


def _put(
    graph: ir.Graph, attention: _Attention, layer: int, shared: _Shared, plan: CachePlan | None
) -> None:
    node, size = attention.node, attention.size
    q, k, v = node.inputs[:3]
    assert q is not None and k is not None and v is not None
    nodes: list[ir.Node] = []
    if not attention.flat:
        counts = (attention.heads, attention.groups, attention.groups)
        q, k, v = (
            _flattened(graph, node, x, n * size, nodes)
            for x, n in zip((q, k, v), counts, strict=True)
        )
    batch, kept = (dims_of(v) or [None])[0], _kept(attention, v, plan)
    past = [
        ir.Value(
            name=PAST.format(layer, kind),
            shape=ir.Shape([batch, attention.groups, "past_sequence", kept.size]),
            type=kept.type,
        )
        for kind in KINDS
    ]
    attributes: dict[str, int | float | str] = {
        "num_heads": attention.heads,
        "kv_num_heads": attention.groups,
        "scale": _scale(node, size),
    }
    if cap := node.attributes.get_float("softcap", 0.0):
        attributes["softcap"] = cap
    if attention.meaning.window is not None:
        attributes["local_window_size"] = attention.meaning.window
    inputs = [q, k, v, *past, shared.last, shared.total, None, None, None, shared.bias]
    if plan is not None:
        attributes |= {
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
            "kv_cache_bit_width": plan.bits,
        }
        inputs.append(None)
        for kind, scales in zip(KINDS, (plan.keys, plan.values), strict=True):
            scale = np.asarray(scales[layer], np.float32)[None, :, None]
            inputs.append(constant(graph, f"{node.name}/{kind}_scale", scale))
    cached = ir.node(
        "GroupQueryAttention", inputs, attributes, domain=CONTRIB, num_outputs=3,
        name=node.name, metadata_props=node.metadata_props,
    )  # fmt: skip
    for made, kind in zip(cached.outputs[1:], KINDS, strict=True):
        made.name = PRESENT.format(layer, kind)
        made.type = kept.type
        made.shape = ir.Shape([batch, attention.groups, "total_sequence", kept.size])
    name_nodes(nodes, str(node.name))
    nodes.append(cached)
    result = cached.outputs[0]
    if not attention.flat:
        split = shared_constant(graph, "cache/sizes", np.array([0, 0, attention.heads, size]))
        apart = build("Reshape", [result, split], {}, node)
        back = build("Transpose", [apart.outputs[0]], {"perm": list(HEADS_FIRST)}, node)
        apart.name, back.name = f"{node.name}/apart", f"{node.name}/back"
        nodes += [apart, back]
        result = back.outputs[0]
    put_for(graph, node.outputs[0], nodes, result)
    graph.inputs.extend(past)
    graph.outputs.extend(cached.outputs[1:])


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What one head of one token is kept as: `size` elements of `type`."""

    type: ir.TypeProtocol | None
    size: int


def _kept(attention: _Attention, value: ir.Value, plan: CachePlan | None) -> _Kept:
    if plan is None:
        return _Kept(value.type, attention.size)
    if plan.bits == 8:
        return _Kept(ir.TensorType(ir.DataType.INT8), attention.size)
    if attention.size % 2:
        raise ModelError(
            f"{module_path(attention.node)} cannot have a cache of {plan.bits} bits: "
            f"its heads have {attention.size} channels, and two share a byte"
        )
    return _Kept(ir.TensorType(ir.DataType.UINT8), attention.size // 2)


def _scale(node: ir.Node, size: int) -> float:
    given = node.attributes.get("scale")
    return given.as_float() if given is not None else 1.0 / math.sqrt(size)


def _flattened(
    graph: ir.Graph, node: ir.Node, value: ir.Value, width: int, nodes: list[ir.Node]
) -> ir.Value:
    """`value` [batch, heads, sequence, D] as [batch, sequence, heads · D]."""
    transpose = made_by(value, "Transpose")
    source = value
    if transpose is not None and turns_heads(transpose):
        assert transpose.inputs[0] is not None
        source = transpose.inputs[0]
    else:
        turned = build("Transpose", [value], {"perm": list(HEADS_FIRST)}, node)
        nodes.append(turned)
        source = turned.outputs[0]
    flat = shared_constant(graph, "cache/sizes", np.array([0, 0, width]))
    merged = build("Reshape", [source, flat], {}, node)
    nodes.append(merged)
    dims = dims_of(value) or [None] * 4
    merged.outputs[0].type = value.type
    merged.outputs[0].shape = ir.Shape([dims[0], dims[2], width])
    return merged.outputs[0]


def _check_rest(graph: ir.Graph, padding: ir.Value, known: Collection[ir.Node]) -> None:
    """Refuse whatever else lets one token see another: it would not see the cache."""
    computed = set(graph.inputs)
    for node in graph:
        where = f"{module_path(node)} cannot have a cache: "
        read = computed.intersection(node.inputs)
        if node in known:
            continue
        if is_op(node, *_MIXING):
            raise ModelError(f"{where}{node.op_type} goes over the tokens")
        if is_op(node, "MatMul") and len(read) > 1:
            raise ModelError(f"{where}its attention is in a form that is not recognised")
        if padding in read:
            raise ModelError(f"{where}its {node.op_type} reads {padding.name}")
        if read:
            computed.update(node.outputs)


def _unrecognised(graph: ir.Graph) -> str:
    for node in graph:
        if is_op(node, "Softmax"):
            return f"the attention of {module_path(node)} is in a form that is not recognised"
    return "no attention was recognised in it"
