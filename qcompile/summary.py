"""Tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile.artifact import PAGE, Artifact
from qcompile.benching import Rate
from qcompile.comparing import Row
from qcompile.headline import FIGURES, headline, megabytes
from qcompile.methods import METHODS, PER_CHANNEL, SUMMARIES
from qcompile.precision import LABELS
from qcompile.report import CandidateRow, Planning, Report
from qcompile.schemes import CACHES, SCHEMES
from qcompile.targets import Target


def print_summary(artifact: Artifact, console: Console) -> None:
    """What was made, how large, how close to float, how fast."""
    report = artifact.report
    table = Table(title=f"{escape(report.model)} → {escape(str(artifact.path))}", show_header=False)
    for label, text in headline(report).items():
        table.add_row(label, escape(text))
    table.add_row("report", escape(str(artifact.path / PAGE)))
    console.print(table)
    if report.refusals:
        console.print(
            f"sites that could not be smoothed: {len(report.refusals)}; "
            f"`qcompile inspect {escape(str(artifact.path))}` says why."
        )


def print_ops(report: Report, console: Console) -> None:
    """The plan, an op a row, then the activations, a site a row."""
    ops = Table(title=f"{escape(report.model)}: {report.target}, {report.scheme}")
    for column in ("module", "K×N", "precision", "kernel", "SQNR", "16-bit safe", "reason"):
        ops.add_column(column, overflow="fold")
    for op in report.ops:
        ops.add_row(
            escape(op.name),
            f"{op.shape[0]}×{op.shape[1]}",
            ", ".join(
                [
                    op.precision,
                    *([op.method] if op.method else []),
                    *([f"{op.kept} channels float"] if op.kept else []),
                ]
            ),
            op.kernel or "fused away",
            f"{op.sqnr_db:.1f} dB" if op.sqnr_db is not None else "",
            op.saturation_safe or "",
            escape(op.reason),
        )
    for row in report.leftovers:
        ops.add_row(escape(row.name), "", "float", "", "", "", f"{row.op}: {escape(row.reason)}")
    console.print(ops)
    if report.units:
        _print_units(report, console)
    if report.planning is not None:
        _print_planning(report, report.planning, console)
    if not report.sites:
        return
    sites = Table(title="activations, before → after smoothing")
    columns = ["site", "α", "absmax", "std", "kurtosis", "smoothing"]
    if not report.units:  # whose table says what has codes
        columns.insert(-1, "quantised")
    for column in columns:
        sites.add_column(column, overflow="fold")
    for site in report.sites:
        sites.add_row(
            escape(site.name),
            "" if site.alpha is None else f"{site.alpha:g}",
            f"{site.before.absmax:.3g} → {site.after.absmax:.3g}",
            f"{site.before.std:.3g} → {site.after.std:.3g}",
            f"{site.before.kurtosis:.3g} → {site.after.kurtosis:.3g}",
            *([] if report.units else [site.activations or "no"]),
            escape(site.smoothing),
        )
    console.print(sites)


def _print_units(report: Report, console: Console) -> None:
    """Every op of a graph whose tensors have codes, weight or not."""
    table = Table(title="ops, and the codes of what they leave")
    for column in ("op", "type", "codes", "scale", "zero", "rounding", "SQNR", "weights", "reason"):
        table.add_column(column, overflow="fold")
    for unit in report.units:
        table.add_row(
            escape(unit.name),
            unit.op,
            unit.codes or "float",
            f"{unit.scale:.3g}" if unit.scale is not None else "",
            str(unit.zero_point) if unit.zero_point is not None else "",
            f"{unit.predicted_db:.1f} dB" if unit.predicted_db is not None else "",
            f"{unit.sqnr_db:.1f} dB" if unit.sqnr_db is not None else "",
            unit.weights or "",
            escape(unit.reason),
        )
    console.print(table)


def _print_planning(report: Report, planning: Planning, console: Console) -> None:
    """What every op was chosen from, then the front, with the chosen plan's place on it."""
    shapes = ", ".join(f"{batch}×{length}" for batch, length in planning.shapes)
    table = Table(title=f"candidates: microseconds at {shapes} (estimated {planning.unit})")
    labels = [k for k in LABELS if any(c.label == k for op in report.ops for c in op.candidates)]
    for column in ("module", *labels):
        table.add_column(column, overflow="fold")
    for op in report.ops:
        cells = {row.label: row for row in op.candidates}
        table.add_row(escape(op.name), *(_candidate(cells.get(label)) for label in labels))
    console.print(table)
    limits = "".join(f", {name} {value:g}" for name, value in planning.limits.items())
    speed = "speed" if planning.whole else "speed of the Linears"
    title = f"predicted {speed} against {planning.unit}: {planning.objective}{limits}"
    front = Table(title=title)
    for column in ("", "speed", planning.unit, "weights", "ops", "change from the plan"):
        front.add_column(column, overflow="fold")
    points = [(p.speed, p.damage, p.bytes, p.ops, p.changes) for p in planning.front]
    if all(changes for *_, changes in points):
        own = Counter[str](c.label for op in report.ops for c in op.candidates if c.chosen)
        points.append((planning.speed, planning.damage, planning.bytes, {**own}, {}))
    for speeds, damage, size, counts, changes in sorted(points, key=lambda p: p[1], reverse=True):
        front.add_row(
            "" if changes else "→",
            ", ".join(f"{ratio:.2f}" for ratio in speeds),
            f"{damage:.3g}",
            megabytes(size),
            ", ".join(f"{n} {label}" for label, n in counts.items()),
            escape(_listed(changes)) if changes else "the plan",
        )
    console.print(front)
    gap = "exact" if planning.gap == 0.0 else f"within {planning.gap:.1e} of the optimum"
    console.print(f"solved by {planning.method}, {gap}; {planning.measured} times taken for it")
    console.print(f"{planning.unit} of an op: {escape(planning.sensitivity)}")


