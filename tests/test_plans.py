"""Plans end to end: chosen, limited, written, replayed, explained. Times are imagined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.targets import get_target

import qcompile
from qcompile.artifact import read_record
from qcompile.choosing import UNSEEN
from qcompile.costs import CostTable
from qcompile.kernels import read_back
from qcompile.planfile import PLAN
from qcompile.report import Report
from qcompile.schemes import rounds_alike
from qcompile.trying import keep_within
from qcompile.weights import violations
from tests.cli_runner import RunCli
from tests.support import from_text


@pytest.fixture
def compiled(tiny_onnx: Path, tiny_opt: Path, tmp_path: Path) -> Any:
    """Compile the example with options, for a CPU whose kernel saturates."""

    def compile_with(name: str = "out", **options: Any) -> qcompile.Artifact:
        return qcompile.compile(
            tiny_onnx,
            target="ort-cpu:avx2",
            calibration=tiny_opt / "calibration.txt",
            config=qcompile.CompileConfig(samples=8, seq_len=64, **options),
            output=tmp_path / name,
        )

    return compile_with


def labels(artifact: qcompile.Artifact) -> dict[str, str]:
    found: dict[str, str] = json.loads((artifact.path / PLAN).read_text("utf-8"))["ops"]
    return found


def test_the_plan_is_explained(compiled: Any) -> None:
    artifact = compiled(shapes=((1, 16), (2, 8)))
    planning = artifact.report.planning
    assert planning is not None
    assert planning.shapes == [(1, 16), (2, 8)]
    assert (planning.objective, planning.unit, planning.sensitivity) == (
        "latency",
        "KL",
        "gradient",
    )
    for op in artifact.report.ops:
        chosen = [row for row in op.candidates if row.chosen]
        assert len(chosen) == 1
        assert chosen[0].label == labels(artifact)[op.name]
        assert all(len(row.microseconds) == 2 for row in op.candidates)
        assert {row.damage > 0 for row in op.candidates if row.label != "float"} == {True}
        assert op.reason.startswith("cost: ")
    speeds = [sum(point.speed) for point in planning.front]
    damages = [point.damage for point in planning.front]
    assert speeds == sorted(speeds, reverse=True)
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] == 0.0
    assert (artifact.path / "plan.json").is_file()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "scheme"},
        {"recipe": {"*.0.*fc1": {"activations": "static", "ranges": "percentile"}}},
    ],
    ids=["measured", "scheme", "ranges of one op"],
)
def test_a_replayed_plan_gives_the_same_bytes(
    compiled: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    plan = tmp_path / "plan.json"
    first = compiled("first", plan_out=plan, **options)
    assert json.loads(plan.read_text("utf-8"))["ops"] == labels(first)
    again = compiled("again", plan_in=plan)
    for name in ("model.onnx", "model.onnx.data", PLAN):
        assert (first.path / name).read_bytes() == (again.path / name).read_bytes(), name
    assert {op.reason for op in again.report.ops} == {"plan"}


def test_a_limit_on_kl_holds_as_measured(compiled: Any) -> None:
    everything = compiled("all").report
    limit = 0.5 * everything.accuracy["kl"]
    limited = compiled("limited", max_kl=limit).report
    assert limited.accuracy["kl"] <= limit
    assert limited.planning.damage < everything.planning.damage
    assert any(op.reason.startswith("constraint: ") for op in limited.ops)
    assert min(limited.planning.speed) >= 1.0


def test_a_limit_twice_as_high_changes_nothing(compiled: Any) -> None:
    free = compiled("free")
    limited = compiled("limited", max_kl=2.0 * free.report.accuracy["kl"])
    assert labels(limited) == labels(free)


def test_the_least_size_that_an_error_names_can_be_had(compiled: Any) -> None:
    with pytest.raises(qcompile.ConfigError, match="the least that can be had is") as refused:
        compiled("refused", max_size=1000)
    least = int(str(refused.value).rpartition(" ")[2])
    artifact = compiled("least", max_size=least)
    assert artifact.report.planning is not None


def test_plans_that_are_not_taken_leave_nothing(
    compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = compiled("all").report
    left: list[list[str]] = []

    def spied(*arguments: Any) -> Any:
        found = keep_within(*arguments)
        left.append([file.name for file in arguments[4].glob("smoothed*.onnx")])
        return found

    monkeypatch.setattr("qcompile.pipeline.keep_within", spied)
    compiled("limited", max_kl=0.5 * everything.accuracy["kl"])
    assert [len(names) for names in left] == [1]


def test_least_size(compiled: Any) -> None:
    smallest = compiled("smallest", objective="size", max_kl=0.5)
    plain = compiled("plain")
    assert smallest.report.planning.bytes < plain.report.planning.bytes
    assert "weight4" in labels(smallest).values()
    counts = read_back(smallest.path / "model.onnx").counts
    assert counts["com.microsoft.MatMulNBits"] == list(labels(smallest).values()).count("weight4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_speedup": 50.0}, "min_speedup 50.0: the fastest plan is predicted at "),
        ({"max_size": 1000}, "max_size 1000: the least that can be had is "),
        (
            {"max_kl": 1e-9, "recipe": {"*.fc1": "w8a8"}},
            "max_kl 1e-09: the least that the recipe allows is ",
        ),
    ],
)
def test_limits_that_cannot_be_kept(compiled: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(qcompile.ConfigError, match=f"^{message}"):
        compiled(**options)


def test_least_damage_for_a_speed(compiled: Any) -> None:
    # What is measured of the example is noise, so the limit may not hold as measured.
    fast = compiled("fast").report.planning
    wanted = 1.0 + 0.5 * (min(fast.speed) - 1.0)
    report = compiled("found", objective="accuracy", min_speedup=wanted, strict=False).report
    assert min(report.planning.speed) >= wanted
    assert report.planning.damage < fast.damage


@pytest.mark.parametrize("label", ["static", "dynamic", "token", "split"])
def test_no_plan_can_saturate(label: str, compiled: Any, tmp_path: Path) -> None:
    names = labels(compiled("any"))
    # Token mode leaves the tied head to a recipe, and a plan may do what a recipe may.
    plan = {
        "target": "ort-cpu:avx2",
        "scheme": "w8a8",
        "ops": dict.fromkeys(names, label),
        "smoothing": {},
    }
    path = tmp_path / "by-hand.json"
    path.write_text(json.dumps(plan), "utf-8")
    artifact = compiled("out", plan_in=path)
    assert set(labels(artifact).values()) == {label}
    safe = {op.saturation_safe for op in artifact.report.ops}
    assert safe <= {"always", "calibrated range"}
    model = ir.load(artifact.path / "model.onnx")
    weights = [v for k, v in model.graph.initializers.items() if k.endswith("weight_int8")]
    assert len(weights) == len(names)
    if label in ("dynamic", "token"):
        for value in weights:
            assert value.const_value is not None
            codes = value.const_value.numpy()
            assert violations(codes, np.full(len(codes), 255)) == 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("", "is not a plan"),
        ('{"target": "t", "scheme": "w8a8", "ops": {}, "smoothing": {}}', "for another model"),
        ('{"target": "t", "scheme": "w8a8", "ops": {"a": "int3"}, "smoothing": {}}', "ops.a"),
    ],
)
def test_plans_that_are_none(plan: str, message: str, compiled: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan, "utf-8")
    with pytest.raises(qcompile.ConfigError, match=message):
        compiled(plan_in=path)
    with pytest.raises(qcompile.ConfigError, match="cannot be read"):
        compiled(plan_in=tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("made", "asked", "method", "named"),
    [
        ("w8a8:gptq", "w8a8", None, "w8a8"),
        ("w8a8", "w8a8:gptq", None, "w8a8:gptq"),
        ("w8a8", "w8a8", "gptq", "w8a8:gptq"),
        ("w4a16", "w8a8", None, "w8a8"),
    ],
)
def test_a_plan_of_another_scheme_is_refused(
    tiny_onnx: Path, tmp_path: Path, made: str, asked: str, method: Any, named: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"target": "t", "scheme": made, "ops": {}, "smoothing": {}}))
    config = qcompile.CompileConfig(plan_in=path, method=method)
    with pytest.raises(qcompile.ConfigError) as refused:
        qcompile.compile(tiny_onnx, scheme=asked, config=config, output=tmp_path / "out")
    assert str(refused.value) == (
        f"{path} was made under scheme {made}, and this is {named} (--scheme {made})"
    )


def test_a_plan_says_by_which_method_it_was_made(compiled: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    compiled("first", plan_out=plan, objective="scheme", method="mse")
    assert json.loads(plan.read_text("utf-8"))["scheme"] == "w8a8:mse"
    again = compiled("again", plan_in=plan, method="mse")
    assert {op.method for op in again.report.ops} == {"mse"}


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("w8a8kv8:gptq", "w8a8:gptq", True),
        ("w8a8kv8", "w8a8kv4", True),
        ("w8a8kv8:gptq", "w8a8kv8", False),
        ("zeroquant", "w8a16", False),
    ],
)
def test_a_cache_changes_no_plan(one: str, other: str, alike: bool) -> None:
    assert rounds_alike(one, other) == rounds_alike(other, one) == alike


def test_times_of_another_machine(compiled: Any, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    compiled("here", costs=path)
    table = CostTable.model_validate_json(path.read_text("utf-8"))
    assert table.machine == get_target("ort-cpu:avx2").machine()
    other = table.model_copy(update={"machine": {**table.machine, "processor": "another"}})
    other.write(path)
    before = path.read_bytes()
    artifact = compiled("there", costs=path)
    assert any("times of another machine" in line for line in artifact.report.warnings)
    assert path.read_bytes() == before
    with pytest.raises(qcompile.ConfigError, match=r"^the table of another has no time for"):
        compiled("elsewhere", costs=path, shapes=((3, 17),))


def test_nothing_is_measured_where_the_scheme_decides(compiled: Any) -> None:
    report = compiled(objective="scheme").report
    assert report.planning is None
    assert "plan" not in report.seconds
    assert report.ops_by_precision == {"int8": 25, "float": 0}


def test_a_model_without_logits_has_no_kl(tmp_path: Path) -> None:
    with pytest.raises(qcompile.ConfigError, match="max_kl is a limit on logits"):
        qcompile.compile(
            _mlp(tmp_path), config=qcompile.CompileConfig(max_kl=0.1), output=tmp_path / "out"
        )


def test_ops_without_a_gradient_are_measured_alone(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((12, 5, 32)).astype(np.float32)
    artifact = qcompile.compile(
        _mlp(tmp_path, middle="Celu"), calibration=[{"x": row[None]} for row in x],
        output=tmp_path / "out",
    )  # fmt: skip
    planning = artifact.report.planning
    assert planning is not None
    assert planning.sensitivity.startswith("each op alone: no gradient through ai.onnx.Celu")
    assert planning.unit == "relative squared error"
    for op in artifact.report.ops:
        assert all(row.damage > 0 for row in op.candidates if row.label != "float")


def test_an_op_that_the_measured_output_does_not_see_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = from_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (float[N,5,32] x, float[32,48] w1, float[32,16] w2)
            => (float[N,5,48] last_hidden_state, float[N,5,16] side) {
        [n0] last_hidden_state = MatMul (x, w1) [n1] side = MatMul (x, w2) }""",
        w1=rng.standard_normal((32, 48)).astype(np.float32),
        w2=rng.standard_normal((32, 16)).astype(np.float32),
    )
    ir.save(model, tmp_path / "two.onnx")
    x = rng.standard_normal((12, 5, 32)).astype(np.float32)
    report = qcompile.compile(
        tmp_path / "two.onnx", calibration=[{"x": row[None]} for row in x], output=tmp_path / "out"
    ).report
    reasons = {op.name: op.reason for op in report.ops}
    assert {name for name, reason in reasons.items() if reason.endswith(UNSEEN)} == {"n1"}
    assert len(reasons) == 2


