"""Say in the report how a plan was chosen, what it was chosen from, and what the next one buys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from qcompile.choosing import Decision
from qcompile.config import CompileConfig
from qcompile.labelling import Solution
from qcompile.precision import CODED, Label
from qcompile.report import CandidateRow, FrontRow, Planning
from qcompile.sensitivity import unit_of
from qcompile.traced import Kind


def planning_row(decision: Decision, config: CompileConfig, kind: Kind) -> Planning:
    """The choice as a whole."""
    measured, solution = decision.measured, decision.solution
    limits = {
        name: float(value)
        for name in ("max_kl", "min_speedup", "max_size")
        if (value := getattr(config, name)) is not None
    }
    return Planning(
        objective=config.objective,
        limits=limits,
        shapes=list(measured.shapes),
        unit=unit_of(kind),
        speed=measured.speeds(solution.cost),
        damage=float(solution.cost[-2]),
        bytes=int(solution.cost[-1] + measured.other_bytes),
        method=solution.method,
        gap=solution.gap,
        measured=measured.taken,
        machine=dict(measured.machine),
        sensitivity=measured.how,
        whole=measured.whole,
        front=[_front_row(point, decision) for point in decision.front()],
    )


def candidate_rows(decision: Decision) -> dict[str, list[CandidateRow]]:
    """What every op was chosen from, the quickest first."""
    measured = decision.measured
    rows: dict[str, list[CandidateRow]] = {}
    for site in measured.sites:
        savings = measured.savings.get(site.name, {})
        for linear in site.linears:
            name = linear.name
            # Float is shown where it was no option, too: it is what the others are measured by.
            labels: dict[Label, None] = dict.fromkeys((*measured.options[name].labels, "float"))
            rows[name] = sorted(
                (
                    CandidateRow(
                        label=label,
                        microseconds=_micro(measured.times[name][label]),
                        conversion=_micro(measured.conversions[site.name][label])
                        if label in CODED
                        else None,
                        saved=_micro(saved) if (saved := savings.get(label)) else None,
                        damage=measured.damage.get(name, {}).get(label, 0.0),
                        bytes=measured.bytes_of(linear, label),
                        chosen=decision.solution.labels[name] == label,
                    )
                    for label in labels
                ),
                key=lambda row: sum(row.microseconds),
            )
    return rows


def _front_row(point: Solution, decision: Decision) -> FrontRow:
    chosen: Mapping[str, str] = decision.solution.labels
    changes: dict[str, Label] = {
        name: label  # type: ignore[misc]
        for name, label in point.labels.items()
        if label != chosen[name]
    }
    return FrontRow(
        speed=decision.measured.speeds(point.cost),
        damage=float(point.cost[-2]),
        bytes=int(point.cost[-1] + decision.measured.other_bytes),
        ops=dict(Counter(point.labels.values())),
        changes=changes,
    )


def _micro(seconds: Sequence[float]) -> list[float]:
    return [round(1e6 * s, 2) for s in seconds]
