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
from qcompile.passes.symbolic_shapes import dims_of
from qcompile.passes.weight_only import KERNEL as NBITS

from qcompile.linears import is_constant

_EACH_TOKEN: Final = frozenset(
    {
        *(("", op) for op in ("Add", "Cast", "Div", "MatMul", "Mul", "QuantizeLinear", "Tanh")),
        *(("", op) for op in ("LayerNormalization", "RMSNormalization")),
        *((CONTRIB, op) for op in (INTEGER, NBITS, BNB4)),
    }
)
"""Ops that give a token's output from that token alone, where all inputs but one are constant."""


class LastLogits(ir.passes.InPlacePass):
    """``logits = f(x)`` -> ``logits = f(Slice(x, -1, axis=1))``, of shape [batch, 1, vocabulary].

    f is what comes after the last op that has two computed inputs, usually the residual Add: a
    norm, a quantisation and the product with the vocabulary. A graph without an output ``logits``
    of three axes is left as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        logits = next((v for v in model.graph.outputs if v.name == "logits"), None)
        dims = dims_of(logits)
        if logits is None or dims is None or len(dims) != 3 or dims[1] == 1:
            return ir.passes.PassResult(model, modified=False)
        after = _after(logits)
        if not after:
            return ir.passes.PassResult(model, modified=False)
        _slice(model.graph, after[-1])
        for node in after:
            known = dims_of(node.outputs[0])
            node.outputs[0].shape = ir.Shape([known[0], 1, *known[2:]]) if known else None
        return ir.passes.PassResult(model, modified=True)


def _after(logits: ir.Value) -> list[ir.Node]:
    """The nodes that take each token alone, from `logits` backwards."""
    found: list[ir.Node] = []
    value = logits
    while True:
        node, source = value.producer(), None
        if node is not None and not (found and (len(value.uses()) > 1 or value.is_graph_output())):
            source = _source(node)
        if node is None or source is None:
            return found
        found.append(node)
        value = source


def _source(node: ir.Node) -> ir.Value | None:
    """What `node` takes each token of, or None where there is more to it."""
    if ("" if node.domain == "ai.onnx" else node.domain, node.op_type) not in _EACH_TOKEN:
        return None
    if "Normalization" in node.op_type and node.attributes.get_int("axis", -1) not in (-1, 2):
        return None
    given = [v for v in node.inputs if v is not None]
    computed = [v for v in given if not _fixed(v)]
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


def _slice(graph: ir.Graph, node: ir.Node) -> None:
    """Let `node` read the last token only."""
    at = _at(node)
    value = node.inputs[at]
    assert value is not None
    bounds = ([-1], [np.iinfo(np.int64).max], [1])
    limits = [
        constant(graph, f"last/{name}", np.array(of, np.int64))
        for name, of in zip(("start", "end", "axis"), bounds, strict=True)
    ]
    last = ir.node("Slice", [value, *limits], name="last/Slice")
    dims = dims_of(value)
    last.outputs[0].name = "last/output"
    last.outputs[0].type = value.type
    last.outputs[0].shape = ir.Shape([dims[0], 1, *dims[2:]]) if dims else None
    graph.insert_before(node, last)
    node.replace_input_with(at, last.outputs[0])
