"""Choose an implementation for every op: what was measured, as a labelling problem, and its answer.

A plan's predicted time at a shape is that of the float model, less its float Linears, plus the
chosen ones and the conversions that they share; its predicted damage is the sum of its ops'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from qcompile.config import CompileConfig
from qcompile.errors import ConfigError
from qcompile.float4 import as_float4
from qcompile.gradients import Importance
from qcompile.labelling import Cost, Item, Problem, Solution, front, solve
from qcompile.linears import Linear, Site
from qcompile.options import Options
from qcompile.precision import CODED, FLOAT_BYTES, Choice, Floats, Label
from qcompile.sensitivity import Damage
from qcompile.targets.base import Target
from qcompile.weight_blocks import BLOCK_SIZE

TIE: Final = 0.01
"""The damage of the scheme's own plan counts as this part of the float model's time: no accuracy is
given away for a gain within the noise of timing."""

MARGIN: Final = 0.98
"""Part of a limit on KL that a prediction may fill: the sum of the ops' parts is not exact."""

SPEED_MARGIN: Final = 1.03
"""A plan is wanted this much faster than a limit: it is measured again when it is built."""

SIZE_MARGIN: Final = 0.995
"""Part of a limit on bytes that a prediction may fill: inserted Muls are not known yet."""

UNSEEN: Final = "; accuracy is measured on an output that does not depend on it"

KEEPING: Final[tuple[Label, ...]] = ("weight8", "weight4", "llm-int8")
"""The labels that may keep input channels in float."""

STEPS: Final = 3
"""How many times as much as a prompt's a step's relative time counts where there is a cache. Of a
prompt of 128 tokens and as many after it, steps take nine tenths in float; of a prompt that is four
times as long, two thirds."""

SECOND: Final = 1e-3
"""Weight of the time where another objective comes first."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a choice rests on.

    Attributes:
        sites: of the canonical graph.
        options: of every Linear.
        shapes: (batch, sequence) that were timed.
        float_times: seconds of the whole float model at each, or of its Linears alone.
        times: op -> label -> seconds at each, without conversions.
        conversions: site -> mode -> seconds at each.
        savings: site -> mode -> seconds at each that are saved where all ops of the site take it:
            what makes the activation quantises it.
        damage: op -> label -> its part of the output's divergence.
        other_bytes: of weights that are no Linear's.
        machine: where times were taken.
        taken: how many times were taken for this compilation.
        importance: of the channels of every op and site; None where no gradient is known.
        how: damage was found: from gradients, or each op alone.
        floats: the type of what is not quantised.
        whole: whether `float_times` are of the whole model.
        steps: how much the relative time at a shape of one token counts beside the others'.
        notes: on the times, for the report.
        block_size: input channels that share a scale, of weights in blocks.
        zero_points: whether those blocks have them.
        kept: op -> how many of its input channels stay in float where it is quantised.
    """

    sites: Sequence[Site]
    options: Mapping[str, Options]
    shapes: Sequence[tuple[int, int]]
    float_times: Sequence[float]
    times: Mapping[str, Mapping[Label, Sequence[float]]]
    conversions: Mapping[str, Mapping[Label, Sequence[float]]]
    damage: Damage
    other_bytes: int
    machine: Mapping[str, str]
    taken: int
    importance: Importance | None = None
    how: str = "gradient"
    floats: Floats = "float32"
    whole: bool = True
    steps: int = 1
    savings: Mapping[str, Mapping[Label, Sequence[float]]] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    block_size: int = BLOCK_SIZE
    zero_points: bool = False
    kept: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def problem(self) -> Problem:
        """Cost vectors: seconds at each shape, damage, bytes."""
        items = []
        for site in self.sites:
            for linear in site.linears:
                labels = self.options[linear.name].labels
                damage = self.damage.get(linear.name, {})
                items.append(
                    Item(
                        name=linear.name,
                        group=site.name,
                        costs={
                            label: np.array(
                                [
                                    *self.times[linear.name][label],
                                    damage.get(label, 0.0),
                                    self.bytes_of(linear, label),
                                ]
                            )
                            for label in labels
                        },
                        needs={label: label if label in CODED else None for label in labels},
                    )
                )
        conversions: dict[str, dict[str, Cost]] = {
            # A static scale and zero point take five bytes.
            site: {mode: np.array([*seconds, 0.0, 5.0]) for mode, seconds in modes.items()}
            for site, modes in self.conversions.items()
        }
        savings: dict[str, dict[str, Cost]] = {
            site: {mode: np.array([*seconds, 0.0, 0.0]) for mode, seconds in modes.items()}
            for site, modes in self.savings.items()
        }
        return Problem(tuple(items), conversions, savings)

    def bytes_of(self, linear: Linear, label: Label) -> int:
        """Of one Linear's weight as it is stored."""
        codes = weight_bytes(
            linear,
            label,
            self.floats,
            block_size=self.block_size,
            zero_points=self.zero_points,
        )
        kept = self.kept.get(linear.name, 0) if label in KEEPING else 0
        return codes + kept_bytes(kept, linear.out_features, self.floats)

    @property
    def rest(self) -> Cost:
        """Of everything that is no Linear, the same for every plan: seconds, damage, bytes."""
        floats = [self.times[linear.name]["float"] for s in self.sites for linear in s.linears]
        seconds = np.array(self.float_times) - np.sum(floats, axis=0)
        return np.array([*np.maximum(seconds, 0.0), 0.0, self.other_bytes])

    def speeds(self, cost: Cost) -> list[float]:
        """Predicted speed of a plan relative to float, at each shape."""
        seconds = (cost + self.rest)[:-2]
        return [float(f / s) for f, s in zip(self.float_times, seconds, strict=True)]


