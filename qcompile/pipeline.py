"""The compiler on one page: every phase, in order."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from qcompile import artifact, frontend
from qcompile.cache import MAX_LENGTH
from qcompile.cache_effect import cache_report
from qcompile.cache_plan import CachePlan
from qcompile.cache_planning import plan_cache
from qcompile.calibration.data import CalibrationData, load_calibration
from qcompile.calibration.generate import generate_calibration
from qcompile.calibration.run import HISTOGRAM_STRIDE, calibrate
from qcompile.calibration.stats import Stats
from qcompile.checkpoints.scheme import check_traced
from qcompile.choosing import decide, scheme_choice
from qcompile.codes import find_codes
from qcompile.config import CompileConfig
from qcompile.correction import correct_linears
from qcompile.errors import VerificationError
from qcompile.gradients import Importance
from qcompile.joining import plan_columns, plan_joins
from qcompile.keeping import keep_plan
from qcompile.last import keep_last
from qcompile.limits import (
    broken_limits,
    check_cache_bits,
    check_limits,
    check_seq_len,
    incomparable,
    ragged,
)
from qcompile.linears import find_sites
from qcompile.measuring import measure
from qcompile.options import find_options, needs_ranges, require_any, scales_channels
from qcompile.ort_format import write_ort
from qcompile.passes.attention_3d import AttentionTo3D
from qcompile.passes.canonical_linear import CanonicalLinear
from qcompile.passes.correct_bias import CorrectBias
from qcompile.passes.fold_affine import FoldAffine
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.fuse_gelu import FuseGelu
from qcompile.passes.fuse_layer_norm import FuseLayerNorm
from qcompile.passes.fuse_rms_norm import FuseRmsNorm
from qcompile.passes.join_products import JoinProducts
from qcompile.passes.kv_cache import KvCache
from qcompile.passes.outer_product import OuterProduct
from qcompile.passes.packed_attention import PackedAttention
from qcompile.passes.permute_channels import PermuteChannels
from qcompile.passes.quantize import Quantize
from qcompile.passes.scale_columns import ScaleColumns
from qcompile.passes.smooth_quant import SmoothQuant
from qcompile.passes.unmerge_heads import UnmergeHeads
from qcompile.passes.untie import Untie
from qcompile.planfile import PLAN, PlanFile
from qcompile.planning import float_plan, plan_precision
from qcompile.precision import Choice, Floats, PrecisionPlan
from qcompile.progress import Phases, Step
from qcompile.ranges import Ranges, find_ranges
from qcompile.report import Report
from qcompile.reporting import make_report, site_rows
from qcompile.schemes import Scheme
from qcompile.session import open_session
from qcompile.shapes import check_shapes, default_shapes, prompt_length, timing_feeds
from qcompile.shared import Calibration, Shared, checked
from qcompile.smoothing import SmoothingPlan, plan_smoothing
from qcompile.spill import release, spill, spill_derived
from qcompile.staging import staged
from qcompile.targets import Target
from qcompile.traced import TracedModel
from qcompile.trying import Applied, keep_within, tried_kl
from qcompile.verify import measure_sqnr, verify


def canonicalize(kept: Collection[str] = ()) -> list[ir.passes.InPlacePass]:
    """The few standard forms that every later phase matches. A new pass is one more line here.

    Args:
        kept: Linears whose weights stay as they are, bit for bit.
    """
    return [
        NameFixPass(),
        FuseLayerNorm(),
        FuseRmsNorm(),
        FuseGelu(),
        UnmergeHeads(),
        FuseAttention(),
        AttentionTo3D(),
        CanonicalLinear(kept),
        FoldAffine(kept),
    ]


def compile_model(
    source: frontend.Source,
    *,
    target: str,
    scheme: Scheme,
    calibration: Calibration,
    config: CompileConfig,
    output: Path,
    overwrite: bool = False,
    phases: Phases | None = None,
) -> artifact.Artifact:
    """Compile `source` into the folder `output`. See `qcompile.compile` for the arguments;
    `scheme` is what `choose_scheme` found for `source`.

    Raises:
        QcompileError: anything that cannot be done; nothing is left at `output` then.
    """
    chosen_target, config = checked(target, scheme, calibration, config)
    check_seq_len(source, calibration, config)
    with staged(output, overwrite=overwrite) as (folder, work):
        shared = Shared(source, calibration, work)
        report = compile_shared(
            shared, chosen_target, target, scheme, config, folder, phases or Phases()
        )
    if config.plan_out is not None:
        shutil.copyfile(output / PLAN, config.plan_out)
    return artifact.Artifact(path=output, report=report)


def compile_shared(
    shared: Shared,
    target: Target,
    target_spec: str,
    scheme: Scheme,
    config: CompileConfig,
    folder: Path,
    phases: Phases,
) -> Report:
    """Compile into `folder`, which is there and empty; what `shared` lacks is added to it."""
    if target.tensors:
        from qcompile.edge.pipeline import compile_edge  # it is made of the same phases as this

        return compile_edge(shared, target, target_spec, scheme, config, folder, phases)
    work = shared.work
    with phases.phase("trace"):
        model = shared.model or traced(shared.source, config, work)
        shared.model = model
        check_traced(scheme, model)
        check_limits(config, model)
        traced_path = work / "traced.onnx"

    cached = with_cache() if config.cache else ()
    lowered = partial(_lowered_float, model, target)
    baseline_path = float_path = lowered(cached, "float32", work / "float.onnx")
    if scheme.cache_bits is not None:
        check_cache_bits(float_path, scheme.cache_bits)
    if scheme.quantizes and target.floats != "float32":
        # The same in the type of what is not quantised: this a quantised model has to beat.
        baseline_path = lowered(cached, target.floats, work / "baseline.onnx")
    # Calibration and plans are of the graph without a cache: the same sites, the same weights.
    planned_path = lowered((), target.floats, work / "planned.onnx") if cached else baseline_path

    with phases.phase("data") as step:
        data = shared.data or calibration_data(
            shared.calibration, model, config, scheme, work, step
        )
        shared.data = data
        timed = timing_feeds(config.shapes or default_shapes(model), data.held_back[0])

    graph, decision, notes, ranges = model.ir.clone(), None, list[str](), Ranges()
    smoothing, stats, apart = SmoothingPlan(), dict[str, Stats](), list[str]()
    floats = scheme.floats or target.floats
    plan = float_plan(find_sites(graph.graph), f"scheme {scheme.name}", floats)
    if scheme.keeps:
        assert model.checkpoint is not None
        with phases.phase("plan"):
            sites = find_sites(graph.graph)
            plan, notes = keep_plan(sites, model.checkpoint, target, model.adapter)
        PlanFile.of(target_spec, scheme.by(config.method), plan, smoothing, config.recipe).write(
            folder / PLAN
        )
    elif model.checkpoint is not None:
        notes.append(
            f"{model.checkpoint.description}: its codes are dequantised, as the scheme says"
        )
        notes += model.checkpoint.notes
    elif scheme.quantizes:
        sites = find_sites(graph.graph)
        replayed = PlanFile.read(config.plan_in) if config.plan_in else None
        if replayed:
            config = config.model_copy(update={"recipe": replayed.recipe})
        options = find_options(sites, config, scheme, target, model.adapter)
        require_any(options, graph)
        chosen = replayed.chosen(options, sites, target) if replayed else scheme_choice(options)
        if needs_ranges(options, chosen) or scales_channels(chosen, config):
            with phases.phase("calibrate") as step:
                stride = 1 if config.wants_histograms else HISTOGRAM_STRIDE
                found = shared.stats or calibrate(
                    graph, sites, data.calibration, work, histogram_stride=stride, progress=step
                )
                shared.stats = found if shared.several else None
                stats = dict(found)
                del found
        measurable = target.unmeasured is None or config.costs is not None
        if replayed is None and config.objective != "scheme" and measurable:
            with phases.phase("plan") as step:
                measured = measure(
                    model, planned_path, options, stats, data, timed, config, target, work, step
                )
                decision = decide(measured, config)
                chosen = decision.chosen
        importance = decision.measured.importance if decision is not None else None
        apply = partial(
            _apply, model, stats, data, replayed, importance, config, target, work, phases
        )
        if decision is not None and config.max_kl is not None:
            tried = partial(tried_kl, target, traced_path, model.kind, data.held_back, work)
            decision, (graph, smoothing, plan) = keep_within(
                decision, config, apply, tried, work, phases
            )
        else:
            graph, smoothing, plan = apply(chosen)
        ranges = find_ranges(model.ir, graph, stats, smoothing)
        PlanFile.of(target_spec, scheme.by(config.method), plan, smoothing, config.recipe).write(
            folder / PLAN
        )
    rows = site_rows(stats, smoothing, plan)
    stats.clear()
    smoothed = graph.clone()
    cache = None
    if scheme.cache_bits is not None:
        with phases.phase("cache") as step:
            cache = plan_cache(smoothed, scheme.cache_bits, data.calibration, work, progress=step)
    if config.bias_correction:
        with phases.phase("correct") as step:
            correction = correct_linears(graph, plan, data.calibration, work, progress=step)
        run(graph, [CorrectBias(correction)])
    run(graph, [Quantize(plan)])

    with phases.phase("lower"):
        run(graph, [*(with_cache(cache) if config.cache else ()), *target.lower(plan)])
        if config.cache:
            packing = PackedAttention(model.max_length)
            run(
                graph,
                [
                    *([packing] if target.packs else ()),
                    JoinProducts(plan_joins(plan, target)),
                    ScaleColumns(plan_columns(plan, target, last=config.last_logits)),
                ],
            )
            apart = packing.notes
            notes += ragged(plan)
            if model.max_length is not None:
                graph.metadata_props[MAX_LENGTH] = str(model.max_length)
        path = target.emit(graph, folder)

    with phases.phase("verify") as step:
        findings = verify(
            traced_path,
            float_path,
            path,
            plan,
            target,
            model.kind,
            data.held_back,
            None if incomparable(target, scheme, config) else timed,
            baseline_path=baseline_path,
            past=prompt_length(model) if config.cache else None,
            progress=step,
        )
        here = decision is None or not decision.foreign(target)
        findings.problems.extend(broken_limits(config, findings, graph, here=here))
        if findings.problems and config.strict:
            raise VerificationError(
                "; ".join(findings.problems), hint="--no-strict writes the artifact all the same"
            )
        kept = None
        if cache is not None:
            kept = cache_report(cache, traced_path, path, target, model.kind, data.held_back)
        sqnr = measure_sqnr(smoothed, path, plan, data.held_back[0], work)
        if config.last_logits:
            keep_last(graph, path, target, data.held_back[0])
        if config.format == "ort" and target.ort_style is not None:
            write_ort(path, target.ort_style, data.held_back[0])

    report = make_report(
        model, target, target_spec, scheme, data, smoothing, rows, plan, findings, sqnr, phases,
        decision, config, kept,
    )  # fmt: skip
    report.warnings += notes
    report.apart = apart
    artifact.complete(
        folder, model, target, report, ranges, plan, cache, config, data.held_back[0], traced_path
    )
    return report


def traced(source: frontend.Source, config: CompileConfig, work: Path) -> TracedModel:
    model = frontend.load(source, config, work)
    check_shapes(config.shapes, model)
    stored = model.checkpoint.weights if model.checkpoint is not None else ()
    run(model.ir, canonicalize(stored))
    model.ir = spill(model.ir, work, "canonical")
    return model


def with_cache(plan: CachePlan | None = None) -> tuple[ir.passes.PassBase, ...]:
    """The passes that give a model a cache; rotary angles may be written like attention."""
    return (OuterProduct(), KvCache(plan))


def _lowered_float(
    model: TracedModel,
    target: Target,
    cached: Sequence[ir.passes.PassBase],
    floats: Floats,
    path: Path,
) -> Path:
    """The float graph as `target` runs it, written to `path` beside the weights."""
    graph = model.ir.clone()
    run(graph, [*cached, *target.lower(PrecisionPlan(floats=floats))])
    if cached and target.packs:
        run(graph, [PackedAttention(model.max_length)])
        spill_derived(graph, path)
    ir.save(graph, path, external_data=f"{path.name}.data" if floats != "float32" else None)
    return path


def _apply(
    model: TracedModel,
    stats: Mapping[str, Stats],
    data: CalibrationData,
    replayed: PlanFile | None,
    importance: Importance | None,
    config: CompileConfig,
    target: Target,
    work: Path,
    phases: Phases,
    chosen: Mapping[str, Choice],
    stem: str = "smoothed",
) -> Applied:
    """The graph smoothed for what was chosen, and the scales and codes that go with it."""
    graph = model.ir.clone()
    with phases.phase("smooth"):
        run(graph, [Untie(name for name, choice in chosen.items() if choice.mode)])
        alphas, kept = (replayed.smoothing, replayed.kept) if replayed is not None else (None, None)
        smoothing = plan_smoothing(
            find_sites(graph.graph), stats, config, chosen, alphas, importance, kept, target.floats
        )
        run(graph, [SmoothQuant(smoothing), PermuteChannels(smoothing)])
        graph = spill(graph, work, stem)
        release(model.ir)
    with phases.phase("quantize") as step:
        codes = find_codes(
            graph, chosen, stats, smoothing, config, target, data.calibration, work, step, kept
        )
        plan = plan_precision(
            find_sites(graph.graph), stats, smoothing, chosen, config, target, codes=codes,
            progress=step,
        )  # fmt: skip
        release(graph)
    return graph, smoothing, plan


def calibration_data(
    given: Calibration,
    model: TracedModel,
    config: CompileConfig,
    scheme: Scheme,
    work: Path,
    step: Step,
) -> CalibrationData:
    """What the user gave, or what can be generated; fp32 needs a few inputs to verify on."""
    if given is not None:
        return load_calibration(given, model, config)
    session = open_session(work / "canonical.onnx")
    if not scheme.calibrates:
        # Random inputs do to compare two float graphs; a model's own text is slow to write.
        model = dataclasses.replace(model, kind="other")
        config = config.model_copy(update={"samples": 4})
    data = generate_calibration(model, session, config, progress=step)
    if scheme.cache_bits is None and (scheme.keeps or not scheme.quantizes):
        # Nothing was calibrated, so the warning is of the figures alone.
        note = f"accuracy was measured on {data.origin}, not on real data; give --calibration"
        return dataclasses.replace(data, warnings=(note,))
    return data


def run(model: ir.Model, passes_: Sequence[ir.passes.PassBase]) -> bool:
    """Run passes in place, in order; True if any changed the graph."""
    modified = False
    for pass_ in passes_:
        modified |= pass_(model).modified
    return modified
