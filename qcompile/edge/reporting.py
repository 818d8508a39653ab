"""The report of an edge artifact, and the error at every op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.cache import fed
from qcompile.calibration.data import CalibrationData
from qcompile.correction import CorrectionPlan
from qcompile.edge.plan import BITS, ConstantQuant, EdgePlan, UnitPlan
from qcompile.edge.units import WEIGHTED
from qcompile.equalization import EqualizationPlan
from qcompile.metrics import sqnr_db
from qcompile.progress import Phases
from qcompile.report import OpRow, Report, SiteRow, UnitRow
from qcompile.reporting import begin_report
from qcompile.schemes import Scheme
from qcompile.session import Runtime, first_sample, open_session
from qcompile.smoothing import SmoothingPlan
from qcompile.targets import Target
from qcompile.traced import Batch, TracedModel
from qcompile.verify import Verification

_AT_ONCE: Final = 32
"""Tensors that leave a session together."""


def make_edge_report(
    model: TracedModel,
    target: Target,
    target_spec: str,
    scheme: Scheme,
    data: CalibrationData,
    smoothing: SmoothingPlan,
    sites: list[SiteRow],
    plan: EdgePlan,
    findings: Verification,
    sqnr: Mapping[str, float],
    phases: Phases,
    equalization: EqualizationPlan,
    correction: CorrectionPlan,
) -> Report:
    """The report of one compilation; sizes are filled in when the artifact is complete.

    `ops` are those with a weight, as for other targets; `units` are all.
    """
    weights = {c.node: c for c in plan.constants if c.role == "weight"}
    report = begin_report(
        model, target, target_spec, scheme, data, smoothing, sites, findings, phases
    )
    report.ops = [
        _op_row(unit, weights[unit.name], sqnr, alone=not plan.tensors)
        for unit in plan.quantized
        if unit.name in weights and unit.op in WEIGHTED
    ]
    report.units = [
        _unit_row(unit, plan, weights, sqnr, equalization, correction) for unit in plan.units
    ]
    return report


def measure_units(
    float_path: Path, path: Path, plan: EdgePlan, runtime: Runtime, feed: Batch
) -> dict[str, float]:
    """SQNR in dB of what every quantised op leaves, against the float graph, on one sample.

    Args:
        float_path: the float graph in primitive ops, as it was planned on.
        path: the compiled graph.
        plan: names the ops and their outputs.
        runtime: how it is opened here.
        feed: one feed, cut to its first sample.
    """
    units = plan.quantized
    one = first_sample(open_session(path, runtime), feed)
    floats, compiled = ir.load(float_path), ir.load(path)
    outputs = {str(v.name) for v in compiled.graph.outputs}

    def inner(name: str) -> bool:
        return name not in outputs and plan.tensor(name) is not None

    result: dict[str, float] = {}
    for start in range(0, len(units), _AT_ONCE):
        part = units[start : start + _AT_ONCE]
        names = [unit.output for unit in part]
        codes = [f"{name}/dequantized" if inner(name) else name for name in names]
        expected = _exposed(floats, names, one, float_path.parent, runtime)
        actual = _exposed(compiled, codes, one, path.parent, runtime)
        for unit, wanted, given in zip(part, expected, actual, strict=True):
            noise = np.square(wanted - given, dtype=np.float64).sum()
            signal = np.square(wanted, dtype=np.float64).sum()
            result[unit.name] = sqnr_db(float(signal), float(noise))
    return result


def _exposed(
    model: ir.Model, names: Sequence[str], feed: Batch, folder: Path, runtime: Runtime
) -> list[np.ndarray]:
    clone = model.clone()
    values = ir.convenience.create_value_mapping(clone.graph)
    clone.graph.outputs[:] = [values[name] for name in names]
    for value in clone.graph.outputs:
        value.dtype = ir.DataType.FLOAT
    RemoveUnusedNodesPass()(clone)
    path = folder / "exposed.onnx"
    ir.save(clone, path)
    session = open_session(path, runtime)
    path.unlink()
    results: list[np.ndarray] = session.run(list(names), fed(session, feed))
    return results


def _op_row(
    unit: UnitPlan, weight: ConstantQuant, sqnr: Mapping[str, float], *, alone: bool
) -> OpRow:
    """`alone`: activations stay in float."""
    precision: Literal["int4", "int8", "int16"] = (
        "int16" if BITS[unit.code or "int8"] > 8 else "int8"
    )
    if BITS[weight.code] == 4:
        precision = "int4"
    scales = weight.scale.size if weight.axis is not None else 1
    width = weight.codes.shape[weight.axis] if weight.axis is not None else weight.codes.shape[-1]
    return OpRow(
        name=unit.name,
        precision="weight8" if alone else precision,
        reason=f"{unit.reason}; {weight.code}, {scales} {'scales' if scales > 1 else 'scale'}",
        shape=(weight.codes.size // max(width, 1), width),
        label="weight8" if alone else "static",
        method=unit.method,
        bytes=weight.nbytes,
        kernel=unit.op,
        sqnr_db=sqnr.get(unit.name),
    )


def _unit_row(
    unit: UnitPlan,
    plan: EdgePlan,
    weights: Mapping[str, ConstantQuant],
    sqnr: Mapping[str, float],
    equalization: EqualizationPlan,
    correction: CorrectionPlan,
) -> UnitRow:
    tensor = plan.tensor(unit.output) if unit.code is not None else None
    weight, by = weights.get(unit.name), f", {unit.method}" if unit.method else ""
    return UnitRow(
        name=unit.name,
        op=unit.op,
        codes=unit.code,
        reason=unit.reason,
        scale=tensor.scale if tensor else None,
        zero_point=tensor.zero_point if tensor else None,
        range=(tensor.low, tensor.high) if tensor else None,
        predicted_db=tensor.sqnr_db if tensor else None,
        sqnr_db=sqnr.get(unit.name),
        weights=f"{weight.code}, {weight.scale.size} scales{by}" if weight else None,
        equalized=equalization.told(unit.name),
        corrected=correction.told(unit.nodes[0]),
    )
