"""The precision plan: what becomes INT8, with which scales, and why the rest does not."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qcompile.config import Activations

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class ActivationQuant:
    """How one site's activation is quantised, to uint8.

    Attributes:
        mode: ``static``, ``dynamic`` (per tensor, at run time) or ``token`` (per row, at run time).
        scale: step between two codes, for static; else None.
        zero_point: code of the value 0, for static; else None.
        highest: int64 [channels], the largest code each channel is planned to reach.
    """

    mode: Activations
    scale: float | None
    zero_point: int | None
    highest: Array


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """Symmetric int8, per output channel: ``W ≈ codes * scale``.

    Attributes:
        codes: int8 [K, N].
        scale: float32 [N].
    """

    codes: Array
    scale: Array


@dataclasses.dataclass(frozen=True)
class Choice:
    """Whether a Linear is quantised, and why."""

    quantize: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class OpPlan:
    """One Linear's decision. `output` is the name of the value it computes."""

    name: str
    site: str
    precision: Literal["int8", "float"]
    reason: str
    in_features: int
    out_features: int
    output: str
    weight: QuantizedWeight | None = None


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """One activation's decision, and the ops that read it quantised."""

    name: str
    value: str
    activation: ActivationQuant
    ops: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PrecisionPlan:
    """Decisions for a whole graph: a value, made once, applied by passes."""

    sites: tuple[SitePlan, ...] = ()
    ops: tuple[OpPlan, ...] = ()

    @property
    def quantized(self) -> tuple[OpPlan, ...]:
        return tuple(op for op in self.ops if op.precision == "int8")

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
                "reason": op.reason,
                "shape": [op.in_features, op.out_features],
                "site": op.site,
            }
            site = modes.get(op.site)
            if op.precision == "int8" and site is not None:
                row["activations"] = site.activation.mode
                row["scale"] = site.activation.scale
                row["zero_point"] = site.activation.zero_point
            rows.append(row)
        return {"ops": rows}


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
