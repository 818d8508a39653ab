"""Gather what a choice rests on: times from the probe, damage from gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.alone import measure_alone
from qcompile.calibration.data import ROW_SAMPLES, TOKEN_SAMPLES, CalibrationData
from qcompile.calibration.stats import Stats
from qcompile.choosing import STEPS, Measured
from qcompile.config import CompileConfig
from qcompile.costs import default_path, open_costs
from qcompile.decomposition import find_outliers, kept_count
from qcompile.float4 import BLOCK_SIZE as FLOAT4_BLOCK
from qcompile.gradients import Gradients, Importance, measure_gradients
from qcompile.linears import Site, find_sites
from qcompile.makers import maker_of
from qcompile.methods import is_symmetric
from qcompile.options import Options
from qcompile.passes.smooth_quant import SmoothQuant
from qcompile.passes.untie import Untie
from qcompile.precision import CODED, FLOAT_BYTES, FP8, LABELS, MODES, Choice, Floats, Label
from qcompile.probe import Prober, Times
from qcompile.probe_graphs import Shape
from qcompile.progress import Step
from qcompile.sensitivity import TOKENS, Damage, measure_damage, sampled_weight
from qcompile.session import divisible, first_sample, open_session
from qcompile.shapes import rows_of, shape_of
from qcompile.smoothing import SmoothingPlan, plan_smoothing
from qcompile.spill import release, spill
from qcompile.stored import StoredTimes
from qcompile.targets.base import Target
from qcompile.torch_graph import UnsupportedOpError
from qcompile.traced import Batch, TracedModel
from qcompile.trials import trial_plans
from qcompile.weight_blocks import BITS, BLOCK_SIZE


def measure(
    model: TracedModel,
    float_path: Path,
    options: Mapping[str, Options],
    stats: Mapping[str, Stats],
    data: CalibrationData,
    timed: Sequence[Batch],
    config: CompileConfig,
    target: Target,
    work: Path,
    progress: Step,
) -> Measured:
    """Everything that a choice rests on.

    Args:
        model: the canonical float graph, its weights in `work`.
        float_path: the same, lowered.
        options: of every Linear.
        stats: of every site.
        data: short samples are cut from what it has to estimate damage on.
        timed: inputs to time at; none: the first held-back sample.
        config: options of the compilation.
        target: whose kernels.
        work: folder for graphs.
        progress: called with (steps done, steps in all).

    Raises:
        ConfigError: the table of times is damaged, or another machine's and incomplete.
    """
    damage, importance, how = estimate_damage(
        model, stats, options, config, target, data.estimated, work, progress
    )
    here = target.machine()
    if target.stored is not None and config.costs is None and not target.runs_here:
        times: Times = StoredTimes(open_costs(target.stored, here), target)
    else:
        table = open_costs(config.costs, here)
        measures = table.machine == here and target.runs_here
        times = Prober(target, table, work, measures=measures)
    session = open_session(float_path)
    feeds = [(shape_of(feed), feed) for feed in timed or [first_sample(session, data.held_back[0])]]
    del session
    measured = measure_times(model.ir, float_path, options, feeds, times, damage, target)
    if times.measured and config.costs is not None:
        table.write(config.costs)
    elif times.measured:
        with contextlib.suppress(OSError):  # a cache that cannot be kept is no failure
            table.write(default_path(here))
    return dataclasses.replace(
        measured,
        importance=importance,
        how=how,
        steps=STEPS if config.cache else 1,
        block_size=config.block_size or _block_size(options),
        zero_points=not is_symmetric(config.method, config.symmetric),
        kept=_kept(measured.sites, options, stats, config),
    )


def _kept(
    sites: Sequence[Site],
    options: Mapping[str, Options],
    stats: Mapping[str, Stats],
    config: CompileConfig,
) -> dict[str, int]:
    """How many input channels of each op stay in float where it is quantised."""
    found = {}
    for site in sites:
        for linear in site.linears:
            labels = options[linear.name].labels
            method = config.recipe.rule_for(linear.name).method or config.method
            if "llm-int8" in labels:
                alone = np.arange(site.channels)
                found[linear.name] = len(find_outliers(stats[site.name], alone, config))
            elif method == "spqr" and set(labels) & set(BITS):
                found[linear.name] = kept_count(site.channels, config.outlier_share)
    return found


def _block_size(options: Mapping[str, Options]) -> int:
    """Of weights in blocks, where nobody asked for one."""
    labels = {label for found in options.values() for label in found.labels}
    return FLOAT4_BLOCK if labels & {"nf4", "fp4"} else BLOCK_SIZE


def measure_times(
    model: ir.Model,
    float_path: Path,
    options: Mapping[str, Options],
    feeds: Sequence[tuple[tuple[int, int], Batch]],
    prober: Times,
    damage: Damage,
    target: Target,
) -> Measured:
    """Time every implementation of every op, and the whole float model, at each shape.

    Args:
        model: the canonical float graph, its weights in the folder of `float_path`.
        float_path: the same, lowered.
        options: of every Linear.
        feeds: (batch, sequence) and an input of that shape.
        prober: has or takes the times.
        damage: of every op by label.
        target: what makes an activation and quantises it in one kernel there.
    """
    sites = find_sites(model.graph)
    rows = rows_of(
        model,
        {site.name: str(site.x.name) for site in sites},
        [feed for _, feed in feeds],
        float_path.parent,
    )
    times: dict[str, dict[Label, list[float]]] = {}
    conversions: dict[str, dict[Label, list[float]]] = {}
    savings: dict[str, dict[Label, list[float]]] = {}
    for site in sites:
        offered = [o for o in LABELS if any(o in options[n.name].labels for n in site.linears)]
        for linear in site.linears:
            labels: list[Label] = list(
                dict.fromkeys(("float", *offered, *options[linear.name].labels))
            )
            times[linear.name] = {label: [] for label in labels}
            for count in rows[site.name]:
                bias = linear.bias is not None
                shape = Shape(count, linear.in_features, linear.out_features, bias)
                for label, seconds in prober.linear(shape, labels).items():
                    times[linear.name][label].append(seconds)
        conversions[site.name] = {
            label: [prober.conversion(label, count, site.channels) for count in rows[site.name]]
            for label in CODED
            if label in offered
        }
        maker = maker_of(site) if target.fuses else None
        if maker in target.fuses and maker is not None:
            savings[site.name] = {
                label: [
                    max(own - extra, 0.0) if extra is not None else 0.0
                    for own, count in zip(seconds, rows[site.name], strict=True)
                    for extra in [prober.fused(maker, label, count, site.channels)]
                ]
                for label, seconds in conversions[site.name].items()
            }
    whole = prober.model(float_path, model.graph, feeds)
    alone = [sum(labels["float"][at] for labels in times.values()) for at in range(len(feeds))]
    float_times = whole if whole is not None else alone
    for each in (times, conversions, savings):
        _fit(each, alone, float_times)
    weights = {linear.weight for site in sites for linear in site.linears if not linear.tied}
    tensors = (v.const_value for v in model.graph.initializers.values() if v not in weights)
    return Measured(
        sites=sites,
        options=options,
        shapes=[shape for shape, _ in feeds],
        float_times=float_times,
        times=times,
        conversions=conversions,
        damage=damage,
        other_bytes=sum(_bytes(tensor, target.floats) for tensor in tensors if tensor is not None),
        machine=prober.machine,
        taken=prober.measured,
        floats=target.floats,
        whole=whole is not None,
        savings=savings,
        notes=prober.notes,
    )


def _bytes(tensor: ir.TensorProtocol, floats: Floats) -> int:
    wide = tensor.dtype == ir.DataType.FLOAT
    return tensor.size * FLOAT_BYTES[floats] if wide else tensor.nbytes


def _fit(
    times: Mapping[str, Mapping[Label, list[float]]],
    alone: Sequence[float],
    float_times: Sequence[float],
) -> None:
    """Scale what was timed alone, in place, where it sums up to more than the whole float model.

    Small ops take longer alone: each run of a probe has a cost of its own.
    """
    for at, (linears, whole) in enumerate(zip(alone, float_times, strict=True)):
        factor = min(1.0, whole / linears) if linears > 0 else 1.0
        for labels in times.values():
            for seconds in labels.values():
                seconds[at] *= factor


def estimate_damage(
    model: TracedModel,
    stats: Mapping[str, Stats],
    options: Mapping[str, Options],
    config: CompileConfig,
    target: Target,
    batches: Sequence[Batch],
    work: Path,
    progress: Step,
) -> tuple[Damage, Importance | None, str]:
    """The damage of every implementation of every op, in a graph smoothed for codes everywhere.

    Returns:
        The damage, how much each Linear's outputs count (None where it is not known), and how the
        damage was found.
    """
    tokens = model.kind == "text-generation"
    samples = short_samples(
        work / "canonical.onnx",
        batches,
        TOKEN_SAMPLES if tokens else ROW_SAMPLES,
        TOKENS if tokens else None,
    )
    gradients, how = None, "gradient"
    try:
        gradients = measure_gradients(
            work / "canonical.onnx", samples, model.kind, seed=config.seed, progress=progress
        )
    except UnsupportedOpError as unsupported:
        how = f"each op alone: no gradient through {unsupported} is known here"
    importance = gradients.importance if gradients is not None else None
    modes = {
        n: next((m for m in found.labels if m in (*MODES, *FP8, "llm-int8")), None)
        for n, found in options.items()
    }
    chosen = {n: Choice(mode or "float", "trial") for n, mode in modes.items()}
    graph = model.ir.clone()
    Untie(name for name, mode in modes.items() if mode)(graph)
    smoothing = plan_smoothing(
        find_sites(graph.graph), stats, config, chosen, importance=importance
    ).in_place
    if gradients is not None:
        del graph
        return (
            damage_by_gradient(
                model.ir, gradients, options, stats, smoothing, config, target, progress
            ),
            importance,
            how,
        )
    SmoothQuant(smoothing)(graph)
    graph = spill(graph, work, "trial")
    release(model.ir)
    trials = trial_plans(find_sites(graph.graph), stats, smoothing, options, config, target)
    release(graph)
    path = work / "trial.onnx"
    damage = measure_alone(path, trials, samples, model.kind, target, progress=progress)
    for name in ("trial.onnx", "trial.onnx.data"):
        (work / name).unlink()
    return damage, importance, how


def damage_by_gradient(
    model: ir.Model,
    gradients: Gradients,
    options: Mapping[str, Options],
    stats: Mapping[str, Stats],
    smoothing: SmoothingPlan,
    config: CompileConfig,
    target: Target,
    progress: Step | None = None,
) -> Damage:
    """The damage of every implementation of every op.

    Args:
        model: the canonical float graph, not smoothed; its weights are unmapped when they are read.
        gradients: of that graph; what was seen of an op is dropped when its damage is known.
        options: of every Linear.
        stats: of every site.
        smoothing: what the implementations are to be tried with.
        config: `ranges` and the recipe.
        target: whether its kernel saturates.
        progress: called with (sites done, sites in all).
    """
    damage: Damage = {}
    sites = find_sites(model.graph)
    for done, site in enumerate(sites):
        # One site at a time: codes of all labels for all weights would not fit beside them.
        scale = smoothing.scale_of(site.name)
        own = {linear.name: options[linear.name] for linear in site.linears}
        weights = partial(sampled_weight, scale=scale)
        plans = trial_plans([site], stats, smoothing, own, config, target, weights)
        for linear in site.linears:
            seen = gradients.seen.pop(linear.name)
            damage[linear.name] = measure_damage(
                linear, plans, seen, gradients.rows, scale, blockwise=target.blockwise
            )
        release(model)
        if progress:
            progress(done + 1, len(sites))
    return damage


def short_samples(
    path: Path, batches: Sequence[Batch], count: int, tokens: int | None
) -> list[Batch]:
    """The first `count` samples of `batches`, each a feed of its own, cut to `tokens` if they can
    be: all inputs [batch, sequence], of any length. What is padded on the left keeps its end."""
    session = open_session(path)
    found: list[Batch] = []
    for batch in batches:
        samples = divisible(session, batch)
        if samples is None:
            found.append(batch)
        else:
            found += [
                {k: v[at : at + 1] for k, v in batch.items()}
                for at in range(min(samples, count - len(found)))
            ]
        if len(found) >= count:
            break
    free = all(len(i.shape) == 2 and not isinstance(i.shape[1], int) for i in session.get_inputs())
    if tokens is not None and free:
        found = [_shortened(feed, tokens) for feed in found]
    return found[:count]


def _shortened(feed: Batch, tokens: int) -> Batch:
    mask = feed.get("attention_mask")
    padded = mask is not None and not mask[:, 0].all()
    part = slice(-tokens, None) if padded else slice(tokens)
    return {name: value[:, part] for name, value in feed.items()}
