"""`ort-cpu`: ONNX Runtime's CPU provider, on the machine at hand or one that is named."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import InlinePass
from qcompile.passes.bnb4 import KERNEL as BNB4
from qcompile.passes.bnb4 import TableMatMul
from qcompile.passes.integer_matmul import CONTRIB, KERNEL, IntegerMatMul
from qcompile.passes.weight_only import KERNEL as NBITS
from qcompile.passes.weight_only import WeightOnlyMatMul
from qcompile.targets.base import Capability, Target
from qcompile.targets.ort_cpu_cache import STORED, cached_codes_obstacle

from qcompile.errors import ConfigError
from qcompile.ort_format import OrtStyle
from qcompile.precision import Label, OpPlan, PrecisionPlan
from qcompile.weight_blocks import BITS

_KERNEL: Final = f"{CONTRIB}.{KERNEL}"
_NBITS_KERNEL: Final = f"{CONTRIB}.{NBITS}"
_BNB4_KERNEL: Final = f"{CONTRIB}.{BNB4}"
_DYNAMIC_KERNEL: Final = f"{CONTRIB}.DynamicQuantizeMatMul"


class OrtCpu(Target):
    """CPU provider, integer kernels of its contrib ops.

    On x86-64 without VNNI the u8·s8 kernel multiplies adjacent input channels and adds the two
    products in 16 bits (vpmaddubsw), which saturates; weights are then rounded so that it cannot.
    """

    name = "ort-cpu"
    summary = "ONNX Runtime, CPU provider"
    variants = ("avx2", "vnni", "arm64")
    caches = ("float32",)
    joins = True
    packs = True
    scales_columns = True
    converted_as = MappingProxyType({"llm-int8": "token"})
    capabilities = (
        Capability("MatMul", "static", "int8 per output channel", _KERNEL, "the fastest"),
        Capability(
            "MatMul",
            "dynamic",
            "int8 per output channel",
            _KERNEL,
            "one pass over the activation more than static, to find its range",
        ),
        Capability(
            "MatMul",
            "token",
            "int8 per output channel",
            _KERNEL,
            "the kernel has no scale per row: three float passes around it",
        ),
        Capability(
            "MatMul",
            "split",
            "int8 per output channel",
            _KERNEL,
            "static, with outlier channels on several channels each",
        ),
        Capability(
            "MatMul",
            "llm-int8",
            "int8 per output channel",
            _KERNEL,
            "as token, outlier channels in a narrow float product beside it",
        ),
        Capability(
            "MatMul",
            "weight8",
            "int8 per block of 32",
            _NBITS_KERNEL,
            "activations to int8 per block inside the kernel; slower than float at many rows",
        ),
        Capability("MatMul", "weight4", "int4 per block of 32", _NBITS_KERNEL, "as weight8"),
        Capability("MatMul", "nf4", "NF4 per block of 64", _BNB4_KERNEL, "small, and slow"),
        Capability("MatMul", "fp4", "FP4 per block of 64", _BNB4_KERNEL, "as nf4"),
    )

    def __init__(self, variant: str = "") -> None:
        if variant and variant not in self.variants:
            raise ConfigError(
                f"target ort-cpu has no variant {variant!r}",
                hint="one of " + ", ".join(self.variants),
            )
        self.variant = variant

    @property
    def ort_style(self) -> OrtStyle:
        return "fused"

    @property
    def saturates(self) -> bool:
        return self.variant == "avx2" if self.variant else host_saturates()

    @property
    def caveat(self) -> str | None:
        arm = platform.machine().lower() in ("aarch64", "arm64")
        foreign = bool(self.variant) and (self.variant == "arm64") != arm
        if foreign or (self.variant == "vnni" and host_saturates()):
            return (
                f"speed was measured on this machine, which is not {self.name}:{self.variant}, and "
                "accuracy with kernels that do not saturate; run `qcompile check` there"
            )
        return None

    def probe(self) -> dict[str, Any]:
        return {
            "variant": self.variant or "host",
            "machine": platform.machine(),
            "processor": _processor(),
            "host_u8s8_saturates": host_saturates(),
            "target_u8s8_saturates": self.saturates,
            "onnxruntime": ort.__version__,
            "kernels": {
                f"{CONTRIB}.{name}": has_kernel(name, CONTRIB) for name in (KERNEL, NBITS, BNB4)
            },
            "cache_bits": [bits for bits in STORED if cached_codes_obstacle(bits) is None],
        }

    def machine(self) -> dict[str, str]:
        return {
            "target": self.name,
            "processor": _processor(),
            "threads": str(_threads()),
            "onnxruntime": ort.__version__,
            "u8s8": "saturates" if host_saturates() else "exact",
        }

    def lower(self, plan: PrecisionPlan) -> Sequence[ir.passes.PassBase]:
        # Blocks that the source came with stay as they are: nobody chose int8 activations for them.
        planned = any(op.precision in BITS for op in plan.quantized)
        weights = (WeightOnlyMatMul(),) if planned else ()
        return (IntegerMatMul(), *weights, TableMatMul(), InlinePass())

    def capability(self, op: str, label: Label) -> Capability | None:
        # The table is what ONNX Runtime documents; a reduced build may lack the kernel.
        row = super().capability(op, label)
        domain, _, kernel = row.kernel.rpartition(".") if row is not None else ("", "", "")
        return row if has_kernel(kernel, domain) else None

    def cache_obstacle(self, bits: int) -> str | None:
        return cached_codes_obstacle(bits)

    def kernels_for(self, op: OpPlan, plan: PrecisionPlan) -> tuple[str, ...]:
        if op.precision != "int8":
            return (_BNB4_KERNEL if op.precision in ("nf4", "fp4") else _NBITS_KERNEL,)
        site = plan.site(op.site)
        if site is not None and site.activation.mode == "dynamic":
            # ONNX Runtime joins the two where a dynamic activation has one reader.
            return (_KERNEL, _DYNAMIC_KERNEL)
        return (_KERNEL,)

    def emit(self, model: ir.Model, folder: Path) -> Path:
        path = folder / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data", alignment=4096)
        return path


@functools.cache
def has_kernel(op_type: str, domain: str) -> bool:
    """Whether this build of ONNX Runtime has a CPU kernel for the op, as far as it can be asked."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if not set(ort.get_available_providers()) <= {"CPUExecutionProvider", "AzureExecutionProvider"}:
        # Listing kernels loads every provider, and crashes the process where one's libraries are
        # missing. Builds with others are whole; what really runs is read back in any case.
        return True
    return any(
        (k.op_name, k.domain, k.provider) == (op_type, domain, "CPUExecutionProvider")
        for k in state.get_all_opkernel_def()
    )


@functools.cache
def host_saturates() -> bool:
    """Whether the u8·s8 kernel of this machine saturates: asked of the kernel, not of cpuid."""
    rows, depth, columns = 16, 64, 32
    product = _kernel_session().run(
        None,
        {
            "x": np.full((rows, depth), 255, np.uint8),
            "w": np.full((depth, columns), 127, np.int8),
        },
    )[0]
    return bool((product != 255 * 127 * depth).any())


def _threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _kernel_session() -> ort.InferenceSession:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        probe (uint8[16, 64] x, int8[64, 32] w) => (int32[16, 32] y) { y = MatMulInteger(x, w) }"""
    )
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
