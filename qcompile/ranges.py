"""How far every channel reaches, before and after smoothing: what the report's pictures show.

Kept beside the report, in a file of its own: thousands of numbers that nobody reads one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pydantic

from qcompile.calibration.stats import Stats
from qcompile.linears import Linear, Site, find_linears, find_sites
from qcompile.smoothing import SmoothingPlan
from qcompile.spill import release

Array = npt.NDArray[Any]

RANGES: Final = "ranges.json"
BUCKETS: Final = 256
"""Of wider layers adjacent channels share a number, their extreme: outliers stay."""
_DIGITS: Final = 4


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Band(_Model):
    """Extremes seen in calibration.

    Attributes:
        low, high: of each bucket of adjacent channels, in order.
        median: over channels, of the largest magnitude.
        peak: magnitude of the channel that was the largest before smoothing.
    """

    low: list[float]
    high: list[float]
    median: float
    peak: float


class SiteRanges(_Model):
    """One activation. `after` is None where nothing was smoothed.

    Attributes:
        name: of the site.
        ops: the Linears that read it.
        channels: how many.
        outlier: the channel of the largest magnitude before smoothing.
    """

    name: str
    ops: list[str]
    channels: int
    outlier: int
    before: Band
    after: Band | None


class WeightRanges(_Model):
    """Largest magnitudes of one Linear's weight [K, N].

    Attributes:
        name: module path.
        inputs: per bucket of input channels, before smoothing.
        smoothed: the same after it, or None where smoothing left the weight alone.
        outputs: per output channel, as it was quantised: the least, the median, the largest.
    """

    name: str
    inputs: list[float]
    smoothed: list[float] | None
    outputs: tuple[float, float, float]


class Ranges(_Model):
    """Written to ``ranges.json``; activations only where something was calibrated."""

    sites: list[SiteRanges] = []
    weights: list[WeightRanges] = []


def find_ranges(
    before: ir.Model, after: ir.Model, stats: Mapping[str, Stats], smoothing: SmoothingPlan
) -> Ranges:
    """Of every calibrated site and every Linear.

    Args:
        before: the float graph.
        after: the same, smoothed.
        stats: by site.
        smoothing: what was decided.
    """
    smoothed = {linear.name: linear for linear in find_linears(after.graph)}
    sites = [
        _site(site, stats[site.name], smoothing.scale_of(site.name))
        for site in find_sites(before.graph)
        if site.name in stats
    ]
    weights = []
    for one in find_linears(before.graph):
        weights.append(_weight(one, smoothed[one.name]))
        release(before)
        release(after)
    return Ranges(sites=sites, weights=weights)


def _site(site: Site, stats: Stats, scale: Array) -> SiteRanges:
    outlier = int(stats.absmax.argmax())
    scaled = None
    if not np.array_equal(scale, np.ones_like(scale)):
        scaled = _band(stats.minimum / scale, stats.maximum / scale, outlier)
    before = _band(stats.minimum, stats.maximum, outlier)
    return SiteRanges(
        name=site.name,
        ops=[linear.name for linear in site.linears],
        channels=site.channels,
        outlier=outlier,
        before=before,
        after=scaled,
    )


def _band(minimum: Array, maximum: Array, outlier: int) -> Band:
    magnitude = np.maximum(np.abs(minimum), np.abs(maximum))
    return Band(
        low=_rounded(_buckets(minimum, np.minimum)),
        high=_rounded(_buckets(maximum, np.maximum)),
        median=_rounded([np.median(magnitude)])[0],
        peak=_rounded([magnitude[outlier]])[0],
    )


def _weight(before: Linear, after: Linear) -> WeightRanges:
    old, _ = _reach(before)
    new, outputs = _reach(after)
    unsmoothed, smoothed = (_rounded(_buckets(reach, np.maximum)) for reach in (old, new))
    least, median, largest = _rounded([outputs.min(), np.median(outputs), outputs.max()])
    return WeightRanges(
        name=before.name,
        inputs=unsmoothed,
        smoothed=smoothed if smoothed != unsmoothed else None,
        outputs=(least, median, largest),
    )


def _reach(linear: Linear) -> tuple[Array, Array]:
    """max|W| per input channel [K] and per output channel [N]."""
    tensor = linear.weight.const_value
    assert tensor is not None
    weight = tensor.numpy()
    if linear.transposed:
        weight = weight.T
    inputs, outputs = (np.maximum(weight.max(axis), -weight.min(axis)) for axis in (1, 0))
    return inputs, outputs


def _buckets(values: Array, extreme: np.ufunc) -> Array:
    """The extremes of at most BUCKETS runs of adjacent channels."""
    count = min(len(values), BUCKETS)
    result: Array = extreme.reduceat(values, np.arange(count) * len(values) // count)
    return result


def _rounded(values: Array | list[Any]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]
