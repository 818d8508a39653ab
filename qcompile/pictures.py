"""The report's pictures of error and choice. Where there is nothing to draw, it is said why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import NullLocator

from qcompile.drawing import (
    TICKS,
    Missing,
    Picture,
    dots,
    graph_order,
    label_color,
    legend,
    locator,
    logarithmic,
    title_y,
)
from qcompile.headline import baseline
from qcompile.report import Cache, Report
from qcompile.svg import INK, color, figure, to_svg


def sqnr_picture(reports: Sequence[tuple[str, Report]]) -> Picture | Missing:
    """SQNR at the output of every op; colours tell implementations, or artifacts where several."""
    title = "Signal to noise at every op's output"
    rows = [(at, op) for at, (_, report) in enumerate(reports) for op in report.ops]
    measured = [(at, op, op.sqnr_db) for at, op in rows if op.sqnr_db is not None]
    if not measured:
        quantised = any(op.precision != "float" for _, op in rows)
        why = "no op's output was left by the fusions" if quantised else "nothing is quantised"
        return Missing(title, f"{why}, so there is no noise to measure per op.")
    names = list(dict.fromkeys(op.name for _, op in rows))
    place = {one: at for at, one in enumerate(names)}
    several = len(reports) > 1
    drawn, axes = figure(2.5)
    series: dict[int, list[tuple[float, float, str]]] = {}
    for at, op, decibels in measured:
        key = at if several else label_color(op.label or op.precision)
        who = f"{reports[at][0]}: " if several else ""
        tip = f"{who}{op.name}: {decibels:.1f} dB, {op.label or op.precision}"
        series.setdefault(key, []).append((place[op.name], decibels, tip))
    for key, points in series.items():
        dots(axes, points, color(key))
    graph_order(axes, names)
    title_y(axes, "dB")
    worst = min(measured, key=lambda row: row[2])
    series_names = (
        [(at, reports[at][0]) for at in series]
        if several
        else legend(op.label or op.precision for _, op, _ in measured)
    )
    return Picture(
        title,
        f"{len(measured)} ops; the least is {worst[2]:.1f} dB at {worst[1].name}.",
        to_svg(drawn, "sqnr"),
        series_names,
        "Higher is closer to float: at 20 dB the error is a tenth of the signal, at 40 dB a "
        "hundredth. An op's output carries the noise of all ops before it, so it falls from left "
        "to right; a sudden drop points at the op that made it. Numbers below are layers.",
    )


def gain_picture(report: Report) -> Picture | Missing:
    """Time saved against damage done, of every candidate of every op."""
    title = "Every candidate: time saved against damage"
    planning = report.planning
    if planning is None:
        return Missing(title, _unplanned(report))
    pairs = [
        (op.name, c, np.array(base.microseconds) - c.microseconds)
        for op in report.ops
        for base in op.candidates
        for c in op.candidates
        if base.label == "float" and c.label != "float"
    ]
    if not any(c.damage > 0.0 for _, c, _ in pairs):
        return Missing(title, "no op had a candidate that does damage.")
    floats = [c for op in report.ops for c in op.candidates if c.label == "float"]
    totals = np.sum([c.microseconds for c in floats], axis=0)
    drawn, axes = figure(2.9)
    for label, chosen in dict.fromkeys((c.label, c.chosen) for _, c, _ in pairs):
        points = [
            (
                100.0 * float(np.mean(saved / totals)),
                c.damage,
                f"{name}: {label}{', in the plan' if chosen else ''}",
            )
            for name, c, saved in pairs
            if (c.label, c.chosen) == (label, chosen) and c.damage > 0.0
        ]
        dots(axes, points, color(label_color(label)), filled=chosen)
    axes.axvline(0.0, color=INK, linewidth=0.6)
    logarithmic(axes)
    # An output head is often ten times any other op.
    axes.set_xscale("symlog", linthresh=1.0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, axis="both")
    axes.xaxis.set_major_formatter(TICKS)
    axes.set_xlabel(f"time saved, % of all Linears in {baseline(report)}")
    title_y(axes, f"damage, {planning.unit}")
    kept = sum(c.chosen for c in floats)
    shapes = ", ".join(f"{batch}×{length}" for batch, length in planning.shapes)
    return Picture(
        title,
        f"{len(pairs)} candidates of {len(floats)} ops, {kept} of which stay in float.",
        to_svg(drawn, "gain"),
        legend(c.label for _, c, _ in pairs),
        f"A dot is one op in one implementation; full ones are in the plan. Right of the line it "
        f"is faster than float (kernels alone, mean over {shapes}); lower is closer to float. "
        f"Worth having is what lies right and low. Ops that stay in float ({kept}) do not show.",
    )


def front_picture(report: Report) -> Picture | Missing:
    """The Pareto front, with the plan's place on it."""
    title = "Plans that none beats: speed against damage"
    planning = report.planning
    if planning is None:
        return Missing(title, _unplanned(report))
    drawn, axes = figure(2.9)
    axes.grid(True, axis="both")
    points = sorted((float(np.mean(p.speed)), p.damage, _front_tip(p.ops)) for p in planning.front)
    axes.plot([p[0] for p in points], [p[1] for p in points], color=color(1), linewidth=1.2)
    dots(axes, points, color(1), filled=False)
    mine = (float(np.mean(planning.speed)), planning.damage, "the plan")
    dots(axes, [mine], color(4), size=60.0, marker="D")
    axes.set_ylim(bottom=0.0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(locator(5))
        axis.set_major_formatter(TICKS)
    what = "speed" if planning.whole else "speed of the Linears"
    axes.set_xlabel(f"predicted {what}, × {baseline(report)}")
    title_y(axes, f"predicted {planning.unit}")
    return Picture(
        title,
        f"{len(planning.front)} plans from {points[0][0]:.2f} to {points[-1][0]:.2f} times the "
        f"speed of float; chosen: {mine[0]:.2f} times at {mine[1]:.3g}.",
        to_svg(drawn, "front"),
        [(4, "the plan"), (1, "Pareto front")],
        "Up is more damage, right is faster. Left of the plan: what more accuracy would cost in "
        "speed. Right of it: what more speed would cost in accuracy.",
    )


def cache_picture(cache: Cache | None) -> Picture | Missing:
    """What codes for keys and values do to the divergence, by position."""
    title = "Cache in codes: divergence by position"
    if cache is None:
        return Missing(
            title, "keys and values are not kept in codes (kv8 or kv4 after the scheme)."
        )
    if not cache.effect:
        return Missing(title, "no held-back sample was long enough to measure.")
    drawn, axes = figure(2.5)
    forms = list(cache.effect[0].kl)
    for at, form in enumerate(forms):
        places = [
            i + 0.8 * (at - (len(forms) - 1) / 2) / len(forms) for i in range(len(cache.effect))
        ]
        axes.bar(places, [row.kl[form] for row in cache.effect], 0.75 / len(forms), color=color(at))
    axes.set_xticks(
        range(len(cache.effect)), [f"{row.first} to {row.last}" for row in cache.effect]
    )
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(locator(5))
    axes.yaxis.set_major_formatter(TICKS)
    axes.set_xlabel("position")
    title_y(axes, "KL, nats")
    names = {"float": "kept in float", "keys": "keys in codes", "values": "values in codes"}
    figures = "; ".join(
        f"{row.first} to {row.last}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.kl.items())
        for row in cache.effect
    )
    return Picture(
        title,
        f"Mean KL by position. {figures}.",
        to_svg(drawn, "cache"),
        [(at, names.get(form, "both in codes")) for at, form in enumerate(forms)],
        f"{cache.samples} held-back samples. What rises above the first bar is the codes' doing; "
        "a bar that grows with the position is an error that adds up over a long text.",
    )


def _front_tip(ops: dict[str, int]) -> str:
    return ", ".join(f"{count} {label}" for label, count in ops.items())


def _unplanned(report: Report) -> str:
    if all(op.precision == "float" for op in report.ops):
        return f"the scheme {report.scheme} quantises nothing, so there was nothing to choose."
    return "nothing was timed: the plan is the scheme's, or was replayed."
