"""``report.html``: one file that needs no other, of one artifact or of several side by side."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup, escape

from qcompile.drawing import Missing, Picture, label_color
from qcompile.headline import accuracy_text, baseline, headline, size_text
from qcompile.pictures import cache_picture, front_picture, gain_picture, sqnr_picture
from qcompile.range_pictures import outlier_picture, smoothing_picture, weight_picture
from qcompile.ranges import Ranges, SiteRanges
from qcompile.report import OpRow, Report, SiteRow
from qcompile.svg import styled

_TEMPLATES: Final = Path(__file__).parent / "templates"
MOST_SITES: Final = 48
"""Pictures of single activations on one page; of more, those whose channels differ most."""


@dataclasses.dataclass(frozen=True)
class Card:
    """A figure in large print."""

    name: str
    value: str
    note: str


@dataclasses.dataclass(frozen=True)
class SiteView:
    """One activation on the page: what was decided, its picture, and whether it is unfolded."""

    row: SiteRow
    picture: Picture
    unfolded: bool


@dataclasses.dataclass(frozen=True)
class ComparedOp:
    """One op in every artifact; None where an artifact has no such op."""

    name: str
    rows: list[OpRow | None]

    @property
    def differs(self) -> bool:
        """Whether it is implemented or run in different ways."""
        return (
            len(
                {
                    (row.label, row.precision, row.method, row.kernel) if row else None
                    for row in self.rows
                }
            )
            > 1
        )


def page(report: Report, ranges: Ranges) -> str:
    """The page of one artifact: the same bytes for the same report and ranges."""
    with styled():
        figures = [
            sqnr_picture([("", report)]),
            front_picture(report),
            gain_picture(report),
            cache_picture(report.cache),
        ]
        reach = [outlier_picture(ranges), weight_picture(ranges)]
        sites = _site_views(report, ranges)
    return _template("page.html.j2").render(
        report=report,
        cards=_cards(report),
        facts=headline(report),
        refusals=_refusals(report),
        figures=figures,
        reach=reach,
        sites=sites,
        left_out=len(ranges.sites) - len(sites),
        sized=any(op.bytes is not None for op in report.ops),
        **_shared(),
    )


def incomparable(reports: Sequence[Report]) -> list[str]:
    """What has to be known before the figures of artifacts are compared, in sentences."""
    notes = []
    if len({report.model for report in reports}) > 1:
        notes.append("these are of different models; ops are matched by their paths")
    if len({(report.calibration, report.held_back) for report in reports}) > 1:
        notes.append(
            "accuracy was measured on different data, named in the last row of figures, so those "
            "figures are not to be compared"
        )
    return notes


def comparison(reports: Sequence[tuple[str, Report]]) -> str:
    """The page that shows several artifacts side by side, by the names given."""
    facts = [{"model": report.model, **headline(report)} for _, report in reports]
    names = dict.fromkeys(op.name for _, report in reports for op in report.ops)
    by_name = [{op.name: op for op in report.ops} for _, report in reports]
    with styled():
        figures = [sqnr_picture(reports)]
    return _template("comparison.html.j2").render(
        reports=reports,
        models=list(dict.fromkeys(report.model for _, report in reports)),
        notes=incomparable([report for _, report in reports]),
        facts={
            fact: [one.get(fact) for one in facts]
            for fact in dict.fromkeys(
                fact for one in sorted(facts, key=len, reverse=True) for fact in one
            )
        },
        refusals=[_refusals(report) for _, report in reports],
        figures=figures,
        ops=[ComparedOp(name, [ops.get(name) for ops in by_name]) for name in names],
        **_shared(),
    )


def _cards(report: Report) -> list[Card]:
    """Size, speed, accuracy."""
    size, _, part = size_text(report).partition(" (")
    cards = [Card("size", size, part.rstrip(")"))]
    cards += [
        Card("speed", f"{speed.ratio:.2f}×", f"{baseline(report)} at {speed.shape}")
        for speed in report.speed[:3]
    ]
    wanted = ("kl", "top1_agreement") if "kl" in report.accuracy else ("cosine", "sqnr_db")
    for name in wanted:
        if name in report.accuracy:
            label, text = accuracy_text(name, report.accuracy[name])
            number, _, unit = text.partition(" ")
            cards.append(Card("accuracy", number, f"{label}, {unit}" if unit else label))
    return cards


def _refusals(report: Report) -> dict[str, list[str]]:
    """Sites by the reason that they could not be smoothed for."""
    reasons: dict[str, list[str]] = {}
    for refusal in report.refusals:
        site, _, reason = refusal.partition(": refused: ")
        reasons.setdefault(reason, []).append(site)
    return reasons


def _site_views(report: Report, ranges: Ranges) -> list[SiteView]:
    """In the order of the graph."""
    rows = {row.name: row for row in report.sites}
    weights = {weight.name: weight for weight in ranges.weights}
    kept = sorted(ranges.sites, key=_unevenness, reverse=True)[:MOST_SITES]
    names = {site.name for site in kept}
    shown = max(kept, key=_gain, default=None)
    return [
        SiteView(
            rows[site.name],
            smoothing_picture(site, [weights[op] for op in site.ops if op in weights], f"site{at}"),
            site is shown,
        )
        for at, site in enumerate(ranges.sites)
        if site.name in names
    ]


def _unevenness(site: SiteRanges) -> float:
    return site.before.peak / site.before.median if site.before.median > 0 else 0.0


def _gain(site: SiteRanges) -> float:
    """How much smoothing evened its channels out."""
    return site.before.peak / site.after.peak if site.after and site.after.peak > 0 else 1.0


def _shared() -> dict[str, Any]:
    """Style and script, and the hash by which the page allows that script and no other."""
    script = (_TEMPLATES / "table.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    return {
        "style": Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(digest).decode(),
    }


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters: dict[str, Callable[..., Any]] = {
        "path": _breakable,
        "color": label_color,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
    }
    environment.filters.update(filters)
    environment.tests["missing"] = lambda picture: isinstance(picture, Missing)
    return environment


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)


def _breakable(path: str) -> Markup:
    """A module path that may be broken behind its dots."""
    return Markup(".<wbr>").join(escape(part) for part in path.split("."))
