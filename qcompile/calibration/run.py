"""Run the observed graph over the calibration data. Only statistics leave the session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import onnx_ir as ir

from qcompile.calibration.observing import outputs_over
from qcompile.calibration.stats import BINS, GRAM_BLOCK, Stats
from qcompile.errors import CalibrationError
from qcompile.passes.observe import PARTS, Observe, output_name
from qcompile.traced import Batch

HISTOGRAM_STRIDE: Final = 16
"""Rows between two that enter a histogram: enough for its shape at a small part of the cost."""

GRAM_STRIDE: Final = 4
"""Rows between two that enter a Gram matrix."""


_HUGE: Final = float(np.finfo(np.float32).max)


class Observed(Protocol):
    """A value to observe: a site, or any other tensor."""

    @property
    def name(self) -> str: ...
    @property
    def x(self) -> ir.Value: ...
    @property
    def channels(self) -> int: ...


def calibrate(
    model: ir.Model,
    sites: Sequence[Observed],
    batches: Sequence[Batch],
    work: Path,
    *,
    histogram_stride: int = HISTOGRAM_STRIDE,
    gram_stride: int | None = GRAM_STRIDE,
    finite: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Stats]:
    """Statistics of every site, by site name, in one run over the data.

    Args:
        model: the float graph; it is cloned, not changed.
        sites: what to observe.
        batches: feeds of the graph.
        work: the folder that holds the graph's external weights.
        histogram_stride: every how manieth row enters the histograms.
        gram_stride: every how manieth row enters the Gram matrix; None: there is none, and it is
            zero.
        finite: whether an infinite value is an error; else extremes may be infinite or NaN.
        progress: called with (batches done, batches in all).

    Raises:
        CalibrationError: an activation is NaN or infinite on this data, or the graph fails on it.
    """
    gathered: dict[str, Stats] = {}
    if not sites:
        return gathered
    observed = model.clone()
    keys = {i: str(site.x.name) for i, site in enumerate(sites)}
    Observe(
        keys,
        channels={i: site.channels for i, site in enumerate(sites)},
        histogram_stride=histogram_stride,
        gram_stride=gram_stride,
    )(observed)
    for results in outputs_over(observed, batches, work / "observed.onnx", progress=progress):
        for key, site in enumerate(sites):
            stats = _read(results, key, site, finite)
            before = gathered.get(site.name)
            gathered[site.name] = before.merge(stats) if before else stats
    return gathered


def _read(results: dict[str, np.ndarray], key: int, site: Observed, finite: bool) -> Stats:
    parts = {part: results[output_name(key, part)].astype(np.float64) for part in PARTS}
    # ReduceMin and ReduceMax may pass over a NaN, the sum does not; higher powers may overflow.
    seen = (parts["minimum"], parts["maximum"])
    if finite and (
        not all(np.isfinite(part).all() for part in seen) or np.isnan(parts["sum1"]).any()
    ):
        raise CalibrationError(
            f"the input of {site.name} is NaN or infinite on the calibration data",
            hint="check the model in float on the same inputs",
        )
    histogram = results[output_name(key, "histogram")]
    blocks = -(-site.channels // GRAM_BLOCK)
    gram = results.get(output_name(key, "gram"), np.zeros((blocks, GRAM_BLOCK, GRAM_BLOCK)))
    return Stats(
        count=int(results[output_name(key, "rows")]),
        minimum=parts["minimum"],
        maximum=parts["maximum"],
        power_sums=np.nan_to_num(
            np.stack([parts[f"sum{i}"] for i in range(1, 5)]), posinf=_HUGE, neginf=-_HUGE
        ),
        histogram=histogram.astype(np.int32).reshape(-1, BINS),
        gram=gram.astype(np.float64),
    )
