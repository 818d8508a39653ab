"""What makes an activation: where its quantisation may be a part of the same kernel."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

import onnx_ir as ir

from qcompile.linears import Site
from qcompile.passes.matching import made_by, operands

Maker: TypeAlias = Literal[
    "LayerNormalization",
    "RMSNormalization",
    "Relu",
    "Gelu",
    "Silu",
    "GatedRelu",
    "GatedGelu",
    "GatedSilu",
]
"""A norm over channels (of a sum of two, as in a residual stream), an activation function, or the
product of one and another factor."""

MAKERS: Final[tuple[Maker, ...]] = get_args(Maker)
NORMS: Final[tuple[Maker, ...]] = ("LayerNormalization", "RMSNormalization")


def maker_of(site: Site) -> Maker | None:
    """What makes the activation of `site`, where nothing but the site's Linears reads it."""
    readers = {linear.matmul for linear in site.linears}
    value = site.x
    while True:
        if value.is_graph_output() or any(use.node not in readers for use in value.uses()):
            return None
        reshape = made_by(value, "Reshape")
        source = reshape.inputs[0] if reshape is not None else None
        if reshape is None or source is None:
            break
        # A target for which rows are rows lets it be.
        readers, value = {reshape}, source
    norm = made_by(value, *NORMS)
    if norm is not None:
        return next(kind for kind in NORMS if kind == norm.op_type)
    function = _function(value)
    if function is not None:
        return next(maker for maker in MAKERS if maker == function)
    product = made_by(value, "Mul")
    for factor, _ in operands(product) if product is not None else ():
        function = _function(factor)
        if function is not None:
            return next(maker for maker in MAKERS if maker == f"Gated{function}")
    return None


def _function(value: ir.Value) -> str | None:
    node = made_by(value, "Relu", "Gelu", "Mul")
    if node is None or node.op_type != "Mul":
        return None if node is None else node.op_type
    for h, gate in operands(node):
        sigmoid = made_by(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is h:
            return "Silu"
    return None
