"""The part that decomposed LayerNormalization and RMSNormalization share."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from qcompile.passes.matching import (
    channel_vector,
    ints,
    is_scalar,
    made_by,
    on_last_axis,
    operands,
    same,
    scalar_of,
    skip_noops,
)


@dataclasses.dataclass(frozen=True)
class Normalised:
    """``base / sqrt(mean(base²) + epsilon) * weight``, the mean over the last axis."""

    base: ir.Value
    weight: ir.Value
    epsilon: float


def match_scaled(node: ir.Node) -> Normalised | None:
    """What `node` computes, if it is the multiplication by the weight that ends a norm."""
    if made_by(node.outputs[0], "Mul") is None:
        return None
    for value, weight in operands(node):
        if channel_vector(weight) and value.dtype in (None, ir.DataType.FLOAT):
            found = _match_normalised(skip_noops(value))
            if found is not None and _fits(found[0], weight):
                return Normalised(found[0], weight, found[1])
    return None


def mean_of(value: ir.Value | None) -> ir.Value | None:
    """x, where `value` is the mean of x over its last axis, the axis kept."""
    node = made_by(value, "ReduceMean")
    if node is None or node.attributes.get_int("keepdims", 1) != 1:
        return None
    x = node.inputs[0]
    return x if on_last_axis(ints(node, "axes", 1), x) else None


def _match_normalised(value: ir.Value) -> tuple[ir.Value, float] | None:
    """(base, epsilon) of ``base / std`` or ``base * (1 / std)``."""
    div = made_by(value, "Div")
    pairs = [(div.inputs[0], _variance_of_std(div.inputs[1]))] if div is not None else []
    mul = made_by(value, "Mul")
    if mul is not None:
        pairs = [(base, _variance_of_inverse(inverse)) for base, inverse in operands(mul)]
    for base, variance in pairs:
        add = made_by(variance, "Add")
        if base is None or add is None:
            continue
        for mean, epsilon in operands(add):
            number = scalar_of(epsilon)
            if number is not None and _is_mean_square(mean, base):
                return skip_noops(base), number
    return None


def _variance_of_std(value: ir.Value | None) -> ir.Value | None:
    """v, where `value` is sqrt(v)."""
    root = made_by(value, "Sqrt")
    if root is not None:
        return root.inputs[0]
    power = made_by(value, "Pow")
    return power.inputs[0] if power is not None and is_scalar(power.inputs[1], 0.5) else None


def _variance_of_inverse(value: ir.Value) -> ir.Value | None:
    """v, where `value` is 1 / sqrt(v)."""
    reciprocal = made_by(value, "Reciprocal")
    if reciprocal is not None:
        return _variance_of_std(reciprocal.inputs[0])
    division = made_by(value, "Div")
    if division is not None and is_scalar(division.inputs[0], 1.0):
        return _variance_of_std(division.inputs[1])
    power = made_by(value, "Pow")
    return power.inputs[0] if power is not None and is_scalar(power.inputs[1], -0.5) else None


def _is_mean_square(value: ir.Value, base: ir.Value) -> bool:
    squared = mean_of(value)
    if squared is None:
        return False
    wanted = skip_noops(base)
    power = made_by(squared, "Pow")
    if power is not None and power.inputs[0] is not None and is_scalar(power.inputs[1], 2.0):
        return same(skip_noops(power.inputs[0]), wanted)
    mul = made_by(squared, "Mul")
    if mul is None or mul.inputs[0] is None or mul.inputs[1] is None:
        return False
    return all(v is not None and same(skip_noops(v), wanted) for v in mul.inputs)


def _fits(x: ir.Value, weight: ir.Value) -> bool:
    """False where the weight is known not to have the length of x's last axis."""
    if x.shape is None or weight.shape is None:
        return True
    if len(weight.shape) > len(x.shape):
        return False
    return not isinstance(x.shape[-1], int) or x.shape[-1] == weight.shape[-1]
