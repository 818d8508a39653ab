"""What providers of edge devices document: constraint tables, as data."""

from __future__ import annotations

import dataclasses
from typing import Final

from qcompile.edge.plan import Code
from qcompile.errors import ConfigError

_WEIGHTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MOVES: Final = frozenset(
    {"Concat", "DepthToSpace", "Flatten", "Gather", "MaxPool", "Reshape", "Resize", "Slice"}
    | {"SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclasses.dataclass(frozen=True)
class Citation:
    """Where a constraint is documented."""

    title: str
    url: str


@dataclasses.dataclass(frozen=True)
class Profile:
    """What one provider runs quantised.

    Attributes:
        name: after the colon of ``onnx-edge:name``.
        summary: one line.
        sources: the provider's documentation.
        activations: types of the codes of activations, the preferred first.
        weights: types of the codes of weights, the preferred first.
        computes: ops that have codes of their own in and out.
        moves: ops that only move values or choose among them: one scale in and out.
        per_channel: ops whose weights may have a scale per output channel.
        symmetric: whether activations must have their zero in the middle of the codes.
        power_of_two: whether scales must be powers of two.
        static_shapes: whether the provider wants every shape to be known.
        opsets: the first and the last one that the provider reads.
        note: what a user should know.
    """

    name: str
    summary: str
    sources: tuple[Citation, ...]
    activations: tuple[Code, ...] = ("uint8", "int8")
    weights: tuple[Code, ...] = ("int8",)
    computes: frozenset[str] = _WEIGHTED
    moves: frozenset[str] = _MOVES
    per_channel: frozenset[str] = _WEIGHTED
    symmetric: bool = False
    power_of_two: bool = False
    static_shapes: bool = False
    opsets: tuple[int, int] = (13, 23)
    note: str = ""

    @property
    def quantizes(self) -> frozenset[str]:
        """All ops that it runs quantised."""
        return self.computes | self.moves


PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile(
            name="generic",
            summary="any runtime of ONNX; what ONNX Runtime's CPU kernels run in codes",
            sources=(
                Citation(
                    "ONNX Runtime: Quantize ONNX models",
                    "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
                ),
            ),
            activations=("uint8", "int8", "uint16", "int16"),
            weights=("int8", "int4"),
            computes=_WEIGHTED
            | {"Add", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Mul", "Relu", "Sigmoid"}
            | {"Clip"},
        ),
    )
}


def get_profile(name: str) -> Profile:
    """The profile `name`; an empty name is ``generic``.

    Raises:
        ConfigError: there is none of that name.
    """
    profile = PROFILES.get(name or "generic")
    if profile is None:
        raise ConfigError(
            f"target onnx-edge has no profile {name!r}", hint="one of " + ", ".join(PROFILES)
        )
    return profile
