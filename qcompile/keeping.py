"""The plan of a checkpoint that is quantised already: what it holds, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.checkpoints import Checkpoint, StoredActivation
from qcompile.errors import ModelError
from qcompile.float4 import TABLES
from qcompile.linears import Linear, Site
from qcompile.planning import weight_of
from qcompile.precision import (
    ActivationQuant,
    Choice,
    Label,
    OpPlan,
    PrecisionPlan,
    QuantizedWeight,
    SitePlan,
)
from qcompile.targets.base import Target
from qcompile.weights import violations

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What computes a Linear, and why.

    Attributes:
        label: the implementation.
        source: where its weight is from.
        obstacle: why it is not computed as the checkpoint has it, or None where it is.
    """

    label: Label
    source: str
    obstacle: str | None = None

    @property
    def choice(self) -> Choice:
        reason = self.source if self.obstacle is None else f"{self.source}; {self.obstacle}"
        return Choice(self.label, reason)


_NAMES: Final[dict[int, Label]] = {8: "weight8", 4: "weight4"}
"""By the bits of a code; codes of a table have its name."""


def keep_plan(
    sites: list[Site], checkpoint: Checkpoint, target: Target, adapter: Collection[str] = ()
) -> tuple[PrecisionPlan, list[str]]:
    """The plan that gives every Linear the codes that the checkpoint has for it.

    Args:
        sites: of the float graph, which was traced from the same codes.
        checkpoint: what was read.
        target: its kernels.
        adapter: modules of an adapter, which are in float.

    Returns:
        The plan, and what a user has to know of it.

    Raises:
        ModelError: a weight of the graph is not, to the last bit, what its codes stand for.
    """
    site_plans: list[SitePlan] = []
    ops: list[OpPlan] = []
    placed: set[str] = set()
    other: list[str] = []
    for site in sites:
        kept = {linear.name: _kept(linear, checkpoint) for linear in site.linears}
        chosen = {
            linear.name: _Kept("float", "adapter")
            if linear.module in adapter
            else _choice(linear, kept[linear.name], checkpoint, target)
            for linear in site.linears
        }
        quantised, chosen = _site_plan(site, chosen, checkpoint)
        if quantised is not None:
            site_plans.append(quantised)
        for linear in site.linears:
            decided, weight = chosen[linear.name], kept[linear.name]
            choice = decided.choice
            if decided.obstacle is not None:
                other.append(f"{linear.name}: {choice.reason}")
            if weight is not None:
                placed.add(linear.module)
                if choice.mode is not None:
                    weight = _per_channel(weight)
            ops.append(
                OpPlan(
                    name=linear.name,
                    site=site.name,
                    precision=choice.precision,
                    reason=choice.reason,
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                    output=str(linear.output.name),
                    weight=weight if choice.label != "float" else None,
                )
            )
    left = [name for name in checkpoint.weights if name not in placed]
    notes = list(checkpoint.notes)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        notes.append(f"no Linear of the graph for the codes of {left[0]}{more}: float there")
    if other:
        notes.append(
            f"{len(other)} ops are not computed as the checkpoint has them; the first, {other[0]}"
        )
    return PrecisionPlan(tuple(site_plans), tuple(ops), target.floats), notes


def _kept(linear: Linear, checkpoint: Checkpoint) -> QuantizedWeight | None:
    read = checkpoint.weights.get(linear.module)
    if read is None:
        return None
    weight = read()
    if not np.array_equal(weight.dequantized(), weight_of(linear)):
        raise ModelError(f"{linear.name}: its weight in the graph is not what its codes stand for")
    return weight


def _choice(
    linear: Linear, weight: QuantizedWeight | None, checkpoint: Checkpoint, target: Target
) -> _Kept:
    """What computes `linear`, and why."""
    if weight is None:
        return _Kept("float", "no codes of the checkpoint are for it")
    reason = f"from the checkpoint: {checkpoint.description}"
    by_weight = _by_weight(weight)
    if target.capability("MatMul", by_weight) is None:
        missing = f"{target.name} has no kernel for {by_weight}, so dequantised"
        return _Kept("float", reason, missing)
    activation = checkpoint.activations.get(linear.module)
    if activation is None:
        return _Kept(by_weight, reason)
    obstacle = _int8_obstacle(linear, weight, activation, target)
    if obstacle is None:
        return _Kept(activation.mode, reason)
    return _Kept(by_weight, reason, f"{obstacle}, so {by_weight} with the same codes")


def _by_weight(weight: QuantizedWeight) -> Label:
    """What computes with `weight` and a float activation."""
    if weight.table is None:
        return _NAMES[weight.bits]
    return next(kind for kind, table in TABLES.items() if np.array_equal(table, weight.table))


def _int8_obstacle(
    linear: Linear, weight: QuantizedWeight, activation: StoredActivation, target: Target
) -> str | None:
    """Why the INT8 kernel cannot take the codes as they are, or None."""
    if _per_channel(weight) is None:
        return "the INT8 kernel takes one scale an output channel and no zero point"
    if target.capability("MatMul", activation.mode) is None:
        return f"{target.name} has no kernel for {activation.mode} activations"
    refusal = target.refusal(linear.in_features, linear.out_features)
    if refusal is not None:
        return refusal
    if target.symmetric and activation.zero_point != 0:
        return f"the INT8 kernel of {target.name} takes no zero point of activations"
    highest = np.full(linear.in_features, activation.highest)
    if target.saturates and (pairs := violations(weight.codes, highest)):
        return f"{pairs} pairs of codes could saturate the INT8 kernel"
    return None


def _per_channel(weight: QuantizedWeight) -> QuantizedWeight | None:
    """The same codes with one scale for each output channel, where that is the same weight."""
    same = weight.bits == 8 and weight.zero_point is None and weight.order is None
    if not same or not (weight.scale == weight.scale[0]).all():
        return None
    return QuantizedWeight(codes=weight.codes, scale=weight.scale[0])


def _site_plan(
    site: Site, chosen: Mapping[str, _Kept], checkpoint: Checkpoint
) -> tuple[SitePlan | None, dict[str, _Kept]]:
    """The one activation of the Linears of `site` that read it in INT8; others get weights alone.

    Linears that want it otherwise than the first of them are given to the other kernel: what is
    chosen for all of them then is returned too.
    """
    first: StoredActivation | None = None
    names, agreed = [], dict(chosen)
    for linear in site.linears:
        kept = chosen[linear.name]
        if kept.choice.mode is None:
            continue
        wanted = checkpoint.activations[linear.module]
        first = first or wanted
        if wanted == first:
            names.append(linear.name)
        else:
            other = "its activation has another scale beside it, so weight8 with the same codes"
            agreed[linear.name] = _Kept("weight8", kept.source, other)
    if first is None:
        return None, agreed
    static = first.mode == "static"
    activation = ActivationQuant(
        mode=first.mode,
        scale=first.scale,
        zero_point=first.zero_point + 128 if static else None,  # codes are unsigned here
        highest=np.full(site.channels, first.highest),
    )
    return SitePlan(site.name, str(site.x.name), activation, tuple(names)), agreed
