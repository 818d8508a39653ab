"""ort-cpu: its variants, what it finds out of the host, and weights that cannot saturate."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnxruntime.capi import onnxruntime_pybind11_state
from qcompile.passes.integer_matmul import CONTRIB, KERNEL
from qcompile.passes.quantize import Quantize
from qcompile.targets import Capability, Target, available, get_target
from qcompile.targets.ort_cpu import OrtCpu, has_kernel, host_saturates

from qcompile.calibration.run import calibrate
from qcompile.choosing import scheme_choice
from qcompile.config import Activations, CompileConfig
from qcompile.errors import ConfigError
from qcompile.kernels import expected_kernels, read_back
from qcompile.linears import find_sites
from qcompile.options import find_options
from qcompile.planning import HEADROOM, plan_precision
from qcompile.precision import PrecisionPlan, QuantizedWeight
from qcompile.schemes import get_scheme
from qcompile.smoothing import plan_smoothing
from qcompile.weights import quantize_weight, violations
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text, run_model

MODES: tuple[Activations, ...] = get_args(Activations)


# by name


def test_available() -> None:
    assert available()["ort-cpu"] is OrtCpu
    assert all(issubclass(target, Target) for target in available().values())


@pytest.mark.parametrize(
    ("spec", "saturates"),
    [
        ("ort-cpu:avx2", True),
        ("ort-cpu:vnni", False),
        ("ort-cpu:arm64", False),
    ],
)
def test_variants(spec: str, saturates: bool) -> None:
    target = get_target(spec)
    assert isinstance(target, OrtCpu)
    assert target.variant == spec.partition(":")[2]
    assert target.saturates is saturates


@pytest.mark.parametrize("spec", ["ort-cpu", "ort-cpu:"])
def test_without_a_variant_it_is_the_host(spec: str) -> None:
    assert get_target(spec).saturates is host_saturates()


@pytest.mark.parametrize("spec", ["ort-gpu", "", ":avx2", "ORT-CPU", "ort-cpu "])
def test_unknown_targets(spec: str) -> None:
    with pytest.raises(ConfigError, match="unknown target") as caught:
        get_target(spec)
    assert "ort-cpu" in (caught.value.hint or "")


@pytest.mark.parametrize("variant", ["avx512", "AVX2", "vnni:x", " "])
def test_unknown_variants(variant: str) -> None:
    with pytest.raises(ConfigError, match="ort-cpu has no variant") as caught:
        get_target(f"ort-cpu:{variant}")
    assert caught.value.hint == "one of avx2, vnni, arm64"


def test_capabilities() -> None:
    target = get_target("ort-cpu")
    for mode in MODES:
        row = target.capability("MatMul", mode)
        assert isinstance(row, Capability) and row.kernel == f"{CONTRIB}.{KERNEL}"
        assert target.capability("Conv", mode) is None


def test_a_build_without_the_kernel_has_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.targets.ort_cpu.has_kernel", lambda op, domain: False)
    assert get_target("ort-cpu").capability("MatMul", "static") is None


# the host


def test_this_build_has_the_kernel() -> None:
    assert has_kernel(KERNEL, CONTRIB)
    assert not has_kernel(KERNEL, "")
    assert not has_kernel("NoSuchOp", CONTRIB)


def test_a_build_with_other_providers_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would crash where a provider's libraries are missing."""
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime_pybind11_state, "get_all_opkernel_def", None)
    assert has_kernel.__wrapped__(KERNEL, CONTRIB)


def test_probe_says_what_host_it_is() -> None:
    found = get_target("ort-cpu:vnni").probe()
    assert found["variant"] == "vnni"
    assert found["machine"] == platform.machine()
    assert found["processor"]
    assert found["host_u8s8_saturates"] is host_saturates()
    assert found["target_u8s8_saturates"] is False
    assert found["onnxruntime"] == ort.__version__
    kernels = (KERNEL, "MatMulNBits", "MatMulBnb4")
    assert found["kernels"] == {f"{CONTRIB}.{name}": True for name in kernels}
    assert found["cache_bits"] == [8, 4]
    assert get_target("ort-cpu").probe()["variant"] == "host"


