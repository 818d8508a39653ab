"""Times in place of measured ones: proportional to the work, by a fixed factor per kernel."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from qcompile.linears import find_linears
from qcompile.precision import Label
from qcompile.probe import Feed, Prober
from qcompile.probe_graphs import Shape

FACTORS = {
    "float": 1.0,
    "static": 0.5,
    "token": 0.6,
    "split": 0.52,
    "llm-int8": 0.65,
    "weight8": 1.5,
    "weight4": 1.2,
    "nf4": 2.0,
    "fp4": 2.0,
    "quantize-static": 1.0,
    "quantize-dynamic": 1.5,
    "quantize-token": 5.0,
    "quantize-split": 2.0,
}
SECONDS_PER_PRODUCT = 1e-9
OTHER_OPS = 1.25
"""A whole float model takes this many times as long as its Linears."""


class ImaginedTimes(Prober):
    """A prober that builds and runs nothing."""

    def model(self, path: Path, graph: ir.Graph, feeds: Sequence[Feed]) -> list[float]:
        products = sum(n.in_features * n.out_features for n in find_linears(graph))
        # Tokens are [batch, sequence]; of other inputs [batch, channels] the rows are the batch.
        first = graph.inputs[0]
        flat = first.dtype == ir.DataType.FLOAT and len(first.shape or ()) == 2
        rows = [batch if flat else batch * length for (batch, length), _ in feeds]
        return [OTHER_OPS * SECONDS_PER_PRODUCT * products * count for count in rows]

    def _measure_conversions(self, rows: int, depth: int, keys: Mapping[Label, str]) -> None:
        self._imagine(keys)

    def _measure_linears(
        self, shape: Shape, keys: Mapping[Label, str], conversions: Mapping[Label, str]
    ) -> None:
        self._imagine(keys)

    def _imagine(self, keys: Mapping[Label, str]) -> None:
        for key in keys.values():
            label, _, dims = key.partition(" ")
            sizes = [int(n) for n in re.findall(r"\d+", dims)]
            self.table.seconds[key] = FACTORS[label] * math.prod(sizes) * SECONDS_PER_PRODUCT
            self.measured += 1