@dataclasses.dataclass(frozen=True)
class Decision:
    """The plan that was chosen, and its surroundings.

    Attributes:
        chosen: op -> implementation and reason.
        solution: the labelling behind it.
        value: of the objective; less is better.
        measured: what it rests on.
    """

    chosen: dict[str, Choice]
    solution: Solution
    value: float
    measured: Measured

    def foreign(self, target: Target) -> bool:
        """Whether the times were taken on another machine."""
        return dict(self.measured.machine) != target.machine()

    def front(self) -> list[Solution]:
        """The Pareto front of time and damage, fastest first; it takes many solutions."""
        problem = self.measured.problem()
        time, damage, _ = _prices(self.measured, problem)
        return front(problem, time, damage)


def decide(measured: Measured, config: CompileConfig, *, correction: float = 1.0) -> Decision:
    """The best plan for the objective of `config` within its limits.

    Args:
        measured: what was timed and estimated.
        config: objective and limits.
        correction: measured divergence over predicted, of a plan that was tried.

    Raises:
        ConfigError: no plan keeps the limits; says how near one comes.
    """
    problem, rest = measured.problem(), measured.rest
    time, damage, size = _prices(measured, problem)
    weights = {
        "latency": time + damage,
        "size": size + SECOND * (time + damage),
        "accuracy": damage + SECOND * time,
    }[config.objective]
    limits = np.full(problem.width, np.inf)
    if config.min_speedup is not None:
        wanted = SPEED_MARGIN * config.min_speedup
        limits[:-2] = np.array(measured.float_times) / wanted - rest[:-2]
    if config.max_kl is not None:
        limits[-2] = MARGIN * config.max_kl / correction
    if config.max_size is not None:
        limits[-1] = SIZE_MARGIN * config.max_size - rest[-1]
    solution = solve(problem, weights, limits)
    if solution is None:
        raise _unreachable(measured, problem, config, limits, correction)
    free = solve(problem, time + damage)
    assert free is not None
    chosen = {
        item.name: Choice(
            solution.labels[item.name],  # type: ignore[arg-type]
            _reason(item, solution, free, problem, measured, config)
            + _caution(solution.labels[item.name], measured.damage.get(item.name, {})),
        )
        for item in problem.items
    }
    return Decision(chosen, solution, float(weights @ solution.cost), measured)


def scheme_choice(options: Mapping[str, Options]) -> dict[str, Choice]:
    """What the scheme names for every op, unmeasured."""
    return {name: found.default for name, found in options.items()}


