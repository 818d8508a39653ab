"""`qcompile report`, and a page that cannot be drawn."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

import qcompile
from qcompile.artifact import (
    PAGE,
    RECORD,
    REPORT,
    damaged_files,
    read_record,
    sha256,
    write_record,
)
from qcompile.ranges import RANGES
from tests.cli_runner import RunCli
from tests.page_reader import read_page


def test_the_page_again(
    run_cli: RunCli, compiled_tiny: qcompile.Artifact, artifact_copy: Path
) -> None:
    drawn = (compiled_tiny.path / PAGE).read_bytes()
    for words in ("<p>drawn by an earlier version</p>", None):
        path = artifact_copy / PAGE
        path.unlink() if words is None else path.write_text(words)
        outcome = run_cli("report", artifact_copy)
        assert (outcome.status, outcome.stdout, outcome.stderr) == (0, f"{path}\n", "")
        assert path.read_bytes() == drawn
        assert damaged_files(artifact_copy, read_record(artifact_copy)) == []
    assert {p.name for p in artifact_copy.iterdir()} == {
        p.name for p in compiled_tiny.path.iterdir()
    }


def test_the_hash_is_of_the_page_that_is_there(artifact_copy: Path, run_cli: RunCli) -> None:
    # As where a later version draws the page otherwise.
    record = json.loads((artifact_copy / RECORD).read_text())
    record["sha256"][PAGE] = "0" * 64
    (artifact_copy / RECORD).write_text(json.dumps(record))
    assert damaged_files(artifact_copy, read_record(artifact_copy)) == [PAGE]
    assert run_cli("report", artifact_copy).status == 0
    assert damaged_files(artifact_copy, read_record(artifact_copy)) == []


def test_a_page_elsewhere(run_cli: RunCli, compiled_tiny: qcompile.Artifact) -> None:
    outcome = run_cli("report", compiled_tiny.path, "-o", "page.html")
    assert (outcome.status, outcome.stdout) == (0, "page.html\n")
    assert Path("page.html").read_bytes() == (compiled_tiny.path / PAGE).read_bytes()


def test_a_full_disk_leaves_nothing(
    run_cli: RunCli, compiled_tiny: qcompile.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qcompile.redrawing.os.replace", full)
    outcome = run_cli("report", compiled_tiny.path, "-o", "page.html")
    assert outcome.status == 1
    assert "page.html cannot be written: No space left on device" in outcome.stderr
    assert list(Path().glob("*.html")) == [] == list(Path().glob(".*.html"))


def test_no_page_is_put_into_an_artifact(
    run_cli: RunCli, compiled_tiny: qcompile.Artifact, artifact_copy: Path
) -> None:
    outcome = run_cli("report", compiled_tiny.path, artifact_copy, "-o", artifact_copy / PAGE)
    assert "is an artifact" in outcome.error
    assert damaged_files(artifact_copy, read_record(artifact_copy)) == []


def test_several(
    run_cli: RunCli, compiled_tiny: qcompile.Artifact, float_tiny: qcompile.Artifact
) -> None:
    outcome = run_cli("report", float_tiny.path, compiled_tiny.path, "-o", "both.html")
    assert (outcome.status, outcome.stdout) == (0, "both.html\n")
    tree = read_page(Path("both.html").read_text(encoding="utf-8"))
    names = [header.words for header in tree.all("table")[0].all("thead")[0].all("th")]
    assert names == ["tiny-fp32", "tiny-w8a8"]
    count = len(compiled_tiny.report.ops)
    assert f"{count} of {count} ops differ" in tree.words


def test_what_is_not_to_be_compared_is_said(
    run_cli: RunCli, compiled_tiny: qcompile.Artifact, artifact_copy: Path
) -> None:
    assert run_cli("report", compiled_tiny.path, artifact_copy, "-o", "a.html").stderr == ""
    record = read_record(artifact_copy)
    report = compiled_tiny.report.model_copy(update={"calibration": "b.txt", "model": "big-opt"})
    (artifact_copy / REPORT).write_text(report.model_dump_json())
    record["sha256"][REPORT] = sha256(artifact_copy / REPORT)
    write_record(artifact_copy, record)
    outcome = run_cli("report", compiled_tiny.path, artifact_copy, "-o", "b.html")
    assert [line.partition(";")[0].partition(",")[0] for line in outcome.stderr.splitlines()] == [
        "warning: these are of different models",
        "warning: accuracy was measured on different data",
    ]
    tree = read_page(Path("b.html").read_text(encoding="utf-8"))
    assert "these are of different models; ops are matched by their paths." in tree.words
    assert "accuracy was measured on different data" in tree.words
    row = tree.all("table")[0].all("tbody")[0].all("tr")[0]
    assert [cell.words for cell in row.all("td")] == [compiled_tiny.report.model, "big-opt"]


def test_names_that_are_the_same_are_told_apart(
    run_cli: RunCli, compiled_tiny: qcompile.Artifact
) -> None:
    twice = run_cli("report", compiled_tiny.path, compiled_tiny.path, "-o", "both.html")
    assert twice.status == 0
    tree = read_page(Path("both.html").read_text(encoding="utf-8"))
    names = [header.words for header in tree.all("table")[0].all("thead")[0].all("th")]
    assert names == [str(compiled_tiny.path)] * 2


@pytest.mark.parametrize("name", [RECORD, REPORT, RANGES])
def test_what_is_missing_or_damaged(run_cli: RunCli, artifact_copy: Path, name: str) -> None:
    path = artifact_copy / name
    whole, page = path.read_bytes(), (artifact_copy / PAGE).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path} is damaged" in run_cli("report", artifact_copy).error
    assert f"{path} is damaged" in run_cli("report", artifact_copy, "-o", "a.html").error
    path.unlink()
    assert f"no {name}" in run_cli("report", artifact_copy).error
    assert (artifact_copy / PAGE).read_bytes() == page


def test_a_report_that_was_edited(run_cli: RunCli, artifact_copy: Path) -> None:
    path = artifact_copy / REPORT
    path.write_text(path.read_text().replace("MatMul", "Gemm"))
    assert f"{path} was changed" in run_cli("report", artifact_copy).error


def test_what_cannot_be_written(
    run_cli: RunCli, compiled_tiny: qcompile.Artifact, tmp_path: Path
) -> None:
    folder = compiled_tiny.path
    assert "name it with -o FILE" in run_cli("report", folder, folder).error
    assert "too many" in run_cli("report", *[folder] * 13, "-o", "all.html").error
    assert "does not end in .html" in run_cli("report", folder, "-o", "model.onnx").error
    assert "No such file" in run_cli("report", folder, "-o", "absent/page.html").error
    (tmp_path / "folder.html").mkdir()
    assert "Is a directory" in run_cli("report", folder, "-o", tmp_path / "folder.html").error


def test_a_page_that_cannot_be_drawn_costs_nothing_else(
    run_cli: RunCli, tiny_onnx: Path, tiny_opt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("no\nfonts")

    words = ("--calibration", tiny_opt / "calibration.txt", "--samples", 4, "--seq-len", 32)
    with monkeypatch.context() as patch:
        patch.setattr("qcompile.page.page", fail)
        outcome = run_cli(tiny_onnx, "--scheme", "fp32", *words, "-o", "out")
    assert outcome.status == 0
    assert "warning: report.html could not be drawn (RuntimeError: no fonts)" in outcome.stderr
    assert not Path("out", PAGE).exists()
    assert damaged_files(Path("out"), read_record(Path("out"))) == []
    assert run_cli("report", "out").status == 0
    page = read_page(Path("out", PAGE).read_text(encoding="utf-8"))
    assert "could not be drawn" in page.all("ul", class_="warnings")[0].words
