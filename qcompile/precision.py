"""The precision plan: what becomes INT8, with which scales, and why the rest does not."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from qcompile.config import Activations
from qcompile.outliers import Split

Array = npt.NDArray[Any]

Precision: TypeAlias = Literal["float", "int8", "weight8", "weight4", "fp8", "nf4", "fp4"]
"""What an op computes with; ``weight8`` and ``weight4`` leave its activation to the kernel, which
takes float and rounds it for itself; ``nf4`` and ``fp4`` leave it in float."""

Label: TypeAlias = Literal[
    "float",
    "static",
    "dynamic",
    "token",
    "split",
    "weight8",
    "weight4",
    "fp8",
    "fp8-static",
    "nf4",
    "fp4",
    "llm-int8",
]
"""An implementation that can be chosen for an op; a mode stands for INT8 in that mode, ``split``
for static INT8 with outlier channels on several channels each (`qcompile.outliers`), ``fp8`` for
e4m3 (`qcompile.e4m3`), activations per token, ``llm-int8`` for INT8 per token with outlier channels
in float beside it (`qcompile.decomposition`)."""

Floats: TypeAlias = Literal["float32", "float16"]
"""The type of what stays floating point."""

FLOAT_BYTES: Final[dict[Floats, int]] = {"float32": 4, "float16": 2}

LABELS: Final[tuple[Label, ...]] = get_args(Label)
MODES: Final[tuple[Activations, ...]] = get_args(Activations)
INT8: Final[tuple[Label, ...]] = (*MODES, "split", "llm-int8")
FP8: Final[tuple[Label, ...]] = ("fp8", "fp8-static")
CODED: Final[tuple[Label, ...]] = (*INT8, *FP8)
"""The labels that quantise an op's activation; ops that read one activation agree on it."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Input channels whose weights stay in float, in a narrow product beside that of the codes.

    Attributes:
        channels: int64 [k], ascending. The codes stand for zeros there.
        weight: float32 [k, N].
    """

    channels: Array
    weight: Array


@dataclasses.dataclass(frozen=True)
class ActivationQuant:
    """How one site's activation is quantised, to uint8 or to e4m3.

    Attributes:
        mode: ``static``, ``dynamic`` (per tensor, at run time) or ``token`` (per row, at run time).
        scale: step between two codes, for static; else None.
        zero_point: code of the value 0, for static uint8; else None.
        highest: int64 [channels], the largest code each channel is planned to reach; copies of
            outlier channels included.
        split: outlier channels and how often they are copied, or None.
        fp8: whether codes are e4m3; `highest` means nothing then.
        kept: int64 [k], channels that stay in float, ascending; None: none do. They come divided
            by so much that no scale is theirs (`qcompile.decomposition`).
    """

    mode: Activations
    scale: float | None
    zero_point: int | None
    highest: Array
    split: Split | None = None
    fp8: bool = False
    kept: Array | None = None

    @property
    def label(self) -> Label:
        """The implementation of the ops that read it."""
        if self.kept is not None:
            return "llm-int8"
        if self.fp8:
            return "fp8-static" if self.mode == "static" else "fp8"
        return self.mode if self.split is None else "split"


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """Codes per output channel, or in blocks of inputs: ``W ≈ (codes − zero_point) · scale``.

    Attributes:
        codes: int8 or float8e4m3fn [K, N]; K counts the copies of outlier channels.
        scale: float32 [N], or [K / block_size, N].
        block_size: input channels that share a scale; None: all of them do.
        bits: of a code, 8 or 4.
        zero_point: int8 of the shape of `scale`, the codes of zero; None: they are zeros.
        order: int64 [K], the input channel of every row of `codes`; None: as they come. What groups
            channels by importance (GPTQ's act-order) stores them in blocks of another order.
        offset: float32 of the shape of `scale`, in blocks that divide K: what is added to every
            weight of a block, for formats whose zero is no code (GGUF's Q4_K); None: nothing.
        table: float32 [2^bits], what the codes are indices of; None: they are the values.
        kept: rows that are float; None: all are codes.
    """

    codes: Array
    scale: Array
    block_size: int | None = None
    bits: int = 8
    zero_point: Array | None = None
    order: Array | None = None
    offset: Array | None = None
    table: Array | None = None
    kept: Kept | None = None

    def dequantized(self) -> Array:
        """The float32 weight [K, N] that the codes stand for, rows in the order of the input."""
        result: Array = self.codes.astype(np.float32)
        if self.table is not None:
            result = self.table[self.codes]
        if self.zero_point is not None:
            result -= self._of_rows(self.zero_point)
        result *= self._of_rows(self.scale)
        if self.offset is not None:
            result += self._of_rows(self.offset)
        if self.order is not None:
            result = result[np.argsort(self.order)]
        if self.kept is not None:
            result[self.kept.channels] = self.kept.weight
        return result

    def _of_rows(self, values: Array) -> Array:
        if self.block_size is None:
            return values
        repeated: Array = np.repeat(values, self.block_size, axis=0)[: len(self.codes)]
        return repeated


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation a Linear gets, and why."""

    label: Label
    reason: str

    @property
    def mode(self) -> Activations | None:
        """How its activation is quantised, or None where it stays in float."""
        if self.label == "static" or self.label == "dynamic" or self.label == "token":
            return self.label
        if self.label in ("fp8", "llm-int8"):
            return "token"
        return "static" if self.label in ("split", "fp8-static") else None

    @property
    def precision(self) -> Precision:
        if self.label in FP8:
            return "fp8"
        return "int8" if self.mode is not None else self.label  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class OpPlan:
    """One Linear's decision.

    Attributes:
        name: module path.
        site: the activation that it reads.
        precision: what computes it.
        reason: why.
        in_features, out_features: K and N.
        output: name of the value it computes.
        weight: codes and scales, where it is quantised.
    """

    name: str
    site: str
    precision: Precision
    reason: str
    in_features: int
    out_features: int
    output: str
    weight: QuantizedWeight | None = None

    @property
    def coded(self) -> bool:
        """Whether it multiplies codes by codes: its activation is quantised, too."""
        return self.precision in ("int8", "fp8")


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """One activation's decision, and the ops that read it quantised."""

    name: str
    value: str
    activation: ActivationQuant
    ops: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PrecisionPlan:
    """Decisions for a whole graph: a value, made once, applied by passes.

    Attributes:
        sites: activations that are quantised.
        ops: every Linear.
        floats: the type of whatever is not quantised.
    """

    sites: tuple[SitePlan, ...] = ()
    ops: tuple[OpPlan, ...] = ()
    floats: Floats = "float32"

    @property
    def quantized(self) -> tuple[OpPlan, ...]:
        """The ops whose weights are codes."""
        return tuple(op for op in self.ops if op.precision != "float")

    def only(self, name: str) -> PrecisionPlan:
        """This plan with every op but `name` in float."""
        op = self.op(name)
        sites = tuple(
            dataclasses.replace(site, ops=(name,)) for site in self.sites if name in site.ops
        )
        others = (dataclasses.replace(o, precision="float", weight=None) for o in self.ops)
        kept = tuple(op if o.name == name else o for o in others)
        return PrecisionPlan(sites, kept, self.floats)

    def label(self, op: OpPlan) -> Label:
        """What was chosen for `op`."""
        if not op.coded:
            return op.precision  # type: ignore[return-value]
        site = self.site(op.site)
        assert site is not None
        return site.activation.label

    def site(self, name: str) -> SitePlan | None:
        """The decision for the site `name`, or None where nothing reads it quantised."""
        return next((site for site in self.sites if site.name == name), None)

    def op(self, name: str) -> OpPlan:
        """The decision for the Linear `name`.

        Raises:
            KeyError: there is none.
        """
        for op in self.ops:
            if op.name == name:
                return op
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Without the weights: what `qcompile.json` and `qcompile inspect` show."""
        modes = {site.name: site for site in self.sites}
        rows = []
        for op in self.ops:
            row: dict[str, Any] = {
                "name": op.name,
                "precision": op.precision,
                "label": self.label(op),
                "reason": op.reason,
                "shape": [op.in_features, op.out_features],
                "site": op.site,
            }
            if op.weight is not None and op.weight.kept is not None:
                row["kept"] = op.weight.kept.channels.tolist()
            site = modes.get(op.site)
            if op.coded and site is not None:
                row["activations"] = site.activation.mode
                row["scale"] = site.activation.scale
                row["zero_point"] = site.activation.zero_point
            rows.append(row)
        return {"floats": self.floats, "ops": rows}


def uint8_affine(minimum: float, maximum: float) -> tuple[float, int]:
    """Scale and zero_point of asymmetric uint8 for the range [minimum, maximum] with 0 in it.

    Zero is a code exactly, as QuantizeLinear wants. The range may grow by up to half a step.
    """
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    if high - low <= 0.0:
        return 1.0, 0
    scale = float(np.float32((high - low) / 255.0))
    if scale < np.finfo(np.float32).tiny:
        return 1.0, 0
    zero_point = int(np.clip(np.rint(-low / scale), 0, 255))
    return scale, zero_point


def uint8_symmetric(minimum: float, maximum: float) -> tuple[float, int]:
    """Scale and zero_point of uint8 codes around 128: int8 codes around 0, for kernels without
    a zero point. Codes reach from 1 to 255."""
    largest = max(abs(minimum), abs(maximum))
    scale = float(np.float32(largest / 127.0))
    return (scale if scale >= np.finfo(np.float32).tiny else 1.0), 128
