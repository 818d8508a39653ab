"""What the pictures of the report have in common: frame, axes and dots."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Final

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from qcompile.precision import LABELS
from qcompile.svg import COLORS

TICKS: Final = FuncFormatter(lambda value, _: _number(value))
"""Writes the numbers of an axis."""

_LAYERS: Final = 9


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


def label_color(label: str) -> int:
    """The series colour of an implementation, the same everywhere on the page."""
    names: Sequence[str] = LABELS
    return (names.index(label) if label in names else len(names)) % COLORS


def legend(labels: Iterable[str]) -> list[tuple[int, str]]:
    """Of implementations, for `Picture.legend`."""
    return sorted({(label_color(label), label) for label in labels})


def dots(
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
    drawn = axes.scatter(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        s=size,
        marker=marker,
        facecolors=shade if filled else "none",
        edgecolors=shade,
        linewidths=0.8,
    )
    drawn.set_urls([tip for *_, tip in points])


def title_y(axes: Axes, text: str) -> None:
    """What the y axis shows, above it: upright text wants a margin that a phone has not."""
    axes.set_title(text, fontsize=9.5, pad=4.0, loc="left")


def locator(most: int) -> MaxNLocator:
    """Round numbers, no more than `most` and one."""
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])


def logarithmic(axes: Axes) -> None:
    """Make the y axis so, with a few labels on a short range, too."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    if high / low < 30.0:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(TICKS)


def graph_order(axes: Axes, names: Sequence[str]) -> None:
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


def _number(value: float) -> str:
    """Short enough for the margin."""
    small = 0.0 < abs(value) < 1e-3 or abs(value) >= 1e5
    text = f"{value:.2e}" if small else f"{value:.10g}"
    mantissa, exponent, power = text.partition("e")
    if exponent:
        text = f"{float(mantissa):g}e{int(power)}"
    return text.replace("-", "−")
