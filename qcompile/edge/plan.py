"""Decisions about tensors: frozen values that `passes.quantize_tensors` writes into a graph."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompile.methods import Method

Array = npt.NDArray[Any]

Code: TypeAlias = Literal["uint8", "int8", "uint16", "int16", "uint4", "int4", "int32"]
"""Type of a code."""

Role: TypeAlias = Literal["weight", "bias", "constant"]
"""What a constant is to the op that reads it: a weight has a scale per channel where the profile
has it; a bias is int32, its scale the product of the input's and the weight's; any other constant
has codes like an activation."""

LIMITS: Final[dict[Code, tuple[int, int]]] = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "uint16": (0, 65535),
    "int16": (-32768, 32767),
    "uint4": (0, 15),
    "int4": (-8, 7),
    "int32": (-(2**31), 2**31 - 1),
}
"""The least and the largest code."""

DTYPES: Final[dict[Code, np.dtype[Any]]] = {
    **{code: np.dtype(code) for code in LIMITS if not code.endswith("int4")},
    "uint4": np.dtype(ml_dtypes.uint4),
    "int4": np.dtype(ml_dtypes.int4),
}

BITS: Final[dict[Code, int]] = {code: int(code.lstrip("uint")) for code in LIMITS}

SINCE: Final[dict[Code, int]] = {"uint16": 21, "int16": 21, "uint4": 21, "int4": 21}
"""The opset from which QuantizeLinear has a code; 13 for the others."""


@dataclasses.dataclass(frozen=True)
class TensorQuant:
    """An activation: ``x ≈ (codes − zero_point) · scale``.

    Attributes:
        value: its name in the graph.
        code: type of the codes.
        scale: float32, step between two codes.
        zero_point: the code of 0.
        group: name of the tensors that have to share a scale with it, one for all of them.
        low, high: the range that the scale was drawn from.
        sqnr_db: of rounding it, predicted from calibration.
    """

    value: str
    code: Code
    scale: float
    zero_point: int
    group: str
    low: float
    high: float
    sqnr_db: float


@dataclasses.dataclass(frozen=True)
class ConstantQuant:
    """A constant that one input of one node reads: weight, bias or another operand.

    Attributes:
        node: name of the node.
        index: of its input.
        value: name of the constant.
        role: ``weight``, ``bias``, or ``constant``.
        codes: of the constant's shape, in int32; stored as `code`.
        code: type of the codes.
        scale: float32, a scalar, or [channels] along `axis`.
        zero_point: of the shape of `scale`; None: zeros.
        axis: of the channels; None: one scale for the tensor.
    """

    node: str
    index: int
    value: str
    role: Role
    codes: Array
    code: Code
    scale: Array
    zero_point: Array | None = None
    axis: int | None = None

    @property
    def nbytes(self) -> int:
        """As stored, scales included."""
        points = 0 if self.zero_point is None else -(-self.zero_point.size * BITS[self.code] // 8)
        return -(-self.codes.size * BITS[self.code] // 8) + self.scale.nbytes + points

    def dequantized(self) -> Array:
        """The float32 constant that the codes stand for."""
        shape = [1] * self.codes.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        codes = self.codes.astype(np.float64)
        if self.zero_point is not None:
            codes = codes - self.zero_point.astype(np.float64).reshape(shape)
        result: Array = (codes * self.scale.astype(np.float64).reshape(shape)).astype(np.float32)
        return result


@dataclasses.dataclass(frozen=True)
class UnitPlan:
    """One op, with the bias and the activation that belong to it.

    Attributes:
        name: module path of its first node, or that node's name.
        nodes: names of the nodes, in order.
        op: type of the first.
        code: of its activations, or of its weight where that alone has codes; None: it stays in
            float.
        reason: why.
        inputs: names of the activations that it reads as codes.
        output: name of what it computes.
        method: by which its weight was rounded, where one was asked for.
    """

    name: str
    nodes: tuple[str, ...]
    op: str
    code: Code | None
    reason: str
    inputs: tuple[str, ...]
    output: str
    method: Method | None = None


@dataclasses.dataclass(frozen=True)
class EdgePlan:
    """Decisions for a whole graph.

    Attributes:
        tensors: activations that have codes.
        constants: operands that are stored as codes.
        units: every op that could be considered, those in float with their reason.
    """

    tensors: tuple[TensorQuant, ...] = ()
    constants: tuple[ConstantQuant, ...] = ()
    units: tuple[UnitPlan, ...] = ()

    @property
    def quantized(self) -> tuple[UnitPlan, ...]:
        return tuple(unit for unit in self.units if unit.code is not None)

    def to_dict(self) -> dict[str, Any]:
        """Without the codes: what `qcompile.json` keeps."""
        return {
            "tensors": [dataclasses.asdict(tensor) for tensor in self.tensors],
            "constants": [
                {
                    "node": each.node,
                    "value": each.value,
                    "code": each.code,
                    "shape": list(each.codes.shape),
                    "axis": each.axis,
                }
                for each in self.constants
            ],
            "ops": [dataclasses.asdict(unit) for unit in self.units],
        }

    def tensor(self, value: str) -> TensorQuant | None:
        """The decision for the activation `value`, or None where it stays in float."""
        return next((tensor for tensor in self.tensors if tensor.value == value), None)
