"""What a user can ask for, checked once, frozen afterwards."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import pydantic
import yaml

from qcompile.edge.options import EdgeOptions
from qcompile.errors import ConfigError
from qcompile.methods import OTHERWISE, PER_CHANNEL, Method

Activations: TypeAlias = Literal["static", "dynamic", "token"]
AdapterMode: TypeAlias = Literal["merge", "keep"]
Objective: TypeAlias = Literal["latency", "size", "accuracy", "scheme"]
RangeMethod: TypeAlias = Literal["minmax", "percentile", "entropy", "mse"]
Smooth: TypeAlias = Annotated[
    Literal["auto", "off"] | float, pydantic.BeforeValidator(lambda value: _checked_smooth(value))
]


def _checked_smooth(value: object) -> object:
    if value is False:
        return "off"  # what YAML makes of a bare `off`
    if value in ("auto", "off"):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{value!r} is not auto, off or a number in [0, 1]")
    return float(value)


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class SiteRule(_Frozen):
    """What a recipe asks for the modules that its glob matches. Unset fields keep the default."""

    precision: Literal["float", "w8a8", "fp8", "w8a16", "w4a16", "split", "llm-int8"] | None = None
    method: Method | None = None
    activations: Activations | None = None
    smooth: Smooth | None = None
    ranges: RangeMethod | None = None

    @pydantic.model_validator(mode="after")
    def _has_effect(self) -> SiteRule:
        if self.ranges is not None and self.activations in ("dynamic", "token"):
            raise ValueError(f"ranges are static, and {self.activations} activations have none")
        if self.precision is not None and not self.coded and {
            self.activations, self.smooth, self.ranges
        } != {None}:  # fmt: skip
            raise ValueError(f"{self.precision} takes no other field")
        if self.method is not None and self.precision is not None and not self.in_blocks:
            if self.precision not in ("w8a8", "llm-int8", "split"):
                raise ValueError(f"{self.precision} has no methods")
            if self.method not in PER_CHANNEL:
                raise ValueError(
                    f"{self.precision} has no method {self.method}: {OTHERWISE[self.method]}"
                )
        return self

    @classmethod
    def named(cls, text: str) -> dict[str, str]:
        """The fields of a rule that is one word: ``float``, ``w4a16``, ``w4a16:gptq``."""
        precision, colon, method = text.partition(":")
        return {"precision": precision, **({"method": method} if colon else {})}

    @property
    def coded(self) -> bool:
        """Whether it asks for codes of weights and activations."""
        return self.precision in ("w8a8", "fp8")

    @property
    def in_blocks(self) -> bool:
        """Whether it asks for weights alone, in blocks of integers."""
        return self.precision in ("w8a16", "w4a16")


class Recipe(_Frozen):
    """Per-module overrides, by glob over the module path. The last rule that matches wins."""

    rules: tuple[tuple[str, SiteRule], ...] = ()

    def rule_for(self, path: str) -> SiteRule:
        """The fields set for the module `path`, later rules over earlier ones."""
        merged: dict[str, Any] = {}
        for glob, rule in self.rules:
            if fnmatch.fnmatchcase(path, glob):
                merged.update(rule.model_dump(exclude_none=True))
        # Unchecked: what is without effect in one rule may come of two that overlap.
        return SiteRule.model_construct(**merged)

    @property
    def codes(self) -> bool:
        """Whether a rule asks for codes of activations, whatever the scheme."""
        return any(rule.coded for _, rule in self.rules)

    def unmatched(self, paths: list[str]) -> list[str]:
        """Globs that match none of `paths`: almost always a spelling mistake."""
        return [g for g, _ in self.rules if not any(fnmatch.fnmatchcase(p, g) for p in paths)]

    @classmethod
    def from_mapping(cls, mapping: object) -> Recipe:
        """From ``{"*.lm_head": "float", "*.fc2": {"activations": "token"}}``.

        Raises:
            ConfigError: not a mapping of globs, or a rule with an unknown field or value.
        """
        if not isinstance(mapping, dict):
            raise ConfigError("a recipe is a mapping of module-path globs to rules")
        rules: list[tuple[str, SiteRule]] = []
        for glob, body in mapping.items():
            fields = SiteRule.named(body) if isinstance(body, str) else body
            try:
                rules.append((str(glob), SiteRule.model_validate(fields)))
            except pydantic.ValidationError as error:
                raise ConfigError(f"recipe rule {glob!r}: {first_problem(error)}") from error
        return cls(rules=tuple(rules))

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From a YAML or JSON file.

        Raises:
            ConfigError: the file is missing, unreadable or not a recipe.
        """
        try:
            mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {path} cannot be read: {error}") from error
        except yaml.YAMLError as error:
            detail = " ".join(str(error).split())
            raise ConfigError(f"recipe {path} is not valid YAML: {detail}") from error
        if mapping is None:
            raise ConfigError(f"recipe {path} is empty")
        return cls.from_mapping(mapping)


