"""One product of queries, keys and values right into attention, which rotates them itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused, sole_use
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.join_products import join, join_key, strung
from qcompile.passes.known_mask import session_of
from qcompile.passes.matching import (
    build,
    ints,
    is_op,
    like,
    made_by,
    name_nodes,
    operands,
    same,
    turns_heads,
)
from qcompile.passes.symbolic_shapes import dims_of

from qcompile.cache import MASK, POSITIONS, TOKENS
from qcompile.linears import is_constant
from qcompile.names import module_path

GUARD: Final = "padding_between_the_tokens_of_one_prompt_or_positions_that_do_not_count_them"
"""The node that fails there: ONNX Runtime names it in the error that it raises."""

_ATTENTION: Final = "GroupQueryAttention"
_INT64: Final = int(ir.DataType.INT64)
_MULTIPLE: Final = {"head": 16, "table": 8}
"""Of what the kernel takes only multiples, where it rotates: the sizes of heads, and of tables."""


class PackedAttention(ir.passes.InPlacePass):
    """Queries, keys and values as one product, for ``GroupQueryAttention`` with a cache.

    1. ``GroupQueryAttention(R(P(x)), R(P'(x)), P''(x), …)``, R a ``RotaryEmbedding`` of all or of
       each head's first channels, whose angles follow from ``position_ids``
       -> ``GroupQueryAttention<do_rotary>([P P' P''](x), , , …, cos, sin, positions)``, cos and sin
       of all positions as constants
    2. the same without R
    3. ``q, k, v = Split(p)`` in place of the three products -> the same with p

    Products are what `join_key` knows, with or without a bias; what they give stays what it was.

    Of a first prompt the kernel reads one position for all rows, and counts on from there; of
    later tokens it reads each one's own. So positions are counted by place in the cache:
    ``position_ids`` and as many as there is padding before the row's first token. A score depends
    on differences of positions only. Where a first prompt has padding between its tokens, or
    positions that are not counted from its first token, the node `GUARD` fails.

    Args:
        positions: how many the model has; None: it does not say.

    Attributes:
        apart: by module path of an attention that was left as it is, why.
    """

    def __init__(self, positions: int | None) -> None:
        super().__init__()
        self.positions = positions
        self.apart: dict[str, str] = {}

    @property
    def notes(self) -> list[str]:
        """`apart` in words, one line for each reason."""
        paths = {
            reason: [p for p, r in self.apart.items() if r == reason]
            for reason in dict.fromkeys(self.apart.values())
        }
        return [
            f"{first}{f' and {len(more)} more' if more else ''}: {reason}"
            for reason, (first, *more) in paths.items()
        ]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        tables = _Tables(model, self.positions)
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) != (CONTRIB, _ATTENTION) or node.inputs[1] is None:
                continue
            try:
                _pack(model.graph, node, tables)
                modified = True
            except _Apart as reason:
                self.apart[module_path(node)] = str(reason)
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


class _Apart(Exception):
    """Why an attention is left as it is."""


def _pack(graph: ir.Graph, node: ir.Node, tables: _Tables) -> None:
    if node.attributes.get_string("k_quant_type", "NONE") != "NONE":
        raise _Apart("keys and values in codes are measured apart, as the attention reads them")
    (first, q), (second, k) = (_unrotated(value) for value in node.inputs[:2])
    rotation = _Rotation.of(first, second) if first is not None or second is not None else None
    for turned, count in ((first, "num_heads"), (second, "kv_num_heads")):
        heads = turned.attributes.get_int("num_heads", 0) if turned is not None else 0
        if heads and heads != node.attributes.get_int(count, 0):
            raise _Apart("its rotation divides channels into other heads")
    sources = [_source(value) for value in (q, k, node.inputs[2])]
    whole = _split_of(sources)
    products = _products(sources) if whole is None else []
    table = tables.of(rotation, node) if rotation is not None else None  # the last that may refuse
    if whole is None:
        whole = _joined(graph, node, products)
    for at, value in enumerate((whole, None, None)):
        node.replace_input_with(at, value)
    if rotation is not None and table is not None:
        for at, value in zip((7, 8, 9), (*table, tables.place(graph)), strict=True):
            node.replace_input_with(at, value)
        node.attributes.add(ir.AttrInt64("do_rotary", 1))
        node.attributes.add(ir.AttrInt64("rotary_interleaved", rotation.interleaved))


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """Of queries and keys alike.

    Attributes:
        cos, sin: of the angles, [batch, sequence, channels / 2].
        interleaved: 1 where neighbours are rotated, 0 where it is halves.
    """

    cos: ir.Value
    sin: ir.Value
    interleaved: int

    @classmethod
    def of(cls, first: ir.Node | None, second: ir.Node | None) -> _Rotation:
        if first is None or second is None:
            raise _Apart("only one of its queries and keys is rotated")
        if any(len(node.inputs) != 3 or not sole_use(node.outputs[0]) for node in (first, second)):
            raise _Apart("its rotation has another form")
        kinds = [node.attributes.get_int("interleaved", 0) for node in (first, second)]
        (cos, sin), others = first.inputs[1:], second.inputs[1:]
        if kinds[0] != kinds[1] or not (same(cos, others[0]) and same(sin, others[1])):
            raise _Apart("its queries and keys are rotated in different ways")
        assert cos is not None and sin is not None
        return cls(cos, sin, kinds[0])


def _unrotated(value: ir.Value | None) -> tuple[ir.Node | None, ir.Value | None]:
    """What rotates `value` [batch, sequence, heads · D], and what it is without.

    Of each head all channels are rotated, or the first of them (Phi)::

        Reshape(Transpose(Concat(RotaryEmbedding(Slice(h)), Slice(h)))), h = Transpose(Reshape(x))
    """
    node = made_by(value, "RotaryEmbedding")
    if node is not None:
        return (node, node.inputs[0]) if len(dims_of(node.inputs[0]) or ()) == 3 else (None, value)
    found: ir.Value | None = value
    for op_type in ("Reshape", "Transpose", "Concat"):
        node = made_by(found, op_type)
        if (
            node is None
            or not sole_use(found)
            or (op_type == "Transpose" and not turns_heads(node))
        ):
            return None, value
        found = node.inputs[0]
    assert node is not None
    rotation = made_by(found, "RotaryEmbedding")
    if (
        rotation is None
        or len(node.inputs) != 2
        or node.attributes.get_int("axis", 0) not in (3, -1)
    ):
        return None, value
    parts = [made_by(part, "Slice") for part in (rotation.inputs[0], node.inputs[1])]
    heads = parts[0].inputs[0] if parts[0] is not None else None
    turned = made_by(heads, "Transpose")
    if turned is None or not turns_heads(turned) or _cuts(parts) != [heads, heads]:
        return None, value
    return rotation, turned.inputs[0]


def _cuts(parts: Sequence[ir.Node | None]) -> list[ir.Value | None]:
    """What two slices along the last axis are of, if the second begins where the first ends."""
    ends = [0]
    for part in parts:
        if part is None:
            return []
        bounds = [ints(part, name, at) for at, name in enumerate(("starts", "ends", "axes"), 1)]
        steps = ints(part, "steps", 4) if len(part.inputs) > 4 else [1]
        if (
            bounds[0] != [ends[-1]]
            or bounds[1] is None
            or bounds[2] not in ([3], [-1])
            or steps != [1]
        ):
            return []
        ends.append(bounds[1][0])
    size = (dims_of(parts[0].inputs[0]) or [None])[-1] if parts[0] is not None else None
    whole = isinstance(size, int) and 0 < ends[1] < size <= ends[2]
    return [part.inputs[0] for part in parts if part is not None] if whole else []


def _source(value: ir.Value | None) -> ir.Value:
    """`value` [batch, sequence, heads · D] before it was reshaped into heads, and back."""
    assert value is not None
    dims, source = dims_of(value) or [], value
    heads = [n for n in dims[2:] if isinstance(n, int)]
    flat = [*dims[:2], math.prod(heads)] if heads and len(heads) == len(dims) - 2 else None
    while (reshape := made_by(source, "Reshape")) is not None:
        assert reshape.inputs[0] is not None
        source = reshape.inputs[0]
        if flat is not None and None not in flat and dims_of(source) == flat:
            value = source
    return value


def _split_of(sources: Sequence[ir.Value]) -> ir.Value | None:
    """What `sources` are all the parts of, in their order, split along the last axis."""
    split = sources[0].producer()
    if split is None or not is_op(split, "Split") or list(split.outputs) != list(sources):
        return None
    whole = split.inputs[0]
    last = split.attributes.get_int("axis", 0) in (-1, 2)
    return whole if last and len(dims_of(whole) or ()) == 3 else None


@dataclasses.dataclass(frozen=True)
class _Product:
    """``matmul [+ bias]``."""

    matmul: ir.Node
    bias: ir.Value | None

    @classmethod
    def of(cls, value: ir.Value) -> _Product:
        node, bias = value.producer(), None
        if node is not None and is_op(node, "Add") and sole_use(value):
            for product, other in operands(node):
                width = (dims_of(product) or [None])[-1]
                if is_constant(other) and width is not None and dims_of(other) == [width]:
                    node, bias, value = product.producer(), other, product
                    break
        if node is None or not sole_use(value) or join_key(node) is None:
            raise _Apart("its queries, keys and values are no products right before it")
        return cls(node, bias)


def _products(sources: Sequence[ir.Value]) -> list[_Product]:
    """What makes `sources`, fit to be joined."""
    found = [_Product.of(value) for value in sources]
    if len({join_key(product.matmul) for product in found}) > 1:
        raise _Apart("its queries, keys and values are products of several inputs or precisions")
    if len({product.bias is None for product in found}) > 1:
        raise _Apart("only some of its queries, keys and values have a bias")
    return found


def _joined(graph: ir.Graph, node: ir.Node, products: Sequence[_Product]) -> ir.Value:
    whole = join(graph, [product.matmul for product in products])
    if products[0].bias is None:
        return whole
    bias = strung(graph, [product.bias for product in products], 0)
    add = build("Add", [whole, bias], {}, node)
    add.name = f"{whole.name}/Add"
    graph.insert_before(node, add)
    return like(add.outputs[0], whole)


class _Tables:
    """What the layers of one graph share: tables of angles, and places in the cache."""

    def __init__(self, model: ir.Model, positions: int | None) -> None:
        self._model = model
        self._positions = positions
        self._known: list[tuple[ir.Value, ir.Value, tuple[ir.Value, ir.Value] | str]] = []
        self._places: ir.Value | None = None

    def of(self, rotation: _Rotation, node: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of all positions, for the attention `node`."""
        size = (dims_of(node.inputs[3]) or [None])[-1]
        if not isinstance(size, int) or size % _MULTIPLE["head"]:
            raise _Apart(f"the kernel rotates no heads of {size}")
        cos, sin = rotation.cos, rotation.sin
        found = (
            made for *known, made in self._known if same(known[0], cos) and same(known[1], sin)
        )
        made = next(found, None)
        if made is None:
            made = self._new(cos, sin)
            self._known.append((cos, sin, made))
        if isinstance(made, str):
            raise _Apart(made)
        return made

    def _new(self, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ir.Value] | str:
        graph = self._model.graph
        if {MASK, TOKENS, POSITIONS} - {value.name for value in graph.inputs}:
            return f"the model has no input {POSITIONS}"
        if self._positions is None:
            return "the model does not say how many positions it has"
        found = _angles(self._model, cos, sin, self._positions)
        if found is None:
            return f"its angles follow from more than each token's {POSITIONS}"
        if found[0].shape[1] % _MULTIPLE["table"]:
            return f"the kernel rotates no {2 * found[0].shape[1]} channels"
        at = len(self._known) or ""
        names = (f"rotary/{name}{at}" for name in ("cos", "sin"))
        return tuple(constant(graph, n, a) for n, a in zip(names, found, strict=True))  # type: ignore[return-value]

    def place(self, graph: ir.Graph) -> ir.Value:
        """Positions by place in the cache, int64 [batch, sequence], made at the graph's start."""
        if self._places is None:
            self._places = _places(graph)
        return self._places


def _angles(
    model: ir.Model, cos: ir.Value, sin: ir.Value, positions: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """`cos` and `sin` of every position, each float32 [positions, channels].

    None where they follow from more than the position of the one token.
    """
    session = session_of(model, [cos, sin])
    if session is None or [i.name for i in session.get_inputs()] != [POSITIONS]:
        return None
    every = np.arange(positions)
    table = [array[0] for array in session.run(None, {POSITIONS: every[None]})]
    # A rotation that depends on the longest position in sight has other angles for a few tokens.
    for some in (every[None, :1], every[None, -1:], np.array([[1, 0], [0, 1]]) % positions):
        for whole, part in zip(table, session.run(None, {POSITIONS: some}), strict=True):
            if not np.array_equal(whole[some], part):
                return None
    return table[0], table[1]


def _places(graph: ir.Graph) -> ir.Value:
    inputs = {value.name: value for value in graph.inputs}
    mask, own, tokens = inputs[MASK], inputs[POSITIONS], inputs[TOKENS]
    zero, one = (constant(graph, f"places/{n}", np.array(n)) for n in (0, 1))
    only = constant(graph, "places/only", np.array([0]))
    tape, prompt, later = (ir.tape.Tape() for _ in range(3))
    length = tape.op("Shape", [tokens], {"start": 1, "end": 2})
    total = tape.op("Shape", [mask], {"start": 1, "end": 2})
    first = tape.op("Equal", [length, total])
    kept = tape.op("Sign", [mask])  # whatever is not zero is no padding
    before = tape.op("ArgMax", [kept], {"axis": 1, "keepdims": 1})
    # The kernel reads counted[0, 0] of a first prompt, which is 0, and counts on.
    counted = prompt.op(
        "Mul", [prompt.op("Range", [zero, prompt.op("Squeeze", [length]), one]), kept]
    )
    wanted = prompt.op("Mul", [prompt.op("Add", [own, before]), kept])
    wrong = prompt.op("Not", [prompt.op("Equal", [counted, wanted])])
    index = prompt.op("ReduceMax", [prompt.op("Cast", [wrong], {"to": _INT64})], {"keepdims": 0})
    checked = prompt.op("Gather", [only, index])
    counted = prompt.op("Add", [counted, checked])
    # Positions of padding may be negative, and the kernel looks at them.
    placed = later.op("Max", [later.op("Add", [own, before]), zero])
    branches = {}
    for name, part, value in (("then_branch", prompt, counted), ("else_branch", later, placed)):
        name_nodes(part.nodes, f"places/{name}")
        value.type, value.shape = own.type, own.shape
        branches[name] = ir.Graph([], [value], nodes=part.nodes, name=name)
    result = tape.op("If", [first], branches)
    name_nodes(tape.nodes, "places")
    guard = checked.producer()
    assert guard is not None
    guard.name = GUARD
    result.type, result.shape = own.type, own.shape
    graph.insert_before(next(iter(graph)), tape.nodes)
    return result
