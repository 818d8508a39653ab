"""``--format ort``: what a reduced build of ONNX Runtime opens, and what it has to contain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import qcompile
from qcompile import ort_format
from qcompile.artifact import damaged_files, read_record, read_sample
from qcompile.errors import ModelError, VerificationError
from qcompile.kernels import read_back
from qcompile.ort_format import OrtStyle, write_ort
from qcompile.session import open_session, run_outputs
from tests.cli_runner import RunCli


@pytest.fixture(scope="module")
def artifact(
    tiny_onnx: Path,
    tiny_opt: Path,
    small: qcompile.CompileConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return qcompile.compile(
        tiny_onnx,
        target="ort-cpu:vnni",
        scheme="w8a8",
        calibration=tiny_opt / "calibration.txt",
        config=small.model_copy(update={"format": "ort"}),
        output=tmp_path_factory.mktemp("ort") / "out",
    ).path


def required(path: Path) -> set[str]:
    """Operators of the list, with their domain: lines like ``ai.onnx;13;Concat{…},Expand``."""
    found = set()
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        domain, _, ops = line.split(";", 2)
        depth, name = 0, ""
        for letter in f"{ops},":
            depth += {"{": 1, "}": -1}.get(letter, 0)
            if letter == "," and depth == 0:
                op = name.partition("{")[0]
                found.add(op if domain == "ai.onnx" else f"{domain}.{op}")
                name = ""
            else:
                name += letter
    return found


def test_the_same_outputs_and_the_operators(artifact: Path) -> None:
    feed, _, _ = read_sample(artifact)
    graph, converted = (
        run_outputs(open_session(artifact / name), feed)["logits"]
        for name in ("model.onnx", "model.ort")
    )
    np.testing.assert_allclose(converted, graph, rtol=0, atol=1e-5 * np.abs(graph).max())
    running = read_back(artifact / "model.onnx").counts
    assert required(artifact / "required_operators.config") == {*running}
    text = (artifact / "required_operators.config").read_text()
    assert 'QuantizeLinear{"outputs": {"0": ["uint8_t"]}}' in text
    assert str(artifact.parent) not in text


def test_the_record_knows_them(artifact: Path) -> None:
    record = read_record(artifact)
    assert {"model.ort", "required_operators.config"} <= {*record["sha256"]}
    assert damaged_files(artifact, record) == []


@pytest.mark.parametrize("style", ["fixed", "runtime"])
def test_styles(style: OrtStyle, compiled_tiny: qcompile.Artifact, artifact_copy: Path) -> None:
    feed, _, _ = read_sample(artifact_copy)
    write_ort(artifact_copy / "model.onnx", style, feed)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.enable_saved_runtime_optimizations", "1")
    session = ort.InferenceSession(artifact_copy / "model.ort", options, ["CPUExecutionProvider"])
    wanted = run_outputs(compiled_tiny.session(), feed)["logits"]
    found = run_outputs(session, feed)["logits"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_what_cannot_be_written(artifact_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, _, _ = read_sample(artifact_copy)
    with monkeypatch.context() as patch:
        patch.setattr(ort_format, "_LARGEST", 1000)
        with pytest.raises(ModelError, match="at most 1000"):
            write_ort(artifact_copy / "model.onnx", "fixed", feed)
    assert not (artifact_copy / "model.ort").exists()
    outputs = iter((1.0, 1.001))
    monkeypatch.setattr(
        ort_format, "run_outputs", lambda session, feed: {"y": np.array([next(outputs)])}
    )
    with pytest.raises(VerificationError, match=r"y of model\.ort differs by 0\.001 of 1 from"):
        write_ort(artifact_copy / "model.onnx", "fixed", feed)


def test_refused_where_no_reduced_build_runs_it(run_cli: RunCli, tiny_opt: Path) -> None:
    error = run_cli(tiny_opt, "--target", "ort-cuda:sm90", "--format", "ort").error
    assert "format ort is for reduced builds of ONNX Runtime" in error
