"""The custom operators, as data: the contract between the lowering, the library and the reference.

Domain ``qcompile``, version 1. Everything that refers to an operator is made from this table: the
C++ library's definitions (``build.py``) and the functions in standard operators (``reference.py``).

Types: ``T`` is float16 or bfloat16, the same for every ``T`` of a node. Shapes: ``...`` is any
number of leading dimensions, the same for every tensor of a node.

Every operator is there twice, for codes in int8 (``QuantizeInt8``) and in e4m3
(``QuantizeFp8``): float8e4m3fn, with four bits of precision and values to 448, which has neither
infinities nor a zero point (arXiv 2209.05433).

The four operators that quantise share one rule. Without the input `scale` they quantise per token:
each row along the last axis by scale = max|row| / LARGEST, which is the output `scale`. With it, a
float32 with one element, they quantise per tensor, saturating at -128 and 127, or at -448 and 448,
and the output `scale` is left out.
"""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

DOMAIN: Final = "qcompile"
VERSION: Final = 1

CHANNELS_OUT: Final = 16
"""The output channels of a weight are a multiple of it, and so are the columns of a row."""
CHANNELS_IN: Final = 32
"""The input channels of a weight are a multiple of it."""
WIDEST_ROW: Final = 32768
"""Columns that an operator that quantises takes at most."""

SUFFIX: Final[dict[Codes, str]] = {"int8": "Int8", "float8e4m3fn": "Fp8"}
"""What operators with these codes are called by."""
LARGEST: Final[dict[Codes, float]] = {"int8": 127.0, "float8e4m3fn": 448.0}
"""The code of the largest magnitude of a row."""
FP8_ARCHITECTURES: Final = (89, 90)
"""Compute capabilities whose tensor cores multiply e4m3."""

ACTIVATIONS: Final = ("none", "relu", "gelu", "gelu_tanh", "silu")
"""Values of the attribute `kind`, in the order of the kernel's numbers."""

Codes = Literal["int8", "float8e4m3fn"]
Type = Literal["T", "float32"] | Codes
AttributeType = Literal["int", "float", "string"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An input or output: its name, its type and shape, whether it may be left out.

    In the library's schema, inputs are called Input0, Input1, … and outputs Output0, …: ONNX
    Runtime names those of custom operators so.
    """

    name: str
    type: Type
    shape: str
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An attribute. All are required: a default in two places would be two defaults."""

    name: str
    type: AttributeType
    meaning: str


@dataclasses.dataclass(frozen=True)
class Operator:
    """A custom operator of the domain: what it does, and the type of its codes."""

    kind: str
    codes: Codes
    summary: str
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    attributes: tuple[Attribute, ...] = ()
    result_type: bool = False
    """Whether the attribute `dtype` names ``T`` instead of an input; float32 is possible."""

    @property
    def name(self) -> str:
        """The op type."""
        return self.kind + SUFFIX[self.codes]


_X: Final = Parameter("x", "T", "[..., C]")
_STATIC: Final = Parameter("scale", "float32", "[1] or []", optional=True)
_SCALE: Final = Parameter("scale", "float32", "[..., 1]", optional=True)
_WEIGHT: Final = Parameter("weight", "T", "[C]")
_RESIDUAL: Final = Parameter("residual", "T", "[..., C]", optional=True)
_SUM: Final = Parameter("sum", "T", "[..., C]", optional=True)
_EPSILON: Final = Attribute("epsilon", "float", "added to the variance")


def _operators(codes: Codes) -> tuple[Operator, ...]:
    made = Parameter("codes", codes, "[..., C]")
    exactly = "exactly in int32" if codes == "int8" else "in float32"
    return (
        Operator("Quantize", codes, "codes of x", (_X, _STATIC), (made, _SCALE)),
        Operator(
            "Activation",
            codes,
            "codes of kind(x), or of kind(x) · up",
            inputs=(_X, Parameter("up", "T", "[..., C]", optional=True), _STATIC),
            outputs=(made, _SCALE),
            attributes=(
                Attribute("kind", "string", "one of " + ", ".join(ACTIVATIONS)),
                Attribute(
                    "packed",
                    "int",
                    "1: x is [..., 2C], first what kind is applied to, then up, which is left out",
                ),
            ),
        ),
        Operator(
            "LayerNorm",
            codes,
            "codes of LayerNormalization(x + residual) over the last axis; sum = x + residual",
            inputs=(_X, _WEIGHT, Parameter("bias", "T", "[C]", optional=True), _RESIDUAL, _STATIC),
            outputs=(made, _SCALE, _SUM),
            attributes=(_EPSILON,),
        ),
        Operator(
            "RMSNorm",
            codes,
            "codes of RMSNormalization(x + residual) over the last axis; sum = x + residual",
            inputs=(_X, _WEIGHT, _RESIDUAL, _STATIC),
            outputs=(made, _SCALE, _SUM),
            attributes=(_EPSILON,),
        ),
        Operator(
            "MatMul",
            codes,
            f"(x · weightᵀ) · x_scale · weight_scale + bias; products summed {exactly}",
            inputs=(
                Parameter("x", codes, "[..., K]"),
                Parameter("x_scale", "float32", "[..., 1], [1] or []"),
                Parameter("weight", codes, "[N, K]"),
                Parameter("weight_scale", "float32", "[N]"),
                Parameter("bias", "float32", "[N]", optional=True),
            ),
            outputs=(Parameter("y", "T", "[..., N]"),),
            attributes=(
                Attribute("dtype", "int", "ONNX type of y: 10 float16, 16 bfloat16, 1 float32"),
            ),
            result_type=True,
        ),
    )


OPERATORS: Final = (*_operators("int8"), *_operators("float8e4m3fn"))
"""``C`` and ``N`` are multiples of CHANNELS_OUT, ``K`` of CHANNELS_IN; ``C`` at most WIDEST_ROW."""

BY_NAME: Final = {operator.name: operator for operator in OPERATORS}


def refusal(channels_out: int, channels_in: int) -> str | None:
    """Why a weight [channels_out, channels_in] has no kernel, or None where it has."""
    if channels_out % CHANNELS_OUT:
        return f"{channels_out} output channels, no multiple of {CHANNELS_OUT}"
    if channels_in % CHANNELS_IN:
        return f"{channels_in} input channels, no multiple of {CHANNELS_IN}"
    if channels_in > WIDEST_ROW:
        return f"{channels_in} input channels, and activations come in rows of {WIDEST_ROW} at most"
    return None
