"""Methods for weights with a scale per output channel: safe, never worse, and each to be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qcompile.targets import get_target
from rich.console import Console

import qcompile
from qcompile.channel_rounding import quantize_channels
from qcompile.config import CompileConfig, Recipe
from qcompile.descent import damped
from qcompile.errors import ConfigError
from qcompile.limits import check_target
from qcompile.methods import OTHERWISE, PER_CHANNEL
from qcompile.precision import Choice, Label, QuantizedWeight
from qcompile.rounding import channel_method, in_sequence, method_of
from qcompile.schemes import get_scheme
from qcompile.summary import print_ops
from qcompile.weights import (
    ENDS,
    LIMIT,
    WHOLE,
    Neighbours,
    kept_inside,
    quantize_weight,
    violations,
)
from tests.edge.models import convolutional, images, saved, sentences, transformer
from tests.support import from_text
from tests.test_methods import problem

seeds = st.integers(0, 2**32 - 1)
Learned = Literal["gptq", "adaround"]


def output_error(weight: np.ndarray, found: QuantizedWeight, gram: np.ndarray) -> np.ndarray:
    off = found.dequantized().astype(np.float64) - weight
    result: np.ndarray = np.einsum("kn,kn->n", off, damped(gram).astype(np.float64) @ off)
    return result


@settings(max_examples=12, deadline=None)
@given(seeds, st.sampled_from([16, 33]), st.sampled_from(["free", "safe", "int4"]))
def test_no_step_makes_a_channel_worse_or_unsafe(seed: int, depth: int, kind: str) -> None:
    weight, x = problem(seed, depth)
    gram = x.astype(np.float64).T @ x
    rng = np.random.default_rng(seed)
    highest = rng.integers(100, 256, depth) if kind == "safe" else None
    bits = 4 if kind == "int4" else 8
    started = quantize_weight(
        weight, np.diagonal(gram), highest, Neighbours.of(gram[None]), bits=bits
    )
    errors = [output_error(weight, started, gram)]
    methods: tuple[Learned, Learned] = ("gptq", "adaround")
    for method in methods:
        found = quantize_channels(weight, gram, method, bits=bits, highest=highest)
        assert found.codes.shape == weight.shape and found.scale.shape == (weight.shape[1],)
        assert found.bits == bits and found.block_size is None
        assert found.codes.min() >= ENDS[bits][0] and found.codes.max() <= ENDS[bits][1]
        if highest is not None:
            assert violations(found.codes, highest) == 0
        errors.append(output_error(weight, found, gram))
    # Compared in float32.
    for better, worse in zip(errors[1:], errors, strict=False):
        assert (better <= worse * (1 + 1e-3)).all()


def test_learning_beats_gptq_and_gptq_the_nearest() -> None:
    weight, x = problem(0, 64)
    gram = x.astype(np.float64).T @ x
    nearest = quantize_weight(weight, np.diagonal(gram), bits=4)
    found = [quantize_channels(weight, gram, m, bits=4) for m in ("gptq", "adaround")]
    errors = [output_error(weight, each, gram).sum() for each in (nearest, *found)]
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.97 * errors[1]
    again = quantize_channels(weight, gram, "adaround", bits=4)
    np.testing.assert_array_equal(found[1].codes, again.codes)
    np.testing.assert_array_equal(found[1].scale, again.scale)


def test_channels_that_say_nothing_keep_codes_of_zero() -> None:
    """Those that stay in float elsewhere: zeros in the weight and in the Gram matrix."""
    weight, x = problem(1, 32)
    weight[[3, 8]], x[:, [3, 8]] = 0.0, 0.0
    found = quantize_channels(weight, x.astype(np.float64).T @ x, "adaround")
    assert not found.codes[[3, 8]].any()


@given(seeds, st.integers(1, 7))
def test_only_pairs_that_break_the_bound_are_moved(seed: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    target = rng.uniform(-127, 127, (depth, 4)).astype(np.float32)
    codes, highest = np.rint(target), rng.integers(0, 256, depth)
    found = kept_inside(codes, target, highest, rng.uniform(0.1, 1.0, depth))
    assert violations(found.astype(np.int8), np.maximum(highest, 1)) == 0
    moved = (found != codes).any(axis=1)
    for pair in range(-(-depth // 2)):
        rows = slice(2 * pair, 2 * pair + 2)
        sums = np.abs((codes[rows] * np.maximum(highest, 1)[rows, None]).sum(axis=0))
        assert moved[rows].any() == (sums > LIMIT).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_range_that_is_not_searched_is_the_whole(bits: int) -> None:
    weight = np.random.default_rng(0).uniform(-1, 1, (32, 6)).astype(np.float32)
    weight[0], moment = 1.2, np.ones(32)
    moment[0] = 0.0  # what the largest weights meet is always zero
    plain = quantize_weight(weight, moment, bits=bits, parts=WHOLE)
    np.testing.assert_allclose(plain.scale, np.abs(weight).max(axis=0) / ENDS[bits][1], rtol=1e-6)
    np.testing.assert_array_equal(plain.codes, np.rint(weight / plain.scale))
    errors = [
        np.square(each.dequantized() - weight)[1:].sum()
        for each in (quantize_weight(weight, moment, bits=bits), plain)
    ]
    assert errors[0] < errors[1]


# names


@pytest.mark.parametrize("name", ["w8a8", "w8a8kv8", "llm-int8"])
@pytest.mark.parametrize("method", PER_CHANNEL)
def test_schemes_of_int8_have_the_methods_per_channel(name: str, method: str) -> None:
    assert get_scheme(f"{name}:{method}").method == method


@pytest.mark.parametrize("method", OTHERWISE)
def test_the_others_are_refused_with_a_reason(method: str) -> None:
    message = f"w8a8 has no method {method.replace('+', '.')}: "
    with pytest.raises(ConfigError, match=message):
        get_scheme(f"w8a8:{method}")
    with pytest.raises(ConfigError, match=message):
        CompileConfig(recipe=Recipe.from_mapping({"*": f"w8a8:{method}"}))
    config = CompileConfig.model_validate({"method": method})
    with pytest.raises(ConfigError, match=message):
        check_target(get_target("ort-cpu:vnni"), get_scheme("w8a8"), config)


def test_a_recipe_names_them_per_module() -> None:
    recipe = Recipe.from_mapping({"*.fc2": "w8a8:gptq", "*.fc1": {"method": "mse"}})
    config = CompileConfig(recipe=recipe, method="awq")
    static, split = Choice("static", ""), Choice("split", "")
    found = {name: channel_method(f"m.{name}", static, config) for name in ("fc1", "fc2", "q")}
    # AWQ is for the weights in blocks beside them.
    assert found == {"fc1": "mse", "fc2": "gptq", "q": None}
    assert channel_method("m.fc2", Choice("weight4", ""), config) is None
    assert [in_sequence("m.fc2", each, config) for each in (static, split)] == [True, False]
    assert not in_sequence("m.fc1", static, config)


# whole models


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., qcompile.Artifact]:
    """Compile a small transformer, whose largest weights meet next to nothing, for a machine that
    saturates."""
    model = transformer()
    constants = model.graph.initializers
    gain, wide = (constants[name].const_value for name in ("n", "u"))
    assert gain is not None and wide is not None
    for tensor, value in ((gain, 1e-3), (wide, 1.2 * np.abs(wide.numpy()).max())):
        array = tensor.numpy().copy()
        array[0] = value
        constants[str(tensor.name)].const_value = ir.tensor(array, name=tensor.name)

    def compile_(scheme: str, **options: Any) -> qcompile.Artifact:
        return qcompile.compile(
            saved(model, tmp_path / "model.onnx"),
            target="ort-cpu:avx2",
            scheme=scheme,
            calibration=sentences(64),
            config=CompileConfig(samples=48, objective="scheme", **options),
            output=tmp_path / str(len(list(tmp_path.iterdir()))),
        )

    return compile_


def codes_of(artifact: qcompile.Artifact) -> dict[str, bytes]:
    """The int8 weights of an artifact, by the module that they are of."""
    model = ir.load(artifact.path / "model.onnx")
    found = {}
    for node in model.graph:
        if node.op_type == "MatMulIntegerToFloat":
            weight = node.inputs[1]
            assert weight is not None and weight.const_value is not None
            found[str(node.name)] = weight.const_value.tobytes()
    return found


def test_every_method_gives_weights_of_its_own_and_none_saturates(
    compiled: Callable[..., qcompile.Artifact],
) -> None:
    names = ("w8a8", *(f"w8a8:{method}" for method in PER_CHANNEL))
    found = {name: compiled(name, smooth="off") for name in names}
    for artifact in found.values():
        assert {op.label for op in artifact.report.ops} == {"static"}
        assert {op.saturation_safe for op in artifact.report.ops} == {"calibrated range"}
    sqnr = {name: artifact.report.accuracy["sqnr_db"] for name, artifact in found.items()}
    assert min(sqnr["w8a8:gptq"], sqnr["w8a8:adaround"]) > sqnr["w8a8:mse"] > sqnr["w8a8:rtn"]
    assert len({tuple(codes_of(artifact).values()) for artifact in found.values()}) == len(found)


def test_one_module_by_a_method(
    compiled: Callable[..., qcompile.Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, one = compiled("w8a8"), compiled("w8a8", recipe={"node_8": "w8a8:gptq"})
    before, after = codes_of(plain), codes_of(one)
    assert before.keys() == after.keys()
    changed = [name for name in before if before[name] != after[name]]
    assert len(changed) == 1 and changed[0].startswith("node_8")
    assert {op.method for op in plain.report.ops} == {None}
    assert {op.name: op.method for op in one.report.ops if op.method} == {"node_8": "gptq"}
    print_ops(one.report, Console(width=200))
    assert "int8, gptq" in capsys.readouterr().out


def test_the_report_names_what_really_rounded() -> None:
    config = CompileConfig(method="gptq", recipe=Recipe.from_mapping({"a": "w4a16:hqq"}))
    labels: tuple[Label, ...] = ("weight4", "static", "llm-int8", "split", "float", "nf4", "fp8")
    found = {label: method_of("b", Choice(label, ""), config) for label in labels}
    assert {label for label, method in found.items() if method} == set(labels[:3])
    assert set(found.values()) == {"gptq", None}
    assert method_of("a", Choice("weight4", ""), config) == "hqq"
    assert method_of("b", Choice("weight8", ""), CompileConfig()) == "rtn"
    assert method_of("b", Choice("token", ""), CompileConfig(method="awq")) is None


def test_channels_that_stay_in_float_beside_gptq(
    compiled: Callable[..., qcompile.Artifact],
) -> None:
    plain, nearest, found = (
        compiled(f"llm-int8{method}", outlier_share=0.1) for method in ("", ":rtn", ":gptq")
    )
    assert {op.label for op in found.report.ops} == {"llm-int8"}
    assert found.report.accuracy["sqnr_db"] > nearest.report.accuracy["sqnr_db"]
    own = codes_of(found)
    for other in map(codes_of, (plain, nearest)):
        assert own.keys() == other.keys() and all(own[name] != other[name] for name in own)


# onnx-edge


def edge(folder: Path, scheme: str, model: ir.Model, feeds: Any, **options: Any) -> Any:
    return qcompile.compile(
        saved(model, folder / "model.onnx"), target=options.pop("target", "onnx-edge"),
        scheme=scheme, calibration=feeds, output=folder / scheme.replace(":", "-"),
        config=CompileConfig(samples=16, opset=21, **options),
    ).report  # fmt: skip


def test_int4_weights_of_an_edge_model_gain_most(tmp_path: Path) -> None:
    """All that can have four bits has them."""
    options: dict[str, Any] = {"max_size": 2600, "bias_correction": False, "smooth": "off"}
    found = {
        method: edge(tmp_path, f"w8a8:{method}", transformer(), sentences(64), **options)
        for method in PER_CHANNEL
    }
    narrow = {
        n: [u for u in r.units if u.weights and "int4" in u.weights] for n, r in found.items()
    }
    assert len({len(units) for units in narrow.values()}) == 1
    sqnr = {name: report.accuracy["sqnr_db"] for name, report in found.items()}
    assert sqnr["gptq"] > sqnr["mse"] > sqnr["rtn"] and sqnr["adaround"] > sqnr["mse"]
    assert all("by mse" not in unit.reason for unit in found["gptq"].units)


def test_what_gptq_is_not_for_is_recorded(tmp_path: Path) -> None:
    report = edge(tmp_path, "w8a8:gptq", convolutional(), images())
    reasons = {unit.op: unit.reason for unit in report.units}
    assert "weights by mse, for gptq is for Linears" in reasons["Conv"]
    assert reasons["Gemm"] == "profile generic"
    used = {op.kernel: op.method for op in report.ops}
    assert (used["Conv"], used["Gemm"]) == ("mse", "gptq")
    weights = {unit.op: unit.weights for unit in report.units if unit.weights}
    assert weights["Conv"].endswith(" scales, mse") and weights["Gemm"].endswith(" scales, gptq")


def test_one_weight_of_an_edge_model_by_a_method(tmp_path: Path) -> None:
    recipe = Recipe.from_mapping({"node_8": "w8a8:gptq", "node_2": {"method": "rtn"}})
    options: dict[str, Any] = {"bias_correction": False, "smooth": "off"}
    found = {}
    for name, rules in (("plain", Recipe()), ("own", recipe)):
        (tmp_path / name).mkdir()
        report = edge(tmp_path / name, "w8a8", transformer(), sentences(), recipe=rules, **options)
        asked = {op.name: op.method for op in report.ops if op.method}
        assert asked == ({"node_8": "gptq", "node_2": "rtn"} if name == "own" else {})
        model = ir.load(tmp_path / name / "w8a8" / "model.onnx")
        found[name] = {
            str(value.name): value.const_value.tobytes()
            for value in model.graph.initializers.values()
            if value.const_value is not None and value.const_value.size >= 256
        }
    plain, own = found["plain"], found["own"]
    assert plain.keys() == own.keys()
    changed = {name for name in plain if plain[name] != own[name]}
    assert "node_8.u.int8" in changed and changed <= {"node_8.u.int8", "node_2.q.int8"}


@pytest.mark.parametrize("rule", ["w8a8", "w4a16:gptq", "llm-int8:gptq"])
def test_what_else_a_recipe_says_is_refused_on_edge(rule: str, tmp_path: Path) -> None:
    recipe = Recipe.from_mapping({"node_8": rule})
    with pytest.raises(ConfigError, match="says only which modules stay in float, and by which"):
        edge(tmp_path, "w8a8", transformer(), sentences(), recipe=recipe)


@pytest.mark.parametrize("target", ["onnx-edge:vitisai", "onnx-edge:xnnpack", "onnx-edge:qnn"])
def test_a_profile_without_scales_per_channel_of_linears_refuses(
    target: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="scale per output channel, which profile"):
        edge(tmp_path, "w8a8:gptq", transformer(), sentences(), target=target)


def test_a_linear_that_no_input_changes(tmp_path: Path) -> None:
    """What it reads is made of constants alone, and is wanted all the same."""
    rng = np.random.default_rng(0)
    shapes = {"w": (32, 32), "v": (32, 32), "e": (4, 32), "s": (32,), "b": (32,)}
    constants: Any = {n: rng.standard_normal(size).astype(np.float32) for n, size in shapes.items()}
    model = from_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[B,32] x, float[32,32] w, float[32,32] v, float[4,32] e, float[32] s, float[32] b)
          => (float[B,32] y) {
          q = LayerNormalization (e, s) p = MatMul (q, w) k = Add (p, b)
          m = ReduceMax <keepdims = 0> (k) h = MatMul (x, v) i = Add (h, b) y = Add (i, m)
        }""",
        **constants,
    )
    made = qcompile.compile(
        saved(model, tmp_path / "model.onnx"),
        target="onnx-edge",
        scheme="w8a8:gptq",
        calibration=[{"x": rng.standard_normal((16, 32)).astype(np.float32)}],
        output=tmp_path / "made",
    )
    assert sum(unit.codes is not None for unit in made.report.units if unit.op == "Gemm") >= 1
