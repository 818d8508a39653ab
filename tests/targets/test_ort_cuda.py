"""The target ort-cuda where there is no GPU: what is written, and what runs in its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.pack_cache import HOSTED
from qcompile.targets import get_target
from qcompile.targets.cuda import library
from qcompile.targets.cuda.schema import DOMAIN
from qcompile.targets.ort_cuda import OrtCuda

import qcompile
from qcompile.artifact import GRAPH, RECORD
from qcompile.check import check_artifact
from qcompile.config import Recipe
from qcompile.errors import ConfigError, ModelError, StandInWarning
from qcompile.genai import CONFIG as GENAI
from qcompile.generation import Decoder, generate
from qcompile.session import open_session

Compile = Callable[[str], qcompile.Artifact]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "gpu", lambda: None)


@pytest.fixture(scope="module")
def compiled(
    tiny_onnx: Path, tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., qcompile.Artifact]:
    """Compiles the example; each combination once."""
    made: dict[str, qcompile.Artifact] = {}

    def compile_for(target: str, scheme: str, **options: Any) -> qcompile.Artifact:
        key = f"{target} {scheme} {options}"
        if key not in made:
            options = {"objective": "scheme"} | options
            config = qcompile.CompileConfig(samples=8, seq_len=64, **options)
            made[key] = qcompile.compile(
                str(tiny_onnx),
                target=target,
                scheme=scheme,
                calibration=tiny_opt / "calibration.txt",
                config=config,
                output=tmp_path_factory.mktemp("cuda") / scheme,
            )
        return made[key]

    return compile_for


def graph_of(artifact: qcompile.Artifact) -> ir.Model:
    return ir.load(artifact.path / GRAPH)


def on_cpu(model: ir.Model) -> list[str | None]:
    """What ONNX Runtime would run on the CPU: ops that compute with a shape, but to fill one."""
    shapes = [node.outputs[0] for node in model.graph if node.op_type == "Shape"]
    readers = [user for value in shapes for user in value.consumers()]
    return [user.name for user in readers if user.op_type != "ConstantOfShape"]


def test_float16(compiled: Callable[..., qcompile.Artifact]) -> None:
    artifact = compiled("ort-cuda:sm90", "fp16")
    model = graph_of(artifact)
    kinds = [node.op_type for node in model.graph.all_nodes()]
    assert "If" not in kinds and on_cpu(model) == []
    assert kinds.count("Reshape") == 1  # before what puts rows back
    assert kinds.count("SkipLayerNormalization") == 8
    assert kinds.count("MultiHeadAttention") == 4
    assert all(value.dtype != ir.DataType.FLOAT for value in model.graph.initializers.values())
    assert artifact.report.accuracy["kl"] < 1e-4
    assert artifact.report.bytes < 0.55 * artifact.report.bytes_float
    assert artifact.report.speed == []
    assert any("speed was not measured" in line for line in artifact.report.warnings)


@pytest.mark.parametrize("activations", ["auto", "static"])
def test_w8a8_is_as_accurate_as_its_emulation(
    compiled: Callable[..., qcompile.Artifact], activations: str
) -> None:
    """Against the CPU target's plan of the same scheme, whose floats are float32."""
    artifact = compiled("ort-cuda:sm90", "w8a8", activations=activations)
    nodes = list(graph_of(artifact).graph)
    assert "If" not in {node.op_type for node in nodes} and on_cpu(graph_of(artifact)) == []
    kinds = [node.op_type for node in nodes if node.domain == DOMAIN]
    assert kinds.count("MatMulInt8") >= 24
    assert kinds.count("LayerNormInt8") >= 8 and kinds.count("ActivationInt8") == 4
    assert kinds.count("QuantizeInt8") == 4  # what attention gives
    mode = "token" if activations == "auto" else activations
    emulated = compiled("ort-cpu:vnni", "w8a8", activations=mode)
    kl, limit = artifact.report.accuracy["kl"], emulated.report.accuracy["kl"]
    # Static codes are symmetric here, which wastes half of them after ReLU.
    assert kl < (1.1 if mode == "token" else 4.0) * limit + 1e-4


