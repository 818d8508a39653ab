"""What is on the page of an artifact, and on that of several, without a browser."""

from __future__ import annotations

import base64
import hashlib
import re

import matplotlib
import pytest

import qcompile
from qcompile import page as pages
from qcompile.headline import headline
from qcompile.page import comparison, page
from qcompile.ranges import Ranges
from qcompile.report import Report
from tests.imagined_reports import NASTY, OPS, full_ranges, full_report
from tests.page_reader import Element, read_page


@pytest.fixture(scope="module")
def text() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "MOST_SITES", 48)
        return page(full_report(), full_ranges())


@pytest.fixture(scope="module")
def both() -> str:
    other = full_report()
    other.model = "another"
    other.ops = [op.model_copy(update={"label": "dynamic"}) for op in OPS[:1]] + OPS[1:-1]
    return comparison([("one", full_report()), (f"other {NASTY}", other)])


@pytest.mark.parametrize("seen", [False, True])
def test_a_sample_that_calibrated_is_not_called_held_back(seen: bool) -> None:
    report = full_report()
    report.seen = seen
    said = headline(report)["measured on"]
    assert ("held-back" in said) != seen and ("that calibrated" in said) == seen


def cells(row: Element) -> dict[str, str]:
    """By the names that a phone shows."""
    return {cell.attributes["data-name"]: cell.words for cell in row.all("td")}


def test_every_op_is_in_the_table(text: str) -> None:
    rows = read_page(text).all("tbody")[0].all("tr")
    assert [row.attributes["data-path"] for row in rows] == [
        *(op.name for op in OPS),
        "model.layers.0.attn",
    ]
    assert [row.all("th")[0].text for row in rows] == [r.attributes["data-path"] for r in rows]
    assert cells(rows[1]) == {
        "#": "2",
        "K×N": "300×300",
        "precision": "static int8",
        "kernel": "com.microsoft.MatMulIntegerToFloat",
        "SQNR": "9.2",
        "bytes": "90,000",
        "16-bit safe": "always",
        "reason": "because of model.layers.0.fc1",
    }
    assert cells(rows[5])["kernel"] == "Attention"
    headers = read_page(text).all("thead")[0].all("th")
    assert len(headers) == len(cells(rows[0])) + 1
    assert all(h.attributes["aria-sort"] == "none" and h.all("button") for h in headers)


def test_by_which_method_a_weight_was_rounded() -> None:
    report = full_report()
    report.ops = [OPS[0].model_copy(update={"method": "gptq"}), *OPS[1:]]
    rows = read_page(page(report, full_ranges())).all("tbody")[0].all("tr")
    assert cells(rows[0])["precision"] == "static int8 by gptq"
    assert cells(rows[1])["precision"] == "static int8"
    tree = read_page(comparison([("one", full_report()), ("two", report)]))
    (row,) = [each for each in tree.all("tr") if "data-differs" in each.attributes]
    told = "static by gptq com.microsoft.MatMulIntegerToFloat"
    assert (row.attributes["data-path"], cells(row)["precision, two"]) == (OPS[0].name, told)


def test_refusals_and_warnings_come_first(text: str) -> None:
    tree = read_page(text)
    (warning,) = tree.all("ul", class_="warnings")[0].all("li")
    assert warning.words == f"Warning: warned of {NASTY}"
    refused = tree.all("ul", class_="refusals")[0].all("li")
    assert [len(entry.all("code")) for entry in refused] == [2, 1]
    assert "a GELU is before it" in refused[0].words
    (cards,) = tree.all("ul", class_="cards")
    assert warning.place < refused[0].place < cards.place < tree.all("svg")[0].place
    for figure in ("1.0 MB", "25% of float", "1.72×", "0.00530", "95.20%"):
        assert figure in cards.words


