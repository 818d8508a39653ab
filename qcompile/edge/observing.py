"""Statistics of every tensor that could be quantised, each as one channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import onnx_ir as ir

from qcompile.calibration.run import calibrate
from qcompile.calibration.stats import Stats
from qcompile.edge.units import Unit
from qcompile.traced import Batch

HISTOGRAM_STRIDE = 7
"""Values between two that enter a histogram; prime, so that no channel is passed over."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value to observe whole."""

    x: ir.Value
    channels: int = 1

    @property
    def name(self) -> str:
        return str(self.x.name)


def observe_tensors(
    model: ir.Model,
    units: Iterable[Unit],
    batches: Sequence[Batch],
    work: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Stats]:
    """Statistics of all activations of `units` that are not refused, by name; one channel each.

    What is infinite has infinite extremes: a mask may be.

    Args:
        model: that the units are of.
        units: of the graph.
        batches: feeds of the graph.
        work: folder that holds the graph's external data.
        progress: called with (batches done, batches in all).
    """
    values = {v: None for unit in units if unit.refusal is None for v in unit.tensors}
    tensors = [Tensor(value) for value in values]
    return calibrate(
        model,
        tensors,
        batches,
        work,
        histogram_stride=HISTOGRAM_STRIDE,
        gram_stride=None,
        finite=False,
        progress=progress,
    )
