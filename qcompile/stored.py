"""Times from a table over a grid of sizes, for a machine that one is not on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.interpolate import RegularGridInterpolator

from qcompile.costs import CostTable
from qcompile.errors import ConfigError
from qcompile.makers import Maker
from qcompile.precision import Label
from qcompile.probe import IDLE, Feed, conversion_key, maker_key
from qcompile.probe_graphs import Shape
from qcompile.targets.base import Target

Grid = npt.NDArray[np.float64]


class StoredTimes:
    """Looks sizes up between those of a table: logarithms are interpolated, linearly in logarithms.

    What lies beyond the largest sizes is taken at the throughput that the largest has; what lies
    below the smallest takes as long as the smallest, which is how long a launch takes. Biases are
    left out: an INT8 kernel adds them for nothing, so that its gain is not overstated.

    Attributes:
        machine: where the times were taken, and when.
        measured: none, here.
    """

    measured = 0

    def __init__(self, table: CostTable, target: Target) -> None:
        self.machine: Mapping[str, str] = table.machine
        self._seconds = table.seconds
        self._timed_as, self._converted_as = target.timed_as, target.converted_as
        self._outside: set[str] = set()

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the report has to know of them."""
        other = {k: v for k, v in self.machine.items() if k not in ("target", "processor")}
        versions = ", ".join(f"{name} {value}" for name, value in other.items())
        notes = [
            f"the plan is from the stored times of an {self.machine.get('processor')} "
            f"({versions}): they are of Linears alone, and nothing was timed here"
        ]
        if self._outside:
            sizes = ", ".join(sorted(self._outside))
            notes.append(f"larger than anything in the table, taken at its throughput: {sizes}")
        return notes

    def linear(self, shape: Shape, labels: Sequence[Label]) -> dict[Label, float]:
        """Seconds of one Linear by label.

        Raises:
            ConfigError: the table knows nothing of a label.
        """
        sizes = (shape.rows, shape.depth, shape.width)
        found = {}
        for label in labels:
            grid = self._grids.get(self._timed_as.get(label, label))
            if grid is None:
                raise ConfigError(f"the stored table has no times of {label} Linears")
            ends = (float(axis[-1]) for axis in grid.grid)
            if any(math.log(size) > end for size, end in zip(sizes, ends, strict=True)):
                self._outside.add(f"{label} {'×'.join(map(str, sizes))}")
            found[label] = _between(grid, sizes)
        return found

    def conversion(self, label: Label, rows: int, depth: int) -> float:
        """Seconds to quantise an activation.

        Raises:
            ConfigError: the table knows nothing of it.
        """
        as_ = self._converted_as.get(label, label)
        seconds = self._of(conversion_key(as_, rows, depth))
        if seconds is None:
            raise ConfigError(f"the stored table has no times of {label} activations")
        return seconds

    def fused(self, maker: Maker, label: Label, rows: int, depth: int) -> float | None:
        """Seconds that `maker` takes longer where it quantises what it makes."""
        labels: tuple[Label, ...] = (self._converted_as.get(label, label), "float")
        both = [self._of(maker_key(maker, each, rows, depth)) for each in labels]
        return None if both[0] is None or both[1] is None else both[0] - both[1]

    def model(self, path: Path, graph: ir.Graph, feeds: Sequence[Feed]) -> list[float] | None:
        """Not known: a table of Linears says nothing of attention."""
        return None

    def _of(self, key: str) -> float | None:
        name, sizes = _parsed(key)
        grid = self._grids.get(name)
        return None if grid is None else _between(grid, sizes)

    @cached_property
    def _grids(self) -> dict[str, RegularGridInterpolator]:
        points: dict[str, dict[tuple[int, ...], float]] = {}
        for key, seconds in self._seconds.items():
            if key != IDLE:
                name, sizes = _parsed(key)
                points.setdefault(name, {})[sizes] = seconds
        return {name: _grid(found) for name, found in points.items()}


def _parsed(key: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = key.partition(" ")
    return name, tuple(int(size) for size in sizes.split("x"))


def _grid(points: Mapping[tuple[int, ...], float]) -> RegularGridInterpolator:
    """Over all combinations of the sizes that occur; a missing one has the throughput of the next
    smaller along the last axis."""
    axes = [np.array(sorted(set(axis))) for axis in zip(*points, strict=True)]
    values = np.empty([len(axis) for axis in axes])
    for place in np.ndindex(values.shape):
        sizes = tuple(int(axis[at]) for axis, at in zip(axes, place, strict=True))
        found = points.get(sizes)
        if found is None:
            *before, last = place
            assert last > 0, f"the table has no time for {sizes}, its smallest"
            smaller = (*before, last - 1)
            grown = axes[-1][last] / axes[-1][last - 1]
            found = float(np.exp(values[smaller])) * grown
        values[place] = math.log(found)
    return RegularGridInterpolator([np.log(axis) for axis in axes], values)


def _between(grid: RegularGridInterpolator, sizes: Sequence[int]) -> float:
    place, beyond = [], 0.0
    for size, axis in zip(sizes, grid.grid, strict=True):
        at = math.log(size)
        place.append(min(max(at, float(axis[0])), float(axis[-1])))
        beyond += max(at - float(axis[-1]), 0.0)
    return math.exp(float(grid(place)[0]) + beyond)
