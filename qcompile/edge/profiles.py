"""What providers of edge devices document: constraint tables, as data."""

from __future__ import annotations

import dataclasses
from typing import Final

from qcompile.edge.plan import Code
from qcompile.errors import ConfigError

_WEIGHTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MOVES: Final = frozenset(
    {"Concat", "DepthToSpace", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Resize", "Slice"}
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
        weight_only: ops whose weights alone have codes, their activations staying in float.
        wide_products: whether two activations of 16 bits can be multiplied.
        float_outputs: whether a product of codes may leave floats; what nothing reads as codes then
            has none.
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
    weight_only: frozenset[str] = frozenset()
    wide_products: bool = True
    float_outputs: bool = False
    static_shapes: bool = False
    opsets: tuple[int, int] = (13, 23)
    note: str = ""

    @property
    def quantizes(self) -> frozenset[str]:
        """All ops that it runs quantised."""
        return self.computes | self.moves


_ORT: Final = "https://onnxruntime.ai/docs/"
_PROVIDERS: Final = f"{_ORT}execution-providers/"

_KERNELS: Final = _WEIGHTED | {
    *("Add", "AveragePool", "Clip", "GlobalAveragePool", "LeakyRelu", "Mul", "Relu", "Sigmoid")
}
"""What ONNX Runtime's own kernels run in codes, and lose little by it."""

PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile(
            name="generic",
            summary="any runtime of ONNX; ops that ONNX Runtime's CPU kernels run in codes",
            sources=(
                Citation(
                    "ONNX Runtime: Quantize ONNX Models",
                    f"{_ORT}performance/model-optimizations/quantization.html",
                ),
            ),
            activations=("uint8", "int8", "uint16", "int16"),
            weights=("int8", "int4"),
            computes=_KERNELS,
            float_outputs=True,
        ),
        Profile(
            name="web",
            summary="onnxruntime-web: the same CPU kernels in WebAssembly",
            sources=(
                Citation("ONNX Runtime Web", f"{_ORT}tutorials/web/"),
                Citation(
                    "ONNX Runtime: Quantize ONNX Models",
                    f"{_ORT}performance/model-optimizations/quantization.html",
                ),
            ),
            weights=("int8", "int4"),
            computes=_KERNELS,
            float_outputs=True,
        ),
        Profile(
            name="qnn",
            summary="Qualcomm's NPU (HTP)",
            sources=(
                Citation("QNN Execution Provider", f"{_PROVIDERS}QNN-ExecutionProvider.html"),
                Citation(
                    "HTP operation definition supplement",
                    "https://docs.qualcomm.com/bundle/publicresource/topics/80-63442-50/"
                    "HtpOpDefSupplement.html",
                ),
            ),
            activations=("uint8", "uint16"),
            weights=("uint8", "int8", "int4"),
            computes=_WEIGHTED
            | {
                *("Add", "AveragePool", "Clip", "Div", "Elu", "Gelu", "GlobalAveragePool"),
                *("HardSwish", "LeakyRelu", "LayerNormalization", "Mul", "Relu", "Sigmoid"),
                *("ReduceMean", "Softmax", "Sub", "Tanh"),
            },
            moves=_MOVES | {"Tile"},
            per_channel=frozenset({"Conv", "ConvTranspose"}),
            static_shapes=True,
            wide_products=False,
            note="weights that have a scale per channel are int8, others uint8",
        ),
        Profile(
            name="xnnpack",
            summary="XNNPACK: CPUs of phones",
            sources=(
                Citation(
                    "XNNPACK Execution Provider", f"{_PROVIDERS}Xnnpack-ExecutionProvider.html"
                ),
            ),
            activations=("uint8", "int8"),
            computes=frozenset({"AveragePool", "Conv", "ConvTranspose", "Softmax"}),
            moves=frozenset({"MaxPool"}),
            per_channel=frozenset({"Conv", "ConvTranspose"}),
            static_shapes=True,
            note="2-D convolutions and pools; its Gemm and MatMul are of floats",
        ),
        Profile(
            name="nnapi",
            summary="Android's Neural Networks API",
            sources=(
                Citation("NNAPI Execution Provider", f"{_PROVIDERS}NNAPI-ExecutionProvider.html"),
            ),
            activations=("uint8",),
            computes=frozenset({"Add", "AveragePool", "Conv", "Gemm", "MatMul", "Mul", "Sigmoid"}),
            moves=frozenset({"Concat", "Flatten", "MaxPool", "Reshape", "Resize", "Transpose"}),
            per_channel=frozenset({"Conv"}),
            static_shapes=True,
        ),
        Profile(
            name="coreml",
            summary="Apple's Core ML: ops in float, weights in codes",
            sources=(
                Citation("CoreML Execution Provider", f"{_PROVIDERS}CoreML-ExecutionProvider.html"),
            ),
            activations=(),
            computes=frozenset(),
            moves=frozenset(),
            weight_only=frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
            static_shapes=True,
            note="its table has no QuantizeLinear; a session with session.disable_quant_qdq=1 "
            "computes the float weights when it opens",
        ),
        Profile(
            name="vitisai",
            summary="AMD's Vitis AI: Ryzen AI and adaptable SoCs",
            sources=(
                Citation(
                    "Vitis AI Execution Provider", f"{_PROVIDERS}Vitis-AI-ExecutionProvider.html"
                ),
                Citation(
                    "Vitis AI User Guide (UG1414), TensorFlow 2.x: pof2s is the default",
                    "https://docs.amd.com/r/en-US/ug1414-vitis-ai/TensorFlow-2.x",
                ),
                Citation(
                    "MQBench: Vitis-AI backend",
                    "https://github.com/ModelTC/MQBench/blob/main/docs/source/user_guide/"
                    "hardware/vitis.rst",
                ),
            ),
            activations=("int8",),
            computes=_WEIGHTED
            | {"Add", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Mul", "Relu", "Clip"},
            per_channel=frozenset(),
            symmetric=True,
            power_of_two=True,
            static_shapes=True,
            note="symmetric int8, one scale a tensor, a power of two",
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
