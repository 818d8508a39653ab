"""Bits per weight to fit a budget, by least damage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.optimize import Bounds, LinearConstraint, milp

from qcompile.calibration.stats import Stats
from qcompile.config import CompileConfig
from qcompile.edge.operands import quantize_constant
from qcompile.edge.plan import SINCE, ConstantQuant, EdgePlan
from qcompile.edge.profiles import Profile
from qcompile.edge.units import WEIGHTED, Unit
from qcompile.errors import ConfigError
from qcompile.passes.quantize_tensors import QuantizeTensors

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Narrowing:
    """What four bits in the place of eight would do to one weight.

    Attributes:
        name: of its unit.
        saved: bytes.
        damage: noise that is added to the unit's output, relative to the output's power.
    """

    name: str
    saved: int
    damage: float


def choose_narrow(
    graph: ir.Model,
    plan: EdgePlan,
    units: Sequence[Unit],
    stats: Mapping[str, Stats],
    profile: Profile,
    config: CompileConfig,
) -> frozenset[str]:
    """Names of the units whose weights get int4 codes, so that all weights fit `config.max_size`.

    The sum of the damage is least (a knapsack, solved exactly). Damage is estimated as if the
    input's values were alike in all channels and independent.

    Args:
        graph: in float, as it was planned on.
        plan: with weights in eight bits.
        units: of the graph.
        stats: of the activations.
        profile: whether it has int4 weights.
        config: the budget, the opset, and how weights are rounded.

    Raises:
        ConfigError: the budget cannot be met; says by how much.
    """
    if config.max_size is None:
        return frozenset()
    size = weight_bytes(graph, plan)
    need = size - config.max_size
    if need <= 0:
        return frozenset()
    why = None
    if "int4" not in profile.weights:
        why = f"profile {profile.name} has no 4-bit weights"
    elif config.opset < SINCE["int4"]:
        why = f"4-bit weights need opset {SINCE['int4']}"
    found = [] if why else _narrowings(plan, units, stats, config)
    most = sum(each.saved for each in found)
    if most < need:
        raise ConfigError(
            f"max_size {config.max_size}: the least that can be had is {size - most}, "
            f"{need - most} bytes more" + (f" ({why})" if why else "")
        )
    saved = np.array([each.saved for each in found], float)
    solved = milp(
        np.array([each.damage for each in found]),
        constraints=LinearConstraint(saved[None, :], need, np.inf),
        integrality=np.ones(len(found), np.int64),
        bounds=Bounds(0, 1),
    )
    assert solved.x is not None, "narrowing everything fits"
    return frozenset(each.name for each, z in zip(found, solved.x, strict=True) if z > 0.5)


def weight_bytes(graph: ir.Model, plan: EdgePlan) -> int:
    """Of all constants, once `plan` is written into `graph`."""
    quantized = graph.clone()
    QuantizeTensors(plan)(quantized)
    tensors = (value.const_value for value in quantized.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _narrowings(
    plan: EdgePlan, units: Sequence[Unit], stats: Mapping[str, Stats], config: CompileConfig
) -> list[Narrowing]:
    weights = {c.node: c for c in plan.constants if c.role == "weight"}
    found = []
    for unit in units:
        wide = weights.get(unit.name)
        if wide is None or unit.op not in WEIGHTED:
            continue
        operand = next(each for each in unit.operands if each.role == "weight")
        tensor = operand.value.const_value
        assert tensor is not None
        exact = tensor.numpy()
        method = config.recipe.rule_for(unit.name).method or config.method
        narrow = quantize_constant(operand, exact, "int4", wide.axis, method=method)
        noise = _error(exact, narrow) - _error(exact, wide)
        power = _moment(stats[str(unit.inputs[0].name)])
        fan_in = exact.size / (exact.shape[wide.axis] if wide.axis is not None else 1)
        signal = max(_moment(stats[str(unit.outputs[0].name)]), 1e-30)
        damage = max(noise, 0.0) / exact.size * fan_in * power / signal
        found.append(Narrowing(unit.name, wide.nbytes - narrow.nbytes, damage))
    return found


def _error(exact: Array, found: ConstantQuant) -> float:
    return float(np.square(exact - found.dequantized(), dtype=np.float64).sum())


def _moment(stats: Stats) -> float:
    return float(stats.second_moment.mean())
