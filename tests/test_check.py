"""`qcompile check`: sound artifacts pass, and each kind of damage is named."""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qcompile.targets.ort_cpu import host_saturates

import qcompile
from qcompile import check
from qcompile.artifact import RECORD, REPORT, SAMPLE
from qcompile.check import check_artifact
from qcompile.errors import ModelError, VerificationError
from qcompile.session import HERE, Runtime


def seal(folder: Path) -> None:
    """Bring the record's checksums up to date, so that only the change itself can be found."""
    record = json.loads((folder / RECORD).read_text())
    for name in record["sha256"]:
        record["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / RECORD).write_text(json.dumps(record))


def edit_report(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    report = json.loads((folder / REPORT).read_text())
    edit(report)
    (folder / REPORT).write_text(json.dumps(report))
    seal(folder)


def edit_sample(folder: Path, **arrays: Any) -> None:
    with np.load(folder / SAMPLE) as data:
        kept = {name: data[name] for name in data}
    kept.update({name.replace("__", "."): np.asarray(array) for name, array in arrays.items()})
    np.savez(folder / SAMPLE, **kept)
    seal(folder)


def refused(folder: Path) -> str:
    with pytest.raises(VerificationError) as caught:
        check_artifact(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_sound_artifact(compiled_tiny: qcompile.Artifact, artifact_copy: Path) -> None:
    found = check_artifact(artifact_copy)
    assert found["quantised ops"] == compiled_tiny.report.ops_by_precision["int8"]
    assert found["kernels"] == "as planned"
    assert found["int8 kernel saturates here"] is host_saturates()
    assert 0.0 <= found["kl"] < 0.05
    assert json.dumps(found)


def test_a_float_artifact(float_tiny: qcompile.Artifact) -> None:
    found = check_artifact(float_tiny.path)
    assert found["quantised ops"] == 0
    assert found["kl"] == pytest.approx(0.0, abs=1e-6)


def test_checking_changes_nothing(artifact_copy: Path) -> None:
    before = {p.name: p.read_bytes() for p in artifact_copy.iterdir()}
    check_artifact(artifact_copy)
    assert {p.name: p.read_bytes() for p in artifact_copy.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_checked(
    artifact_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tempfile.mkdtemp

    def mkdtemp(suffix: Any = None, prefix: Any = None, dir: Any = None) -> str:
        if dir is not None and Path(dir) == artifact_copy:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return str(make(suffix, prefix, dir))

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    assert check_artifact(artifact_copy)["kernels"] == "as planned"


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "config.json", "tokenizer.json", SAMPLE]
)
def test_a_changed_or_missing_file_is_named(artifact_copy: Path, name: str) -> None:
    content = bytearray((artifact_copy / name).read_bytes())
    content[len(content) // 2] ^= 0x10
    (artifact_copy / name).write_bytes(content)
    assert f"{name} is missing or changed" in refused(artifact_copy)
    (artifact_copy / name).unlink()
    assert f"{name} is missing or changed" in refused(artifact_copy)


def test_all_damaged_files_are_named(artifact_copy: Path) -> None:
    (artifact_copy / "config.json").unlink()
    (artifact_copy / "tokenizer.json").write_text("{}")
    message = refused(artifact_copy)
    assert "config.json is missing" in message
    assert "tokenizer.json is missing" in message


@pytest.mark.parametrize("name", [RECORD, REPORT])
def test_a_missing_json_is_no_artifact(artifact_copy: Path, name: str) -> None:
    (artifact_copy / name).unlink()
    with pytest.raises(ModelError, match=f"is not a qcompile artifact: no {name}"):
        check_artifact(artifact_copy)


def test_a_changed_report_is_named(artifact_copy: Path) -> None:
    path = artifact_copy / REPORT
    path.write_text(path.read_text().replace('"held_back":', '"held_back" :', 1))
    assert f"{REPORT} is missing or changed" in refused(artifact_copy)


def test_another_format_is_refused(artifact_copy: Path) -> None:
    record = json.loads((artifact_copy / RECORD).read_text())
    (artifact_copy / RECORD).write_text(json.dumps({**record, "format": 7}))
    with pytest.raises(ModelError, match="artifact format 7"):
        check_artifact(artifact_copy)


def test_a_kernel_that_is_not_the_planned_one_is_named(artifact_copy: Path) -> None:
    names: list[str] = []

    record = json.loads((artifact_copy / RECORD).read_text())
    names.append(next(iter(record["kernels"])))
    record["kernels"][names[0]] = ["com.microsoft.DynamicQuantizeMatMul"]
    (artifact_copy / RECORD).write_text(json.dumps(record))
    message = refused(artifact_copy)
    assert f"{names[0]} runs as com.microsoft.MatMulIntegerToFloat" in message
    assert "not com.microsoft.DynamicQuantizeMatMul" in message


def test_an_op_that_is_gone_is_named(artifact_copy: Path) -> None:
    record = json.loads((artifact_copy / RECORD).read_text())
    record["kernels"]["lost.fc1"] = ["com.microsoft.MatMulIntegerToFloat"]
    (artifact_copy / RECORD).write_text(json.dumps(record))
    assert "lost.fc1" in refused(artifact_copy)


def test_accuracy_that_was_lost_is_told(artifact_copy: Path) -> None:
    with np.load(artifact_copy / SAMPLE) as data:
        reference = data["output.logits"]
    other = reference + np.random.default_rng(0).normal(0.0, 1.0, reference.shape)
    edit_sample(artifact_copy, output__logits=other.astype(np.float32))
    assert "KL to float was" in refused(artifact_copy)


def test_outputs_that_are_ruined_are_told(artifact_copy: Path) -> None:
    with np.load(artifact_copy / SAMPLE) as data:
        reference = data["output.logits"]
    edit_sample(artifact_copy, output__logits=-10.0 * reference)
    assert "ruined" in refused(artifact_copy)


@pytest.mark.parametrize(("saturates", "refuses"), [(True, True), (False, False)])
def test_an_artifact_for_another_kind_of_cpu(
    artifact_copy: Path, monkeypatch: pytest.MonkeyPatch, saturates: bool, refuses: bool
) -> None:
    class Here:
        def __init__(self, spec: str) -> None:
            self.saturates = saturates
            self.runs_here = True

        def runtime(self, *given: object, trust_library: bool = False) -> Runtime:
            return HERE

    def edit(report: dict[str, Any]) -> None:
        for op in report["ops"]:
            op["saturation_safe"] = "no" if op["precision"] == "int8" else None

    edit_report(artifact_copy, edit)
    monkeypatch.setattr(check, "get_target", Here)
    if refuses:
        assert "the int8 kernel of this machine saturates" in refused(artifact_copy)
    else:
        assert check_artifact(artifact_copy)["int8 kernel saturates here"] is False


def test_a_sample_that_does_not_fit_the_graph(artifact_copy: Path) -> None:
    with np.load(artifact_copy / SAMPLE) as data:
        kept = {name: data[name] for name in data if name != "input.input_ids"}
    np.savez(artifact_copy / SAMPLE, **kept)
    seal(artifact_copy)
    with pytest.raises((ModelError, VerificationError)) as caught:
        check_artifact(artifact_copy)
    assert "\n" not in str(caught.value)
