"""Whole models on a GPU: as accurate as by the bodies, threads, memory, captured graphs."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from qcompile.targets.cuda import library

import qcompile
import qcompile.measuring
from qcompile.probe import Prober
from tests.targets.cuda_gpu import needs_gpu
from tests.targets.test_cuda_sessions import free_memory

pytestmark = needs_gpu

Feed = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def compiled(
    tiny_onnx: Path, tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory
) -> qcompile.Artifact:
    """The example, for the GPU at hand."""
    return qcompile.compile(
        str(tiny_onnx),
        target="ort-cuda",
        scheme="w8a8",
        calibration=tiny_opt / "calibration.txt",
        config=qcompile.CompileConfig(samples=8, seq_len=64, objective="scheme"),
        output=tmp_path_factory.mktemp("cuda") / "w8a8",
    )


def feed_of(
    batch: int, length: int, padding: int = 0, *, behind: bool = False, seed: int = 0
) -> Feed:
    """Random tokens; in the first sample, `padding` places before or behind them hold none."""
    mask = np.ones((batch, length), np.int64)
    mask[0, slice(length - padding, None) if behind else slice(padding)] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0) * mask
    ids = np.zeros_like(mask)
    ids[mask.astype(bool)] = np.random.default_rng(seed).integers(3, 200, mask.sum())
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def logits(session: ort.InferenceSession, feed: Feed) -> np.ndarray:
    result: np.ndarray = session.run(["logits"], feed)[0]
    return result


def test_compiled_on_the_machine_with_the_gpu(compiled: qcompile.Artifact) -> None:
    report = compiled.report
    assert report.speed and report.floats == "float16"
    assert not any("was not measured" in line for line in report.warnings)
    assert report.kernels["qcompile.MatMulInt8"] >= 24
    assert "If" not in report.kernels
    assert qcompile.load(compiled.path).get_providers()[0] == "CUDAExecutionProvider"


def test_planned_from_times_taken_on_the_gpu(
    tiny_onnx: Path, tiny_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, Linears are timed there: by what times them, not by what stands in for it."""
    monkeypatch.setattr(qcompile.measuring, "Prober", Prober)
    report = qcompile.compile(
        str(tiny_onnx),
        target="ort-cuda",
        scheme="w8a8",
        calibration=tiny_opt / "calibration.txt",
        config=qcompile.CompileConfig(samples=8, seq_len=64),
        output=tmp_path / "planned",
    ).report
    assert report.planning is not None and report.planning.measured > 0
    assert report.speed and not any("was not measured" in line for line in report.warnings)


def test_padding_may_be_anywhere(compiled: qcompile.Artifact) -> None:
    """Packed, both are the same rows, so that tokens get the same bits."""
    session = qcompile.load(compiled.path)
    before, behind = feed_of(2, 33, 5), feed_of(2, 33, 5, behind=True)
    found = logits(session, before)[before["attention_mask"].astype(bool)]
    wanted = logits(session, behind)[behind["attention_mask"].astype(bool)]
    np.testing.assert_array_equal(found, wanted)


def test_the_example_is_as_accurate_as_its_emulation(
    tiny_onnx: Path, tiny_opt: Path, tmp_path: Path
) -> None:
    assert_as_accurate(tiny_onnx, tiny_opt / "calibration.txt", tmp_path)


@pytest.mark.parametrize("name", ["opt-30m", "llama-28m"])
def test_trained_models_are_as_accurate_as_their_emulation(
    shared: Path, tmp_path: Path, name: str
) -> None:
    assert_as_accurate(shared / "models" / name, shared / "text" / "calib.txt", tmp_path)


@pytest.mark.parametrize("name", ["opt-30m", "llama-28m"])
def test_trained_models_in_e4m3_are_as_accurate_as_by_the_bodies(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Which are Q/DQ and a product in float32, on the CPU: no other target has e4m3."""
    here = library.gpu()
    config = qcompile.CompileConfig(objective="scheme")

    def kl(folder: str) -> float:
        return qcompile.compile(
            str(shared / "models" / name),
            target=f"ort-cuda:{here}",
            scheme="fp8",
            calibration=shared / "text" / "calib.txt",
            config=config,
            output=tmp_path / folder,
        ).report.accuracy["kl"]

    found = kl("gpu")
    monkeypatch.setattr(library, "gpu", lambda: None)
    expected = kl("bodies")
    print(f"KL to float of {name} in e4m3: {found:.5f} on the GPU, {expected:.5f} by the bodies")
    assert found < 1.1 * expected + 1e-4


def assert_as_accurate(model: Path, texts: Path, folder: Path) -> None:
    """KL to float at most 1.1 times that of the same scheme as Q/DQ in float32."""
    kl = {
        target: qcompile.compile(
            str(model),
            target=target,
            scheme="w8a8",
            calibration=texts,
            config=qcompile.CompileConfig(objective="scheme", activations="token"),
            output=folder / target.partition(":")[0],
        ).report.accuracy["kl"]
        for target in ("ort-cuda", "ort-cpu:vnni")
    }
    assert kl["ort-cuda"] < 1.1 * kl["ort-cpu:vnni"] + 1e-4


def test_two_sessions_in_two_threads(compiled: qcompile.Artifact) -> None:
    """Both at once, each with its own shapes, as one after the other."""
    feeds = {
        0: [feed_of(1, 17), feed_of(3, 40, 7)],
        1: [feed_of(2, 64), feed_of(5, 9, 3)],
    }
    sessions = [qcompile.load(compiled.path) for _ in feeds]
    alone = {at: [logits(sessions[at], feed) for feed in feeds[at]] for at in feeds}
    failures: list[str] = []

    def work(at: int) -> None:
        for step in range(50):
            which = step % 2
            if not np.array_equal(logits(sessions[at], feeds[at][which]), alone[at][which]):
                failures.append(f"session {at}, step {step}")

    threads = [threading.Thread(target=work, args=(at,)) for at in feeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_memory_does_not_grow(compiled: qcompile.Artifact) -> None:
    """On a GPU that nothing else uses at the time."""
    session = qcompile.load(compiled.path)

    def steps(count: int) -> None:
        for step in range(count):
            logits(session, feed_of(1 + step % 4, 1 + (step * 37) % 128, padding=step % 3))

    steps(512)  # every shape once: ONNX Runtime's own arena grows until then
    before = free_memory()
    steps(1000)
    assert free_memory() >= before


def test_graph_capture(compiled: qcompile.Artifact) -> None:
    """Captured in the first runs, replayed on other tokens and another padding."""
    plain = qcompile.load(compiled.path)
    captured = qcompile.load(compiled.path, provider_options={"enable_cuda_graph": "1"})
    feed = feed_of(4, 16)
    bound = {name: ort.OrtValue.ortvalue_from_numpy(v, "cuda") for name, v in feed.items()}
    poison = np.full((4, 16, plain.get_outputs()[0].shape[-1]), np.nan, np.float16)
    out = ort.OrtValue.ortvalue_from_numpy(poison, "cuda")
    binding = captured.io_binding()
    for name, value in bound.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("logits", out)
    for seed, padding in enumerate((0, 3, 0, 9)):
        feed = feed_of(4, 16, padding, seed=seed)
        for name, array in feed.items():
            bound[name].update_inplace(array)
        out.update_inplace(poison)
        captured.run_with_iobinding(binding)
        np.testing.assert_array_equal(out.numpy(), logits(plain, feed))
