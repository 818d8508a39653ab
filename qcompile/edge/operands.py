"""Codes of constants: weights, biases and what is added or multiplied."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.edge.plan import BITS, LIMITS, Code, ConstantQuant, TensorQuant
from qcompile.edge.units import Operand
from qcompile.methods import Method
from qcompile.precision import QuantizedWeight
from qcompile.weights import WHOLE, quantize_weight

Array = npt.NDArray[Any]

_PARTS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_FINE: Final = (*np.linspace(1.0, 0.905, 20).tolist(), *_PARTS[2:])
_POWERS: Final = (1.0, 0.5, 0.25)
"""Parts of the full range that are tried; eight bits lose by clipping more than a little."""

_BIAS_ROOM: Final = 2.0**30
"""A bias takes no more than this of its 32 bits: the products are added to it."""


def quantize_constant(
    operand: Operand,
    weight: Array,
    code: Code,
    axis: int | None,
    *,
    power_of_two: bool = False,
    method: Method | None = None,
) -> ConstantQuant:
    """A weight with zero in the middle of its codes.

    Args:
        operand: where it is read.
        weight: float32 of any shape.
        code: type of the codes.
        axis: of the output channels, each with a scale of its own; None: one for all.
        power_of_two: whether scales must be powers of two.
        method: ``rtn`` clips no weight, any other searches the range, finely of 8 bits; None: of
            int4 codes, and coarsely of int8 codes per channel.
    """
    least, most = LIMITS[code]
    middle = (least + most + 1) // 2
    if axis is not None and code in ("int8", "int4") and not power_of_two and weight.ndim > 1:
        rows = np.moveaxis(weight, axis, -1)
        fine = _FINE if method is not None and code == "int8" else None
        found = quantize_weight(
            np.ascontiguousarray(rows.reshape(-1, rows.shape[-1])),
            bits=BITS[code],
            parts=WHOLE if method == "rtn" else fine,
        )
        codes = np.moveaxis(found.codes.reshape(rows.shape), -1, axis)
        return _constant(
            operand, codes.astype(np.int32), code, found.scale, _zeros(found.scale), axis
        )
    others = tuple(i for i in range(weight.ndim) if i != axis) if axis is not None else None
    largest = np.abs(weight).max(axis=others, initial=0.0).astype(np.float64)
    scale = np.maximum(largest / (most - middle), np.finfo(np.float32).tiny)
    scale = np.where(largest > 0, scale, 1.0)
    if power_of_two:
        scale = 2.0 ** np.ceil(np.log2(scale))
    if method not in ("rtn", None) or (method is None and code == "int4" and not power_of_two):
        parts = _POWERS if power_of_two else _PARTS if code == "int4" else _FINE
        scale = _least_error(weight, scale, axis, others, (least - middle, most - middle), parts)
    scale = scale.astype(np.float32)
    codes = np.rint(weight / _along(scale, weight.ndim, axis)) + middle
    codes = np.clip(codes, least, most).astype(np.int32)
    return _constant(operand, codes, code, scale, np.full(scale.shape, middle), axis)


def from_channels(operand: Operand, found: QuantizedWeight) -> ConstantQuant:
    """A weight [in, out] whose codes are known."""
    code: Code = "int8" if found.bits == 8 else "int4"
    return _constant(
        operand, found.codes.astype(np.int32), code, found.scale, _zeros(found.scale), 1
    )


def _least_error(
    weight: Array,
    scale: Array,
    axis: int | None,
    others: tuple[int, ...] | None,
    ends: tuple[int, int],
    parts: tuple[float, ...],
) -> Array:
    """Of few codes the largest weights take too many: of `parts` of `scale` that which errs least,
    with codes between `ends`."""
    best, error = scale, np.full(scale.shape, np.inf)
    for part in parts:
        step = _along(scale * part, weight.ndim, axis)
        rounded = np.clip(np.rint(weight / step), *ends) * step
        found = np.square(weight - rounded).sum(axis=others)
        best = np.where(found < error, scale * part, best)
        error = np.minimum(found, error)
    return best


def quantize_bias(
    operand: Operand,
    bias: Array,
    weight: ConstantQuant,
    input_scale: float,
    *,
    power_of_two: bool = False,
) -> tuple[ConstantQuant, ConstantQuant]:
    """A bias in int32, its scale the product of the input's and the weight's.

    Where that is too fine for the bias, the weight's scale is enlarged and its codes with it.

    Args:
        operand: where it is read.
        bias: float32, its last axis the channels.
        weight: of the same op.
        input_scale: of its activation.
        power_of_two: whether scales must be powers of two.

    Returns:
        The weight, and the bias.
    """
    largest = np.abs(bias.astype(np.float64))
    if weight.axis is None:
        largest = largest.max(initial=0.0)
    wanted = largest / _BIAS_ROOM / input_scale
    if (wanted > weight.scale).any():
        enlarged = np.maximum(weight.scale, wanted)
        if power_of_two:
            enlarged = 2.0 ** np.ceil(np.log2(enlarged))
        weight = _rescaled(weight, enlarged.astype(np.float32))
    scale = (np.float64(input_scale) * weight.scale.astype(np.float64)).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    codes = np.rint(bias / scale.astype(np.float64))
    codes = np.clip(codes, *LIMITS["int32"]).astype(np.int64).astype(np.int32)
    axis = None if weight.axis is None else bias.ndim - 1
    return weight, _constant(operand, codes, "int32", scale, None, axis)


def quantize_operand(operand: Operand, array: Array, like: TensorQuant) -> ConstantQuant:
    """A constant with the scale and zero point of an activation."""
    codes = np.clip(np.rint(array / like.scale) + like.zero_point, *LIMITS[like.code])
    scale = np.array(like.scale, np.float32)
    return _constant(
        operand, codes.astype(np.int32), like.code, scale, np.array(like.zero_point), None
    )


def _rescaled(weight: ConstantQuant, scale: Array) -> ConstantQuant:
    least, most = LIMITS[weight.code]
    points = 0 if weight.zero_point is None else weight.zero_point
    middle = _along(np.broadcast_to(points, scale.shape), weight.codes.ndim, weight.axis)
    codes = weight.dequantized() / _along(scale, weight.codes.ndim, weight.axis)
    codes = np.clip(np.rint(codes) + middle, least, most).astype(np.int32)
    return dataclasses.replace(weight, codes=codes, scale=scale)


def _zeros(scale: Array) -> Array:
    """Zero points, written out: ONNX Runtime's rewriting of products trips over absent ones."""
    return np.zeros(scale.shape, np.int64)


def _along(scale: Array, rank: int, axis: int | None) -> Array:
    """`scale` so that it broadcasts over the axis of a tensor of that rank."""
    shape = [1] * rank
    if axis is not None:
        shape[axis] = -1
    return scale if axis is None else scale.reshape(shape)


def _constant(
    operand: Operand,
    codes: Array,
    code: Code,
    scale: Array,
    zero_point: Array | None,
    axis: int | None,
) -> ConstantQuant:
    return ConstantQuant(
        node=str(operand.node.name),
        index=operand.index,
        value=str(operand.value.name),
        role=operand.role,
        codes=codes,
        code=code,
        scale=np.asarray(scale, np.float32),
        zero_point=zero_point,
        axis=axis,
    )