def test_the_host_saturates_when_its_kernel_does() -> None:
    """Full-range codes of one sign: the kernel is either exact or adds pairs in 16 bits."""
    codes, inputs = np.full((64, 8), 127, np.int8), np.full((5, 64), 255, np.uint8)
    wanted = emulated(inputs, codes) if host_saturates() else reference(inputs, codes)
    np.testing.assert_array_equal(integer_kernel(inputs, codes), wanted)


# saturation


def reference(inputs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    result: np.ndarray = inputs.astype(np.int64) @ codes.astype(np.int64)
    return result


def emulated(inputs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """vpmaddubsw and vpmaddwd: pairs of products added in saturating 16 bits, then in 32."""
    odd = inputs.shape[1] % 2
    x = np.pad(inputs.astype(np.int64), ((0, 0), (0, odd)))
    w = np.pad(codes.astype(np.int64), ((0, odd), (0, 0)))
    total = np.zeros((len(x), w.shape[1]), np.int64)
    for pair in range(0, x.shape[1], 2):
        sums = x[:, [pair]] * w[[pair]] + x[:, [pair + 1]] * w[[pair + 1]]
        total += np.clip(sums, -32768, 32767)
    return total


def integer_kernel(inputs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """ONNX Runtime's MatMulIntegerToFloat with scales of one, the weight a constant."""
    depth, width = codes.shape
    text = f"""g (uint8[M,{depth}] x, int8[{depth},{width}] w, float s, float[{width}] t, uint8 z)
      => (float[M,{width}] y) {{ y = com.microsoft.MatMulIntegerToFloat (x, w, s, t, z) }}"""
    model = from_text(
        HEADER + text,
        w=codes,
        s=np.array(1.0, np.float32),
        t=np.ones(width, np.float32),
        z=np.array(0, np.uint8),
    )
    # float32 holds the sums exactly.
    assert depth * 255 * 127 < 2**24
    return run_model(model, {"x": inputs})["y"].astype(np.int64)


def corners(codes: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Per output channel, the inputs that drive its positive, and its negative, sums highest."""
    top = highest.astype(np.uint8)[None, :]
    zero = np.uint8(0)
    return np.concatenate([np.where(codes.T > 0, top, zero), np.where(codes.T < 0, top, zero)])


def naive(weight: np.ndarray) -> np.ndarray:
    """Full-range int8 codes by rounding alone."""
    scale = np.maximum(np.abs(weight).max(axis=0), 1e-30) / 127
    codes: np.ndarray = np.rint(weight / scale).astype(np.int8)
    return codes


@st.composite
def adversarial(draw: st.DrawFn) -> np.ndarray:
    """Weights with whole pairs, and whole columns, of full range and one sign."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    depth, width = draw(st.integers(2, 96)), draw(st.integers(1, 40))
    weight = rng.standard_normal((depth, width))
    top = np.abs(weight).max()
    pairs = rng.random((depth // 2, width)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    signs = rng.choice([-1.0, 1.0], (depth // 2, width))
    signs[:, rng.random(width) < 0.3] = 1.0
    near = rng.uniform(draw(st.sampled_from([0.5, 0.98, 1.0])), 1.0, (depth // 2, width))
    for half in (0, 1):
        rows = weight[half : 2 * (depth // 2) : 2]
        rows[pairs] = (signs * near * top)[pairs]
    return weight.astype(np.float32)


def assert_exact(codes: np.ndarray, highest: np.ndarray, seed: int) -> None:
    """The real kernel, and its emulation, give what int64 gives on any allowed input."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(0, highest[None, :] + 1, (9, len(highest))).astype(np.uint8)
    inputs = np.concatenate([inputs, corners(codes, highest), highest[None].astype(np.uint8)])
    wanted = reference(inputs, codes)
    np.testing.assert_array_equal(emulated(inputs, codes), wanted)
    np.testing.assert_array_equal(integer_kernel(inputs, codes), wanted)
    # one row goes through a kernel of its own
    np.testing.assert_array_equal(integer_kernel(inputs[9:10], codes), wanted[9:10])


@settings(max_examples=60, deadline=None)
@given(adversarial(), st.integers(0, 2**32 - 1))
def test_no_input_at_all_saturates_dynamic_weights(weight: np.ndarray, seed: int) -> None:
    highest = np.full(len(weight), 255)
    quantized = quantize_weight(weight, highest=highest)
    assert_exact(quantized.codes, highest, seed)


@settings(max_examples=60, deadline=None)
@given(adversarial(), st.integers(0, 2**32 - 1))
def test_no_calibrated_input_saturates_static_weights(weight: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    highest = rng.integers(1, 256, len(weight))
    moment = np.exp(rng.normal(0, 2, len(weight)))
    quantized = quantize_weight(weight, moment, highest)
    assert_exact(quantized.codes, highest, seed)


@settings(max_examples=60, deadline=None)
@given(adversarial(), st.integers(0, 2**32 - 1))
def test_naive_weights_do_saturate(weight: np.ndarray, seed: int) -> None:
    """What the two tests above would find: rounding alone breaks on its worst input."""
    highest = np.full(len(weight), 255)
    codes = naive(weight)
    assume(violations(codes, highest) > 0)
    inputs = corners(codes, highest)
    wrong = emulated(inputs, codes)
    assert (wrong != reference(inputs, codes)).any()
    real = wrong if host_saturates() else reference(inputs, codes)
    np.testing.assert_array_equal(integer_kernel(inputs, codes), real)


def test_the_emulation_is_exact_below_the_bound_and_wrong_above() -> None:
    inputs = np.array([[255, 255, 255]], np.uint8)
    for first, second, right in ((64, 64, True), (65, 64, False), (127, -127, True)):
        codes = np.array([[first], [second], [127]], np.int8)
        equal = emulated(inputs, codes) == reference(inputs, codes)
        assert bool(equal.all()) is right
    saturated = emulated(inputs, np.array([[127], [127], [1]], np.int8))
    np.testing.assert_array_equal(saturated, [[32767 + 255]])
    saturated = emulated(inputs, np.array([[-127], [-127], [1]], np.int8))
    np.testing.assert_array_equal(saturated, [[-32768 + 255]])


# the whole way


DEPTH, WIDTH = 64, 24
RNG = np.random.default_rng(0)
WEIGHT = np.abs(RNG.standard_normal((DEPTH, WIDTH)).astype(np.float32)) + 3
BIAS = RNG.standard_normal(WIDTH).astype(np.float32)
TEXT = """g (float[M,64] x, float[64,24] w, float[24] b) => (float[M,24] y) {
  m = MatMul (x, w) y = Add (m, b) }"""


def compiled(
    mode: Activations, target: Target, folder: Path, x: np.ndarray
) -> tuple[Path, PrecisionPlan]:
    """One Linear with adversarial weights, calibrated on `x`, planned, quantised and lowered."""
    model = typed(from_text(HEADER + TEXT, w=WEIGHT, b=BIAS))
    model.graph[0].name = "model.fc"
    sites, config = find_sites(model.graph), CompileConfig(activations=mode, smooth="off")
    stats = calibrate(model, sites, [{"x": x}], folder)
    chosen = scheme_choice(find_options(sites, config, get_scheme("w8a8"), target))
    unsmoothed = plan_smoothing(sites, stats, config, chosen)
    plan = plan_precision(sites, stats, unsmoothed, chosen, config, target)
    for pass_ in [Quantize(plan), *target.lower(plan)]:
        pass_(model)
    return target.emit(model, folder), plan


def codes_of(x: np.ndarray, mode: Activations, plan: PrecisionPlan) -> tuple[np.ndarray, ...]:
    """Codes, scale and zero point of `x`, by ONNX Runtime's own quantisers."""
    if mode == "token":
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        return np.rint(x / scale).astype(np.int64) + 128, scale, np.array(128)
    if mode == "dynamic":
        text = """g (float[M,64] x) => (uint8[M,64] q, float s, uint8 z) {
          q, s, z = DynamicQuantizeLinear (x) }"""
        found = run_model(from_text(HEADER + text), {"x": x})
        return found["q"].astype(np.int64), found["s"], found["z"].astype(np.int64)
    activation = plan.sites[0].activation
    s, z = np.array(activation.scale, np.float32), np.array(activation.zero_point, np.uint8)
    text = "g (float[M,64] x, float s, uint8 z) => (uint8[M,64] q) { q = QuantizeLinear (x, s, z) }"
    found = run_model(from_text(HEADER + text, s=s, z=z), {"x": x})
    return found["q"].astype(np.int64), s, z.astype(np.int64)


def weight_of(plan: PrecisionPlan) -> QuantizedWeight:
    weight = plan.op("model.fc").weight
    assert weight is not None
    return weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beyond", [1.0, 1.09], ids=["calibrated", "within-the-headroom"])
def test_a_compiled_linear_is_exact_on_a_kernel_that_saturates(
    mode: Activations, beyond: float, tmp_path: Path
) -> None:
    """Positive inputs and weights: every pair is at its worst."""
    assert beyond <= HEADROOM
    target = get_target("ort-cpu:avx2")
    x = np.random.default_rng(1).uniform(-0.5, 4, (40, DEPTH)).astype(np.float32)
    path, plan = compiled(mode, target, tmp_path, x)
    weight = weight_of(plan)
    # each channel at its own extreme: the row that no calibration sample was
    rows = np.concatenate([x, x.max(axis=0, keepdims=True)]) * np.float32(beyond)
    codes, scale, zero = codes_of(rows, mode, plan)
    exact = (codes - zero) @ weight.codes.astype(np.int64)
    wanted = exact * scale.astype(np.float64) * weight.scale + BIAS
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": rows})[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(abs(wanted).max()))
    np.testing.assert_array_equal(
        emulated(codes.astype(np.uint8), weight.codes), codes @ weight.codes.astype(np.int64)
    )
    kernels = read_back(path)
    assert kernels.mismatches(expected_kernels(plan, target)) == []
    assert set(expected_kernels(plan, target)) == {"model.fc"}


@pytest.mark.parametrize("mode", MODES)
def test_with_vnni_nothing_is_given_up(mode: Activations, tmp_path: Path) -> None:
    x = np.random.default_rng(1).uniform(-0.5, 4, (40, DEPTH)).astype(np.float32)
    for folder in ("vnni", "arm64", "avx2"):
        (tmp_path / folder).mkdir()
    free = [
        weight_of(compiled(mode, get_target(f"ort-cpu:{name}"), tmp_path / name, x)[1])
        for name in ("vnni", "arm64")
    ]
    safe = weight_of(compiled(mode, get_target("ort-cpu:avx2"), tmp_path / "avx2", x)[1])
    np.testing.assert_array_equal(free[0].codes, free[1].codes)
    assert np.abs(free[0].codes).max() == 127
    assert violations(free[0].codes, np.full(DEPTH, 255)) > 0
    assert violations(safe.codes, np.full(DEPTH, 255)) <= violations(
        free[0].codes, np.full(DEPTH, 255)
    )
    assert (safe.scale >= free[0].scale).all()


def test_emit_writes_weights_beside_the_graph(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((8, DEPTH)).astype(np.float32)
    path, _ = compiled("static", get_target("ort-cpu"), tmp_path, x)
    assert path == tmp_path / "model.onnx"
    assert (tmp_path / "model.onnx.data").stat().st_size >= DEPTH * WIDTH
    model = ir.load(path)
    assert not model.functions
    assert model.graph.num_nodes() == 2
