"""The codes of weights that a method finds for itself; `qcompile.planning` rounds the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompile.adaround import quantize_adaround
from qcompile.calibration.stats import Stats
from qcompile.channel_rounding import quantize_channels
from qcompile.clipping import clipped_range
from qcompile.config import CompileConfig
from qcompile.decomposition import kept_count
from qcompile.distill import distill, learnable
from qcompile.gptq import importance_in_blocks, quantize_gptq
from qcompile.hqq import quantize_hqq
from qcompile.linears import Linear, find_sites
from qcompile.methods import SEQUENTIAL, Method
from qcompile.planning import activation_of, to_round, weight_of
from qcompile.precision import ActivationQuant, Choice, QuantizedWeight
from qcompile.rounding import Rounding, channel_method, in_sequence, rounding_of
from qcompile.sequence import round_in_sequence
from qcompile.smoothing import SmoothingPlan
from qcompile.spill import release
from qcompile.spqr import quantize_spqr
from qcompile.targets.base import Target
from qcompile.traced import Batch
from qcompile.weight_blocks import in_blocks

Array = npt.NDArray[Any]


def find_codes(
    model: ir.Model,
    chosen: Mapping[str, Choice],
    stats: Mapping[str, Stats],
    smoothing: SmoothingPlan,
    config: CompileConfig,
    target: Target,
    batches: Sequence[Batch],
    work: Path,
    progress: Callable[[int, int], None] | None = None,
    kept: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, QuantizedWeight]:
    """Codes of every op whose method looks for them op by op.

    Args:
        model: the float graph, smoothed; its weights in `work`.
        chosen: the implementation of every Linear.
        stats: of activations before smoothing.
        smoothing: what the graph was smoothed by.
        config: method, blocks and the recipe.
        target: whether its kernel saturates.
        batches: calibration feeds.
        work: folder for graphs.
        progress: called with (sites done, sites in all).
        kept: channels that stay in float by op, of an earlier plan, in place of a search.

    Raises:
        CalibrationError: an activation is NaN or infinite on the data, or there is one sample to
            distil layers on.
    """
    roundings = {name: rounding_of(name, c.precision, config) for name, c in chosen.items()}
    found: dict[str, QuantizedWeight] = {}
    sites = find_sites(model.graph)
    for done, site in enumerate(sites):
        for linear in site.linears:
            rounding = roundings[linear.name]
            if rounding is None or rounding.method not in ("mse", "hqq", "awq"):
                continue
            moment = None
            if rounding.method == "awq":
                moment = stats[site.name].second_moment / smoothing.scale_of(site.name) ** 2
            found[linear.name] = _alone(weight_of(linear), rounding, moment)
            if progress:
                progress(done + 1, len(sites))
        release(model)
    in_turn = frozenset(n for n, r in roundings.items() if r and r.method in SEQUENTIAL)
    in_turn |= {name for name, choice in chosen.items() if in_sequence(name, choice, config)}
    if not in_turn:
        return found
    distilled = frozenset(n for n, r in roundings.items() if r and r.method == "lkd")
    learned_from = learnable(model.graph, batches) if distilled else batches
    site_of = {linear.name: site for site in sites for linear in site.linears}

    def round_(linear: Linear, gram: Array) -> QuantizedWeight:
        rounding = roundings[linear.name]
        if rounding is None:
            method = channel_method(linear.name, chosen[linear.name], config)
            activation, _ = activation_of(
                site_of[linear.name], stats, smoothing, chosen, config, target
            )
            return _beside(activation, weight_of(linear), gram, method, target)
        if rounding.method == "spqr":
            return quantize_spqr(
                weight_of(linear),
                gram,
                bits=rounding.bits,
                block_size=rounding.block_size,
                symmetric=rounding.symmetric,
                count=kept_count(linear.in_features, config.outlier_share),
                channels=(kept or {}).get(linear.name),
            )
        # Of eight bits there is little that learning could gain, and it takes long.
        learned = rounding.method == "adaround" or (rounding.method == "lkd" and rounding.bits < 8)
        quantize = quantize_adaround if learned else quantize_gptq
        return quantize(
            weight_of(linear),
            gram,
            bits=rounding.bits,
            block_size=rounding.block_size,
            symmetric=rounding.symmetric,
        )

    found |= round_in_sequence(model, in_turn, batches, work, round_, progress)
    if distilled:
        started = {name: found[name] for name in roundings if name in distilled}
        found |= distill(model, started, learned_from, work, progress)
    return found


def _beside(
    activation: ActivationQuant, weight: Array, gram: Array, method: Method | None, target: Target
) -> QuantizedWeight:
    """Codes per output channel, of a weight whose activation has codes, too."""
    assert method == "gptq" or method == "adaround"
    rounded, kept = to_round(weight, activation)
    if kept is not None:
        gram = gram.copy()
        gram[kept.channels] = gram[:, kept.channels] = 0.0
    highest = activation.highest if target.saturates else None
    return dataclasses.replace(quantize_channels(rounded, gram, method, highest=highest), kept=kept)


def _alone(weight: Array, rounding: Rounding, moment: Array | None) -> QuantizedWeight:
    """By a method that looks at one weight, and at most at E[x²] of its input channels."""
    if rounding.method == "hqq":
        return quantize_hqq(weight, bits=rounding.bits, block_size=rounding.block_size)
    blocks = in_blocks(weight, rounding.block_size)
    counts = None
    if moment is not None:
        counts = importance_in_blocks(moment, rounding.block_size)
    grid = clipped_range(blocks, counts, bits=rounding.bits, symmetric=rounding.symmetric)
    return grid.weight(grid.nearest(blocks), len(weight))
