"""Tiles of the GEMM, and what each costs: how one is chosen for a shape.

A GEMM of [m, k] by [n, k] on a GPU with S multiprocessors is expected to take

    base + wave · w + wave_depth · w · k/1000 + weights · n·k/10⁶ + results · m·n/10⁶  µs

where w = ⌈tiles / S⌉. The tile with the least expectation is taken (``native/device.cc``).
"""

from __future__ import annotations

import dataclasses
from typing import Final


@dataclasses.dataclass(frozen=True)
class Tile:
    """Shape of a GEMM's block of threads. See ``gemm.py`` and ``gemm_hopper.py``.

    Attributes:
        rows, columns, depth: of the tile; in ``gemm_hopper``, rows are of one consumer.
        stages: buffers between loading and multiplying.
        warps: of 32 threads; in ``gemm_hopper``, of one consumer: always 4.
        consumers: warpgroups beside the loader in ``gemm_hopper``; 0 in ``gemm``.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int = 4
    consumers: int = 0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Coefficients of the expected time, in µs."""

    base: float
    wave: float
    wave_depth: float
    weights: float
    results: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """A tile that the library carries, its cost, and the most rows that it is meant for."""

    tile: Tile
    cost: Cost
    most_rows: int = 2**31 - 1


_HOPPER: Final = (
    Choice(Tile(16, 16, 256, 4, warps=2), Cost(3.23, 0.0, 0.0, 0.30, 0.0), most_rows=16),
    Choice(Tile(16, 32, 256, 6), Cost(1.51, 1.06, 0.093, 0.279, 0.0), most_rows=16),
    Choice(Tile(16, 64, 256, 4), Cost(1.99, 0.0, 1.368, 0.087, 0.0), most_rows=16),
    Choice(Tile(32, 32, 256, 6), Cost(3.64, 0.0, 0.365, 0.221, 0.0), most_rows=32),
    Choice(Tile(32, 64, 256, 3), Cost(3.42, 0.0, 2.157, 0.0, 0.0), most_rows=32),
    Choice(Tile(64, 64, 128, 12, consumers=1), Cost(2.04, 0.382, 0.757, 0.124, 1.523)),
    Choice(Tile(64, 128, 128, 7, consumers=1), Cost(1.02, 0.0, 1.339, 0.124, 1.31)),
    Choice(Tile(128, 128, 128, 5, consumers=1), Cost(0.0, 1.877, 2.188, 0.14, 0.4)),
    Choice(Tile(64, 128, 128, 5, consumers=2), Cost(0.35, 1.478, 2.248, 0.132, 0.461)),
    Choice(Tile(64, 256, 64, 6, consumers=2), Cost(0.43, 2.16, 4.831, 0.049, 0.47)),
    # Slower than those above, and the only one for many rows that writes float32.
    Choice(Tile(128, 128, 128, 3, warps=8), Cost(0.5, 2.5, 2.8, 0.14, 0.7)),
)
"""Fitted to times on an H200: 11 numbers of rows from 1 to 8192, five weights of 4096 to 16384
channels. The tile chosen so was within 2 % of the best on average, within 17 % at worst."""

_OLDER: Final = (
    Choice(Tile(16, 32, 256, 4), Cost(2.0, 1.0, 0.6, 0.28, 0.0), most_rows=16),
    Choice(Tile(16, 64, 128, 4), Cost(2.0, 0.0, 1.6, 0.2, 0.0), most_rows=16),
    Choice(Tile(32, 64, 128, 4), Cost(2.5, 0.0, 2.2, 0.2, 0.0), most_rows=64),
    Choice(Tile(64, 64, 128, 3), Cost(2.5, 1.0, 2.5, 0.13, 1.0)),
    Choice(Tile(128, 128, 64, 4, warps=8), Cost(1.0, 2.5, 6.0, 0.13, 0.5)),
)
"""Not measured: these GPUs were not at hand. The order of the costs follows from the shapes."""

CHOICES: Final = {80: _OLDER, 89: _OLDER, 90: _HOPPER}
"""Tiles by compute capability."""
