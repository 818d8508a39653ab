"""Decomposed LayerNormalization becomes the op."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from qcompile.passes.constants import sole_use
from qcompile.passes.matching import build, channel_vector, flat, made_by, operands, put_for
from qcompile.passes.normalisation import match_scaled, mean_of


class FuseLayerNorm(ir.passes.InPlacePass):
    """Recognise layer normalisation over the last axis, weight and bias constant.

    With ``d = x - ReduceMean(x)`` and ``v = ReduceMean(d²) + epsilon``, where d² is Pow or Mul,
    the axis an attribute or an input, and d may be computed twice:

    1. ``d / Sqrt(v) * weight + bias`` -> ``LayerNormalization(x, weight, bias)``
    2. ``d * Reciprocal(Sqrt(v)) * weight + bias``, or ``1 / Sqrt(v)``, or a Pow of ±0.5 -> same
    3. either without the bias -> ``LayerNormalization(x, weight)``

    A norm without a weight, or over several axes, is left as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            modified |= _fuse(model.graph, node)
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=modified)


def _fuse(graph: ir.Graph, node: ir.Node) -> bool:
    found = match_scaled(node)
    if found is None:
        return False
    deviation = made_by(found.base, "Sub")
    x = deviation.inputs[0] if deviation is not None else None
    if deviation is None or x is None or mean_of(deviation.inputs[1]) is not x:
        return False
    result = node.outputs[0]
    inputs = [x, flat(found.weight)]
    add = _bias_add(result)
    if add is not None:
        bias = next(b for value, b in operands(add) if value is result)
        inputs.append(flat(bias))
        result = add.outputs[0]
    attributes = {"axis": -1, "epsilon": found.epsilon, "stash_type": 1}
    norm = build("LayerNormalization", inputs, attributes, node)
    put_for(graph, result, [norm], norm.outputs[0])
    return True


def _bias_add(scaled: ir.Value) -> ir.Node | None:
    """The Add of a constant vector of the weight's length that alone reads `scaled`."""
    if not sole_use(scaled):
        return None
    add = scaled.consumers()[0]
    if made_by(add.outputs[0], "Add") is None:
        return None
    weight = next(w for w in scaled.producer().inputs if channel_vector(w))  # type: ignore[union-attr]
    for value, bias in operands(add):
        if value is scaled and channel_vector(bias):
            assert bias.shape is not None and weight is not None and weight.shape is not None
            rank = len(scaled.shape) if scaled.shape is not None else 1
            if bias.shape[-1] == weight.shape[-1] and len(bias.shape) <= rank:
                return add
    return None
