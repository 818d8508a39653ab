"""Decide the precision of every Linear, and the scales that go with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calibration.ranges import static_range
from qcompile.calibration.stats import Stats
from qcompile.config import Activations, CompileConfig
from qcompile.errors import ConfigError, ModelError
from qcompile.linears import Linear, Site
from qcompile.precision import (
    ActivationQuant,
    Choice,
    OpPlan,
    PrecisionPlan,
    SitePlan,
    uint8_affine,
)
from qcompile.smoothing import SmoothingPlan
from qcompile.targets.base import Target
from qcompile.weights import Neighbours, quantize_weight

Array = npt.NDArray[Any]

HEADROOM: Final = 1.1
"""A channel may exceed its calibrated extreme by this factor before weights could saturate."""


def choose_quantized(sites: list[Site], config: CompileConfig, target: Target) -> dict[str, Choice]:
    """Which Linears become INT8, and why, by name.

    Raises:
        ConfigError: a recipe's glob matches nothing, gives ranges to activations that have none, or
            mixes modes within one site.
    """
    names = [linear.name for site in sites for linear in site.linears]
    unmatched = config.recipe.unmatched(names)
    if unmatched:
        raise ConfigError(
            f"recipe rule {unmatched[0]!r} matches no module",
            hint=f"modules are named like {names[0]!r}" if names else "the model has no Linear",
        )
    for glob, rule in config.recipe.rules:
        matched = [n for site in sites for n in site.linears if fnmatchcase(n.name, glob)]
        if rule.ranges is not None and all(_mode(n, config) != "static" for n in matched):
            raise ConfigError(
                f"recipe rule {glob!r} gives ranges, and the activations that it matches "
                "are not static",
                hint="add `activations: static`, or take `ranges` out",
            )
    chosen: dict[str, Choice] = {}
    for site in sites:
        for linear in site.linears:
            chosen[linear.name] = _choose(linear, config, target)
        rules = [config.recipe.rule_for(n.name) for n in site.linears if chosen[n.name].quantize]
        for field in ("activations", "smooth", "ranges"):
            if len({getattr(rule, field) for rule in rules}) > 1:
                raise ConfigError(
                    f"the recipe gives {site.name} different {field}, "
                    "but they read one quantised activation",
                    hint="let the glob match them all",
                )
    return chosen


def require_any(chosen: Mapping[str, Choice], graph: ir.Model) -> None:
    """Refuse to call a model quantised in which nothing is.

    Raises:
        ModelError: no Linear was chosen; says what the graph has instead.
    """
    if any(choice.quantize for choice in chosen.values()):
        return
    if chosen:
        name, choice = next(iter(chosen.items()))
        detail = f"{len(chosen)} Linears stay in float, {name} because: {choice.reason}"
    else:
        counts = Counter(node.op_type for node in graph.graph.all_nodes())
        ops = ", ".join(f"{counts[k]} {k}" for k in ("Conv", "MatMul", "Gemm") if counts[k])
        detail = f"no float32 Linear with a constant weight was found ({ops or 'no such op'})"
    raise ModelError(f"nothing can be quantised: {detail}", hint="--scheme fp32 compiles it as is")


def plan_precision(
    sites: list[Site],
    stats: Mapping[str, Stats],
    smoothing: SmoothingPlan,
    chosen: Mapping[str, Choice],
    config: CompileConfig,
    target: Target,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PrecisionPlan:
    """Scales, zero points and weight codes for what was chosen.

    Args:
        sites: of the graph after smoothing.
        stats: of the same activations before smoothing.
        smoothing: what `sites` were smoothed by.
        chosen: from `choose_quantized`.
        config: `activations`, `ranges` and the recipe.
        target: whether its kernel saturates.
    """
    site_plans: list[SitePlan] = []
    ops: list[OpPlan] = []
    for done, site in enumerate(sites):
        quantized = [linear for linear in site.linears if chosen[linear.name].quantize]
        activation = neighbours = None
        if quantized:
            seen = stats[site.name].scaled(smoothing.scale_of(site.name))
            neighbours = Neighbours.of(seen.gram)
            activation = _plan_activation(site, quantized[0], seen, config)
            names = tuple(linear.name for linear in quantized)
            site_plans.append(SitePlan(site.name, str(site.x.name), activation, names))
        for linear in site.linears:
            choice = chosen[linear.name]
            weight = None
            if choice.quantize:
                assert activation is not None
                weight = quantize_weight(
                    weight_of(linear),
                    seen.second_moment,
                    activation.highest if target.saturates else None,
                    neighbours,
                )
            ops.append(
                OpPlan(
                    name=linear.name,
                    site=site.name,
                    precision="int8" if choice.quantize else "float",
                    reason=choice.reason,
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                    output=str(linear.output.name),
                    weight=weight,
                )
            )
        if progress:
            progress(done + 1, len(sites))
    return PrecisionPlan(tuple(site_plans), tuple(ops))


def float_plan(sites: list[Site], reason: str) -> PrecisionPlan:
    """The plan that quantises nothing, for one `reason`."""
    return PrecisionPlan(
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
        )
    )


def weight_of(linear: Linear) -> Array:
    """The float32 weight [K, N] of a Linear, however it is stored."""
    tensor = linear.weight.const_value
    assert tensor is not None
    weight: Array = tensor.numpy()
    return weight.T if linear.transposed else weight


def _choose(linear: Linear, config: CompileConfig, target: Target) -> Choice:
    rule = config.recipe.rule_for(linear.name)
    if rule.precision == "float":
        return Choice(False, "recipe")
    mode = _mode(linear, config)
    if target.capability("MatMul", mode) is None:
        return Choice(False, f"{target.name} has no kernel for {mode} activations")
    if rule.precision == "w8a8":
        return Choice(True, "recipe")
    if linear.tied and mode == "token":
        # The mode chosen for accuracy, in the place where an error is least forgiven.
        return Choice(
            False,
            "the weight is shared with the embedding, and would be stored twice; "
            "a recipe can quantise it",
        )
    if linear.tied:
        return Choice(True, "scheme w8a8; the embedding that shares the weight keeps it in float")
    if linear.shared > 1:
        return Choice(True, f"scheme w8a8; {linear.shared} ops share the weight, int8 for each")
    return Choice(True, "scheme w8a8")


def _mode(linear: Linear, config: CompileConfig) -> Activations:
    return config.recipe.rule_for(linear.name).activations or config.activations


def _plan_activation(
    site: Site, linear: Linear, stats: Stats, config: CompileConfig
) -> ActivationQuant:
    rule = config.recipe.rule_for(linear.name)
    mode = rule.activations or config.activations
    if mode != "static":
        # Any code can occur in any channel: the range is found at run time.
        return ActivationQuant(mode, None, None, np.full(site.channels, 255))
    low, high = static_range(stats, rule.ranges or config.ranges)
    scale, zero_point = uint8_affine(low, high)
    # A channel's own extreme, not the tensor's: most channels stay far below code 255.
    reach = np.where(stats.maximum > 0, stats.maximum * HEADROOM, stats.maximum / HEADROOM)
    highest = np.clip(np.ceil(reach / scale) + zero_point, 0, 255).astype(np.int64)
    return ActivationQuant("static", scale, zero_point, highest)
