"""Which implementations each Linear may have: from the recipe, the scheme and the target."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Final

import onnx_ir as ir

from qcompile.config import Activations, CompileConfig, SiteRule
from qcompile.errors import ConfigError, ModelError
from qcompile.float4 import BLOCK_SIZE, as_float4
from qcompile.linears import Linear, Site
from qcompile.methods import FOLDED
from qcompile.outliers import can_split
from qcompile.precision import CODED, Choice, Label
from qcompile.rounding import rounding_of
from qcompile.schemes import Scheme, check_method
from qcompile.targets.base import Target

_NAMED: Final[Mapping[str, Label]] = {
    "w8a16": "weight8",
    "w4a16": "weight4",
    "split": "split",
    "llm-int8": "llm-int8",
}
_FP8_OF: Final[Mapping[Activations, Label]] = {"token": "fp8", "static": "fp8-static"}
_TIED: Final = (
    "the weight is shared with the embedding, and would be stored twice; a recipe can quantise it"
)
_EVEN_STEPS: Final = ("entropy", "mse")
"""Ranges that are chosen for codes at even distances."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What one Linear may become.

    Attributes:
        labels: the implementations, the one that the scheme names first.
        reason: why these, or why only this one.
    """

    labels: tuple[Label, ...]
    reason: str

    @property
    def default(self) -> Choice:
        """What the scheme names, measured or not."""
        return Choice(self.labels[0], self.reason)


def find_options(
    sites: list[Site],
    config: CompileConfig,
    scheme: Scheme,
    target: Target,
    adapter: Collection[str] = (),
) -> dict[str, Options]:
    """The options of every Linear, by name.

    Args:
        sites: of the graph.
        config: its recipe, and how activations may be quantised.
        scheme: what is named for every op.
        target: its kernels.
        adapter: modules of an adapter that is kept: in float where the recipe does not name them.

    Raises:
        ConfigError: a recipe's glob matches nothing, gives ranges to activations that have none,
            mixes modes within one site, or asks for what the target has no kernel for.
    """
    _check_recipe(sites, config, scheme, target)
    options: dict[str, Options] = {}
    for site in sites:
        for linear in site.linears:
            rule = config.recipe.rule_for(linear.name)
            if rule.precision is None and linear.module in adapter:
                options[linear.name] = Options(("float",), "adapter")
            else:
                options[linear.name] = _options(linear, config, scheme, target)
        rules = [
            config.recipe.rule_for(linear.name)
            for linear in site.linears
            if set(options[linear.name].labels) & set(CODED)
        ]
        first = {linear.name: options[linear.name].labels[0] for linear in site.linears}
        _agree(site, options)
        _keep_apart(site, options)
        for name, label in first.items():
            found = options[name]
            if label not in found.labels:
                why = f"{found.reason}; not {label}, for what others make of its activation"
                options[name] = dataclasses.replace(found, reason=why)
        for field in ("activations", "smooth", "ranges"):
            if len({getattr(rule, field) for rule in rules}) > 1:
                raise ConfigError(
                    f"the recipe gives {site.name} different {field}, "
                    "but they read one quantised activation",
                    hint="let the glob match them all",
                )
    return options


def _agree(site: Site, options: dict[str, Options]) -> None:
    """Readers that have to have one quantised activation share a label; the others' follow from it.

    Raises:
        ConfigError: they cannot.
    """
    readers = {linear.name: options[linear.name] for linear in site.linears}
    forced = [set(o.labels) for o in readers.values() if set(o.labels) <= set(CODED)]
    if not forced:
        return
    common = set.intersection(*forced)
    if not common:
        raise ConfigError(
            f"the recipe gives {site.name} different activations, "
            "but they read one quantised activation",
            hint="let the glob match them all",
        )
    for name, found in readers.items():
        shared = [label for label in found.labels if label in common]
        others = [label for label in found.labels if label not in CODED]
        labels = (*shared, *others) or ("float",)
        options[name] = dataclasses.replace(found, labels=labels)


def _keep_apart(site: Site, options: dict[str, Options]) -> None:
    """What reads an activation beside llm-int8 gets no blocks of codes: rows of its weight are
    multiplied by powers of two, and the other rows of their blocks would be rounded away.

    Raises:
        ConfigError: the recipe wants it so.
    """
    if not any("llm-int8" in options[linear.name].labels for linear in site.linears):
        return
    for linear in site.linears:
        found = options[linear.name]
        labels = tuple(label for label in found.labels if label in CODED or label == "float")
        if not labels:
            raise ConfigError(
                f"{linear.name} cannot be {found.labels[0]} beside llm-int8: what they read has "
                "its outlier channels divided by powers of two",
                hint="let one glob of the recipe match all that read it",
            )
        options[linear.name] = dataclasses.replace(found, labels=labels)


def needs_ranges(options: Mapping[str, Options], chosen: Mapping[str, Choice]) -> bool:
    """Whether any activation may be quantised; rounding weights alone needs no calibration."""
    labels = {label for found in options.values() for label in found.labels}
    return bool((labels | {choice.label for choice in chosen.values()}) & set(CODED))


def scales_channels(chosen: Mapping[str, Choice], config: CompileConfig) -> bool:
    """Whether a method of weights alone scales input channels by what calibration saw."""
    found = (rounding_of(name, choice.precision, config) for name, choice in chosen.items())
    return any(rounding is not None and rounding.method in FOLDED for rounding in found)


def require_any(options: Mapping[str, Options], graph: ir.Model) -> None:
    """Refuse to call a model quantised in which nothing can be.

    Raises:
        ModelError: every Linear has to stay in float; says what the graph has instead.
    """
    if any(set(found.labels) - {"float"} for found in options.values()):
        return
    if options:
        name, found = next(iter(options.items()))
        detail = f"{len(options)} Linears stay in float, {name} because: {found.reason}"
    else:
        counts = Counter(node.op_type for node in graph.graph.all_nodes())
        ops = ", ".join(f"{counts[k]} {k}" for k in ("Conv", "MatMul", "Gemm") if counts[k])
        detail = f"no float32 Linear with a constant weight was found ({ops or 'no such op'})"
    raise ModelError(f"nothing can be quantised: {detail}", hint="--scheme fp32 compiles it as is")


def _check_recipe(sites: list[Site], config: CompileConfig, scheme: Scheme, target: Target) -> None:
    names = [linear.name for site in sites for linear in site.linears]
    unmatched = config.recipe.unmatched(names)
    if unmatched:
        raise ConfigError(
            f"recipe rule {unmatched[0]!r} matches no module",
            hint=f"modules are named like {names[0]!r}" if names else "the model has no Linear",
        )
    for glob, rule in config.recipe.rules:
        matched = [name for name in names if fnmatchcase(name, glob)]
        given = rule.model_fields_set - {"precision", "method"}
        if given and not scheme.modes and not config.recipe.codes:
            raise ConfigError(
                f"recipe rule {glob!r} gives {min(given)}, and scheme {scheme.name} quantises no "
                "activations",
                hint="add `precision: w8a8`",
            )
        if rule.method is not None and rule.precision is None:
            if not scheme.methods:
                raise ConfigError(
                    f"recipe rule {glob!r} gives a method, and scheme {scheme.name} has none",
                    hint="add `precision: w4a16`",
                )
            check_method(scheme, rule.method)
        modes = [_modes(name, config, target) for name in matched]
        if rule.ranges is not None and all("static" not in found for found in modes):
            raise ConfigError(
                f"recipe rule {glob!r} gives ranges, and the activations that it matches "
                "are not static",
                hint="add `activations: static`, or take `ranges` out",
            )


def _has_mode(rule: SiteRule, scheme: Scheme) -> bool:
    """Whether activations that `rule` is for may be quantised."""
    return rule.coded or (rule.precision is None and bool(scheme.modes))


def _options(linear: Linear, config: CompileConfig, scheme: Scheme, target: Target) -> Options:
    rule = config.recipe.rule_for(linear.name)
    if rule.precision == "float":
        return Options(("float",), "recipe")
    decomposed = scheme.labels == ("llm-int8",) and rule.precision is None
    label = "llm-int8" if decomposed else _NAMED.get(rule.precision or "")
    if label is not None:
        refusal = target.refusal(linear.in_features, linear.out_features)
        if decomposed and refusal is not None:
            return Options(("float",), f"no int8 kernel of {target.name} takes it: {refusal}")
        if target.capability("MatMul", label) is None:
            raise ConfigError(f"{target.name} has no kernel for {rule.precision} ({linear.name})")
        if label == "split" and not can_split(linear.in_features):
            raise ConfigError(f"{linear.name} has too few input channels to be split")
        if label == "llm-int8" and refusal is not None:
            raise ConfigError(f"{target.name} has no int8 kernel for {linear.name}: {refusal}")
        if decomposed and linear.tied:
            return Options(("float",), _TIED)
        if decomposed:
            return Options((label, "float"), _scheme_reason(linear, scheme))
        return Options((label,), "recipe")
    if not _has_mode(rule, scheme):
        labels = tuple(k for k in scheme.labels if target.capability("MatMul", k) is not None)
        if not labels:
            return Options(("float",), f"{target.name} has no kernel for {scheme.labels[0]}")
        size = config.block_size or BLOCK_SIZE
        if as_float4(labels[0]) is not None and linear.in_features % size:
            reason = f"{linear.in_features} input channels are no multiple of the block's {size}"
            return Options(("float",), f"no {labels[0]} kernel of {target.name} takes it: {reason}")
        return Options((*labels, "float"), _scheme_reason(linear, scheme))
    fp8 = rule.precision == "fp8" or (rule.precision is None and scheme.fp8)
    codes = "fp8" if fp8 else "int8"
    refusal = target.refusal(linear.in_features, linear.out_features)
    if refusal is not None:
        if rule.coded:
            raise ConfigError(f"{target.name} has no {codes} kernel for {linear.name}: {refusal}")
        return Options(("float",), f"no {codes} kernel of {target.name} takes it: {refusal}")
    asked = _modes(linear.name, config, target)
    wanted: tuple[Label, ...] = asked
    if fp8:
        wanted = tuple(_FP8_OF[mode] for mode in asked if mode in _FP8_OF)
    modes = tuple(mode for mode in wanted if target.capability("MatMul", mode) is not None)
    if not modes and rule.precision == "fp8":
        why = target.scheme_obstacle("fp8")
        raise ConfigError(
            f"{target.name} has no kernel for fp8 ({linear.name})" + (f": {why}" if why else ""),
            hint="w8a8 and float are what the recipe can say there",
        )
    if not modes:
        of = f"{asked[0]} activations" + (" in fp8" if fp8 else "")
        return Options(("float",), f"{target.name} has no kernel for {of}")
    ranges = rule.ranges or config.ranges
    if "fp8-static" in modes and ranges in _EVEN_STEPS:
        raise ConfigError(
            f"ranges {ranges} are for codes at even distances, which fp8 has not ({linear.name})",
            hint="minmax or percentile",
        )
    if rule.coded:
        return Options(modes, "recipe")
    if linear.tied:
        # The mode chosen for accuracy, in the place where an error is least forgiven.
        modes = tuple(mode for mode in modes if Choice(mode, "").mode != "token")
        if not modes:
            return Options(("float",), _TIED)
    if rule.activations is not None:
        return Options(modes, "recipe")
    further = _further(linear, config, scheme, target)
    return Options((*modes, "float", *further), _scheme_reason(linear, scheme))


def _scheme_reason(linear: Linear, scheme: Scheme) -> str:
    if linear.tied:
        return f"scheme {scheme.name}; the embedding that shares the weight keeps it in float"
    if linear.shared > 1:
        return f"scheme {scheme.name}; {linear.shared} ops share the weight, codes for each"
    return f"scheme {scheme.name}"


def _further(
    linear: Linear, config: CompileConfig, scheme: Scheme, target: Target
) -> tuple[Label, ...]:
    """Splitting and weight-only forms, where the mode is open; four bits where size is the aim; and
    INT8 where FP8 was asked for, which as many bits can hold."""
    if config.activations != "auto":
        return ()
    # A split takes its range from the extremes alone.
    ranges = config.recipe.rule_for(linear.name).ranges or config.ranges
    splits = can_split(linear.in_features) and ranges == "minmax"
    wanted: list[Label] = ["split", "weight8"] if splits else ["weight8"]
    if scheme.fp8:
        wanted.append("token")
    if config.objective == "size":
        wanted.append("weight4")
    return tuple(label for label in wanted if target.capability("MatMul", label) is not None)


def _modes(name: str, config: CompileConfig, target: Target) -> tuple[Activations, ...]:
    asked = config.recipe.rule_for(name).activations or config.activations
    return target.modes if asked == "auto" else (asked,)
