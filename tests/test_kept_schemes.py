"""Schemes that keep input channels in float, end to end: llm-int8, and the method spqr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.integer_matmul import KERNEL
from qcompile.passes.weight_only import KERNEL as NBITS

import qcompile
from qcompile.errors import ConfigError
from qcompile.planfile import PLAN
from tests.cli_runner import RunCli

FEW = {"*.layers.[012].*": "float", "lm_head": "float"}
"""A recipe that leaves one layer: what is rounded takes time."""


@pytest.fixture
def compiled(tiny_onnx: Path, tiny_opt: Path, tmp_path: Path) -> Any:
    """Compile the example by a scheme."""

    def compile_with(
        scheme: str, *, target: str = "ort-cpu:avx2", **options: Any
    ) -> qcompile.Artifact:
        return qcompile.compile(
            tiny_onnx,
            target=target,
            scheme=scheme,
            calibration=tiny_opt / "calibration.txt",
            config=qcompile.CompileConfig(samples=8, seq_len=32, **options),
            output=tmp_path / f"{scheme.replace(':', '-')}{len(list(tmp_path.iterdir()))}",
        )

    return compile_with


def op_types(artifact: qcompile.Artifact) -> list[str]:
    return [node.op_type for node in ir.load(artifact.path / "model.onnx").graph]


def same_weights(one: qcompile.Artifact, other: qcompile.Artifact) -> bool:
    name = "model.onnx.data"
    return (one.path / name).read_bytes() == (other.path / name).read_bytes()


def test_llm_int8_says_what_it_keeps_and_replays(
    compiled: Any, run_cli: RunCli, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    artifact = compiled("llm-int8", objective="scheme", plan_out=plan)
    report = artifact.report
    ops = {op.name: op for op in report.ops}
    assert report.accuracy["kl"] < 1e-3
    labels = {op.label for op in report.ops}
    assert labels == {"llm-int8", "token", "float"}
    for op in report.ops:
        assert (op.kept is not None) == (op.label == "llm-int8")
        if op.label != "float":
            assert op.kernel == f"com.microsoft.{KERNEL}"
    fc2 = ops["model.decoder.layers.3.fc2"]
    assert fc2.kept is not None and "sliced, since what makes them puts them last" in fc2.reason
    assert "so that all are in int8 per token" in ops["model.decoder.layers.0.fc1"].reason
    assert "is shared with the embedding" in ops["lm_head"].reason
    assert fc2.bytes is not None
    assert fc2.bytes == 512 * 128 + 4 * 128 + fc2.kept * (4 * 128 + 8)
    sites = {row.name: row for row in report.sites}
    assert "stay in float" in sites[fc2.name].smoothing and sites[fc2.name].alpha is None
    assert {"Slice", "Gather"} & set(op_types(artifact))
    kept = json.loads(plan.read_text("utf-8"))["kept"]
    assert len(kept[fc2.name]) == fc2.kept
    shown = run_cli("inspect", artifact.path)
    assert f"{fc2.kept} channels" in " ".join(shown.stdout.split())
    assert same_weights(artifact, compiled("llm-int8", plan_in=plan))
    changed = json.loads(plan.read_text("utf-8"))
    changed["kept"][fc2.name] = [512]
    plan.write_text(json.dumps(changed), "utf-8")
    with pytest.raises(ConfigError, match="has no input channel 512"):
        compiled("llm-int8", plan_in=plan)


def test_spqr_keeps_a_share_and_replays(compiled: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    options = {"outlier_share": 0.05, "objective": "scheme", "recipe": FEW}
    artifact = compiled("w4a16:spqr", **options, plan_out=plan)
    quantised = [op for op in artifact.report.ops if op.label == "weight4"]
    assert len(quantised) == 6
    for op in quantised:
        assert op.kept == round(0.05 * op.shape[0])
        assert op.kernel == f"com.microsoft.{NBITS}"
        assert op.reason == f"scheme w4a16:spqr; {op.kept} input channels stay in float"
        scales = op.shape[0] // 32 * op.shape[1]
        points = -(-op.shape[0] // 64) * op.shape[1]
        codes = op.shape[0] * op.shape[1] // 2 + 4 * scales + points
        assert op.bytes == codes + op.kept * (4 * op.shape[1] + 8)
    # The channels are the plan's: the share is not asked for again.
    assert same_weights(artifact, compiled("w4a16:spqr", plan_in=plan))


def test_plans_are_measured_and_count_the_bytes_of_what_is_kept(compiled: Any) -> None:
    artifact = compiled("llm-int8", shapes=((1, 16),))
    report = artifact.report
    assert report.planning is not None
    sizes = {}
    for op in report.ops[:-1]:
        rows = {row.label: row for row in op.candidates}
        assert set(rows) == {"llm-int8", "float"}
        assert rows["llm-int8"].damage > 0
        sizes[op.name] = rows["llm-int8"].bytes - op.shape[0] * op.shape[1] - 4 * op.shape[1]
        if op.kept:
            assert sizes[op.name] == op.kept * (4 * op.shape[1] + 8)
    assert any(sizes.values())
    stored = (artifact.path / "model.onnx.data").stat().st_size
    # Alignment and the sizes that are not Linears' apart, what was predicted is what is stored.
    assert stored == pytest.approx(report.planning.bytes, rel=0.02)


def test_a_recipe_names_them_per_module_on_cuda_too(compiled: Any) -> None:
    recipe = {**FEW, "*.3.fc2": "llm-int8", "*.3.fc1": "w4a16:spqr"}
    artifact = compiled("w8a8", target="ort-cuda:sm90", objective="scheme", recipe=recipe)
    assert artifact.report.accuracy["kl"] < 0.01
    ops = {op.name.rpartition(".")[2]: op for op in artifact.report.ops}
    assert (ops["fc2"].label, ops["fc1"].label, ops["q_proj"].label) == (
        "llm-int8", "weight4", "token",
    )  # fmt: skip
    assert ops["fc2"].kept and ops["fc1"].kept == 1 and ops["q_proj"].kept is None
    graph = ir.load(artifact.path / "model.onnx").graph
    types = {node.op_type for node in graph}
    assert {"MatMulInt8", "MatMulNBits", "Slice", "Gather"} <= types
    # Padding moves behind the tokens, so that no mask is left: what is kept is of each row alone.
    assert "If" not in types
    kept = [value for name, value in graph.initializers.items() if ".weight_kept" in name]
    assert len(kept) == 2 and {value.dtype for value in kept} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("llm-int8", {"smooth": 0.5}, "so smooth has no effect"),
        ("llm-int8", {"activations": "static"}, "so activations has no effect"),
        ("w8a8", {"outlier_threshold": 5.0}, "w8a8 looks for no outliers, so outlier_threshold"),
        ("w4a16:spqr", {"outlier_threshold": 5.0}, "so outlier_threshold has no effect"),
        ("w4a16:gptq", {"outlier_share": 0.01}, "keeps no channels in float, so outlier_share"),
        ("llm-int8", {"recipe": {"*.fc2": {"method": "spqr"}}}, "llm-int8 has no method spqr"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    compiled: Any, scheme: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compiled(scheme, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"outlier_share": 0.5},
        {"outlier_share": 0.0},
        {"outlier_threshold": -1.0},
        {"outlier_share": 0.01, "outlier_threshold": 6.0},
        {"recipe": {"*": {"precision": "llm-int8", "smooth": "off"}}},
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        qcompile.CompileConfig(**options)


def test_from_the_command_line(
    run_cli: RunCli, tiny_onnx: Path, tiny_opt: Path, tmp_path: Path
) -> None:
    words = ["--calibration", tiny_opt / "calibration.txt", "--samples", "4", "--seq-len", "32"]
    recipe = tmp_path / "few.yaml"
    recipe.write_text("".join(f"{glob!r}: {rule}\n" for glob, rule in FEW.items()), "utf-8")
    words += ["--objective", "scheme", "--recipe", recipe, "-o", tmp_path / "out"]
    outcome = run_cli(
        tiny_onnx, "--compare", "llm-int8,w4a16:spqr", "--outlier-share", "0.1", *words, "--json"
    )
    assert outcome.status == 0, outcome.stderr
    rows = json.loads(outcome.stdout)["rows"]
    assert [row["scheme"] for row in rows] == ["llm-int8", "w4a16:spqr"]
    assert all(np.isfinite(row["accuracy"]["kl"]) for row in rows)
    for name in ("llm-int8", "w4a16-spqr"):
        assert json.loads((tmp_path / "out" / name / PLAN).read_text("utf-8"))["kept"]
    refused = run_cli(tiny_onnx, "--scheme", "w4a16:spqr-sparse", "-o", tmp_path / "no")
    assert refused.status == 1 and "no fast product of a sparse matrix" in refused.stderr
