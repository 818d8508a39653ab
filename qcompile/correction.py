"""Bias correction (arXiv 1906.04721, 4.2): what rounding shifts on average goes into biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calibration.observing import outputs_over
from qcompile.errors import CalibrationError
from qcompile.passes.observe_bias import PARTS, ObserveBias, output_name
from qcompile.passes.quantize import Quantize
from qcompile.precision import PrecisionPlan
from qcompile.session import Runtime
from qcompile.traced import Batch
from qcompile.weighted import Weighted, find_weighted

Array = npt.NDArray[Any]

_PLAIN: Final = Runtime(entries={"session.disable_quant_qdq": "1"})
"""Q/DQ computed as they stand: what the codes say, and not what a kernel that saturates makes of
them."""


@dataclasses.dataclass(frozen=True)
class CorrectionPlan:
    """What is added to biases, applied by `passes.correct_bias`.

    Attributes:
        shifts: name of an op -> float64 [out channels].
        refused: name of an op -> why its bias stays.
    """

    shifts: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def told(self, name: str) -> str | None:
        """What was decided for the bias of the op `name`, in words."""
        shift = self.shifts.get(name)
        if shift is None:
            return self.refused.get(name)
        most = np.abs(shift).max(initial=0.0)
        return f"{np.count_nonzero(shift)} of {len(shift)} channels, by up to {most:.3g}"


def correct_linears(
    graph: ir.Model,
    plan: PrecisionPlan,
    batches: Sequence[Batch],
    work: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> CorrectionPlan:
    """`plan_correction` for the Linears of `plan`: `graph` is as it was planned for."""
    planned = {op.name for op in plan.quantized}
    ops = [op for op in find_weighted(graph.graph) if op.name in planned]
    quantized = graph.clone()
    Quantize(plan)(quantized)
    # Behind the bias, a product of channels that stay in float may have taken the output's name.
    makers = {str(value.name): str(n.name) for n in quantized.graph for value in n.outputs}
    lasts = {op.name: makers[str(op.output.name)] for op in ops}
    return plan_correction(graph, quantized, ops, batches, work, lasts=lasts, progress=progress)


def plan_correction(
    reference: ir.Model,
    quantized: ir.Model,
    ops: Sequence[Weighted],
    batches: Sequence[Batch],
    work: Path,
    *,
    unbiased: Collection[str] = (),
    lasts: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CorrectionPlan:
    """Measure E[y_float − y_quantised] per output channel of every op, in graph order, each with
    the ones before it corrected.

    A mean over n values is itself off by √(variance / (n − 1)), so a channel gets the part
    1 − variance / ((n − 1) · mean²) of it, and nothing where that is negative, or n is one.

    Args:
        reference: the float graph.
        quantized: the same with Q/DQ; its nodes keep their names.
        ops: quantised ops of `reference`, in graph order.
        batches: calibration data.
        work: the folder that holds the graphs' external weights.
        unbiased: names of ops whose bias cannot be had.
        lasts: name of an op -> name of the node of `quantized` that computes its output; None: of
            the node that does so in `reference`.
        progress: called with (batches done, batches in all).

    Raises:
        CalibrationError: an output is NaN or infinite on this data, or a graph fails on it.
    """
    refused = {
        op.name: "it has no bias that is a part of its kernel" for op in ops if op.name in unbiased
    }
    ops = [op for op in ops if op.name not in refused]
    if not ops:
        return CorrectionPlan({}, refused)
    both = quantized.clone()
    measured = [
        (_last_node(op), (lasts or {}).get(op.name, _last_node(op)), op.axis, op.out_channels)
        for op in ops
    ]
    ObserveBias(reference, measured)(both)
    counts = [0] * len(ops)
    sums = [np.zeros((2, op.out_channels)) for op in ops]
    outputs = outputs_over(both, batches, work / "biases.onnx", runtime=_PLAIN, progress=progress)
    for results in outputs:
        for at, op in enumerate(ops):
            rows, *moments = (results[output_name(at, part)] for part in PARTS)
            if not np.isfinite(moments).all():
                raise CalibrationError(
                    f"the output of {op.name} is NaN or infinite on the calibration data",
                    hint="leave --bias-correction out",
                )
            counts[at] += int(rows[0])
            sums[at] += int(rows[0]) * np.asarray(moments, np.float64)
    shifts = {
        op.name: shrunk(total[0] / count, total[1] / count, count)
        for op, total, count in zip(ops, sums, counts, strict=True)
    }
    return CorrectionPlan(shifts, refused)


def shrunk(mean: Array, square: Array, count: int) -> Array:
    """The part of a mean that its own uncertainty leaves.

    Args:
        mean: of `count` values, [channels].
        square: the mean of their squares.
        count: how many values there were.
    """
    if count < 2:
        return np.zeros_like(mean)
    noise = np.maximum(square - np.square(mean), 0.0) / (count - 1)
    share = 1.0 - noise / np.maximum(np.square(mean), np.finfo(np.float64).tiny)
    result: Array = mean * np.maximum(share, 0.0)
    return result


def _last_node(op: Weighted) -> str:
    node = op.output.producer()
    assert node is not None
    return str(node.name)
