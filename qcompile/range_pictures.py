"""The report's pictures of how far channels reach, and of what smoothing did to that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from qcompile.drawing import (
    TICKS,
    Missing,
    Picture,
    dots,
    graph_order,
    locator,
    logarithmic,
    title_y,
)
from qcompile.ranges import Band, Ranges, SiteRanges, WeightRanges
from qcompile.svg import WIDTH, color, figure, to_svg

Array = npt.NDArray[Any]

_BARS: Final = 128
"""Channels in a picture; of more, adjacent ones share a bar."""


def outlier_picture(ranges: Ranges) -> Picture | Missing:
    """How far the largest channel of each activation stands out, before and after smoothing."""
    title = "How far the largest channel stands out"
    if not ranges.sites:
        return Missing(title, _no_sites(ranges))
    drawn, axes = figure(2.5)
    befores, afters = [], []
    for at, site in enumerate(ranges.sites):
        before = _spread(site.before)
        befores.append((float(at), before, f"{site.name}: {before:.1f} before smoothing"))
        if site.after is not None:
            after = _spread(site.after)
            afters.append((float(at), after, f"{site.name}: {after:.1f} after smoothing"))
            axes.plot([at, at], [before, after], color=color(1), linewidth=1.0)
    dots(axes, befores, color(4))
    dots(axes, afters, color(1))
    logarithmic(axes)
    graph_order(axes, [site.name for site in ranges.sites])
    title_y(axes, "largest / median channel")
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
    dots(axes, points, color(2))
    logarithmic(axes)
    graph_order(axes, [w.name for w in weights])
    title_y(axes, "max |W|")
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
        axes.yaxis.set_major_locator(locator(3))
        axes.yaxis.set_major_formatter(TICKS)
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


def _spread(band: Band) -> float:
    largest = max(*band.high, -min(band.low))
    return largest / band.median if band.median > 0 else 1.0


def _three(outputs: tuple[float, float, float]) -> str:
    return f"{outputs[0]:.3g}, {outputs[1]:.3g}, {outputs[2]:.3g}"


def _fewer(values: Sequence[float] | Array, extreme: np.ufunc) -> list[float]:
    count = min(len(values), _BARS)
    result: list[float] = extreme.reduceat(values, np.arange(count) * len(values) // count).tolist()
    return result


def _no_ranges() -> str:
    return "the artifact keeps no ranges: nothing is quantised, or an earlier version made it."


def _no_sites(ranges: Ranges) -> str:
    if ranges.weights:
        return "activations stay in float, so none was calibrated."
    return _no_ranges()