@pytest.mark.parametrize("activations", ["token", "static"])
def test_fp8(compiled: Callable[..., qcompile.Artifact], activations: str) -> None:
    artifact = compiled("ort-cuda:sm89", "fp8", activations=activations)
    model = graph_of(artifact)
    kinds = [node.op_type for node in model.graph if node.domain == DOMAIN]
    assert kinds.count("MatMulFp8") >= 24 and kinds.count("QuantizeFp8") == 4
    assert kinds.count("LayerNormFp8") >= 8 and kinds.count("ActivationFp8") == 4
    assert not any(kind.endswith("Int8") for kind in kinds)
    codes = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT8E4M3FN]
    assert len(codes) == kinds.count("MatMulFp8")
    label = {"token": "fp8", "static": "fp8-static"}[activations]
    ops = [op for op in artifact.report.ops if op.precision != "float"]
    assert {(op.precision, op.saturation_safe) for op in ops} == {("fp8", None)}
    assert {row["label"] for row in planned(artifact) if row["precision"] == "fp8"} == {label}
    assert min(op.sqnr_db or 0.0 for op in ops) > 15
    assert check_artifact(artifact.path)["kernels"] == "as planned, by other means here"


def planned(artifact: qcompile.Artifact) -> list[dict[str, Any]]:
    record = json.loads((artifact.path / RECORD).read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = record["plan"]["ops"]
    return rows


def test_fp8_is_planned_from_the_stored_table(
    compiled: Callable[..., qcompile.Artifact],
) -> None:
    """Against float16 and INT8, whose times and damage are known as well."""
    report = compiled("ort-cuda:sm90", "fp8", objective="latency", shapes=((8, 64),)).report
    rows = {row.label: row for op in report.ops[:1] for row in op.candidates}
    assert {"fp8", "token", "float"} <= rows.keys()
    assert rows["fp8"].conversion == rows["token"].conversion
    assert rows["fp8"].bytes == rows["token"].bytes
    assert 0.0 < rows["token"].damage < rows["fp8"].damage, "eight bits of precision, or four"
    assert any("stored times" in line for line in report.warnings)


def test_a_recipe_mixes_codes(tiny_onnx: Path, tiny_opt: Path, tmp_path: Path) -> None:
    recipe = {"*.fc1": {"precision": "fp8"}, "*.fc2": {"precision": "fp8", "activations": "static"}}
    config = qcompile.CompileConfig(
        samples=4,
        seq_len=32,
        objective="scheme",
        recipe=Recipe.from_mapping(recipe),
        smooth="off",
    )
    artifact = qcompile.compile(
        str(tiny_onnx),
        target="ort-cuda:sm90",
        scheme="w8a8",
        calibration=tiny_opt / "calibration.txt",
        config=config,
        output=tmp_path / "out",
    )
    labels = {row["name"].rpartition(".")[2]: row["label"] for row in planned(artifact)}
    assert (labels["fc1"], labels["fc2"], labels["q_proj"]) == ("fp8", "fp8-static", "token")


def test_without_a_gpu_a_stored_table_is_planned_by(
    compiled: Callable[..., qcompile.Artifact],
) -> None:
    """In a model as small as this one a quantisation of its own costs more than INT8 gains."""
    report = compiled("ort-cuda:sm90", "w8a8", objective="latency", shapes=((8, 64),)).report
    kinds: dict[str, set[str]] = {}
    for op in report.ops:
        kinds.setdefault(op.name.rpartition(".")[2], set()).add(op.precision)
    for name in ("q_proj", "k_proj", "v_proj", "fc1", "fc2"):
        assert kinds[name] == {"int8"}, name
    assert kinds["out_proj"] == {"float"}
    (kept,) = {op.reason for op in report.ops if op.name.endswith("out_proj")}
    assert re.fullmatch(r"cost: token at 0\.\d\d of float's speed", kept)
    rows = {row.label: row for op in report.ops[:1] for row in op.candidates}
    assert rows["token"].saved is not None and rows["token"].saved[0] > 0.0
    assert report.planning is not None and not report.planning.whole
    assert report.planning.measured == 0 and report.speed == []
    (note,) = [line for line in report.warnings if "stored times" in line]
    assert "NVIDIA H200 (onnxruntime 1.31.1, operators 1, date 2026-11-22)" in note
    assert "nothing was timed here" in note


def test_without_a_table_the_scheme_is_followed(
    compiled: Callable[..., qcompile.Artifact],
) -> None:
    report = compiled("ort-cuda:sm80", "w8a8", objective="latency").report
    assert report.planning is None
    assert any("no table of measured times for sm80" in line for line in report.warnings)
    assert {op.precision for op in report.ops if op.name != "lm_head"} == {"int8"}


def test_a_limit_on_divergence_is_kept_by_trying(
    compiled: Callable[..., qcompile.Artifact],
) -> None:
    limit = 2e-4
    report = compiled("ort-cuda:sm90", "w8a8", objective="latency", max_kl=limit).report
    assert report.accuracy["kl"] <= limit
    assert 0 < report.ops_by_precision["int8"] < 20


@pytest.mark.parametrize(("scheme", "bits", "limit"), [("w8a16", 8, 1e-3), ("w4a16", 4, 0.1)])
def test_weights_alone(
    compiled: Callable[..., qcompile.Artifact], scheme: str, bits: int, limit: float
) -> None:
    artifact = compiled("ort-cuda:sm90", scheme)
    model = graph_of(artifact)
    products = [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]
    assert len(products) == len(artifact.report.ops) == 25
    assert {node.attributes.get_int("bits") for node in products} == {bits}
    assert {node.attributes.get_int("accuracy_level") for node in products} == {0}
    assert not any(node.domain == DOMAIN for node in model.graph), "no library is needed"
    assert all(value.dtype != ir.DataType.FLOAT for value in model.graph.initializers.values())
    assert 0.0 < artifact.report.accuracy["kl"] < limit


def test_the_artifact_is_checked_where_there_is_no_gpu(
    compiled: Callable[..., qcompile.Artifact],
) -> None:
    artifact = compiled("ort-cuda:sm90", "w8a8")
    assert check_artifact(artifact.path)["kernels"] == "as planned, by other means here"
    with pytest.warns(StandInWarning, match="on the CPU"):
        session = qcompile.load(artifact.path)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert all(op.sqnr_db is None or op.sqnr_db > 15 for op in artifact.report.ops)


def test_left_padding_changes_nothing(compiled: Callable[..., qcompile.Artifact]) -> None:
    session = open_session(compiled("ort-cuda:sm90", "fp16").path / GRAPH)
    ids = np.random.default_rng(0).integers(3, 200, (1, 12))
    plain = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(12)[None],
    }
    padded = {name: np.pad(array, ((0, 0), (5, 0))) for name, array in plain.items()}
    wanted, found = (session.run(["logits"], feed)[0] for feed in (plain, padded))
    np.testing.assert_allclose(found[:, 5:].astype(float), wanted.astype(float), atol=0.05)


