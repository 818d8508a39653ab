"""The two corrections of arXiv 1906.04721, for graphs whose tensors all have codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calibration.channels import observe_channels
from qcompile.correction import CorrectionPlan, plan_correction
from qcompile.edge.plan import BITS, LIMITS, ConstantQuant, EdgePlan
from qcompile.edge.profiles import Profile
from qcompile.edge.settings import Settings
from qcompile.equalization import EqualizationPlan, plan_equalization, wanted_values
from qcompile.passes.quantize_tensors import QuantizeTensors
from qcompile.traced import Batch
from qcompile.weighted import find_weighted

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]


def equalization_of(
    graph: ir.Model,
    batches: Sequence[Batch],
    work: Path,
    settings: Settings,
    profile: Profile,
    *,
    progress: Progress | None = None,
) -> EqualizationPlan:
    """Which scales to move between the ops of `graph`, from calibration data."""
    ops = find_weighted(graph.graph)
    stats = observe_channels(graph, wanted_values(ops), batches, work, progress=progress)
    per_channel = settings.per_channel and "Conv" in profile.per_channel
    bits = BITS[settings.activation]
    return plan_equalization(ops, stats, per_channel=per_channel, bits=bits)


def correction_of(
    graph: ir.Model,
    plan: EdgePlan,
    batches: Sequence[Batch],
    work: Path,
    *,
    progress: Progress | None = None,
) -> CorrectionPlan:
    """By how much the ops of `plan` are off on average. `graph` is as it was planned for; an op
    whose bias has no codes is left as it is."""
    coded = {c.node for c in plan.constants if c.code == "int32"}
    planned = {unit.nodes[0]: coded.isdisjoint(unit.nodes) for unit in plan.quantized}
    ops = [
        dataclasses.replace(op, name=str(op.node.name))
        for op in find_weighted(graph.graph)
        if op.node.name in planned
    ]
    quantized = graph.clone()
    QuantizeTensors(plan)(quantized)
    unbiased = {name for name, without in planned.items() if without}
    return plan_correction(
        graph, quantized, ops, batches, work, unbiased=unbiased, progress=progress
    )


def with_shifts(plan: EdgePlan, shifts: Mapping[str, Array]) -> EdgePlan:
    """`plan` with its biases shifted.

    Args:
        plan: whose biases are int32 codes.
        shifts: name of a unit's first node -> float64 [out channels].
    """
    by_node = {
        node: shifts[unit.nodes[0]]
        for unit in plan.quantized
        if unit.nodes[0] in shifts
        for node in unit.nodes
    }
    return dataclasses.replace(
        plan,
        constants=tuple(
            _shifted(c, by_node[c.node]) if c.code == "int32" and c.node in by_node else c
            for c in plan.constants
        ),
    )


def _shifted(bias: ConstantQuant, shift: Array) -> ConstantQuant:
    steps = np.rint(shift / bias.scale.astype(np.float64)).reshape(bias.codes.shape)
    codes = np.clip(bias.codes + steps, *LIMITS["int32"])
    return dataclasses.replace(bias, codes=codes.astype(np.int64).astype(np.int32))
