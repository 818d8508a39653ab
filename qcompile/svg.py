"""From a Matplotlib figure to SVG that is a part of a page: themed, small, the same each time."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final
from xml.etree import ElementTree

import matplotlib
import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK: Final = "#0a0b01"
FAINT: Final = "#0a0b02"
COLORS: Final = 12
_SERIES: Final = tuple(f"#0b{at:02x}03" for at in range(COLORS))
_VARIABLES: Final[Mapping[str, str]] = {
    INK: "var(--ink)",
    FAINT: "var(--rule)",
    **{color: f"var(--c{at})" for at, color in enumerate(_SERIES)},
}
"""Colours that stand for the page's own, so that one picture does for light, dark and paper."""

WIDTH: Final = 4.4
"""Inches; so narrow that its text can be read on a phone."""

_STYLE: Final = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9.5,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.labelpad": 2.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "qcompile",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def color(at: int) -> str:
    """The page's series colour number `at`, of COLORS."""
    return _SERIES[at]


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the page's style, whatever the user's settings are."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fonts: the browser draws the text
        yield


def figure(height: float) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes."""
    result = Figure(figsize=(WIDTH, height))
    axes = result.add_axes((0.13, 0.44 / height, 0.85, 1.0 - 0.70 / height))
    return result, axes


def to_svg(drawn: Figure, name: str) -> Markup:
    """`drawn` as an element. URLs of its artists are not links but what shows on hovering.

    Args:
        drawn: the figure.
        name: different for each on a page: ids begin with it.
    """
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(re.findall(r"#([\w-]+)", buffer.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        if element.tag == "a":
            element.tag = "g"
            title = ElementTree.Element("title")
            title.text = attributes.pop("href")
            element.insert(0, title)
        for key, value in attributes.items():
            if (key == "id" and value not in used) or key == "target":
                continue
            if key == "transform" and value.startswith("rotate(-0 "):
                continue
            element.set(key, _cleaned(key, value, name))
    for key in ("version", "width", "height"):
        root.attrib.pop(key, None)
    root.set("aria-hidden", "true")
    return Markup(re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _cleaned(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" or key == "clip-path":
        return value.replace("#", f"#{name}-")
    if key == "style":
        value = re.sub(r"font-family: [^;]*; ", "", value)  # the page's
        return re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), value)
    if key in ("d", "x", "y", "transform"):
        value = re.sub(
            r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value
        )
        return " ".join(value.split())
    return value
