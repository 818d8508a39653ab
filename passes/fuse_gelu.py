"""Decomposed and runtime-specific Gelu becomes the ONNX op."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from qcompile.passes.matching import build, is_op, like, made_by, put_for, scalar_of, skip_noops

# A polynomial: (power of x, power of the gate) -> coefficient.
_Polynomial = dict[tuple[int, int], float]

_DEPTH: Final = 6
_ERF_ARGUMENT: Final[_Polynomial] = {(1, 0): math.sqrt(0.5)}
_TANH_ARGUMENT: Final[_Polynomial] = {
    (1, 0): math.sqrt(2 / math.pi),
    (3, 0): math.sqrt(2 / math.pi) * 0.044715,
}
_RESULT: Final[_Polynomial] = {(1, 0): 0.5, (1, 1): 0.5}
_ARITHMETIC: Final = ("Add", "Sub", "Mul", "Div", "Pow")


class FuseGelu(ir.passes.InPlacePass):
    """Recognise Gelu however its arithmetic is arranged.

    1. ``x/2 · (1 + Erf(x / √2))`` -> ``Gelu(x)``
    2. ``x/2 · (1 + Tanh(√(2/π) · (x + 0.044715·x³)))`` -> ``Gelu(x, approximate=tanh)``
    3. com.microsoft ``Gelu(x)`` -> ``Gelu(x)``
    4. com.microsoft ``FastGelu(x[, bias])`` -> ``[Add]``, ``Gelu(approximate=tanh)``
    5. com.microsoft ``BiasGelu(x, bias)`` -> ``Add``, ``Gelu``

    In 1 and 2 the argument and the result are expanded as polynomials in x and in the Erf or Tanh,
    and compared coefficient by coefficient, so the order of the multiplications does not matter.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if is_op(node, "Erf", "Tanh"):
                modified |= _fuse(model.graph, node)
            elif node.domain == "com.microsoft" and node.op_type in (
                "Gelu",
                "FastGelu",
                "BiasGelu",
            ):
                modified |= _replace_runtime_op(model.graph, node)
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=modified)


def _fuse(graph: ir.Graph, gate: ir.Node) -> bool:
    exact = gate.op_type == "Erf"
    wanted = _ERF_ARGUMENT if exact else _TANH_ARGUMENT
    argument = gate.inputs[0]
    if argument is None:
        return False
    for x in _candidates(argument, _DEPTH):
        if x is argument or not _equal(_expand(argument, x, None, _DEPTH), wanted):
            continue
        for result in _results(gate.outputs[0], _DEPTH):
            if _equal(_expand(result, x, gate.outputs[0], _DEPTH), _RESULT):
                attributes = {"approximate": "none" if exact else "tanh"}
                origin = result.producer()
                assert origin is not None
                gelu = build("Gelu", [x], attributes, origin)
                put_for(graph, result, [gelu], gelu.outputs[0])
                return True
    return False


def _candidates(value: ir.Value, depth: int) -> Iterator[ir.Value]:
    """Every value below `value` that arithmetic alone leads to."""
    yield value
    node = made_by(skip_noops(value), *_ARITHMETIC)
    if node is None or depth == 0:
        return
    for below in node.inputs:
        if below is not None and scalar_of(below) is None:
            yield from _candidates(below, depth - 1)


def _results(value: ir.Value, depth: int) -> Iterator[ir.Value]:
    """Every value above `value` that sums and products alone lead to."""
    if depth == 0:
        return
    for user in value.consumers():
        if is_op(user, "Add", "Mul", "Div"):
            yield user.outputs[0]
            yield from _results(user.outputs[0], depth - 1)


def _expand(value: ir.Value, x: ir.Value, gate: ir.Value | None, depth: int) -> _Polynomial | None:
    """`value` as a polynomial in `x` and `gate`, or None where it is none."""
    if value is x:
        return {(1, 0): 1.0}
    if value is gate:
        return {(0, 1): 1.0}
    number = scalar_of(value)
    if number is not None:
        return {(0, 0): number}
    node = made_by(value, *_ARITHMETIC)
    if node is None or depth == 0 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    a = _expand(node.inputs[0], x, gate, depth - 1)
    b = _expand(node.inputs[1], x, gate, depth - 1)
    if a is None or b is None:
        return None
    if node.op_type == "Add":
        return _sum(a, b, 1.0)
    if node.op_type == "Sub":
        return _sum(a, b, -1.0)
    if node.op_type == "Mul":
        return _product(a, b)
    # What is left divides by a number, or raises to a small whole power.
    if list(b) != [(0, 0)] or b[0, 0] == 0.0:
        return None
    if node.op_type == "Div":
        return _product(a, {(0, 0): 1.0 / b[0, 0]})
    if b[0, 0] not in (2.0, 3.0):
        return None
    squared = _product(a, a)
    return squared if b[0, 0] == 2.0 else _product(squared, a)


def _sum(a: _Polynomial, b: _Polynomial, sign: float) -> _Polynomial:
    return {k: a.get(k, 0.0) + sign * b.get(k, 0.0) for k in {**a, **b}}


def _product(a: _Polynomial, b: _Polynomial) -> _Polynomial:
    result: _Polynomial = {}
    for (i, j), p in a.items():
        for (k, m), q in b.items():
            result[i + k, j + m] = result.get((i + k, j + m), 0.0) + p * q
    return result


def _equal(found: _Polynomial | None, wanted: _Polynomial) -> bool:
    """Equal up to the float32 rounding of a few constants."""
    if found is None:
        return False
    return all(
        abs(found.get(k, 0.0) - wanted.get(k, 0.0)) <= 1e-6 * abs(wanted.get(k, 0.0))
        for k in {**found, **wanted}
    )


def _replace_runtime_op(graph: ir.Graph, node: ir.Node) -> bool:
    x = node.inputs[0]
    bias = node.inputs[1] if len(node.inputs) > 1 else None
    if x is None:
        return False
    nodes: list[ir.Node] = []
    if bias is not None:
        add = build("Add", [x, bias], {}, node)
        x = like(add.outputs[0], x)
        nodes.append(add)
    attributes = {"approximate": "tanh" if node.op_type == "FastGelu" else "none"}
    gelu = build("Gelu", [x], attributes, node)
    put_for(graph, node.outputs[0], [*nodes, gelu], gelu.outputs[0])
    return True
