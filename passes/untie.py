"""Give Linears that are going to be quantised a weight of their own."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import derived, drop_unused

from qcompile.linears import find_linears


class Untie(ir.passes.InPlacePass):
    """Copy a weight that something else reads too, so that scales can be folded into it.

    1. ``MatMul(x, Transpose(W))``, W also read by an embedding's Gather -> ``MatMul(x, Wᵀ)``
    2. ``MatMul(x, W)``, W also read by something that is no Linear -> ``MatMul(x, W')``, a copy

    Args:
        names: the Linears to untie; those whose weight is not tied stay as they are.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        tied = [x for x in find_linears(model.graph) if x.tied and x.name in self.names]
        for linear in tied:
            own = derived(
                linear.weight,
                "untied",
                np.transpose if linear.transposed else np.asarray,
                (linear.in_features, linear.out_features),
            )
            linear.matmul.replace_input_with(1, own)
        if tied:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=bool(tied))
