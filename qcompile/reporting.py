"""Fill the report from what the phases decided and found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qcompile.batch_norm import unfolded
from qcompile.calibration.data import CalibrationData
from qcompile.calibration.stats import Stats, Summary
from qcompile.choosing import Decision, kept_bytes, weight_bytes
from qcompile.config import CompileConfig
from qcompile.explaining import candidate_rows, planning_row
from qcompile.leftovers import find_leftovers
from qcompile.limits import incomparable
from qcompile.linears import Linear, find_linears
from qcompile.methods import Method
from qcompile.precision import FLOAT_BYTES, Choice, OpPlan, PrecisionPlan
from qcompile.progress import Phases
from qcompile.report import (
    Cache,
    CandidateRow,
    LeftoverRow,
    OpRow,
    Report,
    SiteRow,
    SummaryRow,
)
from qcompile.rounding import method_of
from qcompile.schemes import Scheme
from qcompile.smoothing import SmoothingPlan
from qcompile.targets.base import Target
from qcompile.traced import TracedModel
from qcompile.verify import Verification
from qcompile.weights import violations


def begin_report(
    model: TracedModel,
    target: Target,
    target_spec: str,
    scheme: Scheme,
    data: CalibrationData,
    smoothing: SmoothingPlan,
    sites: list[SiteRow],
    findings: Verification,
    phases: Phases,
    notes: Sequence[str] = (),
) -> Report:
    """What is reported alike on every target, with `notes` among the warnings; ops are missing."""
    warnings = [*data.warnings, *(unfolded(model.ir.graph) if scheme.quantizes else ())]
    if target.caveat:
        warnings.append(target.caveat)
    return Report(
        model=model.name,
        task=model.task,
        target=target_spec,
        scheme=scheme.name,
        calibration=data.origin,
        samples=data.samples,
        held_back=sum(len(next(iter(batch.values()))) for batch in data.held_back),
        seen=data.seen,
        warnings=[*warnings, *notes, *findings.problems],
        refusals=[
            f"{entry.site}: {entry.reason}"
            for entry in smoothing.entries
            if entry.reason.startswith("refused")
        ],
        accuracy=findings.accuracy,
        decoded=findings.decoded,
        speed=findings.speed,
        kernels=findings.kernels.counts,
        sites=sites,
        seconds=dict(phases.seconds),
    )


def make_report(
    model: TracedModel,
    target: Target,
    target_spec: str,
    scheme: Scheme,
    data: CalibrationData,
    smoothing: SmoothingPlan,
    sites: list[SiteRow],
    plan: PrecisionPlan,
    findings: Verification,
    sqnr: Mapping[str, float],
    phases: Phases,
    decision: Decision | None,
    config: CompileConfig,
    cache: Cache | None = None,
) -> Report:
    """The report of one compilation; sizes are filled in when the artifact is complete."""
    notes: list[str] = []
    nothing = incomparable(target, scheme, config)
    if nothing is not None and target.runs_here:
        notes.append(nothing)
    unplanned = scheme.quantizes and config.objective != "scheme" and config.costs is None
    if unplanned and target.unmeasured and decision is None:
        notes.append(target.unmeasured)
    notes += [
        f"at {speed.shape} the compiled model is slower than float on this "
        f"machine ({speed.ratio:.2f} of its speed)"
        for speed in findings.speed
        if scheme.quantizes and speed.ratio < 0.95
    ]
    if decision is not None and not plan.quantized:
        notes.append(
            "every op stays in float: no other plan is better for the objective and the limits"
        )
    if decision is not None and decision.measured.notes:
        notes += decision.measured.notes
    elif decision is not None and decision.foreign(target):
        notes.append(
            "the plan was made from times of another machine: "
            + ", ".join(decision.measured.machine.values())
        )
    report = begin_report(
        model, target, target_spec, scheme, data, smoothing, sites, findings, phases, notes
    )
    candidates = candidate_rows(decision) if decision is not None else {}
    linears = {linear.name: linear for linear in find_linears(model.ir.graph)}
    report.cache = cache
    report.ops = [
        _op_row(
            op,
            linears[op.name],
            plan,
            findings,
            sqnr,
            candidates.get(op.name, []),
            None if scheme.keeps else method_of(op.name, Choice(plan.label(op), ""), config),
        )
        for op in plan.ops
    ]
    if decision is not None:
        report.planning = planning_row(decision, config, model.kind)
    if scheme.quantizes:
        report.floats = target.floats
        report.leftovers = [
            LeftoverRow(name=left.name, op=left.op, reason=left.reason)
            for left in find_leftovers(model.ir.graph)
        ]
    return report


def site_rows(
    stats: Mapping[str, Stats], smoothing: SmoothingPlan, plan: PrecisionPlan
) -> list[SiteRow]:
    """What was seen and decided at every site."""
    return [_site_row(name, smoothing, seen, plan) for name, seen in stats.items()]


def _site_row(name: str, smoothing: SmoothingPlan, stats: Stats, plan: PrecisionPlan) -> SiteRow:
    entry = smoothing.of(name)
    assert entry is not None
    site = plan.site(name)
    return SiteRow(
        name=name,
        before=_summary(stats.summary()),
        after=_summary(stats.scaled(entry.scale).summary()),
        smoothing=entry.reason,
        alpha=entry.alpha,
        activations=site.activation.mode if site else None,
        scale=site.activation.scale if site else None,
        zero_point=site.activation.zero_point if site else None,
    )


def _op_row(
    op: OpPlan,
    linear: Linear,
    plan: PrecisionPlan,
    findings: Verification,
    sqnr: Mapping[str, float],
    candidates: list[CandidateRow],
    method: Method | None,
) -> OpRow:
    return OpRow(
        name=op.name,
        precision=op.precision,
        reason=op.reason,
        shape=(op.in_features, op.out_features),
        label=plan.label(op),
        method=method,
        bytes=_bytes(op, linear, plan),
        kept=_kept(op),
        candidates=candidates,
        kernel=findings.kernels.by_name.get(op.name),
        sqnr_db=sqnr.get(op.name),
        saturation_safe=_saturation(op, plan),
    )


def _kept(op: OpPlan) -> int | None:
    weight = op.weight
    return len(weight.kept.channels) if weight is not None and weight.kept is not None else None


def _bytes(op: OpPlan, linear: Linear, plan: PrecisionPlan) -> int:
    weight = op.weight
    if weight is None:
        return weight_bytes(linear, plan.label(op), plan.floats)
    kept = 0
    if weight.kept is not None:
        kept = kept_bytes(len(weight.kept.channels), op.out_features, plan.floats)
    if weight.block_size is None:
        # Copies of outlier channels included.
        return weight.codes.nbytes + weight.scale.nbytes + kept
    blocks, width = weight.scale.shape
    size: int = blocks * weight.block_size * width * weight.bits // 8  # the last block is padded
    if weight.zero_point is not None:
        size += -(-blocks * weight.bits // 8) * width
    floats = weight.scale.size + (weight.offset.size if weight.offset is not None else 0)
    return size + floats * FLOAT_BYTES[plan.floats] + kept


def _saturation(op: OpPlan, plan: PrecisionPlan) -> str | None:
    """What inputs the 16-bit sums of a kernel without VNNI are exact for."""
    site = plan.site(op.site)
    if op.precision != "int8" or op.weight is None or site is None:
        return None
    if violations(op.weight.codes, np.full(len(op.weight.codes), 255)) == 0:
        return "always"
    if violations(op.weight.codes, site.activation.highest) == 0:
        return "calibrated range"
    return "no"


def _summary(summary: Summary) -> SummaryRow:
    return SummaryRow(absmax=summary.absmax, std=summary.std, kurtosis=summary.kurtosis)
