"""Shapes that are known but for batch and sequence are constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from qcompile.passes.constants import drop_unused, shared_constant
from qcompile.passes.matching import array_of, is_op
from qcompile.passes.symbolic_shapes import dims_of


class ConstantShapes(ir.passes.InPlacePass):
    """``Reshape(x, Concat(Shape(...), ...))`` -> ``Reshape(x, [0, 0, heads, D])``.

    0 keeps a dimension of x: of the same name in x and in the result, at the same place. Left as it
    is where another dimension is not known, or is none: an axis of length 0 cannot be said so. What
    computes a shape is of a few numbers, and ONNX Runtime would run it on the CPU.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            shape = _known(node) if is_op(node, "Reshape") else None
            if shape is not None and array_of(node.inputs[1]) is None:
                node.attributes.pop("allowzero", None)
                node.replace_input_with(1, shared_constant(model.graph, "shape", np.array(shape)))
                modified = True
        if modified:
            drop_unused(model)
        return ir.passes.PassResult(model, modified=modified)


def _known(reshape: ir.Node) -> list[int] | None:
    before, after = dims_of(reshape.inputs[0]), dims_of(reshape.outputs[0])
    if before is None or after is None:
        return None
    kept = [before[: len(after)][at : at + 1] == [dim] for at, dim in enumerate(after)]
    if any(
        dim in (None, 0) or not (isinstance(dim, int) or keep)
        for dim, keep in zip(after, kept, strict=True)
    ):
        return None
    return [dim if isinstance(dim, int) else 0 for dim in after]
