"""The scales, zero points and weight codes of what was chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.calibration.ranges import static_range
from qcompile.calibration.stats import Stats
from qcompile.config import CompileConfig
from qcompile.decomposition import without
from qcompile.e4m3 import e4m3_scale, quantize_e4m3
from qcompile.float4 import BLOCK_SIZE, as_float4, quantize_float4
from qcompile.linears import Linear, Site
from qcompile.methods import SEQUENTIAL
from qcompile.outliers import find_split
from qcompile.precision import (
    ActivationQuant,
    Choice,
    Floats,
    Kept,
    OpPlan,
    PrecisionPlan,
    QuantizedWeight,
    SitePlan,
    uint8_affine,
    uint8_symmetric,
)
from qcompile.rounding import channel_method, rounding_of
from qcompile.smoothing import Smoothing, SmoothingPlan
from qcompile.targets.base import Target
from qcompile.weight_blocks import quantize_blocks
from qcompile.weights import WHOLE, Neighbours, quantize_weight

Array = npt.NDArray[Any]

HEADROOM: Final = 1.1
"""A channel may exceed its calibrated extreme by this factor before weights could saturate."""


def plan_precision(
    sites: list[Site],
    stats: Mapping[str, Stats],
    smoothing: SmoothingPlan,
    chosen: Mapping[str, Choice],
    config: CompileConfig,
    target: Target,
    *,
    weights: Callable[[Linear], Array] | None = None,
    codes: Mapping[str, QuantizedWeight] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PrecisionPlan:
    """Scales, zero points and weight codes for what was chosen.

    Args:
        sites: of the graph after smoothing.
        stats: of the same activations before smoothing.
        smoothing: what `sites` were smoothed by.
        chosen: the implementation of every Linear.
        config: `ranges`, the blocks of weights, and the recipe.
        target: whether its kernel saturates.
        weights: what to round of each Linear, float32 [K, any]; None: its weight.
        codes: of weights that are rounded already; weights in blocks that it lacks are rounded to
            nearest.
        progress: called with (sites done, sites in all).
    """
    weights = weights or weight_of
    site_plans: list[SitePlan] = []
    ops: list[OpPlan] = []
    for done, site in enumerate(sites):
        quantized = [linear for linear in site.linears if chosen[linear.name].mode is not None]
        activation = neighbours = None
        if quantized:
            activation, seen = activation_of(site, stats, smoothing, chosen, config, target)
            split, moment, gram = activation.split, seen.second_moment, seen.gram
            if activation.kept is not None:
                gram = without(gram, activation.kept)
            if split is not None:
                moment = split.extend(moment, split.copies**2)
                gram = split.extended_gram(gram, site.channels)
            neighbours = None if activation.fp8 else Neighbours.of(gram)
            names = tuple(linear.name for linear in quantized)
            site_plans.append(SitePlan(site.name, str(site.x.name), activation, names))
        for linear in site.linears:
            choice = chosen[linear.name]
            weight = None
            if codes is not None and linear.name in codes:
                weight = codes[linear.name]
            elif choice.precision == "fp8":
                weight = quantize_e4m3(weights(linear))
            elif choice.mode is not None:
                assert activation is not None
                rounded, kept = to_round(weights(linear), activation)
                method = channel_method(linear.name, choice, config)
                weight = quantize_weight(
                    rounded,
                    moment,
                    activation.highest if target.saturates else None,
                    neighbours if method not in ("rtn", "mse") else None,
                    parts=WHOLE if method == "rtn" else None,
                )
                weight = dataclasses.replace(weight, kept=kept)
            elif (kind := as_float4(choice.precision)) is not None:
                size = config.block_size or BLOCK_SIZE
                weight = quantize_float4(weights(linear), kind, block_size=size)
            elif choice.precision != "float":
                rounding = rounding_of(linear.name, choice.precision, config)
                assert rounding is not None
                weight = quantize_blocks(
                    weights(linear),
                    bits=rounding.bits,
                    block_size=rounding.block_size,
                    symmetric=rounding.symmetric,
                )
            ops.append(
                OpPlan(
                    name=linear.name,
                    site=site.name,
                    precision=choice.precision,
                    reason=_reason(linear.name, choice, weight, smoothing.of(site.name), config),
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                    output=str(linear.output.name),
                    weight=weight,
                )
            )
        if progress:
            progress(done + 1, len(sites))
    return PrecisionPlan(tuple(site_plans), tuple(ops), target.floats)


def activation_of(
    site: Site,
    stats: Mapping[str, Stats],
    smoothing: SmoothingPlan,
    chosen: Mapping[str, Choice],
    config: CompileConfig,
    target: Target,
) -> tuple[ActivationQuant, Stats]:
    """How the activation of `site`, which something reads quantised, is quantised, and its
    statistics as smoothing leaves it; arguments as for `plan_precision`."""
    entry = smoothing.of(site.name)
    seen = stats[site.name].scaled(smoothing.scale_of(site.name))
    if entry is not None and entry.permutation is not None:
        seen = seen.permuted(entry.permutation.order)
    reader = next(linear for linear in site.linears if chosen[linear.name].mode is not None)
    activation = plan_activation(site, reader, chosen, seen, config, symmetric=target.symmetric)
    if entry is not None and entry.kept is not None:
        activation = dataclasses.replace(activation, kept=entry.places)
    return activation, seen


def to_round(weight: Array, activation: ActivationQuant) -> tuple[Array, Kept | None]:
    """What of `weight` [K, N] gets codes beside `activation`, [K and copies, N], and what stays."""
    if activation.split is not None:
        return activation.split.extend(weight), None
    if activation.kept is None:
        return weight, None
    kept = Kept(activation.kept, weight[activation.kept].astype(np.float32))
    rounded = weight.copy()
    rounded[kept.channels] = 0
    return rounded, kept


def _reason(
    name: str,
    choice: Choice,
    weight: QuantizedWeight | None,
    entry: Smoothing | None,
    config: CompileConfig,
) -> str:
    """That of the choice, and of what it became where that is something else."""
    if choice.label == "split" and channel_method(name, choice, config) in SEQUENTIAL:
        return f"{choice.reason}; split channels are rounded as without a method"
    if choice.label == "llm-int8" and entry is not None:
        return f"{choice.reason}; {entry.reason}"
    if weight is not None and weight.kept is not None:
        return f"{choice.reason}; {len(weight.kept.channels)} input channels stay in float"
    return choice.reason


def float_plan(sites: list[Site], reason: str, floats: Floats = "float32") -> PrecisionPlan:
    """The plan that quantises nothing, for one `reason`."""
    return PrecisionPlan(
        floats=floats,
        ops=tuple(
            OpPlan(
                name=linear.name,
                site=site.name,
                precision="float",
                reason=reason,
                in_features=linear.in_features,
                out_features=linear.out_features,
                output=str(linear.output.name),
            )
            for site in sites
            for linear in site.linears
        ),
    )


def weight_of(linear: Linear) -> Array:
    """The float32 weight [K, N] of a Linear, however it is stored."""
    tensor = linear.weight.const_value
    assert tensor is not None
    weight: Array = tensor.numpy()
    return weight.T if linear.transposed else weight


def plan_activation(
    site: Site,
    linear: Linear,
    chosen: Mapping[str, Choice],
    stats: Stats,
    config: CompileConfig,
    *,
    symmetric: bool = False,
) -> ActivationQuant:
    """How the activation of `site` is quantised for `linear`, one of its quantised readers."""
    rule = config.recipe.rule_for(linear.name)
    choice = chosen[linear.name]
    mode = choice.mode
    assert mode is not None
    fp8 = choice.precision == "fp8"
    anything = np.full(site.channels, 255)
    if mode != "static":
        # Any code can occur in any channel: the range is found at run time.
        return ActivationQuant(mode, None, None, anything, fp8=fp8)
    ranges = rule.ranges or config.ranges
    if fp8:
        scale = float(e4m3_scale(max(map(abs, static_range(stats, ranges)))))
        return ActivationQuant(mode, scale, None, anything, fp8=True)
    # A channel's own extreme, not the tensor's: most channels stay far below code 255.
    reach = np.where(stats.maximum > 0, stats.maximum * HEADROOM, stats.maximum / HEADROOM)
    split = find_split(stats) if choice.label == "split" else None
    if split is None:
        affine = uint8_symmetric if symmetric else uint8_affine
        scale, zero_point = affine(*static_range(stats, ranges))
    else:
        low, high = (split.extend(end, split.copies) for end in (stats.minimum, stats.maximum))
        scale, zero_point = uint8_affine(float(low.min()), float(high.max()))
        reach = split.extend(reach, split.copies)
    highest = np.clip(np.ceil(reach / scale) + zero_point, 0, 255).astype(np.int64)
    if split is not None:
        highest[split.channels] = 255  # they clip, against weights of zero
    return ActivationQuant("static", scale, zero_point, highest, split)
