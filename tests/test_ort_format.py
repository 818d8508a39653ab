"""``--format ort``: what a reduced build of ONNX Runtime opens, and what it has to contain."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile import ort_format
from qcompile.artifact import damaged_files, read_record, read_sample
from qcompile.config import CompileConfig
from qcompile.edge.options import EdgeOptions
from qcompile.errors import ModelError, VerificationError
from qcompile.kernels import read_back
from qcompile.ort_format import OrtStyle, write_ort
from qcompile.session import open_session, run_outputs
from tests.cli_runner import RunCli
from tests.edge.models import convolutional, images, saved
from tests.support import from_text


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


def test_standard_operators_stay(tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    model = from_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N,8] x, int8[8,4] w) => (float[N,4] y) {
            s = Constant <value = float {0.1}>()
            z = Constant <value = uint8 {128}>()
            c = Constant <value = int8 {0}>()
            q = QuantizeLinear (x, s, z)
            a = DequantizeLinear (q, s, z)
            b = DequantizeLinear (w, s, c)
            y = MatMul (a, b)
        }""",
        w=np.arange(-16, 16, dtype=np.int8).reshape(8, 4),
    )
    ir.save(model, graph)
    feed = {"x": np.linspace(-9, 9, 24, dtype=np.float32).reshape(3, 8)}
    found, needed = dict[str, np.ndarray](), dict[str, set[str]]()
    for style in get_args(OrtStyle):
        write_ort(graph, style, feed)
        found[style] = run_outputs(open_session(tmp_path / "model.ort"), feed)["y"]
        needed[style] = required(tmp_path / "required_operators.config")
    assert needed["standard"] == {"QuantizeLinear", "DequantizeLinear", "MatMul"}
    assert needed["fused"] == {"QuantizeLinear", "com.microsoft.MatMulIntegerToFloat"}
    np.testing.assert_allclose(found["fused"], found["standard"], rtol=0, atol=1e-5)


def test_what_cannot_be_written(artifact_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, _, _ = read_sample(artifact_copy)
    with monkeypatch.context() as patch:
        patch.setattr(ort_format, "_LARGEST", 1000)
        with pytest.raises(ModelError, match="at most 1000"):
            write_ort(artifact_copy / "model.onnx", "fused", feed)
    assert not (artifact_copy / "model.ort").exists()
    outputs = iter((1.0, 1.001))
    monkeypatch.setattr(
        ort_format, "run_outputs", lambda session, feed: {"y": np.array([next(outputs)])}
    )
    with pytest.raises(VerificationError, match=r"y of model\.ort differs by 0\.001 of 1 from"):
        write_ort(artifact_copy / "model.onnx", "fused", feed)


def test_refused_where_no_reduced_build_runs_it(run_cli: RunCli, tiny_opt: Path) -> None:
    error = run_cli(tiny_opt, "--target", "ort-cuda:sm90", "--format", "ort").error
    assert "format ort is for reduced builds of ONNX Runtime" in error


@pytest.mark.parametrize(("profile", "fused"), [("generic", True), ("nnapi", False)])
def test_edge_profiles(profile: str, fused: bool, tmp_path: Path) -> None:
    """What ONNX Runtime's own kernels run is fused; other providers find the operators of ONNX."""
    source, feeds = saved(convolutional(), tmp_path / "cnn.onnx"), images()
    edge = EdgeOptions(shapes={} if fused else {"x": (1, 3, 8, 8)})
    config = CompileConfig(samples=16, opset=21, format="ort", edge=edge)
    target, output = f"onnx-edge:{profile}", tmp_path / "out"
    artifact = qcompile.compile(
        source, target=target, calibration=feeds, config=config, output=output
    )
    wanted = run_outputs(artifact.session(), feeds[0])["y"]
    found = run_outputs(open_session(output / "model.ort"), feeds[0])["y"]
    step = next(row.scale for row in artifact.report.units[::-1] if row.scale is not None)
    assert np.abs(found - wanted).max() <= 1.01 * step
    contrib = [op for op in required(output / "required_operators.config") if "." in op]
    assert bool(contrib) == fused