def weight_bytes(
    linear: Linear,
    label: Label,
    floats: Floats = "float32",
    *,
    block_size: int = BLOCK_SIZE,
    zero_points: bool = False,
) -> int:
    """Bytes of one Linear's weight as it is stored.

    In float, a tied one costs nothing more than its embedding, and those that share one weight
    divide it among them; codes are each op's own.
    """
    size = linear.in_features * linear.out_features
    depth = -(-linear.in_features // block_size)
    blocks = depth * linear.out_features
    wide = FLOAT_BYTES[floats]
    if label == "float":
        return 0 if linear.tied else wide * size // linear.shared
    if as_float4(label) is not None:
        return size // 2 + wide * blocks
    if label == "weight8" or label == "weight4":
        bits = 8 if label == "weight8" else 4
        points = linear.out_features * -(-depth * bits // 8) if zero_points else 0
        # The last block is padded.
        return blocks * (block_size * bits // 8 + wide) + points
    # How many copies a split makes is known later; this is the most.
    copies = linear.in_features // 8 * (linear.out_features + 12) if label == "split" else 0
    return size + 4 * linear.out_features + copies


def kept_bytes(channels: int, width: int, floats: Floats) -> int:
    """Bytes of what stays in float of a weight: rows, and their places."""
    return channels * (FLOAT_BYTES[floats] * width + 8)


def _prices(measured: Measured, problem: Problem) -> tuple[Cost, Cost, Cost]:
    """Weights that turn a cost vector into relative time, relative damage and relative size."""
    time, damage, size = (np.zeros(problem.width) for _ in range(3))
    parts = np.array([measured.steps if tokens == 1 else 1 for _, tokens in measured.shapes])
    time[: len(parts)] = parts / (np.array(measured.float_times) * parts.sum())
    scheme = sum(float(item.costs[next(iter(item.costs))][-2]) for item in problem.items)
    damage[-2] = TIE / scheme if scheme > 0 else 0.0
    all_bytes = sum(max(float(c[-1]) for c in item.costs.values()) for item in problem.items)
    size[-1] = 1.0 / max(all_bytes, 1.0)
    return time, damage, size


def _reason(
    item: Item,
    solution: Solution,
    free: Solution,
    problem: Problem,
    measured: Measured,
    config: CompileConfig,
) -> str:
    options = measured.options[item.name]
    if "float" not in options.labels or len(options.labels) == 1:
        return options.reason
    label, wanted = solution.labels[item.name], free.labels[item.name]
    if label != wanted:
        cause = {"size": "size", "accuracy": "accuracy"}.get(config.objective, "constraint")
        return f"{cause}: {_compared(item, wanted, problem)} was given up"
    if label == "float":
        others = [k for k in options.labels if k != "float"]
        best = min(others, key=lambda k: float(_alone(item, k, problem).sum()))
        if (_alone(item, best, problem) < _alone(item, "float", problem)).all():
            return (
                f"damage: {_compared(item, best, problem)} is not worth {item.costs[best][-2]:.1e}"
            )
        return f"cost: {_compared(item, best, problem)}"
    return f"cost: {_compared(item, label, problem)}"


def _caution(label: str, damage: Mapping[Label, float]) -> str:
    return UNSEEN if label != "float" and damage and not any(damage.values()) else ""


def _alone(item: Item, label: str, problem: Problem) -> Cost:
    """Seconds at each shape, with a conversion that nothing else shares, as cheap as it can be."""
    need = item.needs[label]
    conversion = 0.0 if need is None else problem.conversions[item.group][need]
    if need is not None:
        saved = problem.savings.get(item.group, {}).get(need, 0.0)
        conversion = np.maximum(conversion - saved, 0.0)
    result: Cost = (item.costs[label] + conversion)[:-2]
    return result


def _compared(item: Item, label: str, problem: Problem) -> str:
    if "float" not in item.costs:
        return label
    ratios = _alone(item, "float", problem) / _alone(item, label, problem)
    return f"{label} at " + ", ".join(f"{ratio:.2f}" for ratio in ratios) + " of float's speed"


def _unreachable(
    measured: Measured, problem: Problem, config: CompileConfig, limits: Cost, correction: float
) -> ConfigError:
    """Which limit cannot be kept even alone, and how near a plan comes."""
    time, damage, size = _prices(measured, problem)
    rest = measured.rest
    smallest = solve(problem, size)
    fastest = solve(problem, time)
    safest = solve(problem, damage)
    assert smallest is not None and fastest is not None and safest is not None
    if smallest.cost[-1] > limits[-1]:
        least = math.ceil((smallest.cost[-1] + rest[-1]) / SIZE_MARGIN)
        return ConfigError(f"max_size {config.max_size}: the least that can be had is {least}")
    if (fastest.cost[:-2] > limits[:-2]).any():
        speeds = ", ".join(f"{speed:.2f}" for speed in measured.speeds(fastest.cost))
        return ConfigError(
            f"min_speedup {config.min_speedup}: the fastest plan is predicted at {speeds} of "
            "float's speed"
        )
    if safest.cost[-2] > limits[-2]:
        least_kl = safest.cost[-2] * correction / MARGIN
        return ConfigError(
            f"max_kl {config.max_kl}: the least that the recipe allows is {least_kl:.3g}"
        )
    return ConfigError("no plan keeps all limits at once", hint="loosen one of them")
