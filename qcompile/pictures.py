"""The pictures of the report. Each is drawn where there is something to draw, else says why not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from qcompile.precision import LABELS
from qcompile.ranges import Ranges, SiteRanges, WeightRanges
from qcompile.report import Cache, Report
from qcompile.svg import INK, WIDTH, color, figure, to_svg

_TICKS: Final = FuncFormatter(lambda value, _: _number(value))
Array = npt.NDArray[Any]

_LAYERS: Final = 9
_BARS: Final = 128
"""Channels in a picture; of more, adjacent ones share a bar."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        title: what it shows.
        alt: the same with its main figures, for who does not see it.
        svg: the picture.
        legend: (number of the series colour, what it stands for).
        caption: how to read it.
    """

    title: str
    alt: str
    svg: Markup
    legend: list[tuple[int, str]]
    caption: str


@dataclasses.dataclass(frozen=True)
class Missing:
    """In the place of a picture: why there is nothing to draw."""

    title: str
    why: str


def label_color(label: str | None) -> int:
    """The series colour of an implementation, the same everywhere on the page."""
    names: Sequence[str] = LABELS
    return names.index(label) if label in names else len(names)


def sqnr_picture(reports: Sequence[tuple[str, Report]], name: str = "sqnr") -> Picture | Missing:
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
        key = at if several else label_color(op.label)
        who = f"{reports[at][0]}: " if several else ""
        tip = f"{who}{op.name}: {decibels:.1f} dB, {op.label or op.precision}"
        series.setdefault(key, []).append((place[op.name], decibels, tip))
    for key, points in series.items():
        _dots(axes, points, color(key))
    _graph_order(axes, names)
    _title_y(axes, "dB")
    worst = min(measured, key=lambda row: row[2])
    legend = (
        [(at, reports[at][0]) for at in series]
        if several
        else _legend(op.label or op.precision for _, op, _ in measured)
    )
    return Picture(
        title,
        f"{len(measured)} ops; the least is {worst[2]:.1f} dB at {worst[1].name}.",
        to_svg(drawn, name),
        legend,
        "Higher is closer to float; 20 dB is a tenth of the signal, 40 dB a hundredth. An op's "
        "output carries the noise of all ops before it, so it falls from left to right; a sudden "
        "drop points at the op that made it. Numbers below are layers.",
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
        _dots(axes, points, color(label_color(label)), filled=chosen)
    axes.axvline(0.0, color=INK, linewidth=0.6)
    _logarithmic(axes)
    # An output head is often ten times any other op.
    axes.set_xscale("symlog", linthresh=1.0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, axis="both")
    axes.xaxis.set_major_formatter(_TICKS)
    axes.set_xlabel("time saved, % of all Linears in float")
    _title_y(axes, f"damage, {planning.unit}")
    kept = sum(c.chosen for c in floats)
    shapes = ", ".join(f"{batch}×{length}" for batch, length in planning.shapes)
    return Picture(
        title,
        f"{len(pairs)} candidates of {len(floats)} ops, {kept} of which stay in float.",
        to_svg(drawn, "gain"),
        _legend(c.label for _, c, _ in pairs),
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
    _dots(axes, points, color(1), filled=False)
    mine = (float(np.mean(planning.speed)), planning.damage, "the plan")
    _dots(axes, [mine], color(4), size=60.0, marker="D")
    axes.set_ylim(bottom=0.0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_locator(5))
        axis.set_major_formatter(_TICKS)
    axes.set_xlabel("predicted speed, × float")
    _title_y(axes, f"predicted {planning.unit}")
    return Picture(
        title,
        f"{len(planning.front)} plans from {points[0][0]:.2f} to {points[-1][0]:.2f} times the "
        f"speed of float; chosen: {mine[0]:.2f} times at {mine[1]:.3g}.",
        to_svg(drawn, "front"),
        [(4, "the plan"), (1, "Pareto front")],
        "Up is more damage, right is faster. Left of the plan: what more accuracy would cost in "
        "speed. Right of it: what more speed would cost in accuracy.",
    )


def outlier_picture(ranges: Ranges) -> Picture | Missing:
    """How far the largest channel of each activation stands out, before and after smoothing."""
    title = "How far the largest channel stands out"
    if not ranges.sites:
        return Missing(title, _no_sites(ranges))
    drawn, axes = figure(2.5)
    lines = []
    befores, afters = [], []
    for at, site in enumerate(ranges.sites):
        before, after = _spread(site.before.high, site.before.low, site.before.median), None
        befores.append((float(at), before, f"{site.name}: {before:.1f} before smoothing"))
        if site.after is not None:
            after = _spread(site.after.high, site.after.low, site.after.median)
            afters.append((float(at), after, f"{site.name}: {after:.1f} after smoothing"))
            lines.append((at, before, after))
    axes.vlines(
        [at for at, *_ in lines],
        [low for _, low, _ in lines],
        [high for *_, high in lines],
        color=color(1),
        linewidth=1.0,
    )
    _dots(axes, befores, color(4))
    _dots(axes, afters, color(1))
    _logarithmic(axes)
    _graph_order(axes, [site.name for site in ranges.sites])
    _title_y(axes, "largest / median channel")
    worst = max(befores, key=lambda row: row[1])
    return Picture(
        title,
        f"{len(befores)} activations, {len(afters)} smoothed; the furthest is {worst[2]}.",
        to_svg(drawn, "outliers"),
        [(4, "before smoothing"), (1, "after")],
        "The scale of a tensor has to reach its largest channel, and the others get what is left "
        "of 256 codes: at 16 an ordinary channel has 4 of the 8 bits. Smoothing moves that into "
        "the weights. Not every site gains by it; where it was refused, it says so above.",
    )


def weight_picture(ranges: Ranges) -> Picture | Missing:
    """The reach of every op's weight, from its least to its largest output channel."""
    title = "Weights: the largest magnitude of each output channel"
    if not ranges.weights:
        return Missing(title, _no_ranges())
    drawn, axes = figure(2.5)
    weights, floor = ranges.weights, 1e-6
    axes.vlines(
        range(len(weights)),
        [max(w.outputs[0], floor) for w in weights],
        [max(w.outputs[2], floor) for w in weights],
        color=color(2),
        linewidth=1.0,
    )
    points = [
        (float(at), max(w.outputs[1], floor), f"{w.name}: " + _three(w.outputs))
        for at, w in enumerate(weights)
    ]
    _dots(axes, points, color(2))
    _logarithmic(axes)
    _graph_order(axes, [w.name for w in weights])
    _title_y(axes, "max |W|")
    widest = max(weights, key=lambda w: w.outputs[2] / max(w.outputs[1], floor))
    return Picture(
        title,
        f"{len(weights)} weights; the widest is {widest.name}, {_three(widest.outputs)}.",
        to_svg(drawn, "weights"),
        [(2, "least to largest channel; dot: median")],
        "As they are quantised, after smoothing. A long line is why each output channel has a "
        "scale of its own: one for the whole weight would leave the small channels few codes.",
    )


