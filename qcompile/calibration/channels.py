"""Statistics per channel of chosen values, in one run over the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calibration.observing import outputs_over
from qcompile.errors import CalibrationError
from qcompile.passes.observe_channels import PARTS, ObserveChannels, output_name
from qcompile.traced import Batch

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class ChannelStats:
    """Of one value, float64 [channels] each.

    Attributes:
        count: values of a channel that were seen.
        minimum, maximum: the extremes.
        total: the sum of them.
        squares: the sum of their squares.
        nonzero: how many are not zero.
    """

    count: int
    minimum: Array
    maximum: Array
    total: Array
    squares: Array
    nonzero: Array

    def merge(self, other: ChannelStats) -> ChannelStats:
        """Statistics of both data sets together."""
        return ChannelStats(
            count=self.count + other.count,
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
            total=self.total + other.total,
            squares=self.squares + other.squares,
            nonzero=self.nonzero + other.nonzero,
        )

    def scaled(self, scale: Array) -> ChannelStats:
        """Statistics of x / scale, for a positive `scale` [channels]."""
        return ChannelStats(
            self.count,
            self.minimum / scale,
            self.maximum / scale,
            self.total / scale,
            self.squares / np.square(scale),
            self.nonzero,
        )

    @property
    def absmax(self) -> Array:
        """Largest magnitude per channel."""
        result: Array = np.maximum(np.abs(self.minimum), np.abs(self.maximum))
        return result

    @property
    def second_moment(self) -> Array:
        """E[x²] per channel."""
        result: Array = self.squares / self.count
        return result


def observe_channels(
    model: ir.Model,
    values: Mapping[str, tuple[int, int]],
    batches: Sequence[Batch],
    work: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ChannelStats]:
    """Statistics of every value, by its name.

    Args:
        model: the float graph; it is cloned, not changed.
        values: name -> (axis of its channels: 1 or -1, number of channels).
        batches: feeds of the graph.
        work: the folder that holds the graph's external weights.
        progress: called with (batches done, batches in all).

    Raises:
        CalibrationError: a value is NaN or infinite on this data, or the graph fails on it.
    """
    gathered: dict[str, ChannelStats] = {}
    if not values:
        return gathered
    observed = model.clone()
    ObserveChannels({key: (name, *rest) for key, (name, rest) in enumerate(values.items())})(
        observed
    )
    for results in outputs_over(observed, batches, work / "channels.onnx", progress=progress):
        for key, name in enumerate(values):
            rows, *parts = (results[output_name(key, part)] for part in PARTS)
            stats = ChannelStats(int(rows[0]), *(part.astype(np.float64) for part in parts))
            if not np.isfinite([stats.minimum, stats.maximum, stats.total]).all():
                raise CalibrationError(
                    f"{name} is NaN or infinite on the calibration data",
                    hint="check the model in float on the same inputs",
                )
            before = gathered.get(name)
            gathered[name] = before.merge(stats) if before else stats
    return gathered