@pytest.mark.parametrize("scheme", ["fp16", "w8a8", "w4a16"])
def test_generating(
    compiled: Callable[..., qcompile.Artifact],
    compile_cached: Callable[[str], qcompile.Artifact],
    scheme: str,
) -> None:
    """By the bodies and ONNX Runtime's float16 attention on the CPU, as the float model does."""
    artifact = compiled("ort-cuda:sm90", scheme, cache=True)
    model = graph_of(artifact)
    graph = model.graph
    kinds = [node.op_type for node in graph.all_nodes()]
    assert kinds.count("GroupQueryAttention") == 4 and "If" not in kinds
    assert on_cpu(model) == [HOSTED]
    kept = [v for v in (*graph.inputs, *graph.outputs) if ".0." in str(v.name)]
    assert len(kept) == 4 and {v.dtype for v in kept} == {ir.DataType.FLOAT16}
    decoded, whole = artifact.report.decoded["kl"], artifact.report.accuracy["kl"]
    assert decoded < 2 * whole + 1e-5
    settings = json.loads((artifact.path / GENAI).read_text(encoding="utf-8"))
    options = settings["model"]["decoder"]["session_options"]
    assert options["provider_options"] == [{"cuda": {}}]
    session = open_session(artifact.path / GRAPH)
    prompts = [[1, 17, 42, 9], [5, 6], [8, 80, 100, 7, 33, 21]]
    together = np.stack(list(generate(session, prompts, 16)), axis=1)
    for prompt, row in zip(prompts, together, strict=True):
        alone = np.stack(list(generate(session, [prompt], 16)), axis=1)
        assert alone[0].tolist() == row.tolist()
    if scheme == "fp16":
        wanted = list(generate(compile_cached("fp32").session(), prompts, 16))
        assert together.tolist() == np.stack(wanted, axis=1).tolist()


def test_the_last_logits_of_int8(compiled: Callable[..., qcompile.Artifact]) -> None:
    whole, last = (
        open_session(compiled("ort-cuda:sm90", "w8a8", cache=True, last_logits=only).path / GRAPH)
        for only in (False, True)
    )
    ids = np.array([[1, 17, 42, 9], [5, 6, 3, 4]])
    found, wanted = (Decoder(session, 2, 4).step(ids) for session in (last, whole))
    np.testing.assert_array_equal(found, wanted[:, -1:])