def smoothing_picture(site: SiteRanges, weights: Sequence[WeightRanges], name: str) -> Picture:
    """One site, channel by channel: the activation and the weights that it meets."""
    drawn = Figure(figsize=(WIDTH, 2.7))
    x, w = (drawn.add_axes((0.12, bottom, 0.87, 0.36)) for bottom in (0.56, 0.06))
    # Before and after stand side by side on one scale.
    sides = [("before", site.before, 4, [one.inputs for one in weights])]
    if site.after is not None:
        smoothed = [one.smoothed or one.inputs for one in weights]
        sides.append(("after", site.after, 1, smoothed))
    for at, (when, band, series, reach) in enumerate(sides):
        low, high = _fewer(band.low, np.minimum), _fewer(band.high, np.maximum)
        start = at * 1.1 * len(low)
        places = start + np.arange(len(low))
        x.fill_between(places, low, high, color=color(series), linewidth=0.4)
        if reach:
            top = _fewer(np.max(reach, axis=0), np.maximum)
            w.fill_between(places, 0.0, top, color=color(2), linewidth=0.4)
        for axes, what in ((x, "X"), (w, "max |W|")):
            title = f"{what} {when}" if len(sides) > 1 else what
            axes.text(start, 1.04, title, transform=axes.get_xaxis_transform())
    for axes in (x, w):
        axes.margins(x=0.0)
        axes.xaxis.set_major_locator(NullLocator())
        axes.yaxis.set_major_locator(_locator(3))
        axes.yaxis.set_major_formatter(_TICKS)
    w.set_ylim(bottom=0.0)
    before = site.before
    said = f"channel {site.outlier} reaches {before.peak:.3g}, the median one {before.median:.3g}"
    if site.after is not None:
        said += f"; after smoothing {site.after.peak:.3g} and {site.after.median:.3g}"
    shared = -(-site.channels // min(site.channels, _BARS))
    joined = f"; {shared} adjacent ones share a bar" if shared > 1 else ""
    return Picture(
        site.name,
        f"{site.channels} channels: {said}.",
        to_svg(drawn, name),
        [],
        f"{site.channels} channels, left to right{joined}. {said[0].upper()}{said[1:]}.",
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
    axes.yaxis.set_major_locator(_locator(5))
    axes.yaxis.set_major_formatter(_TICKS)
    axes.set_xlabel("position")
    _title_y(axes, "KL, nats")
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


def _dots(
    axes: Axes,
    points: Sequence[tuple[float, float, str]],
    shade: str,
    *,
    filled: bool = True,
    size: float = 16.0,
    marker: str = "o",
) -> None:
    """Dots that tell on hovering what they are."""
    if not points:
        return
    dots = axes.scatter(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        s=size,
        marker=marker,
        facecolors=shade if filled else "none",
        edgecolors=shade,
        linewidths=0.8,
    )
    dots.set_urls([tip for *_, tip in points])


def _title_y(axes: Axes, text: str) -> None:
    """What the y axis shows, above it: upright text wants a margin that a phone has not."""
    axes.set_title(text, fontsize=9.5, pad=4.0, loc="left")


def _locator(most: int) -> MaxNLocator:
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])


