"""Cross-layer equalisation (arXiv 1906.04721): which scales move between which ops.

Dividing the output channels of one op by s and multiplying the input channels of the next by s
changes nothing in float, where only homogeneous ops lie between, and much in codes. The paper's
s_i = √(r1_i / r2_i), with r1 and r2 the ranges of channel i in the two weights, makes both ranges
√(r1_i · r2_i); it is meant for one scale per weight. Where each output channel has its own, the
range of the activation takes the place of r1 (SmoothQuant, arXiv 2211.10438). Both are candidates
here, and a pair takes what predicts the least error at the second op's output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.calibration.channels import ChannelStats
from qcompile.pairs import Pair, find_pairs
from qcompile.weighted import Weighted

Array = npt.NDArray[Any]

ALPHAS: Final = (0.25, 0.5, 0.75, 1.0)
"""Exponents of the activation's range that are tried."""

SWEEPS: Final = 10
"""Ops share weights with the pairs before and after theirs, so pairs are gone through again."""

PAYS: Final = 0.7
"""A pair is scaled where that brings the predicted error to this part or less: the prediction is
rough."""

_BETTER: Final = 0.99
"""A pair that is scaled gets another scale where that brings the error to this part or less."""

ROOM: Final = 1.25
"""A channel is moved under the limit of a Clip only where this many times its calibrated maximum
stays below it."""

_LARGEST: Final = 1e3


@dataclasses.dataclass(frozen=True)
class Equalized:
    """One pair's decision.

    Attributes:
        first, second: names of the ops.
        scale: s, float64 [out channels of the first].
        channels: int64 [in channels of the second], where each comes from in `scale`.
        gain: predicted error, relative to that without.
    """

    first: str
    second: str
    scale: Array
    channels: npt.NDArray[np.int64]
    gain: float