def test_the_command_line(run_cli: RunCli, tiny_onnx: Path, tiny_opt: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    common = [tiny_onnx, "--calibration", tiny_opt / "calibration.txt", "--samples", 8]
    common += ["--seq-len", 64]
    first = run_cli(*common, "-o", "a", "--max-size", "1.5MB", "--plan-out", plan, "-q")
    assert first.status == 0, first.stderr
    assert plan.is_file()
    shown = run_cli("inspect", "a").stdout
    assert "candidates: microseconds at 1×128, 1×1 (estimated KL)" in shown
    assert "the plan" in shown
    assert "change from the plan" in shown
    again = run_cli(*common, "-o", "b", "--plan-in", plan, "-q")
    assert again.status == 0, again.stderr
    labels = [[op["label"] for op in read_record(Path(d))["plan"]["ops"]] for d in "ab"]
    assert labels[0] == labels[1]
    assert "float" not in labels[0]
    assert Report.read(Path("b")).planning is None
    for words, message in (
        (["--objective", "accuracy"], "objective accuracy alone keeps everything in float"),
        (["--objective", "scheme", "--max-kl", 1], "objective scheme chooses nothing"),
        (["--max-size", "big"], "max_size: 'big' is not a size like 20MB"),
        (
            ["--plan-in", plan, "--max-kl", 1],
            "a plan that is replayed takes no recipe",
        ),
        (["--costs", tiny_opt / "config.json"], "is not a table of measured times"),
    ):
        refused = run_cli(*common, "-o", "c", *words)
        assert refused.status == 1
        assert message in refused.stderr


def _mlp(folder: Path, middle: str = "Relu") -> Path:
    rng = np.random.default_rng(0)
    model = from_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[N,5,32] x, float[32,48] w1, float[48,16] w2) => (float[N,5,16] y) {{
        h = MatMul (x, w1) a = {middle} (h) y = MatMul (a, w2) }}""",
        w1=rng.standard_normal((32, 48)).astype(np.float32),
        w2=rng.standard_normal((48, 16)).astype(np.float32),
    )
    path = folder / "mlp.onnx"
    ir.save(model, path)
    return path
