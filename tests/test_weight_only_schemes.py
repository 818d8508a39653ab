"""The schemes that quantise weights alone, end to end on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qcompile.passes.bnb4 import KERNEL as BNB4
from qcompile.passes.weight_only import KERNEL

import qcompile
from qcompile.errors import ConfigError, ModelError
from qcompile.precision import OpPlan, PrecisionPlan
from qcompile.schemes import SCHEMES
from qcompile.sensitivity import quantized_activation
from qcompile.weight_blocks import quantize_blocks
from tests.support import narrow


@pytest.fixture
def compiled(tiny_onnx: Path, tiny_opt: Path, tmp_path: Path) -> Any:
    """Compile the example by a scheme."""

    def compile_with(scheme: str, **options: Any) -> qcompile.Artifact:
        return qcompile.compile(
            tiny_onnx,
            scheme=scheme,
            calibration=tiny_opt / "calibration.txt",
            config=qcompile.CompileConfig(samples=8, seq_len=64, **options),
            output=tmp_path / f"{scheme}{len(list(tmp_path.iterdir()))}",
        )

    return compile_with


@pytest.mark.parametrize(
    ("scheme", "label", "limit"), [("w8a16", "weight8", 2e-3), ("w4a16", "weight4", 0.1)]
)
def test_every_weight_is_rounded_and_nothing_is_calibrated(
    compiled: Any, scheme: str, label: str, limit: float
) -> None:
    report = compiled(scheme, objective="scheme").report
    assert {op.precision for op in report.ops} == {label}
    assert {op.kernel for op in report.ops} == {f"com.microsoft.{KERNEL}"}
    assert report.sites == [] and "calibrate" not in report.seconds
    assert report.held_back > 0 and 0.0 < report.accuracy["kl"] < limit
    assert len(report.speed) == 2


def test_each_op_is_chosen_from_measured_times(compiled: Any) -> None:
    """Imagined ones, by which float is faster: size is what weights alone gain."""
    fast = compiled("w4a16").report
    small = compiled("w4a16", objective="size").report
    for report in (fast, small):
        for op in report.ops:
            assert {row.label for row in op.candidates} == {"weight4", "float"}
            assert all(row.conversion is None for row in op.candidates)
    assert {op.precision for op in fast.ops} == {"float"}
    assert any("every op stays in float" in line for line in fast.warnings)
    assert all(op.reason.startswith("cost: weight4 at 0.83") for op in fast.ops)
    # An output head that is tied to the embedding takes nothing in float.
    assert {op.precision for op in small.ops[:-1]} == {"weight4"}


def test_a_recipe_can_quantise_activations_too(compiled: Any) -> None:
    report = compiled("w8a16", objective="scheme", recipe={"*.fc2": "w8a8"}).report
    kinds = {op.name.rpartition(".")[2]: op.precision for op in report.ops}
    assert kinds["fc2"] == "int8" and kinds["fc1"] == "weight8"
    assert "calibrate" in report.seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "token"}, "scheme w8a16 quantises no activations, so activations has no"),
        ({"smooth": 0.5}, "so smooth has no effect"),
        ({"ranges": "mse"}, "so ranges has no effect"),
        ({"recipe": {"*.fc2": {"smooth": "off"}}}, "gives smooth, and scheme w8a16 quantises no"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    compiled: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compiled("w8a16", **options)


def test_schemes_say_what_they_quantise() -> None:
    assert [s.name for s in SCHEMES.values() if not s.quantizes] == ["fp32", "fp16"]
    assert [s.name for s in SCHEMES.values() if s.modes] == ["w8a8", "llm-int8", "fp8"]
    assert [s.name for s in SCHEMES.values() if s.fp8] == ["fp8"]


def test_a_kernel_that_leaves_activations_alone_does_no_damage_by_them() -> None:
    rng = np.random.default_rng(0)
    weight = quantize_blocks(rng.standard_normal((64, 8)).astype(np.float32), bits=4)
    op = OpPlan("m", "m", "weight4", "test", 64, 8, "y", weight)
    plan = PrecisionPlan((), (op,))
    x = torch.from_numpy(rng.standard_normal((3, 64)).astype(np.float32))
    assert torch.equal(quantized_activation(x, op, plan, blockwise=False), x)
    assert not torch.equal(quantized_activation(x, op, plan), x)


@pytest.mark.parametrize(
    ("scheme", "label", "kernel"),
    [
        ("w4a16:hqq", "weight4", KERNEL),
        ("w4a16:awq", "weight4", KERNEL),
        ("w4a8:gptq", "weight4", KERNEL),
        ("w8a16:awq+gptq", "weight8", KERNEL),
        ("w4a16:adaround", "weight4", KERNEL),
        ("zeroquant", "weight8", KERNEL),
        ("zeroquant4", "weight4", KERNEL),
        ("nf4", "nf4", BNB4),
        ("fp4", "fp4", BNB4),
    ],
)
def test_every_method_runs_by_its_kernel(
    compiled: Any, scheme: str, label: str, kernel: str
) -> None:
    artifact = compiled(scheme, objective="scheme")
    report = artifact.report
    assert {op.precision for op in report.ops} == {label}
    assert {op.kernel for op in report.ops} == {f"com.microsoft.{kernel}"}
    assert 0.0 < report.accuracy["kl"] < 0.1
    assert ("calibrate" in report.seconds) == ("awq" in scheme)
    assert any(row.alpha for row in report.sites) == ("awq" in scheme)


def test_gptq_is_nearer_to_float_and_replays(compiled: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    options = {"symmetric": False, "objective": "scheme", "block_size": 64}
    plain = compiled("w4a16:rtn", **options)
    recipe = {"lm_head": "w4a16:rtn"}
    better = compiled("w4a16:gptq", **options, recipe=recipe, plan_out=plan)
    assert better.report.accuracy["kl"] < 0.8 * plain.report.accuracy["kl"]
    assert better.report.bytes == pytest.approx(plain.report.bytes, abs=64)
    again = compiled("w4a16:gptq", symmetric=False, block_size=64, plan_in=plan)
    name = "model.onnx.data"
    assert (again.path / name).read_bytes() == (better.path / name).read_bytes()


def test_bits_per_tensor_under_a_limit_on_size(compiled: Any) -> None:
    small, large = (compiled(s, objective="scheme").report.bytes for s in ("w4a16", "w8a16"))
    limit = (small + large) // 2
    artifact = compiled("mixed", objective="accuracy", max_size=limit)
    assert {"weight4", "weight8"} <= {op.precision for op in artifact.report.ops}
    assert (artifact.path / "model.onnx.data").stat().st_size <= limit


def test_blocks_that_do_not_divide_a_depth_have_no_table(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="96 input channels are no multiple of the block's 64"):
        qcompile.compile(
            narrow(tmp_path),
            scheme="nf4",
            calibration=[{"x": np.ones((2, 96), np.float32)}] * 4,
            config=qcompile.CompileConfig(objective="scheme"),
            output=tmp_path / "out",
        )


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w4a16:gptq", {"method": "awq"}, "contradict each other"),
        ("nf4", {"method": "gptq"}, "scheme nf4 has no weights in blocks"),
        ("fp32", {"block_size": 64}, "so block_size has no effect"),
        ("nf4", {"symmetric": True}, "so symmetric has no effect"),
        ("nf4", {"recipe": {"*": {"method": "gptq"}}}, "gives a method, and scheme nf4 has none"),
        ("w8a8", {"recipe": {"*": {"method": "hqq"}}}, "scheme w8a8 has no method hqq: it moves"),
    ],
)
def test_methods_without_effect_are_refused(
    compiled: Any, scheme: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compiled(scheme, **options)
