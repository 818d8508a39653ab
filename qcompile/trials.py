"""Plans to try every implementation by: one per label, given to every op that may have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from qcompile.calibration.stats import Stats
from qcompile.config import CompileConfig
from qcompile.linears import Linear, Site
from qcompile.options import Options
from qcompile.planning import Array, plan_activation, plan_precision
from qcompile.precision import FP8, LABELS, Choice, Label, OpPlan, PrecisionPlan, SitePlan
from qcompile.smoothing import SmoothingPlan
from qcompile.targets.base import Target


def trial_plans(
    sites: list[Site],
    stats: Mapping[str, Stats],
    smoothing: SmoothingPlan,
    options: Mapping[str, Options],
    config: CompileConfig,
    target: Target,
    weights: Callable[[Linear], Array] | None = None,
) -> dict[Label, PrecisionPlan]:
    """A plan per label, for sites, statistics and weights as `plan_precision` takes them.

    Rounding weights takes longest, so plans share codes where they would be the same or nearly.
    """
    plans: dict[Label, PrecisionPlan] = {}
    for label in LABELS[1:]:
        having = {name for name, found in options.items() if label in found.labels}
        donor = plans.get(_donor(label, plans, target))
        chosen = {n: Choice(label if n in having else "float", "trial") for n in options}
        if not having:
            continue
        if donor is None or not having <= {op.name for op in donor.quantized}:
            plans[label] = plan_precision(
                sites, stats, smoothing, chosen, config, target, weights=weights
            )
        else:
            seen = {s.name: stats[s.name].scaled(smoothing.scale_of(s.name)) for s in sites}
            plans[label] = _given(donor, label, sites, seen, chosen, config, target)
    return plans


def _donor(label: Label, plans: Mapping[Label, PrecisionPlan], target: Target) -> Label:
    """Which plan's codes `label` can take; itself where there is none."""
    if label == "split":
        return "static"
    if label in FP8:
        return FP8[0]
    if label == "token" and "dynamic" in plans:
        return "dynamic"
    # Where sums cannot overflow, the range of the activation does not bear on the weights.
    return "static" if label in ("dynamic", "token") and not target.saturates else label


def _given(
    donor: PrecisionPlan,
    label: Label,
    sites: list[Site],
    stats: Mapping[str, Stats],
    chosen: Mapping[str, Choice],
    config: CompileConfig,
    target: Target,
) -> PrecisionPlan:
    """The codes of `donor`, with activations quantised as `label` has it."""
    site_plans: list[SitePlan] = []
    ops: list[OpPlan] = []
    for site in sites:
        having = [linear for linear in site.linears if chosen[linear.name].label == label]
        activation = None
        if having:
            activation = plan_activation(
                site, having[0], chosen, stats[site.name], config, symmetric=target.symmetric
            )
            names = tuple(linear.name for linear in having)
            site_plans.append(SitePlan(site.name, str(site.x.name), activation, names))
        for linear in site.linears:
            op = donor.op(linear.name)
            if linear not in having or activation is None:
                op = dataclasses.replace(op, precision="float", weight=None)
            elif activation.split is not None and op.weight is not None:
                codes = activation.split.extend(op.weight.codes)
                op = dataclasses.replace(op, weight=dataclasses.replace(op.weight, codes=codes))
            ops.append(op)
    return PrecisionPlan(tuple(site_plans), tuple(ops), target.floats)
