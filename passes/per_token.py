"""Per-token quantisation as model-local functions: it has no standard ONNX form."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

DOMAIN: Final = "qcompile"
QUANTIZE: Final = "QuantizePerToken"
DEQUANTIZE: Final = "DequantizePerToken"

LEVELS: Final = 127
"""Codes on each side of zero."""
ZERO_POINT: Final = 128
"""uint8 code of the value 0: codes are symmetric around it, from 1 to 255."""


def per_token_functions() -> tuple[ir.Function, ir.Function]:
    """The two functions, bodies in opset 23.

    ``QuantizePerToken(x [..., C]) -> codes uint8 [..., C], scale float32 [..., 1]`` with
    scale = max|row| / 127, and ``DequantizePerToken(codes, scale) -> x̂ [..., C]``.
    """
    return _quantize(), _dequantize()


def _quantize() -> ir.Function:
    x = ir.Value(name="x")
    tape = ir.tape.Tape()
    last = tape.op("Constant", [], {"value": ir.tensor(np.array([-1], np.int64))})
    levels = tape.op("Constant", [], {"value": ir.tensor(np.float32(LEVELS))})
    # A row of zeros must not divide by zero; any positive scale gives its codes.
    floor = tape.op("Constant", [], {"value": ir.tensor(np.float32(1e-20))})
    one, zero_point = _unit(tape)
    absmax = tape.op("ReduceMax", [tape.op("Abs", [x]), last], {"keepdims": 1})
    scale = tape.op("Div", [tape.op("Max", [absmax, floor]), levels])
    codes = tape.op("QuantizeLinear", [tape.op("Div", [x, scale]), one, zero_point])
    return _function(QUANTIZE, [x], [codes, scale], tape)


def _dequantize() -> ir.Function:
    codes, scale = ir.Value(name="codes"), ir.Value(name="scale")
    tape = ir.tape.Tape()
    one, zero_point = _unit(tape)
    result = tape.op("Mul", [tape.op("DequantizeLinear", [codes, one, zero_point]), scale])
    return _function(DEQUANTIZE, [codes, scale], [result], tape)


def _unit(tape: ir.tape.Tape) -> tuple[ir.Value, ir.Value]:
    one = tape.op("Constant", [], {"value": ir.tensor(np.float32(1.0))})
    zero_point = tape.op("Constant", [], {"value": ir.tensor(np.uint8(ZERO_POINT))})
    return one, zero_point


def _function(
    name: str, inputs: list[ir.Value], outputs: list[ir.Value], tape: ir.tape.Tape
) -> ir.Function:
    graph = ir.Graph(inputs, outputs, nodes=list(tape.nodes), opset_imports={"": 23}, name=name)
    return ir.Function(domain=DOMAIN, name=name, graph=graph, attributes={})
