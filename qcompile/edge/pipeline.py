"""Compiling for `onnx-edge` on one page: what `qcompile.pipeline` is for the other targets."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedOpsetsPass

from qcompile import artifact
from qcompile.config import CompileConfig
from qcompile.correction import CorrectionPlan
from qcompile.edge.correcting import correction_of, equalization_of, with_shifts
from qcompile.edge.observing import observe_tensors
from qcompile.edge.plan import EdgePlan
from qcompile.edge.planning import plan_edge, require_any
from qcompile.edge.profiles import Profile, get_profile
from qcompile.edge.reporting import make_edge_report, measure_units
from qcompile.edge.rounding import round_linears
from qcompile.edge.settings import choose_settings
from qcompile.edge.sizing import choose_narrow
from qcompile.edge.smoothing import smooth_linears
from qcompile.edge.static_shapes import bind_shapes, check_input_shapes, fold_shapes
from qcompile.edge.units import find_units, inner_ops, keep_float, name_units
from qcompile.edge.verifying import verify_edge
from qcompile.equalization import EqualizationPlan
from qcompile.errors import VerificationError
from qcompile.ort_format import write_ort
from qcompile.passes.decompose import Decompose
from qcompile.passes.equalize import Equalize
from qcompile.passes.quantize_tensors import QuantizeTensors
from qcompile.passes.to_gemm import ToGemm
from qcompile.passes.to_opset import ToOpset
from qcompile.passes.zero_bias import ZeroBias
from qcompile.pipeline import calibration_data, run, traced
from qcompile.precision import PrecisionPlan
from qcompile.progress import Phases
from qcompile.ranges import Ranges, find_ranges
from qcompile.report import Report, SiteRow
from qcompile.reporting import site_rows
from qcompile.schemes import Scheme
from qcompile.shared import Shared
from qcompile.smoothing import SmoothingPlan
from qcompile.spill import spill
from qcompile.targets import Target
from qcompile.traced import TracedModel


def compile_edge(
    shared: Shared,
    target: Target,
    target_spec: str,
    scheme: Scheme,
    config: CompileConfig,
    folder: Path,
    phases: Phases,
) -> Report:
    """Compile into `folder`, which is there and empty; what `shared` lacks is added to it.

    All is planned on a float graph of opset 23 in primitive operators; that its operators are
    stated in an older opset comes last.
    """
    work, profile = shared.work, get_profile(target_spec.partition(":")[2])
    settings, runtime = choose_settings(profile, config), target.runtime()
    with phases.phase("trace"):
        model = shared.model or _traced(shared, config, profile)
        shared.model = model

    with phases.phase("data") as step:
        data = shared.data or calibration_data(
            shared.calibration, model, config, scheme, work, step
        )
        shared.data = data

    graph, smoothing, rows = model.ir.clone(), SmoothingPlan(), list[SiteRow]()
    ranges = Ranges()
    if scheme.quantizes:
        with phases.phase("smooth") as step:
            smoothing, stats = smooth_linears(graph, config, data.calibration, work, progress=step)
            rows = site_rows(stats, smoothing, PrecisionPlan())
            ranges = find_ranges(model.ir, graph, stats, smoothing)
            stats.clear()
    with phases.phase("lower"):
        graph, float_path = _primitive(graph, config.opset, work)
    equalization, correction = EqualizationPlan(), CorrectionPlan()
    if scheme.quantizes and profile.activations and config.equalize is not False:
        with phases.phase("equalize") as step:
            equalization = equalization_of(
                graph, data.calibration, work, settings, profile, progress=step
            )
            run(graph, [Equalize(equalization)])
            graph, float_path = spill(graph, work, "equalized"), work / "equalized.onnx"

    plan = EdgePlan()
    if scheme.quantizes:
        with phases.phase("calibrate") as step:
            units = find_units(graph.graph, profile)
            kept = keep_float(units, config.recipe)
            seen = observe_tensors(graph, units, data.calibration, work, progress=step)
        with phases.phase("quantize") as step:
            plan = plan_edge(units, seen, profile, settings, kept)
            require_any(plan)
            narrow = choose_narrow(graph, plan, units, seen, profile, config)
            codes = {}
            if settings.in_sequence:
                plan = plan_edge(units, seen, profile, settings, kept, narrow)
                codes = round_linears(graph, plan, data.calibration, work, settings, progress=step)
            if narrow or codes:
                plan = plan_edge(units, seen, profile, settings, kept, narrow, codes)
        if profile.activations and config.bias_correction is not False:
            with phases.phase("correct") as step:
                correction = correction_of(graph, plan, data.calibration, work, progress=step)
            plan = with_shifts(plan, correction.shifts)
        run(graph, [QuantizeTensors(plan)])
    with phases.phase("emit"):
        run(graph, [ToOpset(config.opset), RemoveUnusedOpsetsPass()])
        path = target.emit(graph, folder)

    with phases.phase("verify") as step:
        findings = verify_edge(
            work / "traced.onnx", float_path, path, profile, settings, config.opset, runtime,
            model.kind, data.held_back, progress=step,
        )  # fmt: skip
        if findings.problems and config.strict:
            raise VerificationError(
                "; ".join(findings.problems), hint="--no-strict writes the artifact all the same"
            )
        sqnr = measure_units(float_path, path, plan, runtime, data.held_back[0])
        if config.format == "ort" and target.ort_style is not None:
            write_ort(path, target.ort_style, data.held_back[0], runtime)

    report = make_edge_report(
        model, target, target_spec, scheme, data, smoothing, rows, plan, findings, sqnr, phases,
        equalization, correction,
    )  # fmt: skip
    if scheme.quantizes:
        report.warnings += inner_ops(graph.graph, profile)
    artifact.complete(
        folder, model, target, report, ranges, plan, None, config, data.held_back[0],
        work / "traced.onnx",
    )  # fmt: skip
    return report


def _traced(shared: Shared, config: CompileConfig, profile: Profile) -> TracedModel:
    """The canonical graph, its inputs of the shapes that were asked for."""
    model = traced(shared.source, config, shared.work)
    bind_shapes(model.ir, check_input_shapes(model, config.edge.shapes, profile))
    return model


def _primitive(graph: ir.Model, opset: int, work: Path) -> tuple[ir.Model, Path]:
    """The float graph in ops that are planned one by one, and where it is written."""
    run(graph, [Decompose(opset), ZeroBias(), NameFixPass()])
    fold_shapes(graph)
    run(graph, [ToGemm(), NameFixPass()])
    name_units(graph.graph)
    return spill(graph, work, "primitive"), work / "primitive.onnx"