def _candidate(row: CandidateRow | None) -> str:
    if row is None:
        return ""
    times = ", ".join(f"{t:.4g}" for t in row.microseconds)
    text = f"{times} ({row.damage:.1e})" if row.damage else times
    return f"[bold]{text}[/]" if row.chosen else text


def _listed(changes: Mapping[str, str]) -> str:
    shown = [f"{name}: {label}" for name, label in list(changes.items())[:3]]
    more = len(changes) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def scheme_lines() -> Iterator[str]:
    """Every scheme, and what may follow its name."""
    for scheme in SCHEMES.values():
        yield f"{scheme.name:10} {scheme.summary}"
    having = ", ".join(s.name for s in SCHEMES.values() if s.methods == METHODS)
    coded = ", ".join(s.name for s in SCHEMES.values() if s.methods == PER_CHANNEL)
    yield f"Methods of {having}, and of {coded} where marked, after a colon:"
    for method, summary in SUMMARIES.items():
        yield f"  :{method:9}{'*' if method in PER_CHANNEL else ' '} {summary}"
    for suffix, bits in CACHES.items():
        yield f"…{suffix:9} any of these, keys and values kept in {bits} bits"


def targets_table(targets: Mapping[str, type[Target]]) -> Table:
    """Every target and its capability table."""
    table = Table()
    for column in ("target", "op", "form", "weights", "kernel", "note"):
        table.add_column(column, overflow="fold")
    for name, target in targets.items():
        variants = f"\n({name}:{'|'.join(target.variants)})" if target.variants else ""
        for at, row in enumerate(target.capabilities):
            table.add_row(
                f"{name}{variants}\n{target.summary}" if at == 0 else "",
                row.op,
                row.label,
                row.weights,
                row.kernel,
                row.note,
            )
    return table


def rates_table(rates: Sequence[Rate]) -> Table:
    """Tokens per second, and how many times the first artifact's."""
    table = Table()
    for column in ("artifact", "prefill, tokens/s", "", "decode, tokens/s", ""):
        table.add_column(column, overflow="fold")
    first = rates[0]
    for rate in rates:
        table.add_row(
            escape(rate.folder),
            f"{rate.prefill:.1f}",
            f"{rate.prefill / first.prefill:.2f}×",
            f"{rate.decode:.1f}",
            f"{rate.decode / first.decode:.2f}×",
        )
    return table


def comparison_table(rows: Sequence[Row], title: str) -> Table:
    """One scheme a line: size, what it does to accuracy, how fast."""
    made = [row for row in rows if row.error is None]
    figures = [name for name in FIGURES if any(name in row.accuracy for row in made)]
    shapes = list(dict.fromkeys(shape for row in made for shape in row.speed))
    table = Table(title=escape(title))
    for heading in ("scheme", "size", *(FIGURES[name][0] for name in figures)):
        table.add_column(heading)
    for shape in shapes:
        table.add_column(f"speed at {shape}")
    table.add_column("")
    for row in rows:
        cells = [f"{row.accuracy[name]:.4g}" if name in row.accuracy else "" for name in figures]
        cells += [f"{row.speed[shape]:.2f}" if shape in row.speed else "" for shape in shapes]
        size = "" if row.error is not None else megabytes(row.bytes)
        table.add_row(row.scheme, size, *cells, escape(row.error or ""))
    return table
