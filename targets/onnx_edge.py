"""`onnx-edge`: standard ONNX for edge devices, by the constraints that a provider documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import onnxruntime as ort
from qcompile.targets.base import Capability, Target

from qcompile.edge.profiles import PROFILES, get_profile
from qcompile.ort_format import OrtStyle
from qcompile.precision import OpPlan, PrecisionPlan
from qcompile.session import Runtime

_EXACT: Final = Runtime(entries={"session.x64quantprecision": "1"})
"""Devices add in 32 bits; on x86 without VNNI that has to be asked for."""

_FOLDED: Final = Runtime(entries={"session.disable_quant_qdq": "1"})
"""Weights in codes alone are computed when a session opens; else int4 and int8 kernels for language
models, which round activations, would take them."""
_ON_CPU: Final = ("generic", "web")
"""Profiles of ONNX Runtime's own kernels, in WebAssembly too; other providers look for operators
of ONNX."""

_INLINE_BYTES: Final = 1 << 30
"""Weights up to this lie in the graph's own file: a page or an app loads one file."""


class OnnxEdge(Target):
    """Operators of ONNX itself, QuantizeLinear and DequantizeLinear around them.

    `qcompile.edge.pipeline` compiles for it: what has codes are tensors between any ops, not the
    activations of Linears. Nothing is timed, for the device is not here.
    """

    name = "onnx-edge"
    summary = "standard ONNX with Q/DQ, for providers of edge devices"
    variants = tuple(PROFILES)
    schemes = ("fp32", "w8a8")
    modes = ("static",)
    tensors = True
    equalizes = True
    capabilities = tuple(
        Capability(
            op=", ".join(sorted(profile.computes | profile.weight_only)),
            label="static",
            weights=", ".join(profile.weights),
            kernel=f"{profile.name}: {', '.join(profile.activations) or 'float'} activations",
            note="; ".join(
                part
                for part in (profile.summary, profile.note, *(s.url for s in profile.sources))
                if part
            ),
        )
        for profile in PROFILES.values()
    )

    def __init__(self, variant: str = "") -> None:
        self.profile = get_profile(variant)
        self.variant = variant

    @property
    def ort_style(self) -> OrtStyle:
        return "fused" if self.profile.name in _ON_CPU else "standard"

    @property
    def saturates(self) -> bool:
        return False

    @property
    def runs_here(self) -> bool:
        return False

    @property
    def caveat(self) -> str | None:
        return "an edge device is not here to be timed on, so speed was not measured"

    def runtime(
        self, folder: Path | None = None, record: Mapping[str, Any] | None = None, *,
        trust_library: bool = False,
    ) -> Runtime:  # fmt: skip
        return _EXACT if self.profile.activations else _FOLDED

    def probe(self) -> dict[str, Any]:
        return {"profile": self.profile.name, "onnxruntime": ort.__version__}

    def machine(self) -> dict[str, str]:
        return {"target": self.name, "profile": self.profile.name}

    def lower(self, plan: PrecisionPlan) -> Sequence[ir.passes.PassBase]:
        return ()

    def kernels_for(self, op: OpPlan, plan: PrecisionPlan) -> tuple[str, ...]:
        return ()

    def emit(self, model: ir.Model, folder: Path) -> Path:
        path = folder / "model.onnx"
        tensors = (value.const_value for value in model.graph.initializers.values())
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        if size <= _INLINE_BYTES:
            ir.save(ir.external_data.load_to_model(model), path)
        else:
            ir.save(model, path, external_data="model.onnx.data", alignment=4096)
        return path
