"""`ort-cuda`: ONNX Runtime's CUDA provider, with INT8 and FP8 operators of our own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    InlinePass,
    RemoveUnusedOpsetsPass,
)
from qcompile.passes.constant_shapes import ConstantShapes
from qcompile.passes.int8_linear import Int8Linear
from qcompile.passes.int8_rows import Int8Rows
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.multi_head import MultiHead
from qcompile.passes.outer_product import OuterProduct
from qcompile.passes.pack_cache import HOSTED, PackCache
from qcompile.passes.pack_tokens import PackTokens
from qcompile.passes.skip_norm import SkipNorm
from qcompile.passes.to_float16 import ToFloat16
from qcompile.passes.unflatten import Unflatten
from qcompile.passes.weight_only import KERNEL as NBITS
from qcompile.passes.weight_only import WeightOnlyMatMul
from qcompile.targets.base import Capability, Target
from qcompile.targets.cuda import library
from qcompile.targets.cuda.reference import with_reference
from qcompile.targets.cuda.schema import DOMAIN, FP8_ARCHITECTURES, VERSION, refusal

from qcompile.errors import ConfigError
from qcompile.makers import MAKERS
from qcompile.precision import FP8, Label, OpPlan, PrecisionPlan
from qcompile.session import HERE, Runtime

_KERNEL: Final = f"{DOMAIN}.MatMulInt8"
_FP8_KERNEL: Final = f"{DOMAIN}.MatMulFp8"
_STAND_IN: Final = (
    "there is no GPU with ONNX Runtime's CUDA provider here, so the graph runs on the CPU, by the "
    "operators' bodies in standard ops: right, and slow"
)
_NBITS_KERNEL: Final = f"{CONTRIB}.{NBITS}"


class OrtCuda(Target):
    """CUDA provider in float16, INT8 and FP8 by custom operators.

    Where there is no such GPU, the operators' bodies in standard ops run on the CPU: what they
    compute is checked, how fast is not.
    """

    name = "ort-cuda"
    summary = "ONNX Runtime, CUDA provider, INT8 kernels of our own"
    variants = ("sm80", "sm89", "sm90")
    schemes = (
        "fp32", "fp16", "w8a8", "llm-int8", "fp8", "w8a16", "w4a16", "mixed", "zeroquant",
        "zeroquant4", "checkpoint",
    )  # fmt: skip
    floats = "float16"
    caches = ("float16",)
    genai = "cuda"
    modes = ("token",)
    symmetric = True
    blockwise = False
    fuses = MAKERS
    timed_as = MappingProxyType({"static": "token", "fp8-static": "fp8", "llm-int8": "token"})
    converted_as = MappingProxyType({"fp8": "token", "fp8-static": "static", "llm-int8": "token"})
    probe_bytes = 1 << 30
    saturates = False
    capabilities = (
        Capability(
            "MatMul",
            "token",
            "int8 per output channel",
            _KERNEL,
            "a scale per row, in the epilogue",
        ),
        Capability(
            "MatMul", "static", "int8 per output channel", _KERNEL, "one scale, from calibration"
        ),
        Capability(
            "MatMul",
            "llm-int8",
            "int8 per output channel",
            _KERNEL,
            "as token, outlier channels in a narrow float16 product beside it",
        ),
        Capability("MatMul", "fp8", "e4m3 per output channel", _FP8_KERNEL, "as token"),
        Capability("MatMul", "fp8-static", "e4m3 per output channel", _FP8_KERNEL, "as static"),
        Capability("MatMul", "weight8", "int8 per block of 32", _NBITS_KERNEL, "float16 inside"),
        Capability("MatMul", "weight4", "int4 per block of 32", _NBITS_KERNEL, "as weight8"),
    )

    def __init__(self, variant: str = "") -> None:
        if variant and variant not in self.variants:
            raise ConfigError(
                f"target ort-cuda has no variant {variant!r}",
                hint="one of " + ", ".join(self.variants),
            )
        self.variant = variant or library.gpu() or ""

    @property
    def obstacle(self) -> str | None:
        if self.variant in self.variants:
            return None
        if self.variant:
            return f"the operators have no kernels for {self.variant}"
        return (
            "there is no GPU with ONNX Runtime's CUDA provider here; "
            "name the one to compile for, like ort-cuda:sm90"
        )

    @property
    def runs_here(self) -> bool:
        return self.variant != "" and self.variant == library.gpu()

    @property
    def stored(self) -> Path | None:
        path = Path(__file__).parent / "cuda" / f"costs_{self.variant}.json"
        return path if path.is_file() else None

    @property
    def unmeasured(self) -> str | None:
        if self.runs_here and library.installed() is None:
            return (
                "the CUDA operators are not built, so their times cannot be taken; "
                "python -m qcompile.targets.cuda.build builds them"
            )
        if self.runs_here or self.stored is not None:
            return None
        return (
            f"there is no table of measured times for {self.variant} and no such GPU here, so "
            "every op has the precision that the scheme names"
        )

    @property
    def caveat(self) -> str | None:
        if self.runs_here:
            return None
        return (
            f"speed was not measured: there is no {self.variant} GPU here. Accuracy was, with the "
            "operators' bodies in standard ops on the CPU; run `qcompile check` there"
        )

    def cache_obstacle(self, bits: int) -> str | None:
        return (
            "the CUDA provider's attention on a cache in codes gives wrong results, and no error, "
            "where past and present are not in the same memory"
        )

    def scheme_obstacle(self, scheme: str) -> str | None:
        if scheme == "fp8" and self.variant in self.variants and not self._fp8:
            having = " and ".join(f"sm{number}" for number in FP8_ARCHITECTURES)
            return f"{self.variant} has no tensor cores for e4m3; {having} have"
        return None

    @property
    def _fp8(self) -> bool:
        return self.variant in {f"sm{number}" for number in FP8_ARCHITECTURES}

    def capability(self, op: str, label: Label) -> Capability | None:
        return super().capability(op, label) if self._fp8 or label not in FP8 else None

    def refusal(self, in_features: int, out_features: int) -> str | None:
        return refusal(out_features, in_features)

    def runtime(
        self, folder: Path | None = None, record: Mapping[str, Any] | None = None, *,
        trust_library: bool = False,
    ) -> Runtime:  # fmt: skip
        # The library has kernels for every variant: an artifact runs on whichever is here.
        if not self.runs_here and (folder is None or library.gpu() not in self.variants):
            return dataclasses.replace(HERE, stand_in=_STAND_IN)
        own = library.installed()
        if folder is not None and record is not None and _needs_library(record):
            own = library.choose(folder, record, trust_library=trust_library)
        return Runtime(("CUDAExecutionProvider",), own, hosted=frozenset({HOSTED}))

    def carried(self, folder: Path) -> dict[str, Any] | None:
        path = folder / library.LIBRARY
        return library.description(path) if path.is_file() else None

    def probe(self) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "gpu": library.gpu(),
            "onnxruntime": ort.__version__,
            "operators": VERSION,
            "library": library.installed() is not None,
        }

    def machine(self) -> dict[str, str]:
        return {
            "target": self.name,
            "processor": library.gpu_name() or "none",
            "onnxruntime": ort.__version__,
            "operators": str(VERSION),
        }

    def lower(self, plan: PrecisionPlan) -> Sequence[ir.passes.PassBase]:
        return (
            OuterProduct(),
            ConstantShapes(),
            Unflatten(),
            PackTokens(),
            PackCache(),
            MultiHead(),
            Int8Linear(),
            Int8Rows(),
            WeightOnlyMatMul(accuracy_level=0),
            SkipNorm(),
            InlinePass(),
            *((ToFloat16(),) if plan.floats == "float16" else ()),
            CommonSubexpressionEliminationPass(),
            RemoveUnusedOpsetsPass(),
        )

    def kernels_for(self, op: OpPlan, plan: PrecisionPlan) -> tuple[str, ...]:
        return ({"int8": _KERNEL, "fp8": _FP8_KERNEL}.get(op.precision, _NBITS_KERNEL),)

    def emit(self, model: ir.Model, folder: Path) -> Path:
        path = folder / "model.onnx"
        custom = any(node.domain == DOMAIN for node in model.graph.all_nodes())
        if custom:
            model = with_reference(model)
            own = library.installed()
            if own is not None:
                shutil.copyfile(own, folder / library.LIBRARY)
        ir.save(model, path, external_data="model.onnx.data", alignment=4096)
        return path


def _needs_library(record: Mapping[str, Any]) -> bool:
    """Whether a graph with this ``qcompile.json`` has operators of the library."""
    kernels = [kernel for some in record.get("kernels", {}).values() for kernel in some]
    return bool(record.get("library")) or any(k.startswith(f"{DOMAIN}.") for k in kernels)