@pytest.mark.parametrize(
    ("target", "scheme", "options", "message"),
    [
        ("ort-cuda", "fp16", {}, "there is no GPU .* like ort-cuda:sm90"),
        ("ort-cuda:sm70", "fp16", {}, "no variant 'sm70'"),
        ("ort-cpu", "fp16", {}, "target ort-cpu has no scheme fp16"),
        ("ort-cpu", "fp8", {}, "target ort-cpu has no scheme fp8"),
        ("ort-cuda:sm80", "fp8", {}, "sm80 has no tensor cores for e4m3; sm89 and sm90 have"),
        (
            "ort-cuda:sm80",
            "w8a8",
            {"recipe": {"*": "fp8"}},
            r"ort-cuda has no kernel for fp8 \(.*q_proj\): sm80 has no tensor cores for e4m3; sm89 "
            r"and sm90 have \(w8a8 and float are what the recipe can say there\)",
        ),
        ("ort-cpu", "w8a8", {"recipe": {"*": "fp8"}}, "ort-cpu has no kernel for fp8"),
        (
            "ort-cuda:sm90",
            "fp8",
            {"activations": "static", "ranges": "mse"},
            "ranges mse are for codes at even distances",
        ),
        ("ort-cuda:sm80", "w8a8", {"max_kl": 0.1}, "max_kl wants measured times"),
        (
            "ort-cuda:sm89",
            "w8a8",
            {"objective": "accuracy", "max_size": 1},
            "max_size wants measured times",
        ),
        ("ort-cuda:sm90", "w8a8", {"min_speedup": 1.1}, "stored times are of Linears alone"),
        ("ort-cuda:sm90", "w8a8", {"costs": Path("none.json")}, "there is no none.json"),
    ],
)
def test_refusals(
    tiny_onnx: Path, tmp_path: Path, target: str, scheme: str, options: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        qcompile.compile(
            str(tiny_onnx),
            target=target,
            scheme=scheme,
            config=qcompile.CompileConfig(**options),
            output=tmp_path / "out",
        )


def test_sizes_without_a_kernel() -> None:
    target = get_target("ort-cuda:sm90")
    assert target.refusal(64, 32) is None
    assert target.refusal(64, 258) == "258 output channels, no multiple of 16"
    assert target.refusal(48, 32) == "48 input channels, no multiple of 32"


# Which library is registered.


@pytest.fixture
def carrying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The record of an artifact that carries a library, on a machine with a GPU."""
    (tmp_path / library.LIBRARY).write_bytes(b"code")
    monkeypatch.setattr(library, "gpu", lambda: "sm90")
    monkeypatch.setattr(library, "installed", lambda: None)
    described = library.description(tmp_path / library.LIBRARY)
    record = {
        "scheme": "w8a8",
        "versions": {"qcompile": described["qcompile"]},
        "library": described,
    }
    (tmp_path / RECORD).write_text(json.dumps(record), encoding="utf-8")
    return record


def test_the_packages_own_library_comes_first(
    tmp_path: Path, carrying: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.so"
    monkeypatch.setattr(library, "installed", lambda: own)
    runtime = OrtCuda().runtime(tmp_path, carrying, trust_library=True)
    assert runtime.library == own
    assert runtime.providers == ("CUDAExecutionProvider",)
    assert runtime.hosted == frozenset({HOSTED})


@pytest.mark.parametrize("key", ["operators", "version"])
def test_a_library_of_another_version_is_not_registered(
    tmp_path: Path, carrying: dict[str, Any], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(library, "installed", lambda: tmp_path / "own.so")
    if key == "operators":
        carrying["library"]["operators"] = 99
    else:
        carrying["versions"]["qcompile"] = "0.0.1"
    with pytest.raises(ModelError, match="trust_library=True"):
        OrtCuda().runtime(tmp_path, carrying)


def test_the_artifacts_library_has_to_be_trusted(tmp_path: Path, carrying: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="is code"):
        OrtCuda().runtime(tmp_path, carrying)
    trusted = OrtCuda().runtime(tmp_path, carrying, trust_library=True)
    assert trusted.library == tmp_path / library.LIBRARY


def test_a_library_that_was_changed_is_refused(tmp_path: Path, carrying: dict[str, Any]) -> None:
    (tmp_path / library.LIBRARY).write_bytes(b"other code")
    with pytest.raises(ModelError, match="is not the library"):
        OrtCuda().runtime(tmp_path, carrying, trust_library=True)


@pytest.mark.parametrize("name", ["../evil.so", "missing.so"])
def test_a_library_that_is_not_there_is_refused(
    tmp_path: Path, carrying: dict[str, Any], name: str
) -> None:
    carrying["library"]["file"] = name
    with pytest.raises(ModelError, match="lacks the library"):
        OrtCuda().runtime(tmp_path, carrying, trust_library=True)
