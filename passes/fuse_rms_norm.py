"""RMSNormalization, decomposed or in ONNX Runtime's own ops, becomes the ONNX op."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from qcompile.passes.matching import build, flat, like, made_by, put_for
from qcompile.passes.normalisation import match_scaled, mean_of

# ONNX Runtime put SimplifiedLayerNormalization into ONNX's own domain.
_RUNTIME_DOMAINS = ("com.microsoft", "", "ai.onnx")


class FuseRmsNorm(ir.passes.InPlacePass):
    """Bring root-mean-square norms, and ONNX Runtime's fused norms, into ONNX's own ops.

    1. ``x / Sqrt(ReduceMean(x²) + epsilon) * weight`` -> ``RMSNormalization(x, weight)``, with x²
       as Pow or Mul, the division as Div, Reciprocal or Pow, and Casts from float to float between
    2. ``SimplifiedLayerNormalization(x, weight)`` -> ``RMSNormalization(x, weight)``
    3. ``SkipSimplifiedLayerNormalization(x, skip, weight[, bias])``
       -> ``Add(x, skip)``, ``[Add bias]``, ``RMSNormalization``
    4. ``SkipLayerNormalization(x, skip, weight[, beta[, bias]])``
       -> ``Add(x, skip)``, ``[Add bias]``, ``LayerNormalization``

    The fourth output of a Skip op, the sum, is the Add's output. An op whose mean or inverse
    deviation is read is left as it is. Run FuseLayerNorm before.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Mul":
                modified |= _fuse(model.graph, node)
            elif node.domain in _RUNTIME_DOMAINS and node.op_type == "SimplifiedLayerNormalization":
                modified |= _rename(model.graph, node)
            elif node.domain == "com.microsoft" and node.op_type in (
                "SkipLayerNormalization",
                "SkipSimplifiedLayerNormalization",
            ):
                modified |= _split_skip(model.graph, node)
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=modified)


def _fuse(graph: ir.Graph, node: ir.Node) -> bool:
    found = match_scaled(node)
    if found is None:
        return False
    sub = made_by(found.base, "Sub")
    if sub is not None and mean_of(sub.inputs[1]) is sub.inputs[0]:
        return False  # a layer norm, which FuseLayerNorm left alone
    attributes = {"axis": -1, "epsilon": found.epsilon, "stash_type": 1}
    norm = build("RMSNormalization", [found.base, flat(found.weight)], attributes, node)
    put_for(graph, node.outputs[0], [norm], norm.outputs[0])
    return True


def _rename(graph: ir.Graph, node: ir.Node) -> bool:
    if any(_is_read(v) for v in node.outputs[1:]):
        return False
    attributes = {
        "axis": node.attributes.get_int("axis", -1),
        "epsilon": node.attributes.get_float("epsilon", 1e-5),
        "stash_type": node.attributes.get_int("stash_type", 1),
    }
    norm = build("RMSNormalization", node.inputs[:2], attributes, node)
    put_for(graph, node.outputs[0], [norm], norm.outputs[0])
    return True


def _split_skip(graph: ir.Graph, node: ir.Node) -> bool:
    if any(_is_read(v) for v in node.outputs[1:3]):
        return False
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    padded = [*node.inputs, None, None]
    x, skip, weight = padded[:3]
    beta, bias = (None, padded[3]) if simplified else (padded[3], padded[4])
    if x is None or skip is None or weight is None:
        return False
    add = build("Add", [x, skip], {}, node)
    nodes, total = [add], like(add.outputs[0], x)
    if bias is not None:
        add = build("Add", [total, bias], {}, node)
        nodes.append(add)
        total = like(add.outputs[0], x)
    attributes = {
        "axis": -1,
        "epsilon": node.attributes.get_float("epsilon", 1e-12),
        "stash_type": 1,
    }
    inputs = [total, weight] if beta is None else [total, weight, beta]
    op_type = "RMSNormalization" if simplified else "LayerNormalization"
    norm = build(op_type, inputs, attributes, node)
    put_for(graph, node.outputs[0], [*nodes, norm], norm.outputs[0])
    if len(node.outputs) > 3 and _is_read(node.outputs[3]):
        put_for(graph, node.outputs[3], [], total)
    return True


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
