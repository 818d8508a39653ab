"""Weights as indices into a table, in blocks, as a model-local function: no standard ONNX form."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
from qcompile.passes.per_token import DOMAIN

NAME: Final = "DequantizeTable"


def table_function() -> ir.Function:
    """``DequantizeTable(codes uint8 [blocks, size, N], scale [blocks, N], table [16]) -> [K, N]``,
    ``table[codes] · scale``, its body in opset 23."""
    codes, scale, table = (ir.Value(name=name) for name in ("codes", "scale", "table"))
    tape = ir.tape.Tape()
    one = tape.op("Constant", [], {"value": ir.tensor(np.array([1], np.int64))})
    values = tape.op("Gather", [table, tape.op("Cast", [codes], {"to": ir.DataType.INT32.value})])
    blocks = tape.op("Mul", [values, tape.op("Unsqueeze", [scale, one])])
    # By way of [N, K]: a 0 in Reshape's shape copies the axis of that place.
    turned = tape.op("Transpose", [blocks], {"perm": [2, 0, 1]})
    rows = tape.op("Constant", [], {"value": ir.tensor(np.array([0, -1], np.int64))})
    result = tape.op("Transpose", [tape.op("Reshape", [turned, rows])], {"perm": [1, 0]})
    graph = ir.Graph(
        [codes, scale, table], [result], nodes=list(tape.nodes), opset_imports={"": 23}, name=NAME
    )
    return ir.Function(domain=DOMAIN, name=NAME, graph=graph, attributes={})
