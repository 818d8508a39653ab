"""Of a prompt, only the last token's logits: what generating takes of them."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.bnb4 import KERNEL as BNB4
from qcompile.passes.constants import constant
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.integer_matmul import KERNEL as INTEGER
from qcompile.passes.matching import made_by
from qcompile.passes.pack_tokens import name_places, negative
from qcompile.passes.symbolic_shapes import dims_of
from qcompile.passes.weight_only import KERNEL as NBITS

from qcompile.cache import MASK, TOKENS
from qcompile.linears import is_constant

_EACH_TOKEN: Final = frozenset(
    {
        *(("", op) for op in ("Add", "Cast", "Div", "MatMul", "Mul", "QuantizeLinear", "Tanh")),
        *(("", op) for op in ("LayerNormalization", "RMSNormalization")),
        *((CONTRIB, op) for op in (INTEGER, NBITS, BNB4)),
    }
)
"""Ops that give a token's output from that token alone, where all inputs but one are constant."""
_PRODUCTS: Final = frozenset({"MatMul", INTEGER, NBITS, BNB4})


class LastLogits(ir.passes.InPlacePass):
    """``logits = f(x)`` -> ``logits = f(GatherND(x, last))``, of shape [batch, 1, vocabulary].

    f is what comes after the last op that has two computed inputs, usually the residual Add: a
    norm, a quantisation and the product with the vocabulary. ``last`` is where ``attention_mask``
    [batch, total] has its last one among the tokens of ``input_ids`` [batch, sequence], so that
    padding may be on either side; in a row of nothing but padding it is the last column. A graph
    without these inputs, or without an output ``logits`` of three axes, is left as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        logits = next((v for v in model.graph.outputs if v.name == "logits"), None)
        dims = dims_of(logits)
        if logits is None or dims is None or len(dims) != 3 or dims[1] == 1:
            return ir.passes.PassResult(model, modified=False)
        given = {value.name: value for value in model.graph.inputs}
        after = _after(logits)
        # Behind the product alone nothing would be saved by cutting.
        saves = any(node.op_type in _PRODUCTS for node in after)
        if not saves or not {MASK, TOKENS} <= given.keys():
            return ir.passes.PassResult(model, modified=False)
        _gather(model.graph, after[-1], given[MASK], given[TOKENS])
        for made in (value for node in after for value in node.outputs):
            known = dims_of(made)
            made.shape = ir.Shape([known[0], 1, *known[2:]]) if known else None
        return ir.passes.PassResult(model, modified=True)


def _after(logits: ir.Value) -> list[ir.Node]:
    """The nodes that take each token alone, from `logits` backwards."""
    found: list[ir.Node] = []
    value = logits
    while True:
        node, source = value.producer(), None
        if node is not None and (not found or _is_read_by(found[-1], node)):
            source = _source(node)
        if node is None or source is None:
            return found
        found.append(node)
        value = source


def _is_read_by(reader: ir.Node, node: ir.Node) -> bool:
    """Whether `reader` alone reads what `node` makes."""
    return all(
        not value.is_graph_output() and all(use.node is reader for use in value.uses())
        for value in node.outputs
    )


def _computed(node: ir.Node) -> list[ir.Value]:
    return [v for v in node.inputs if v is not None and not _fixed(v)]


def _source(node: ir.Node) -> ir.Value | None:
    """What `node` takes each token of, or None where there is more to it."""
    if ("" if node.domain == "ai.onnx" else node.domain, node.op_type) not in _EACH_TOKEN:
        return None
    if "Normalization" in node.op_type and node.attributes.get_int("axis", -1) not in (-1, 2):
        return None
    given, computed = [v for v in node.inputs if v is not None], _computed(node)
    if len(computed) != 1 or computed[0] is not node.inputs[_at(node)]:
        return None
    # With this the output has as many axes as what is computed, so that axis 1 is the tokens.
    flat = node.domain == CONTRIB or all(
        v is computed[0] or len(dims_of(v) or ()) < 3 for v in given
    )
    return computed[0] if flat else None


def _fixed(value: ir.Value) -> bool:
    """A constant, or one transposed: a weight that the embedding reads too."""
    source = made_by(value, "Transpose")
    return is_constant(value if source is None else source.inputs[0])


def _at(node: ir.Node) -> int:
    """Which input is computed: the first, of an op whose two may change places either."""
    first = node.inputs[0]
    return 1 if node.op_type in ("Add", "Mul") and first is not None and _fixed(first) else 0


def _gather(graph: ir.Graph, node: ir.Node, mask: ir.Value, tokens: ir.Value) -> None:
    """Let `node` read the last token of each row only."""
    at = _at(node)
    value = node.inputs[at]
    assert value is not None
    axis, axes, inner, minus_one = (
        constant(graph, f"last/{name}", of)
        for name, of in (
            ("axis", np.array(1)),
            ("axes", np.array([1])),
            ("inner", np.array([1, 2])),
            ("minus_one", np.array(-1, np.int32)),
        )
    )
    tape = ir.tape.Tape()
    # No shape is computed with: ONNX Runtime would do that on the CPU.
    minus = negative(tape, tokens)
    newest = tape.op("CumSum", [minus, axis], {"reverse": 1})
    real = tape.op("Cast", [mask], {"to": int(ir.DataType.BOOL)})
    known = tape.op("Cast", [real], {"to": int(ir.DataType.INT32)})
    kept = tape.op("GatherElements", [known, newest], {"axis": 1})
    places = tape.op("Mul", [kept, tape.op("CumSum", [minus, axis])])
    least = tape.op("ReduceMin", [places, axes], {"keepdims": 0})
    at_last = tape.op("Sub", [minus_one, least])
    index = tape.op("Cast", [at_last], {"to": int(ir.DataType.INT64)})
    last = tape.op("GatherND", [value, tape.op("Unsqueeze", [index, inner])], {"batch_dims": 1})
    name_places(tape.nodes, "last")
    dims = dims_of(value)
    last.type = value.type
    last.shape = ir.Shape([dims[0], 1, *dims[2:]]) if dims else None
    graph.insert_before(node, tape.nodes)
    node.replace_input_with(at, last)
