"""What a target is: capabilities as data, lowering as passes, and the kernels to expect."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from qcompile.config import Activations
from qcompile.makers import Maker
from qcompile.ort_format import OrtStyle
from qcompile.precision import MODES, Floats, Label, OpPlan, PrecisionPlan
from qcompile.session import HERE, Runtime


@dataclasses.dataclass(frozen=True)
class Capability:
    """One row of a target's table: an op in a precision, and the kernel that runs it.

    Attributes:
        op: canonical op type.
        label: the implementation; an INT8 one is called by how its activation is quantised.
        weights: dtype and granularity of the weight.
        kernel: op type, with its domain, expected in the optimised graph.
        note: what a user should know.
    """

    op: str
    label: Label
    weights: str
    kernel: str
    note: str = ""


class Target(abc.ABC):
    """A place where the graph runs. One file each; targets never import one another.

    Constructed with the variant after the colon of ``name:variant``, or an empty string for the
    machine at hand.
    """

    name: str
    summary: str
    variants: tuple[str, ...] = ()
    capabilities: tuple[Capability, ...] = ()
    schemes: tuple[str, ...] = (
        "fp32", "w8a8", "llm-int8", "w8a16", "w4a16", "w4a8", "mixed", "zeroquant", "zeroquant4",
        "nf4", "fp4", "checkpoint",
    )  # fmt: skip
    """Names of the schemes that it runs."""
    floats: Floats = "float32"
    """The type that quantised models keep for the rest."""
    modes: tuple[Activations, ...] = MODES
    """How activations may be quantised where the user leaves it open, the default first."""
    caches: tuple[Floats, ...] = ()
    """The types in which it runs attention that keeps keys and values."""
    genai: str | None = None
    """Its execution provider as onnxruntime-genai names it; None: the CPU."""
    equalizes: bool = False
    """Whether cross-layer equalisation is applied; where weights have a scale per output channel
    and what Linears read is smoothed, it has nothing to add."""
    joins: bool = False
    """Whether one kernel for all weight-only products of an activation is faster, of one token."""
    packs: bool = False
    """Whether attention with a cache takes queries, keys and values as one product, and rotates."""
    scales_columns: bool = False
    """Whether its integer kernel takes a token faster without the scales of output channels."""
    symmetric: bool = False
    """Whether static codes have to be symmetric around zero: kernels without a zero point."""
    blockwise: bool = True
    """Whether the kernel for quantised weights alone rounds its activation to int8 per block."""
    fuses: tuple[Maker, ...] = ()
    """What makes an activation and can quantise it in the same kernel."""
    timed_as: Mapping[Label, Label] = MappingProxyType({"dynamic": "static"})
    """Labels whose Linears meet the kernel of another: one time for both."""
    converted_as: Mapping[Label, Label] = MappingProxyType({})
    """Labels whose activations are quantised by the kernel of another, as fast."""
    tensors: bool = False
    """Whether the tensors between any ops get codes, and not the activations of Linears alone:
    `qcompile.edge` compiles for it then."""
    probe_bytes: int = 48 << 20
    """Bytes of float32 weights that a probe fills where it can: more than a cache holds."""

    @abc.abstractmethod
    def __init__(self, variant: str = "") -> None:
        """Raises ConfigError for a variant that does not exist."""

    @property
    @abc.abstractmethod
    def saturates(self) -> bool:
        """Whether the u8·s8 kernel adds two products in 16 bits, so that weights must be safe."""

    @property
    def caveat(self) -> str | None:
        """What figures measured here do not say about the machine that is compiled for."""
        return None

    @property
    def ort_style(self) -> OrtStyle | None:
        """How its graphs are written in ONNX Runtime's own format; None: they cannot be."""
        return None

    @property
    def obstacle(self) -> str | None:
        """Why nothing can be compiled for it, or None."""
        return None

    @property
    def runs_here(self) -> bool:
        """Whether its kernels run on this machine; where not, the graph runs by other means."""
        return True

    @property
    def stored(self) -> Path | None:
        """A table of times that were measured elsewhere, for where none can be taken."""
        return None

    @property
    def unmeasured(self) -> str | None:
        """Why there are no measured times to plan by but a user's own, or None."""
        return None

    def scheme_obstacle(self, scheme: str) -> str | None:
        """Why one of `schemes` cannot be had on this variant, or None."""
        return None

    def cache_obstacle(self, bits: int) -> str | None:
        """Why keys and values cannot be kept in codes of `bits`, or None."""
        return f"target {self.name} has no attention with a quantised cache"

    def refusal(self, in_features: int, out_features: int) -> str | None:
        """Why a Linear of this size has no INT8 kernel, or None."""
        return None

    def runtime(
        self, folder: Path | None = None, record: Mapping[str, Any] | None = None, *,
        trust_library: bool = False,
    ) -> Runtime:  # fmt: skip
        """How a session on its graphs is opened here.

        Args:
            folder: the artifact that is opened, if any, and `record`, its ``qcompile.json``.
            record: see there.
            trust_library: whether code that the artifact carries may be loaded.

        Raises:
            ModelError: it cannot be opened so.
        """
        return HERE

    def carried(self, folder: Path) -> dict[str, Any] | None:
        """What the record says of a library that `emit` put beside the graph, or None."""
        return None

    @abc.abstractmethod
    def probe(self) -> dict[str, Any]:
        """What was found out about the machine and the runtime, for the artifact's record."""

    @abc.abstractmethod
    def machine(self) -> dict[str, str]:
        """What measured times depend on: two machines of one description share a table."""

    @abc.abstractmethod
    def lower(self, plan: PrecisionPlan) -> Sequence[ir.passes.PassBase]:
        """The passes that replace canonical and Q/DQ patterns by this target's kernels."""

    @abc.abstractmethod
    def kernels_for(self, op: OpPlan, plan: PrecisionPlan) -> tuple[str, ...]:
        """The op types, with domain, any of which may run a planned INT8 op."""

    @abc.abstractmethod
    def emit(self, model: ir.Model, folder: Path) -> Path:
        """Write ``model.onnx`` and its external data; return the path of the graph."""

    def capability(self, op: str, label: Label) -> Capability | None:
        """The row for `op` as `label`, or None where the target has no kernel."""
        for row in self.capabilities:
            if (row.op, row.label) == (op, label):
                return row
        return None
