"""How keys and values are kept in codes: a value, decided once, applied by a pass."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy.typing as npt

Array = npt.NDArray[Any]

GRANULARITY: Final = "per channel"
"""Of the scales, keys and values alike: the CPU kernel takes no mixture."""


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """How every layer keeps its keys and values.

    A code is the value over its scale, rounded and clipped to the signed integers of `bits`.

    Attributes:
        bits: of a code, 8 or 4.
        keys: the scales of each layer's keys, as they are after rotation, float32 [heads, D].
        values: those of its values, as many.
    """

    bits: int
    keys: tuple[Array, ...]
    values: tuple[Array, ...]

    @property
    def bytes_per_token(self) -> int:
        """Of the codes of all layers, for one token of one sequence."""
        return sum(scale.size for scale in (*self.keys, *self.values)) * self.bits // 8

    @property
    def bytes_per_token_float(self) -> int:
        """Of the same in float32."""
        return sum(scale.size for scale in (*self.keys, *self.values)) * 4

    def to_dict(self) -> dict[str, Any]:
        """What `qcompile.json` shows: the smallest and the largest scale for all of a layer."""
        layers = [
            {"key": _extremes(key), "value": _extremes(value)}
            for key, value in zip(self.keys, self.values, strict=True)
        ]
        return {"bits": self.bits, "granularity": GRANULARITY, "scales": layers}


def _extremes(scale: Array) -> list[float]:
    return [float(scale.min()), float(scale.max())]