def _number(value: float) -> str:
    """Short enough for the margin."""
    small = 0.0 < abs(value) < 1e-3 or abs(value) >= 1e5
    text = f"{value:.2e}" if small else f"{value:.10g}"
    mantissa, exponent, power = text.partition("e")
    if exponent:
        text = f"{float(mantissa):g}e{int(power)}"
    return text.replace("-", "−")


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    if high / low < 30.0:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(_TICKS)


def _graph_order(axes: Axes, names: Sequence[str]) -> None:
    """Ticks where layers begin, with the layer's number."""
    starts: dict[str, int] = {}
    for at, name in enumerate(names):
        found = re.search(r"\.(\d+)(?:\.|$)", f".{name}")
        if found:
            starts.setdefault(found[1], at)
    every = -(-len(starts) // _LAYERS) or 1
    kept = list(starts.items())[::every]
    axes.set_xticks([at for _, at in kept], [layer for layer, _ in kept])
    axes.set_xlabel("layer, in the order of the graph" if kept else "in the order of the graph")
    axes.set_xlim(-1, len(names))


def _legend(labels: Iterable[str]) -> list[tuple[int, str]]:
    return sorted({(label_color(label), label) for label in labels})


def _front_tip(ops: dict[str, int]) -> str:
    return ", ".join(f"{count} {label}" for label, count in ops.items())


def _spread(high: Sequence[float], low: Sequence[float], median: float) -> float:
    largest = max(max(high), -min(low))
    return largest / median if median > 0 else 1.0


def _three(outputs: tuple[float, float, float]) -> str:
    return f"{outputs[0]:.3g}, {outputs[1]:.3g}, {outputs[2]:.3g}"


def _fewer(values: Sequence[float] | Array, extreme: np.ufunc) -> list[float]:
    count = min(len(values), _BARS)
    result: list[float] = extreme.reduceat(values, np.arange(count) * len(values) // count).tolist()
    return result


def _unplanned(report: Report) -> str:
    if all(op.precision == "float" for op in report.ops):
        return f"the scheme {report.scheme} quantises nothing, so there was nothing to choose."
    return "nothing was timed: the plan is the scheme's, or was replayed."


def _no_ranges() -> str:
    return "the artifact keeps no ranges: nothing is quantised, or an earlier version made it."


def _no_sites(ranges: Ranges) -> str:
    if ranges.weights:
        return "activations stay in float, so none was calibrated."
    return _no_ranges()
