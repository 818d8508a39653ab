"""Scales of output channels behind the integer kernel, for steps of one token."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, drop_unused, shared_constant
from qcompile.passes.integer_matmul import CONTRIB, KERNEL
from qcompile.passes.matching import array_of, like

from qcompile.names import apart

_X_SCALE, _W_SCALE, _BIAS = 2, 3, 6


class ScaleColumns(ir.passes.InPlacePass):
    """``MatMulIntegerToFloat(x, w, s, t, z, , b)``, t [N] one scale per output channel
    -> ``Mul(MatMulIntegerToFloat(x, w, 1, 1, z, , b / (s·t)), s·t)``

    In every call the kernel multiplies s by t into a vector that it grows number by number, before
    its threads start: 3.3 ns for each output channel, an eighth of a step of llama-28m. Where s
    is constant and there is no bias the results are the same to the bit; else they are rounded in
    another place. Where s is found at run time it stays in the kernel. Of many rows the product
    is slower so, by one pass over its output.

    Left as it is: one scale for all, a scale that is no constant, and one that b cannot be divided
    by.

    Args:
        names: of the products, or of those that were joined in them.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            product = (node.domain, node.op_type) == (CONTRIB, KERNEL)
            if product and not self.names.isdisjoint(apart(str(node.name))):
                modified |= _scale(model.graph, node)
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _scale(graph: ir.Graph, product: ir.Node) -> bool:
    factor = array_of(product.inputs[_W_SCALE])
    if factor is None or factor.size == 1:
        return False
    static = array_of(product.inputs[_X_SCALE])
    if static is not None:
        factor = factor * static.reshape(())
    whole = product.outputs[0]
    name = str(product.name or whole.name)
    bias = product.inputs[_BIAS] if len(product.inputs) > _BIAS else None
    if bias is not None:
        added = array_of(bias)
        if added is None:
            return False
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            added = added / factor
        if not np.isfinite(added).all():
            return False
        divided = constant(graph, f"{name}/bias", added)
        product.replace_input_with(_BIAS, divided)
    one = shared_constant(graph, "unit_scale", np.float32(1.0))
    product.replace_input_with(_W_SCALE, one)
    if static is not None:
        product.replace_input_with(_X_SCALE, one)
    last = apart(name)[-1]  # of what was joined: the kernel alone has the names of all
    scaled = ir.node(
        "Mul",
        [whole, constant(graph, f"{name}/factor", factor)],
        name=f"{last}/Scale",
        metadata_props=dict(product.metadata_props),
    )
    graph.insert_after(product, scaled)
    result = like(scaled.outputs[0], whole)
    whole.replace_all_uses_with(result, replace_graph_outputs=whole.is_graph_output())
    scaled.replace_input_with(0, whole)
    # A graph output must keep its name, and reports look for the others by theirs.
    result.name, whole.name = whole.name, f"{whole.name}/sums"
    return True
