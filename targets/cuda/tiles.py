"""Tiles of the GEMM, and what each costs: how one is chosen for a shape.

A GEMM of [m, k] by [n, k] on a GPU with S multiprocessors is expected to take

    base + wave · w + wave_depth · w · k/1000 + weights · n·k/10⁶ + results · m·n/10⁶  µs

where w = ⌈tiles / S⌉. The tile with the least expectation is taken (``native/device.cc``).
"""

from __future__ import annotations

import dataclasses
from typing import Final

from qcompile.targets.cuda.schema import Codes

ANY_ROWS: Final = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Tile:
    """Shape of a GEMM's block of threads. See ``gemm.py`` and ``gemm_hopper.py``.

    Attributes:
        rows, columns, depth: of the tile; in ``gemm_hopper``, rows are of one consumer.
        stages: buffers between loading and multiplying.
        warps: of 32 threads; in ``gemm_hopper``, of one consumer: always 4.
        consumers: warpgroups beside the loader in ``gemm_hopper``; 0 in ``gemm``.
        promote: stages after which a sum goes on in float32, in ``gemm_hopper``; 0: never.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int = 4
    consumers: int = 0
    promote: int = 0


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
    """A tile that the library carries, its cost, and how many rows it is meant for."""

    tile: Tile
    cost: Cost
    fewest_rows: int = 1
    most_rows: int = ANY_ROWS


_HOPPER: Final = (
    Choice(Tile(16, 16, 512, 4, warps=2), Cost(3.136, 0.054, 0.0, 0.280, 0.846), most_rows=16),
    Choice(Tile(16, 32, 512, 4), Cost(2.648, 0.523, 0.087, 0.242, 1.142), most_rows=16),
    Choice(Tile(16, 64, 256, 4), Cost(2.931, 0.0, 1.109, 0.095, 1.515), most_rows=16),
    Choice(Tile(32, 32, 256, 6), Cost(3.486, 0.0, 0.288, 0.244, 0.0), 17, 32),
    Choice(Tile(32, 64, 256, 3), Cost(4.964, 0.0, 1.866, 0.0, 0.0), 17, 32),
    Choice(Tile(64, 64, 128, 4), Cost(5.189, 0.0, 1.876, 0.0, 0.0), 17, 64),
    Choice(Tile(64, 64, 128, 12, consumers=1), Cost(3.091, 0.465, 0.342, 0.236, 0.0), 17, 128),
    Choice(Tile(64, 128, 128, 7, consumers=1), Cost(0.787, 2.079, 0.847, 0.195, 0.0), 17, 256),
    Choice(Tile(64, 128, 128, 5, consumers=2), Cost(1.547, 0.0, 2.389, 0.079, 0.857), 65),
    Choice(Tile(64, 256, 64, 6, consumers=2), Cost(2.193, 0.0, 4.701, 0.047, 0.763), 129, 3072),
    # Slower than those above, and the only one for many rows that writes float32.
    Choice(Tile(128, 128, 128, 3, warps=8), Cost(9.0, 0.5, 3.2, 0.09, 1.0), 17),
)
"""Fitted to times on an H200, ONNX Runtime left out (``benchmarks/cuda_tiles.py``): 13 numbers of
rows from 1 to 8192 by nine weights of 4096 to 20480 channels. The tile chosen so is 2 % slower than
the best on average and 20 % at worst."""

_OLDER: Final = (
    Choice(Tile(16, 32, 256, 4), Cost(2.0, 1.0, 0.6, 0.28, 0.0), most_rows=16),
    Choice(Tile(16, 64, 128, 4), Cost(2.0, 0.0, 1.6, 0.2, 0.0), most_rows=16),
    Choice(Tile(32, 64, 128, 4), Cost(2.5, 0.0, 2.2, 0.2, 0.0), most_rows=64),
    Choice(Tile(64, 64, 128, 3), Cost(2.5, 1.0, 2.5, 0.13, 1.0), 17),
    Choice(Tile(128, 128, 64, 4, warps=8), Cost(1.0, 2.5, 6.0, 0.13, 0.5), 33),
)
"""Not measured: these GPUs were not at hand. The order of the costs follows from the shapes."""

_HOPPER_FP8: Final = (
    Choice(Tile(16, 32, 256, 6), Cost(2.918, 0.0, 0.464, 0.211, 0.0), most_rows=16),
    Choice(Tile(16, 64, 256, 4), Cost(3.220, 0.0, 2.087, 0.0, 0.0), most_rows=16),
    Choice(Tile(64, 32, 256, 5), Cost(0.757, 1.986, 1.321, 0.063, 0.0), most_rows=64),
    Choice(Tile(64, 64, 128, 6), Cost(3.048, 0.0, 1.686, 0.075, 0.0), most_rows=128),
    Choice(
        Tile(64, 64, 128, 12, consumers=1, promote=4),
        Cost(2.023, 0.911, 0.632, 0.176, 0.0),
        17,
        256,
    ),
    Choice(
        Tile(64, 128, 128, 7, consumers=1, promote=4),
        Cost(1.026, 1.806, 1.073, 0.183, 0.0),
        17,
        256,
    ),
    Choice(
        Tile(64, 128, 128, 5, consumers=2, promote=2), Cost(0.711, 0.0, 2.624, 0.082, 1.371), 65
    ),
    # The only one for many rows that writes float32.
    Choice(Tile(128, 128, 128, 3, warps=8), Cost(9.0, 0.986, 4.932, 0.052, 1.318), 17),
)
"""Fitted to times of the same kind, at three weights for those with consumers: 2 % slower than the
best on average, 12 % at worst. A wider tile would have no registers for two sums."""

CHOICES: Final[dict[int, dict[Codes, tuple[Choice, ...]]]] = {
    80: {"int8": _OLDER},
    89: {"int8": _OLDER, "float8e4m3fn": _OLDER},
    90: {"int8": _HOPPER, "float8e4m3fn": _HOPPER_FP8},
}
"""Tiles by compute capability and codes."""