@pytest.mark.parametrize("kind", ["page", "comparison"])
def test_nothing_is_fetched_and_nothing_injected(kind: str, text: str, both: str) -> None:
    shown = text if kind == "page" else both
    tree = read_page(shown)
    (script,) = tree.all("script")
    assert "alert" not in script.text
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    policy = tree.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]
    assert f"script-src 'sha256-{digest}'" in policy.attributes["content"]
    assert "default-src 'none'" in policy.attributes["content"]
    everything = [tree]
    for element in everything:
        everything += element.children
    references = [
        value
        for element in everything
        for name, value in element.attributes.items()
        if name in ("src", "href", "xlink:href", "action", "poster", "srcset", "data")
    ]
    assert all(value.startswith(("#", "data:,")) for value in references)
    assert not any(name.startswith("on") for e in everything for name in e.attributes)
    styles = [e.text for e in everything if e.tag == "style"]
    styles += [e.attributes.get("style", "") for e in everything]
    styles += [e.attributes.get("clip-path", "") for e in everything]
    assert all(url == "url(#" for style in styles for url in re.findall(r"url\(.", style))
    assert not any("@import" in style for style in styles)
    ids = [e.attributes["id"] for e in everything if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    wanted = re.findall(r"(?:href=\"|url\()#([\w-]+)", shown)
    assert set(wanted) <= set(ids)
    # Names with markup in them are text, wherever they stand.
    assert tree.all("main")[0].text.count(NASTY) > 3
    assert not [e for e in everything if e.tag == "b"]


def test_every_picture_is_there_with_its_figures(text: str) -> None:
    tree = read_page(text)
    drawn = {d.attributes["aria-label"].partition(". ")[0]: d for d in tree.all("div", role="img")}
    assert {
        "Signal to noise at every op's output",
        "Plans that none beats: speed against damage",
        "Every candidate: time saved against damage",
        "Cache in codes: divergence by position",
        "How far the largest channel stands out",
        "Weights: the largest magnitude of each output channel",
    } <= set(drawn)
    assert not tree.all("p", class_="missing")
    tips = [t.text for t in drawn["Signal to noise at every op's output"].all("title")]
    assert tips == [
        f"{op.name}: {op.sqnr_db:.1f} dB, {op.label}"
        for label in ("static", "token", "float")
        for op in OPS
        if op.label == label and op.sqnr_db is not None
    ]
    assert all(d.all("svg") and d.all("path") for d in drawn.values())
    sites = tree.all("div", class_="sites")[0].all("details")
    assert len(sites) == len(OPS)
    (label,) = [d.attributes["aria-label"] for d in sites[0].all("div", role="img")]
    assert "channel 299 reaches 41.5, the median one 1; after smoothing 4 and 1.5" in label
    assert [site.attributes.get("open") for site in sites].count("") == 1


def test_what_was_not_measured_is_left_out_and_said(float_tiny: qcompile.Artifact) -> None:
    tree = read_page(page(float_tiny.report, Ranges()))
    assert not tree.all("svg")
    lines = [line.words for line in tree.all("p", class_="missing")]
    assert len(lines) == 6
    assert all(line.startswith("Not shown: ") for line in lines)
    assert "Nothing is quantised" in lines[0]
    assert "quantises nothing" in lines[1]
    assert len(tree.all("tbody")[0].all("tr")) == len(float_tiny.report.ops)


def test_a_plan_that_was_not_measured(compiled_tiny: qcompile.Artifact) -> None:
    tree = read_page((compiled_tiny.path / "report.html").read_text(encoding="utf-8"))
    lines = [line.words for line in tree.all("p", class_="missing")]
    assert len(lines) == 3
    assert [("nothing was timed" in line.lower()) for line in lines] == [True, True, False]
    rows = tree.all("tbody")[0].all("tr")
    named = {row.attributes["data-path"]: cells(row) for row in rows}
    for op in compiled_tiny.report.ops:
        assert named[op.name]["reason"] == op.reason
        assert named[op.name]["bytes"] == f"{op.shape[0] * op.shape[1] + 4 * op.shape[1]:,}"


def test_the_report_of_an_earlier_version() -> None:
    dumped = full_report().model_dump()
    for op in dumped["ops"]:
        del op["label"], op["bytes"]
    tree = read_page(page(Report.model_validate(dumped), Ranges()))
    assert any("earlier version" in line.words for line in tree.all("p", class_="missing"))
    assert [cells(row)["precision"] for row in tree.all("tbody")[0].all("tr")[:4]] == [
        "int8", "int8", "int8", "float",
    ]  # fmt: skip


def test_a_model_without_any_op() -> None:
    bare = Report(
        model="m", task="", target="ort-cpu", scheme="fp32", calibration="c", samples=1, held_back=1
    )
    tree = read_page(page(bare, Ranges()))
    assert not tree.all("svg")
    assert any("no op" in line.words for line in tree.all("p", class_="missing"))
    assert "No warnings, nothing refused." in tree.words


def test_of_many_activations_those_that_differ_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MOST_SITES", 2)
    ranges = full_ranges()
    flat = ranges.sites[0].before.model_copy(update={"peak": 1.0})
    sites = [
        site.model_copy(update={"before": flat}) if at in (0, 1, 3) else site
        for at, site in enumerate(ranges.sites)
    ]
    tree = read_page(page(full_report(), Ranges(sites=sites, weights=ranges.weights)))
    shown = tree.all("div", class_="sites")[0].all("details")
    assert [site.all("code")[0].text for site in shown] == [OPS[2].name, OPS[4].name]
    assert "3 others are not" in tree.words


def test_the_same_bytes_whatever_the_settings(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MOST_SITES", 48)
    with matplotlib.rc_context({"font.size": 30.0, "lines.linewidth": 9.0, "svg.hashsalt": "x"}):
        assert page(full_report(), full_ranges()) == text


def test_several_side_by_side(both: str) -> None:
    tree = read_page(both)
    notes = [note.words for note in tree.all("ul", class_="warnings")]
    assert "different models" in notes[0]
    headline, ops = tree.all("table")
    facts = {row.all("th")[0].words: [c.words for c in row.all("td")] for row in headline.all("tr")}
    assert facts["size"] == ["1.0 MB (25% of float)"] * 2
    assert facts["warnings, sites not smoothed"] == ["1, 3"] * 2
    rows = {row.attributes["data-path"]: row for row in ops.all("tbody")[0].all("tr")}
    assert list(rows) == [op.name for op in OPS]
    differing = [name for name, row in rows.items() if "data-differs" in row.attributes]
    assert differing == [OPS[0].name, "lm_head"]
    first = cells(rows[OPS[0].name])
    assert first["precision, one"] == "static com.microsoft.MatMulIntegerToFloat"
    assert first[f"precision, other {NASTY}"] == "dynamic com.microsoft.MatMulIntegerToFloat"
    assert cells(rows["lm_head"])[f"precision, other {NASTY}"] == "no such op"
    assert "2 of 5 ops differ" in tree.words