Size = Annotated[int, pydantic.Field(ge=1)]
Shape: TypeAlias = tuple[Size, Size]
"""Batch and sequence of a token input."""


class CompileConfig(_Frozen):
    """Options of one compilation.

    Attributes:
        samples: number of calibration samples (sequences, or input dictionaries).
        seq_len: tokens per calibration sample of text.
        smooth: SmoothQuant's migration strength α in [0, 1], ``auto`` to search it per site, or
            ``off`` (arXiv 2211.10438).
        activations: ``static`` (one scale from calibration; the paper's O3), ``dynamic`` (one scale
            per tensor at run time; O2), ``token`` (one scale per row at run time; O1), or ``auto``
            to choose per site (static where the objective is ``scheme``).
        objective: what a plan is chosen for, from times measured on this machine and damage
            measured on this model: least ``latency``, least ``size``, least damage (``accuracy``;
            wants a limit), or ``scheme``: every op as the scheme says, nothing measured.
        max_kl: upper bound on the mean KL to float, nats per row, on held-back data.
        min_speedup: lower bound on float's time over the plan's, at every timed shape.
        max_size: upper bound on the bytes of the weights.
        costs: file of measured times, read and added to; default one per user. A file of another
            machine is used as it is.
        plan_in: a plan to replay instead of choosing; `plan_out`: where to write the plan.
        ranges: how a static range is drawn from the calibration histogram.
        method: how weights are rounded; a scheme's name may say it too, after a colon. None: to
            nearest where they are in blocks; where activations have codes too, in searched ranges,
            errors made up for within blocks of channels.
        block_size: of their input channels that share a scale; None: 32.
        symmetric: whether their blocks have no zero points; None: as the method has it.
        outlier_threshold: a channel whose magnitude reaches it in calibration stays in float where
            the scheme is ``llm-int8``; None: 6, as in the paper.
        outlier_share: part of the input channels that stays in float, for ``llm-int8`` instead of
            a threshold, and for the method ``spqr``; None: a hundredth there.
        equalize: move scales between ops before they are quantised (arXiv 1906.04721); None: where
            the target gains by it.
        bias_correction: add what rounding shifts on average to biases (the same paper); None: on
            `onnx-edge`; language models gain next to nothing by it (docs/vision.md).
        recipe: per-module overrides; a mapping as in a recipe file will do.
        task: a task name of optimum's, instead of the one read from the model.
        opset: ONNX opset of the graph; 23 but for `onnx-edge`.
        edge: options of `onnx-edge`.
        seed: of everything random (generated calibration data).
        trust_remote_code: let Transformers run Python code that a model folder carries.
        shapes: (batch, sequence) pairs to plan for and to measure speed at; none: 1x128 of tokens
            (and 1x1 for what generates), else the first held-back sample's.
        cache: a causal language model keeps its keys and values, so that it generates; without,
            its graph gives the logits of every position at once. None: as the scheme has it.
        last_logits: with a cache, the graph gives the logits of each row's last token only.
        adapter: folder or hub id of a PEFT adapter (LoRA) for a Transformers model.
        adapter_mode: ``merge`` it into the weights before they are quantised, or ``keep`` it beside
            them in float.
        strict: a verification that does not hold is an error, not only a line in the report.
        format: ``ort`` also writes the graph in ONNX Runtime's own format, for reduced builds of
            it, with the operators and types that such a build needs.

    Raises:
        ConfigError: an unknown option, a value out of its range, or one without effect.
    """

    samples: Annotated[int, pydantic.Field(ge=1)] = 64
    seq_len: Annotated[int, pydantic.Field(ge=2)] = 256
    smooth: Smooth = "auto"
    activations: Activations | Literal["auto"] = "auto"
    objective: Objective = "latency"
    max_kl: Annotated[float, pydantic.Field(gt=0)] | None = None
    min_speedup: Annotated[float, pydantic.Field(gt=0)] | None = None
    max_size: Annotated[int, pydantic.Field(ge=1)] | None = None
    costs: Path | None = None
    plan_in: Path | None = None
    plan_out: Path | None = None
    ranges: RangeMethod = "minmax"
    method: Method | None = None
    block_size: Literal[32, 64, 128] | None = None
    symmetric: bool | None = None
    outlier_threshold: Annotated[float, pydantic.Field(gt=0)] | None = None
    outlier_share: Annotated[float, pydantic.Field(gt=0, le=0.125)] | None = None
    equalize: bool | None = None
    bias_correction: bool | None = None
    recipe: Recipe = Recipe()
    task: str | None = None
    opset: Annotated[int, pydantic.Field(ge=13, le=23)] = 23
    edge: EdgeOptions = EdgeOptions()
    seed: Annotated[int, pydantic.Field(ge=0)] = 0
    trust_remote_code: bool = False
    shapes: tuple[Shape, ...] = ()
    cache: bool | None = None
    last_logits: bool = False
    adapter: str | Path | None = None
    adapter_mode: AdapterMode = "merge"
    strict: bool = True
    format: Literal["onnx", "ort"] = "onnx"

    @pydantic.field_validator("recipe", mode="before")
    @classmethod
    def _as_recipe(cls, given: object) -> object:
        # A mapping of globs, as in a recipe file.
        return given if isinstance(given, Recipe) else Recipe.from_mapping(given)

    @pydantic.model_validator(mode="after")
    def _ranges_have_effect(self) -> CompileConfig:
        static = self.activations in ("static", "auto") or any(
            rule.activations == "static" for _, rule in self.recipe.rules
        )
        if self.ranges != "minmax" and not static:
            raise ValueError(
                f"ranges {self.ranges} are static, and {self.activations} activations have none"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _zero_points_where_they_are_the_point(self) -> CompileConfig:
        methods = {self.method, *(rule.method for _, rule in self.recipe.rules)}
        if self.symmetric and "hqq" in methods:
            raise ValueError("hqq moves zero points, and symmetric blocks have none")
        return self

    @pydantic.model_validator(mode="after")
    def _outliers_are_found_in_one_way(self) -> CompileConfig:
        if self.outlier_threshold is not None and self.outlier_share is not None:
            raise ValueError("outlier_threshold and outlier_share contradict each other")
        return self

    @pydantic.model_validator(mode="after")
    def _limits_have_effect(self) -> CompileConfig:
        limits = (self.max_kl, self.min_speedup, self.max_size)
        if self.objective == "accuracy" and self.min_speedup is None and self.max_size is None:
            raise ValueError(
                "objective accuracy alone keeps everything in float: add min_speedup or max_size"
            )
        if self.objective == "scheme" and limits != (None, None, None):
            raise ValueError("objective scheme chooses nothing, so a limit has no effect")
        if self.plan_in is not None:
            usual = ("latency", "auto", "auto", None)
            asked = (self.objective, self.activations, self.smooth, self.costs) != usual
            if asked or limits != (None, None, None) or self.recipe.rules:
                raise ValueError(
                    "a plan that is replayed takes no recipe, limits, "
                    "objective, activations, smooth or costs"
                )
        if self.objective == "scheme" and self.costs is not None:
            raise ValueError("objective scheme measures nothing, so costs have no effect")
        return self

    @pydantic.model_validator(mode="after")
    def _adapter_mode_has_effect(self) -> CompileConfig:
        if self.adapter is None and self.adapter_mode != "merge":
            raise ValueError("there is no adapter to keep")
        return self

    # Last, so that it sees what the other validators refuse.
    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, given: Any, check: Callable[[Any], CompileConfig]) -> CompileConfig:
        try:
            return check(given)
        except pydantic.ValidationError as error:
            raise ConfigError(first_problem(error)) from error

    @property
    def plans(self) -> list[str]:
        """Names of the options given that bear on a plan alone."""
        names = ("plan_in", "plan_out", "costs", "max_kl", "min_speedup", "max_size")
        return [name for name in names if getattr(self, name) is not None]

    @property
    def wants_histograms(self) -> bool:
        """Whether a range is drawn from a histogram anywhere."""
        asked = {self.ranges, *(rule.ranges for _, rule in self.recipe.rules)}
        return bool(asked - {"minmax", None})


def parse_smooth(text: str) -> Smooth:
    """``auto``, ``off`` or a number, from the command line.

    Raises:
        ConfigError: none of these.
    """
    if text in ("auto", "off"):
        return text  # type: ignore[return-value]
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"smooth: {text!r} is not auto, off or a number in [0, 1]") from error


def parse_size(text: str) -> int:
    """``20MB``, ``1.5 GB`` or a number of bytes; units are powers of ten.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"max_size: {text!r} is not a size like 20MB")
    return int(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[match[2].lower()])


_PROBLEMS: Final = {
    "greater_than_equal": "{value} is below {ge}",
    "greater_than": "{value} is not above {gt}",
    "less_than_equal": "{value} is above {le}",
    "literal_error": "{value!r} is not {expected}",
    "extra_forbidden": "there is no such option",
}
"""What pydantic says at length, by its type of error."""


def first_problem(error: pydantic.ValidationError) -> str:
    """The first problem of a pydantic report as one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    form = _PROBLEMS.get(first["type"])
    message = first["msg"].removeprefix("Value error, ")
    if form is not None:
        message = form.format(value=first["input"], **first.get("ctx", {}))
    return f"{where}: {message}" if where else message
