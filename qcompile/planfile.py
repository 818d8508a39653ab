"""A plan on disk: what was chosen, to look at, to change by hand, and to replay."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import pydantic

from qcompile.config import RangeMethod, Recipe, SiteRule
from qcompile.errors import ConfigError
from qcompile.linears import Site
from qcompile.methods import Method
from qcompile.options import Options
from qcompile.outliers import can_split
from qcompile.precision import CODED, Choice, Label, PrecisionPlan
from qcompile.smoothing import SmoothingPlan
from qcompile.targets.base import Target

PLAN: Final = "plan.json"


class PlanFile(pydantic.BaseModel):
    """Implementation by op, α by site (None: not smoothed; a site left out is searched), the
    ranges and methods that a recipe gave ops, and the input channels that stay in float: by site
    where all its ops share them (llm-int8), by op where each has its own (spqr).

    With the same model, scheme, calibration data, `ranges`, blocks and versions, a replay gives the
    same graph, bit for bit.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    format: Literal[1] = 1
    target: str
    scheme: str
    ops: dict[str, Label]
    smoothing: dict[str, Annotated[float, pydantic.Field(ge=0, le=1)] | None]
    ranges: dict[str, RangeMethod] = {}
    methods: dict[str, Method] = {}
    kept: dict[str, Annotated[list[pydantic.NonNegativeInt], pydantic.Field(min_length=1)]] = {}

    @classmethod
    def of(
        cls,
        target: str,
        scheme: str,
        plan: PrecisionPlan,
        smoothing: SmoothingPlan,
        recipe: Recipe,
    ) -> PlanFile:
        """From the decisions of one compilation."""
        ranges = {op.name: recipe.rule_for(op.name).ranges for op in plan.ops}
        methods = {op.name: recipe.rule_for(op.name).method for op in plan.ops}
        kept = {entry.site: entry.kept for entry in smoothing.entries if entry.kept is not None}
        kept |= {
            op.name: op.weight.kept.channels
            for op in plan.ops
            if not op.coded and op.weight is not None and op.weight.kept is not None
        }
        return cls(
            target=target,
            scheme=scheme,
            ops={op.name: plan.label(op) for op in plan.ops},
            smoothing={entry.site: entry.alpha for entry in smoothing.entries},
            ranges={name: method for name, method in ranges.items() if method is not None},
            methods={name: method for name, method in methods.items() if method is not None},
            kept={name: channels.tolist() for name, channels in kept.items()},
        )

    @property
    def recipe(self) -> Recipe:
        """The ranges and methods of single ops, as a recipe gives them."""
        ranges = [(name, SiteRule(ranges=found)) for name, found in self.ranges.items()]
        methods = [(name, SiteRule(method=found)) for name, found in self.methods.items()]
        rules = [(glob.escape(name), rule) for name, rule in (*ranges, *methods)]
        return Recipe(rules=tuple(rules))

    @classmethod
    def read(cls, path: Path) -> PlanFile:
        """From `path`.

        Raises:
            ConfigError: it is missing, unreadable or no plan.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"plan {path} cannot be read: {error}") from error
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{path} is not a plan: {where}: {first['msg']}") from error

    def chosen(
        self, options: Mapping[str, Options], sites: list[Site], target: Target
    ) -> dict[str, Choice]:
        """The choice for every Linear of a model.

        Raises:
            ConfigError: the plan is for another model, or asks for what an op cannot become.
        """
        different = sorted(set(self.ops) ^ set(options))
        named = {site.name for site in sites}
        different = different or sorted(set(self.smoothing) - named)
        different = different or sorted(set(self.kept) - named - set(options))
        if different:
            where = (
                "the plan"
                if different[0] in {*self.ops, *self.smoothing, *self.kept}
                else "the model"
            )
            raise ConfigError(f"the plan is for another model: {different[0]} is only in {where}")
        for site in sites:
            for linear in site.linears:
                label = self.ops[linear.name]
                outside = [c for c in self.kept.get(linear.name, ()) if c >= linear.in_features]
                outside += [c for c in self.kept.get(site.name, ()) if c >= site.channels]
                if outside:
                    raise ConfigError(
                        f"{linear.name} has no input channel {outside[0]}, as the plan has it"
                    )
                absent = label != "float" and target.capability("MatMul", label) is None
                if absent or (label == "split" and not can_split(site.channels)):
                    raise ConfigError(f"{linear.name} cannot be {label}, as the plan has it")
            choices = [Choice(self.ops[linear.name], "plan") for linear in site.linears]
            labels = {choice.label for choice in choices}
            if len(labels & set(CODED)) > 1 or (
                "llm-int8" in labels and labels - {*CODED, "float"}
            ):
                raise ConfigError(
                    f"the plan quantises {site.name} in two ways, and it is one activation"
                )
        return {name: Choice(label, "plan") for name, label in self.ops.items()}

    def write(self, path: Path) -> None:
        """As JSON.

        Raises:
            OSError: it cannot be written.
        """
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
