"""Time the Linears that models are made of, over a grid of sizes, on the GPU at hand.

    python -m benchmarks.cuda_costs targets/cuda/costs_sm90.json

What comes out is the table that ``--target ort-cuda:sm90`` plans by where there is no such GPU;
``--costs FILE`` takes no such table. Probes are the planner's own (`qcompile.probe`). What the file
holds already is kept. Then sizes between those of the grid are timed and compared with what the
table gives for them: the error of the interpolation is printed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np
from qcompile.targets.ort_cuda import OrtCuda

from qcompile.costs import CostTable, open_costs
from qcompile.makers import Maker
from qcompile.precision import Label
from qcompile.probe import Prober
from qcompile.probe_graphs import Shape
from qcompile.stored import StoredTimes

ROWS: Final = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHANNELS: Final = (256, 512, 1024, 2048, 4096, 8192, 16384, 28672)
FEW: Final = (256, 1024, 4096, 16384)
"""Channels that weights in blocks and in e4m3 are timed at."""

MOST: Final = 1 << 28
"""Weights of a Linear; of larger ones, the table takes the throughput of the next smaller."""

SECONDS: Final = 0.3
"""The most to spend on the labels of one size."""

MODES: Final[tuple[Label, ...]] = ("token", "static")
MAKERS: Final[tuple[Maker, ...]] = (
    "LayerNormalization",
    "RMSNormalization",
    "Relu",
    "Gelu",
    "GatedSilu",
)
BETWEEN: Final = (
    (1, 768, 3072), (20, 5120, 5120), (100, 4096, 14336), (300, 2560, 10240), (700, 14336, 4096),
    (3000, 5120, 20480), (6000, 11008, 4096), (1500, 6144, 6144),
)  # fmt: skip
"""Rows, depth and width to try the table at."""


def fill(prober: Prober, rows: tuple[int, ...], channels: tuple[int, ...], out: Path) -> None:
    """Take all times of the grid, and write them as they come."""
    start = time.perf_counter()
    for depth in channels:
        for width in channels:
            labels: list[Label] = ["float", "token"]
            if depth * width > MOST:
                continue
            if depth in FEW and width in FEW:
                labels += ["fp8", "weight8", "weight4"]
            for count in rows:
                prober.linear(Shape(count, depth, width, False), labels)
        for count in rows:
            prober.linear(Shape(count, depth, channels[0], False), MODES)
        for maker, count, label in itertools.product(MAKERS, rows, MODES):
            prober.fused(maker, label, count, depth)
        prober.table.write(out)
        seconds = time.perf_counter() - start
        print(f"{depth:6d} channels: {prober.measured} times, {seconds:.0f} s", flush=True)


def compare(table: CostTable, target: OrtCuda, work: Path) -> None:
    """Print how far the table is from times that are between its own."""
    stored = StoredTimes(table, target)
    fresh = Prober(target, CostTable(machine=target.machine()), work)
    labels: list[Label] = ["float", "token", "fp8"]
    for sizes in BETWEEN:
        shape = Shape(*sizes, False)
        given, found = stored.linear(shape, labels), fresh.linear(shape, labels)
        cells = "  ".join(
            f"{label} {1e6 * found[label]:8.1f} µs, table {given[label] / found[label]:.2f}x"
            for label in labels
        )
        ratios = [times["float"] / times["token"] for times in (found, given)]
        print(f"{'×'.join(map(str, sizes)):>16}  {cells}  gain {ratios[0]:.2f}, {ratios[1]:.2f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    target = OrtCuda()
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    table = open_costs(arguments.out, target.machine() | {"date": date})
    with tempfile.TemporaryDirectory() as work:
        fill(Prober(target, table, Path(work), seconds=SECONDS), ROWS, CHANNELS, arguments.out)
        rounded = {
            key: float(np.format_float_scientific(seconds, precision=3))
            for key, seconds in sorted(table.seconds.items())
        }
        table = table.model_copy(update={"seconds": rounded})
        table.write(arguments.out)
        compare(table, target, Path(work))


if __name__ == "__main__":
    main()
