"""The artifact folder: what it holds, what opens it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile.artifact import (
    FORMAT,
    GRAPH,
    PAGE,
    RECORD,
    REPORT,
    SAMPLE,
    damaged_files,
    load,
    read_record,
    read_sample,
)
from qcompile.errors import ModelError
from qcompile.planfile import PLAN
from qcompile.ranges import RANGES
from qcompile.report import Report


def change(folder: Path, **fields: Any) -> None:
    """Set fields of the record; None removes one."""
    path = folder / RECORD
    record = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


def test_the_folder_holds_everything(compiled_tiny: qcompile.Artifact, tiny_opt: Path) -> None:
    names = {path.name for path in compiled_tiny.path.iterdir()}
    assert names == {
        GRAPH,
        f"{GRAPH}.data",
        PAGE,
        PLAN,
        RANGES,
        RECORD,
        REPORT,
        SAMPLE,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } - (
        {"generation_config.json"} if not (tiny_opt / "generation_config.json").exists() else set()
    )
    for name in ("config.json", "tokenizer.json"):
        assert (compiled_tiny.path / name).read_bytes() == (tiny_opt / name).read_bytes()


def test_the_record_says_what_was_compiled(compiled_tiny: qcompile.Artifact) -> None:
    record = read_record(compiled_tiny.path)
    assert record["format"] == FORMAT
    assert (record["target"], record["scheme"]) == ("ort-cpu:avx2", "w8a8")
    assert record["kind"] == "text-generation"
    assert record["config"]["samples"] == 8
    assert record["session_options"] == {}
    assert record["probed"]["target_u8s8_saturates"] is True
    assert set(record["versions"]) >= {"qcompile", "onnxruntime", "torch", "transformers"}
    ops = {row["name"]: row for row in record["plan"]["ops"]}
    planned = {op.name: op.precision for op in compiled_tiny.report.ops}
    assert {name: row["precision"] for name, row in ops.items()} == planned
    static = [row for row in ops.values() if row["precision"] == "int8"]
    assert static
    assert all(row["scale"] > 0 and 0 <= row["zero_point"] <= 255 for row in static)


def test_the_record_covers_every_other_file(compiled_tiny: qcompile.Artifact) -> None:
    record = read_record(compiled_tiny.path)
    assert set(record["sha256"]) == {p.name for p in compiled_tiny.path.iterdir()} - {RECORD}
    assert damaged_files(compiled_tiny.path, record) == []


def test_the_report_is_the_one_on_disk(compiled_tiny: qcompile.Artifact) -> None:
    assert Report.read(compiled_tiny.path) == compiled_tiny.report
    graph = sum((compiled_tiny.path / n).stat().st_size for n in (GRAPH, f"{GRAPH}.data"))
    assert compiled_tiny.report.bytes == graph


def test_load_opens_the_folder(compiled_tiny: qcompile.Artifact) -> None:
    sample, _, _ = read_sample(compiled_tiny.path)
    for session in (qcompile.load(str(compiled_tiny.path)), compiled_tiny.session()):
        logits = session.run(None, sample)[0]
        assert logits.shape == (*sample["input_ids"].shape, 258)
        assert np.isfinite(logits).all()


def test_the_check_sample_is_one_short_feed(compiled_tiny: qcompile.Artifact) -> None:
    feed, reference, figures = read_sample(compiled_tiny.path)
    assert all(len(value) == 1 for value in feed.values())
    assert reference["logits"].shape[:2] == feed["input_ids"].shape
    assert set(figures) >= {"kl", "top1_agreement", "sqnr_db"}


@pytest.mark.parametrize("name", [RECORD, GRAPH])
def test_a_folder_without_its_files_is_no_artifact(artifact_copy: Path, name: str) -> None:
    (artifact_copy / name).unlink()
    with pytest.raises(ModelError, match="is not a qcompile artifact"):
        load(artifact_copy)


def test_a_graph_that_is_cut_short_is_refused(artifact_copy: Path) -> None:
    path = artifact_copy / GRAPH
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot run the graph") as caught:
        load(artifact_copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1}', '{"sha256": []}', "\udcff"])
def test_a_damaged_record(artifact_copy: Path, text: str) -> None:
    (artifact_copy / RECORD).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"qcompile\.json is damaged"):
        read_record(artifact_copy)


@pytest.mark.parametrize("field", ["target", "scheme", "kind", "plan", "kernels"])
def test_a_record_without_a_field_is_damaged(artifact_copy: Path, field: str) -> None:
    change(artifact_copy, **{field: None})
    with pytest.raises(ModelError, match=r"qcompile\.json is damaged"):
        read_record(artifact_copy)


@pytest.mark.parametrize("number", [0, 2, "1", 99])
def test_another_format_is_refused_by_its_number(artifact_copy: Path, number: object) -> None:
    change(artifact_copy, format=number)
    with pytest.raises(ModelError, match=f"artifact format {number}, this qcompile reads 1"):
        read_record(artifact_copy)


def test_a_later_format_need_not_look_like_this_one(artifact_copy: Path) -> None:
    (artifact_copy / RECORD).write_text('{"format": 2, "files": []}')
    with pytest.raises(ModelError, match="artifact format 2"):
        read_record(artifact_copy)


def test_a_missing_record(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match=r"is not a qcompile artifact: no qcompile\.json"):
            read_record(folder)


def test_files_that_changed_or_went(artifact_copy: Path) -> None:
    record = read_record(artifact_copy)
    (artifact_copy / "tokenizer.json").unlink()
    data = artifact_copy / f"{GRAPH}.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert sorted(damaged_files(artifact_copy, record)) == [f"{GRAPH}.data", "tokenizer.json"]


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_sample_that_cannot_be_read(artifact_copy: Path, content: bytes | None) -> None:
    if content is None:
        (artifact_copy / SAMPLE).write_bytes((artifact_copy / SAMPLE).read_bytes()[:1000])
    else:
        (artifact_copy / SAMPLE).write_bytes(content)
    with pytest.raises(ModelError, match=r"check\.npz cannot be read"):
        read_sample(artifact_copy)


def test_a_report_that_cannot_be_read(artifact_copy: Path) -> None:
    (artifact_copy / REPORT).write_text("{}")
    with pytest.raises(ModelError, match=r"report\.json is damaged"):
        Report.read(artifact_copy)
    (artifact_copy / REPORT).unlink()
    with pytest.raises(ModelError, match=r"is not a qcompile artifact: no report\.json"):
        Report.read(artifact_copy)