@dataclasses.dataclass(frozen=True)
class EqualizationPlan:
    """Decisions for a graph, applied by `passes.equalize`.

    Attributes:
        pairs: that are scaled.
        refused: name of an op -> why no scale moves into it.
    """

    pairs: tuple[Equalized, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def told(self, name: str) -> str | None:
        """What was decided for the input channels of the op `name`, in words."""
        for pair in self.pairs:
            if pair.second == name:
                return f"scales from {pair.first}: {pair.gain:.2f} of the predicted error"
        return self.refused.get(name)


def wanted_values(ops: list[Weighted]) -> dict[str, tuple[int, int]]:
    """What `plan_equalization` has to know of: value name -> (axis of its channels, how many)."""
    pairs, _ = find_pairs(ops)
    wanted: dict[str, tuple[int, int]] = {}
    for pair in pairs:
        for op in (pair.first, pair.second):
            wanted[str(op.x.name)] = (op.axis, op.in_channels)
        if pair.limit is not None:
            wanted[str(pair.first.output.name)] = (pair.first.axis, pair.first.out_channels)
    return wanted


def plan_equalization(
    ops: list[Weighted],
    stats: Mapping[str, ChannelStats],
    *,
    per_channel: bool,
    bits: int = 8,
) -> EqualizationPlan:
    """Decide the scales of all pairs.

    Args:
        ops: of the float graph, in graph order.
        stats: of `wanted_values`, by value name.
        per_channel: whether weights have one scale per output channel, or one.
        bits: of the codes of activations.
    """
    pairs, refused = find_pairs(ops)
    weights = {op.name: op.blocks() for pair in pairs for op in (pair.first, pair.second)}
    inputs = {op.name: stats[str(op.x.name)] for pair in pairs for op in (pair.first, pair.second)}
    scales = [np.ones(pair.first.out_channels) for pair in pairs]
    gains = [1.0] * len(pairs)
    for _ in range(SWEEPS):
        changed = False
        for at, pair in enumerate(pairs):
            trial = _Trial(pair, weights, inputs, per_channel, bits)
            candidates = trial.candidates()
            if pair.limit is not None:
                seen = stats[str(pair.first.output.name)].maximum / scales[at]
                candidates = [_under(s, seen, pair.limit, scales[at]) for s in candidates]
            errors = [trial.error(s) for s in candidates]
            best, before = int(np.argmin(errors)), trial.error(np.ones_like(scales[at]))
            wanted = PAYS if gains[at] == 1.0 else _BETTER
            if before <= 0 or errors[best] > wanted * before:
                continue
            scale, changed = candidates[best], True
            gains[at] *= errors[best] / before
            scales[at] = scales[at] * scale
            first, second = pair.first.name, pair.second.name
            weights[first] = weights[first] / _of_outputs(scale, weights[first])
            weights[second] = weights[second] * _of_inputs(scale[pair.channels], weights[second])
            inputs[second] = inputs[second].scaled(scale[pair.channels])
        if not changed:
            break
    planned = []
    for pair, scale, gain in zip(pairs, scales, gains, strict=True):
        if gain < 1.0:
            names = pair.first.name, pair.second.name
            planned.append(Equalized(*names, scale, pair.channels, gain))
        else:
            refused[pair.second.name] = f"no scale would bring the predicted error below {PAYS:.0%}"
    return EqualizationPlan(tuple(planned), refused)


class _Trial:
    """A pair as it is now, and what a further scale would do."""

    def __init__(
        self,
        pair: Pair,
        weights: Mapping[str, Array],
        inputs: Mapping[str, ChannelStats],
        per_channel: bool,
        bits: int,
    ) -> None:
        self.first, self.second = weights[pair.first.name], weights[pair.second.name]
        self.channels = pair.channels
        self.per_channel = per_channel
        self.steps = 2.0**bits - 1.0
        self.x = inputs[pair.second.name]
        # Of the second weight, per group: [groups, out, in]; and per input channel.
        self.largest = np.abs(self.second).max(axis=3)
        self.energy = np.square(self.second).sum(axis=(1, 3)).reshape(-1)
        self.range_out = np.abs(self.first).max(axis=(2, 3)).reshape(-1)
        powers = inputs[pair.first.name].second_moment.reshape(len(self.first), -1).sum(axis=1)
        each = np.repeat(powers, self.first.shape[1]) * self.first.shape[3]
        self.first_power = each / 12.0 / 127.0**2

    def candidates(self) -> list[Array]:
        """Scales to try, [out channels of the first]."""
        count = len(self.range_out)
        range_in = np.zeros(count)
        np.maximum.at(range_in, self.channels, self.largest.max(axis=1).reshape(-1))
        activation = np.zeros(count)
        np.maximum.at(activation, self.channels, self.x.absmax)
        found = [_scale(self.range_out, range_in, 0.5)]
        return found + [_scale(activation, range_in, alpha) for alpha in ALPHAS]

    def error(self, scale: Array) -> float:
        """Predicted squared error of the second op's output, summed over its channels: codes of
        its input, of its weight, and of the first op's weight are each off by uniform noise."""
        s = scale[self.channels]
        low, high = (self.x.minimum / s).min(), (self.x.maximum / s).max()
        step = (max(high, 0.0) - min(low, 0.0)) / self.steps
        reach = self.energy * np.square(s)
        # Zero is a code exactly.
        rounded = self.x.nonzero / self.x.count
        activation = step**2 / 12.0 * (reach * rounded).sum()
        groups, _, ins, taps = self.second.shape
        tops = (self.largest * s.reshape(groups, 1, ins)).max(axis=2)
        if not self.per_channel:
            tops = np.full_like(tops, tops.max())
        power = (self.x.second_moment / np.square(s)).reshape(groups, ins).sum(axis=1) * taps
        weight = (np.square(tops / 127.0).sum(axis=1) / 12.0 * power).sum()
        ranges = self.range_out / scale
        if not self.per_channel:
            ranges = np.full_like(ranges, ranges.max())
        before = (self.first_power * np.square(ranges))[self.channels] * reach
        return float(activation + weight + before.sum())


def _scale(left: Array, right: Array, alpha: float) -> Array:
    """left^α / right^(1−α), its geometric mean one; one where either range is zero."""
    alive = (left > 0) & (right > 0)
    scale = np.ones(len(left))
    if alive.any():
        logs = alpha * np.log(left[alive]) - (1.0 - alpha) * np.log(right[alive])
        scale[alive] = np.clip(np.exp(logs - logs.mean()), 1 / _LARGEST, _LARGEST)
    return scale


def _under(scale: Array, seen: Array, limit: float, before: Array) -> Array:
    """`scale` as a Clip to `limit` allows: channels that reach it keep their values, the others
    stay below it.

    Args:
        scale: proposed, on top of `before`.
        seen: largest value of each channel before the Clip, as it is now.
        limit: of the Clip.
        before: scale that was decided already.
    """
    free = seen * before * ROOM <= limit
    least = ROOM * np.maximum(seen, 0.0) / limit
    return np.where(free, np.maximum(scale, least), 1.0)


def _of_outputs(scale: Array, blocks: Array) -> Array:
    return scale.reshape(blocks.shape[0], blocks.shape[1], 1, 1)


def _of_inputs(scale: Array, blocks: Array) -> Array:
    return scale.reshape(blocks.shape[0], 1, blocks.shape[2], 1)
