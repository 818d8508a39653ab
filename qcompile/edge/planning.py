"""Which ops of a graph get codes, and the scales of every tensor between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import networkx as nx
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calibration.ranges import static_range
from qcompile.calibration.stats import Stats
from qcompile.edge.operands import (
    from_channels,
    quantize_bias,
    quantize_constant,
    quantize_operand,
)
from qcompile.edge.plan import BITS, LIMITS, Code, ConstantQuant, EdgePlan, TensorQuant, UnitPlan
from qcompile.edge.profiles import Profile
from qcompile.edge.rounding import method_used
from qcompile.edge.settings import Settings
from qcompile.edge.units import WEIGHTED, Operand, Unit, axis_of
from qcompile.errors import ModelError
from qcompile.methods import Method
from qcompile.metrics import sqnr_db
from qcompile.passes.constants import LARGEST
from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]

LEAST_DB: Final = 20.0
"""A tensor that its codes would blur beyond this predicted SQNR stays in float, and what computes
or reads it with it; of a Gaussian, eight bits keep some 40 dB."""

LEAST_STORED_DB: Final = 25.0
"""The same for a table that has codes for its size alone: they gain nothing else."""

_HIDDEN: Final = -LARGEST / 2
"""Scores below are those of a mask."""

_FIXED: Final = {"Sigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "HardSigmoid": (0.0, 1.0)}
"""Ranges that the op itself sets, whatever calibration saw."""


def plan_edge(
    units: Sequence[Unit],
    stats: Mapping[str, Stats],
    profile: Profile,
    settings: Settings,
    kept: Mapping[str, str] | None = None,
    narrow: Collection[str] = (),
    codes: Mapping[str, QuantizedWeight] | None = None,
) -> EdgePlan:
    """Decide for every unit and tensor.

    Args:
        units: of the graph, in its order.
        stats: of the activations of those that are not refused.
        profile: its constraints.
        settings: what a user may choose.
        kept: name of a unit -> why it stays in float all the same.
        narrow: names of the units whose weights get int4 codes.
        codes: of weights that are rounded already, by name of the unit.

    An op has codes where the profile has it, its tensors can be told apart in so many bits, and,
    for ops that only move values, where what they read or what they feed has codes anyway.
    """
    refused = {unit.first: unit.refusal for unit in units if unit.refusal is not None}
    refused |= {unit.first: kept[unit.name] for unit in units if kept and unit.name in kept}
    if BITS[settings.activation] == 16 and not profile.wide_products:
        refused |= {
            unit.first: f"profile {profile.name} multiplies no two activations of 16 bits"
            for unit in units
            if unit.op == "MatMul" and len(unit.inputs) == 2
        }
    if not profile.activations:
        return _weights_alone(units, refused, profile, settings, codes or {})
    while True:
        chosen = [unit for unit in units if unit.first not in refused]
        if profile.float_outputs:
            _drop_unread(chosen, refused)
        _drop_idle_movers(chosen, refused)
        chosen = [unit for unit in chosen if unit.first not in refused]
        tensors = _plan_tensors(chosen, stats, profile, settings)
        blurred = _blurred(chosen, tensors, profile)
        if not blurred:
            break
        refused |= blurred
    constants: list[ConstantQuant] = []
    for unit in chosen:
        constants += _plan_operands(
            unit, tensors, profile, settings, unit.name in narrow, codes or {}
        )
    return EdgePlan(
        tensors=tuple(tensors.values()),
        constants=tuple(constants),
        units=tuple(
            _unit_plan(
                unit,
                None if unit.first in refused else settings.activation,
                refused.get(unit.first) or _reason(unit, profile, settings, codes or {}),
                method_used(unit, settings, codes or {}),
            )
            for unit in units
        ),
    )


def _weights_alone(
    units: Sequence[Unit],
    refused: Mapping[ir.Node, str],
    profile: Profile,
    settings: Settings,
    codes: Mapping[str, QuantizedWeight],
) -> EdgePlan:
    """Codes for weights, and for nothing else."""
    constants, plans = [], []
    for unit in units:
        weight = next((operand for operand in unit.operands if operand.role == "weight"), None)
        chosen = unit.first not in refused and weight is not None
        if chosen and weight is not None:
            constants.append(_plan_weight(unit, weight, profile, settings, False, codes))
        reason = (
            f"{_reason(unit, profile, settings, codes)}; activations stay in float"
            if chosen
            else refused.get(unit.first)
        )
        code = settings.weight if chosen else None
        plans.append(_unit_plan(unit, code, reason or "", method_used(unit, settings, codes)))
    return EdgePlan(constants=tuple(constants), units=tuple(plans))


def _reason(
    unit: Unit, profile: Profile, settings: Settings, codes: Mapping[str, QuantizedWeight]
) -> str:
    """Why `unit` has codes, and by what its weight was rounded where that is not as asked."""
    asked, method = settings.method_of(unit.name), method_used(unit, settings, codes)
    if method in (None, asked):
        return f"profile {profile.name}"
    return (
        f"profile {profile.name}; weights by {method}, for {asked} is for Linears with a "
        "scale per output channel"
    )


def _unit_plan(unit: Unit, code: Code | None, reason: str, method: Method | None) -> UnitPlan:
    return UnitPlan(
        name=unit.name,
        nodes=tuple(str(node.name) for node in unit.nodes),
        op=unit.op,
        code=code,
        reason=reason,
        inputs=tuple(str(value.name) for value in unit.inputs),
        output=str(unit.outputs[0].name),
        method=method if code is not None else None,
    )


def require_any(plan: EdgePlan) -> None:
    """Refuse to call a model quantised in which nothing is.

    Raises:
        ModelError: every op stays in float; says why the first does.
    """
    if plan.quantized:
        return
    why = f"{plan.units[0].name}: {plan.units[0].reason}" if plan.units else "it has no float op"
    raise ModelError(f"nothing can be quantised: {why}", hint="--scheme fp32 compiles it as is")


def affine(
    low: float, high: float, code: Code, *, symmetric: bool, power_of_two: bool = False
) -> tuple[float, int]:
    """Scale and zero_point of the range [low, high], which is widened to hold zero.

    Symmetric codes leave out the lowest, so that both signs reach as far.
    """
    least, most = LIMITS[code]
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        zero_point = (least + most + 1) // 2
        scale = max(-low, high) / (most - zero_point)
    else:
        scale = (high - low) / (most - least)
    scale = float(np.float32(scale))
    if scale < np.finfo(np.float32).tiny:
        return 1.0, (least + most + 1) // 2 if symmetric else max(least, 0)
    if power_of_two:
        scale = float(2.0 ** np.ceil(np.log2(scale)))
    if not symmetric:
        zero_point = int(np.clip(np.rint(least - low / scale), least, most))
    return scale, zero_point


def rounding_db(stats: Stats, scale: float, zero_point: int, code: Code) -> float:
    """SQNR of rounding a tensor, predicted from its histogram, in dB.

    What a mask hides counts as nothing: it is large, exact, and says nothing about the rest.
    """
    values, counts = stats.weighted_values()
    counts = np.where(values > _HIDDEN, counts, 0)
    least, most = LIMITS[code]
    low, high = (least - zero_point) * scale, (most - zero_point) * scale
    clipped = np.square(values - np.clip(values, low, high))
    # What is nearer to zero than a step is rounded to zero, or to one step.
    rounded = np.minimum(scale**2 / 12.0, np.square(values))
    outside = (values < low) | (values > high)
    noise = float((counts * np.where(outside, clipped, rounded)).sum())
    return sqnr_db(float((counts * np.square(values)).sum()), noise)


def _drop_unread(chosen: Sequence[Unit], refused: dict[ir.Node, str]) -> None:
    """Codes that no product reads would only round."""
    wanted = _read_as_codes(chosen)
    for unit in chosen:
        if unit.op not in WEIGHTED and not (wanted.intersection(unit.outputs) or _stored(unit)):
            refused[unit.first] = "no product reads its codes"


def _stored(unit: Unit) -> bool:
    """Whether it looks a constant up: with codes that is a quarter as large, whatever reads it."""
    return unit.moves and bool(unit.operands) and not unit.inputs


def _read_as_codes(chosen: Sequence[Unit]) -> set[ir.Value]:
    """What products read, and what that is made of without a product. Units are in graph order."""
    wanted: set[ir.Value] = set()
    for unit in reversed(chosen):
        if unit.op in WEIGHTED or wanted.intersection(unit.outputs):
            wanted.update(unit.inputs)
    return wanted


def _coded(unit: Unit, wanted: set[ir.Value], profile: Profile) -> tuple[ir.Value, ...]:
    """The tensors of a unit that have codes."""
    if profile.float_outputs and unit.op in WEIGHTED:
        return (*unit.inputs, *(value for value in unit.outputs if value in wanted))
    return unit.tensors


def _drop_idle_movers(chosen: Sequence[Unit], refused: dict[ir.Node, str]) -> None:
    """Movers pass codes on; between floats they would only round."""
    coded = {v for unit in chosen if not unit.moves for v in unit.tensors}
    movers = [unit for unit in chosen if unit.moves]
    active = {unit.first for unit in movers if _stored(unit)}
    while True:
        found = [u for u in movers if u.first not in active and coded.intersection(u.tensors)]
        if not found:
            break
        for unit in found:
            active.add(unit.first)
            coded.update(unit.tensors)
    for unit in movers:
        if unit.first not in active:
            refused[unit.first] = "it only moves values, and no op beside it has codes"


def _plan_tensors(
    chosen: Sequence[Unit], stats: Mapping[str, Stats], profile: Profile, settings: Settings
) -> dict[ir.Value, TensorQuant]:
    """Scales; tensors that must share one get that of the union of their ranges."""
    together: nx.Graph[ir.Value] = nx.Graph()
    wanted = _read_as_codes(chosen)
    for unit in chosen:
        together.add_nodes_from(_coded(unit, wanted, profile))
        if unit.moves:
            together.add_edges_from((unit.tensors[0], other) for other in unit.tensors[1:])
    held = defaultdict[ir.Value, list[tuple[float, float]]](list)
    fixed = {
        value: _FIXED[unit.op] for unit in chosen if unit.op in _FIXED for value in unit.outputs
    }
    # What a mover takes from a constant has to fit, too: rows of an embedding that no data read.
    for unit in chosen:
        for operand in unit.operands if unit.moves else ():
            array = _array(operand)
            held[unit.outputs[0]].append((float(array.min()), float(array.max())))
    tensors: dict[ir.Value, TensorQuant] = {}
    for group in nx.connected_components(together):
        members = sorted(group, key=lambda v: str(v.name))
        ranges = [
            fixed.get(v) or static_range(stats[str(v.name)], settings.ranges) for v in members
        ]
        ranges += [bounds for v in members for bounds in held[v]]
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        scale, zero_point = 1.0, 0
        if np.isfinite([low, high]).all():
            scale, zero_point = affine(
                low,
                high,
                settings.activation,
                symmetric=settings.symmetric,
                power_of_two=profile.power_of_two,
            )
        for value in members:
            seen = stats[str(value.name)]
            finite = np.isfinite([*seen.minimum, *seen.maximum]).all()
            tensors[value] = TensorQuant(
                value=str(value.name),
                code=settings.activation,
                scale=scale,
                zero_point=zero_point,
                group=str(members[0].name),
                low=low,
                high=high,
                sqnr_db=rounding_db(seen, scale, zero_point, settings.activation)
                if finite
                else -np.inf,
            )
    return tensors


def _blurred(
    chosen: Sequence[Unit], tensors: Mapping[ir.Value, TensorQuant], profile: Profile
) -> dict[ir.Node, str]:
    """Ops with a tensor of which too little would be left, and how little.

    A product that may leave floats is judged by what it reads.
    """
    found = {}
    for unit in chosen:
        free = profile.float_outputs and unit.op in WEIGHTED
        values = unit.inputs if free else unit.tensors
        worst = min((tensors[v] for v in values), key=lambda t: t.sqnr_db, default=None)
        least = LEAST_STORED_DB if _stored(unit) else LEAST_DB
        if worst is not None and worst.sqnr_db < least:
            found[unit.first] = (
                f"{worst.code} codes of {worst.value} would keep {worst.sqnr_db:.0f} dB of it "
                f"(range {worst.low:.3g} to {worst.high:.3g})"
            )
    return found


def _plan_weight(
    unit: Unit,
    operand: Operand,
    profile: Profile,
    settings: Settings,
    narrow: bool,
    codes: Mapping[str, QuantizedWeight],
) -> ConstantQuant:
    if unit.name in codes:
        return from_channels(operand, codes[unit.name])
    allowed = settings.per_channel and unit.op in profile.per_channel
    axis = axis_of(operand) if allowed else None
    # Scales per channel are documented for int8.
    code: Code = settings.weight if axis is None else "int8"
    code = "int4" if narrow else code
    weight = _array(operand)
    return quantize_constant(
        operand,
        weight,
        code,
        axis,
        power_of_two=profile.power_of_two,
        method=settings.method_of(unit.name),
    )


def _array(operand: Operand) -> Array:
    tensor = operand.value.const_value
    assert tensor is not None
    array: Array = tensor.numpy()
    return array


def _plan_operands(
    unit: Unit,
    tensors: Mapping[ir.Value, TensorQuant],
    profile: Profile,
    settings: Settings,
    narrow: bool,
    codes: Mapping[str, QuantizedWeight],
) -> list[ConstantQuant]:
    """Weight first: a bias has the product of its scale and the input's."""
    planned: list[ConstantQuant] = []
    weight: ConstantQuant | None = None
    for operand in sorted(unit.operands, key=lambda operand: operand.role != "weight"):
        array = _array(operand)
        if operand.role == "weight":
            weight = _plan_weight(unit, operand, profile, settings, narrow, codes)
            planned.append(weight)
        elif operand.role == "bias" and weight is not None:
            scale = tensors[unit.inputs[0]].scale
            weight, bias = quantize_bias(
                operand, array, weight, scale, power_of_two=profile.power_of_two
            )
            planned = [weight, bias]
        elif unit.moves:
            planned.append(quantize_operand(operand, array, tensors[unit.outputs[0]]))
        else:
            low, high = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
            scale, zero_point = affine(
                low,
                high,
                settings.activation,
                symmetric=settings.symmetric,
                power_of_two=profile.power_of_two,
            )
            like = TensorQuant("", settings.activation, scale, zero_point, "", low, high, 0.0)
            planned.append(quantize_operand(operand, array, like))
    return planned
