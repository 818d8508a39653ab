"""Give every Conv a bias, so that there is one to correct."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import constant

from qcompile.weighted import find_weighted, set_bias


class ZeroBias(ir.passes.InPlacePass):
    """``Conv(x, W)`` -> ``Conv(x, W, 0)``: kernels of Conv add a bias for nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for op in find_weighted(model.graph):
            if op.convolves and op.bias is None:
                zeros = np.zeros(op.out_channels, np.float32)
                set_bias(model.graph, op, constant(model.graph, f"{op.name}.bias", zeros))
                modified = True
        return ir.passes.PassResult(model, modified=modified)
