"""Models and artifacts that several test files use, each made once a session."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from selenium import webdriver

import qcompile
import qcompile.measuring
import qcompile.page
import qcompile.verify
from qcompile import cli
from qcompile.timing import speed_ratio
from tests.chromium import chromium
from tests.cli_runner import Outcome, RunCli
from tests.imagined_times import ImaginedTimes

# Examples are drawn alike in every run, and a busy machine is no failure.
hypothesis.settings.register_profile("qcompile", deadline=None, derandomize=True)
hypothesis.settings.load_profile("qcompile")

_TINY_OPT = Path(__file__).parents[1] / "examples" / "tiny-opt"
_TINY_FILES = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "calibration.txt",
    "evaluation.txt",
)


@pytest.fixture(scope="session", autouse=True)
def _short_timing() -> Iterator[None]:
    """Three seconds of timing a compilation buy nothing where no test reads the ratio."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(speed_ratio, seconds=0.1, min_rounds=2)
        patch.setattr(qcompile.verify, "speed_ratio", quick)
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_pictures() -> Iterator[None]:
    """A second of drawing a compilation buys nothing where no test looks at the pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qcompile.page, "MOST_SITES", 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def _times_that_do_not_vary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans must not depend on how busy the machine is: INT8 takes half of float's time, always.

    Where times are kept is the tests' own folder, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qcompile.measuring, "Prober", ImaginedTimes)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_opt() -> Path:
    """The example model. It is part of the repository: missing, it fails whatever needs it."""
    missing = [name for name in _TINY_FILES if not (_TINY_OPT / name).is_file()]
    assert not missing, f"{_TINY_OPT} lacks {', '.join(missing)}"
    return _TINY_OPT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The team's models and texts, which are no part of the repository."""
    folder = os.environ.get("QCOMPILE_SHARED")
    if not folder:
        pytest.skip("set QCOMPILE_SHARED to the folder with models/ and text/")
    return Path(folder)


@pytest.fixture(scope="session")
def small() -> qcompile.CompileConfig:
    """Enough calibration for a tiny model."""
    return qcompile.CompileConfig(samples=8, seq_len=64, objective="scheme")


@pytest.fixture(scope="session")
def compile_tiny(
    tiny_opt: Path, small: qcompile.CompileConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], qcompile.Artifact]:
    """Compiles tiny-opt by the scheme given, for a CPU whose kernel saturates."""
    return lambda scheme: qcompile.compile(
        str(tiny_opt),
        target="ort-cpu:avx2",
        scheme=scheme,
        calibration=tiny_opt / "calibration.txt",
        config=small,
        output=tmp_path_factory.mktemp("compiled") / f"tiny-{scheme}",
    )


@pytest.fixture(scope="session")
def compiled_tiny(compile_tiny: Callable[[str], qcompile.Artifact]) -> qcompile.Artifact:
    """tiny-opt with static activations. Not to be changed."""
    return compile_tiny("w8a8")


@pytest.fixture(scope="session")
def float_tiny(compile_tiny: Callable[[str], qcompile.Artifact]) -> qcompile.Artifact:
    """tiny-opt traced and fused, nothing quantised. Not to be changed.

    Its graph, with config and tokenizer beside it, is also an ONNX model that compiles in a tenth
    of the time that tracing takes.
    """
    return compile_tiny("fp32")


@pytest.fixture(scope="session")
def tiny_onnx(float_tiny: qcompile.Artifact) -> Path:
    """The example as an ONNX file with its tokenizer: no time goes into tracing."""
    return float_tiny.path / "model.onnx"


@pytest.fixture(scope="session")
def compile_cached(
    tiny_opt: Path,
    tiny_onnx: Path,
    small: qcompile.CompileConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], qcompile.Artifact]:
    """Compiles tiny-opt with a cache by the scheme given, once a session. Not to be changed."""

    @functools.cache
    def compile_(scheme: str) -> qcompile.Artifact:
        return qcompile.compile(
            tiny_onnx,
            target="ort-cpu:avx2",
            scheme=scheme,
            calibration=tiny_opt / "calibration.txt",
            config=small.model_copy(update={"cache": True}),
            output=tmp_path_factory.mktemp("cached") / f"tiny-{scheme}",
        )

    return compile_


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Chromium, or a skip with what to install."""
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def artifact_copy(compiled_tiny: qcompile.Artifact, tmp_path: Path) -> Path:
    """A copy of the compiled model, to be damaged."""
    copy = tmp_path / "copy"
    shutil.copytree(compiled_tiny.path, copy)
    return copy


@pytest.fixture
def run_cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> RunCli:
    """Run qcompile in this process, in an empty folder; a failure must leave nothing in it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["qcompile", *map(str, words)])
        before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
        out, err = capfd.readouterr()
        if status:
            assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
        return Outcome(status, out, err)

    return run
