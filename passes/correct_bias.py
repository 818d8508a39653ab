"""Add what bias correction found to the biases (arXiv 1906.04721, 4.2)."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant, derived, drop_unused

from qcompile.correction import CorrectionPlan
from qcompile.weighted import find_weighted, set_bias

_DONE = "qcompile.bias_corrected"


class CorrectBias(ir.passes.InPlacePass):
    """Conv(x, W, b) -> Conv(x, W, b + shift), and the same of a Linear; without b it gets one.

    A bias that several ops share gets a corrected copy. An op is marked in its metadata, so that a
    second run changes nothing.
    """

    def __init__(self, plan: CorrectionPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for op in find_weighted(model.graph):
            shift = self.plan.shifts.get(op.name)
            if shift is None or not shift.any() or _DONE in op.node.metadata_props:
                continue
            shift = shift.astype(np.float32)
            if op.bias is None:
                bias = constant(model.graph, f"{op.name}.bias", shift)
            else:
                bias = derived(op.bias, "corrected", partial(np.add, shift), op.bias.shape)
            set_bias(model.graph, op, bias)
            op.node.metadata_props[_DONE] = "1"
            modified = True
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)
