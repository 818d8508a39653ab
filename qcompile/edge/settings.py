"""What the profile and the user together ask of the codes."""

from __future__ import annotations

import dataclasses
from typing import Final

from qcompile.config import CompileConfig, RangeMethod, Recipe
from qcompile.edge.plan import SINCE, Code
from qcompile.edge.profiles import Profile
from qcompile.errors import ConfigError
from qcompile.methods import SEQUENTIAL, Method

LINEAR: Final = frozenset({"Gemm", "MatMul"})
"""Ops whose weights can be rounded for what they read."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tensors are quantised.

    Attributes:
        activation: type of the codes of activations.
        weight: type of the codes of weights.
        symmetric: whether zero is in the middle of an activation's codes.
        per_channel: whether weights have a scale per output channel, where the profile allows it.
        ranges: how a range is drawn from what calibration saw.
        method: how weights are rounded; None: in searched ranges where they have int4 codes, or
            int8 codes and a scale per output channel.
        recipe: says otherwise of single modules.
    """

    activation: Code = "uint8"
    weight: Code = "int8"
    symmetric: bool = False
    per_channel: bool = True
    ranges: RangeMethod = "minmax"
    method: Method | None = None
    recipe: Recipe = dataclasses.field(default_factory=Recipe)

    def method_of(self, name: str) -> Method | None:
        """How the weight of the op `name` is rounded."""
        return self.recipe.rule_for(name).method or self.method

    @property
    def in_sequence(self) -> bool:
        """Whether any is, or may be, by a method that looks at what it reads."""
        rules = (rule.method for _, rule in self.recipe.rules)
        return not {self.method, *rules}.isdisjoint(SEQUENTIAL)


def choose_settings(profile: Profile, config: CompileConfig) -> Settings:
    """The profile's own, but for what `config` says.

    Raises:
        ConfigError: what the profile or the opset does not have.
    """
    asked = config.edge
    first, last = profile.opsets
    if not first <= config.opset <= last:
        raise ConfigError(f"profile {profile.name} reads opsets {first} to {last}")
    preferred = profile.activations or profile.weights
    activation: Code = asked.activation_type or preferred[0]
    if asked.activation_type and not profile.activations:
        raise ConfigError(f"profile {profile.name} leaves activations in float")
    for option in ("equalize", "bias_correction"):
        if getattr(config, option) and not profile.activations:
            raise ConfigError(
                f"profile {profile.name} leaves activations in float, so {option} has no effect"
            )
    if activation not in preferred:
        raise ConfigError(
            f"profile {profile.name} has no {activation} activations",
            hint="one of " + ", ".join(profile.activations),
        )
    if config.opset < SINCE.get(activation, 0):
        raise ConfigError(
            f"opset {config.opset} has no {activation} codes",
            hint=f"--opset {SINCE[activation]} or later",
        )
    if asked.weights == "per-channel" and not profile.per_channel:
        raise ConfigError(f"profile {profile.name} has one scale for each weight")
    per_channel = asked.weights != "per-tensor"
    settings = Settings(
        activation=activation,
        weight=profile.weights[0],
        symmetric=asked.symmetric_activations or profile.symmetric,
        per_channel=per_channel,
        ranges=config.ranges,
        method=config.method,
        recipe=config.recipe,
    )
    if settings.in_sequence and not (
        per_channel and profile.per_channel & LINEAR and not profile.power_of_two
    ):
        whose = f"profile {profile.name} has" if per_channel else "per-tensor weights have"
        raise ConfigError(
            f"gptq and adaround are for Linears with a scale per output channel, which {whose} not",
            hint="w8a8:mse searches the ranges of any weight",
        )
    return settings
