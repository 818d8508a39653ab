"""The command line: what it prints, its exit statuses, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import qcompile
from qcompile import cli, running
from qcompile.methods import METHODS
from qcompile.terminating import Terminated
from tests.cli_runner import Outcome, RunCli

KEYS = {
    "path", "model", "task", "target", "scheme", "calibration", "samples", "held_back", "seen",
    "warnings", "refusals", "bytes_float", "bytes", "accuracy", "decoded", "cache", "apart",
    "speed", "floats", "seconds", "ops_by_precision",
}  # fmt: skip


@pytest.fixture
def texts(tiny_opt: Path) -> tuple[object, ...]:
    return ("--calibration", tiny_opt / "calibration.txt", "--samples", 4, "--seq-len", 32)


# Interrupted.


def start(*words: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start qcompile, interruptible even where the process that runs the tests is not."""
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = "import runpy; runpy.run_module('qcompile', run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", f"{heed}\n{run}", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"} | (environment or {}),
    )


def test_an_interrupt_in_the_middle(tiny_onnx: Path, tmp_path: Path) -> None:
    # Writing its own text keeps a model busy for long enough.
    output = tmp_path / "out"
    process = start(tiny_onnx, "-o", output, "--samples", 5000)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*/scratch/canonical.onnx")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert lines == ["error: interrupted; nothing was written"]
    assert stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "lost"), [("model --scheme fp32", "; nothing was written"), ("run folder x", "")]
)
@pytest.mark.parametrize(
    ("raised", "said", "status"),
    [(KeyboardInterrupt, "interrupted", "130"), (Terminated, "terminated", "143")],
)
def test_an_interrupt_says_what_was_lost(
    words: str,
    lost: str,
    raised: type[BaseException],
    said: str,
    status: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(**_: object) -> None:
        raise raised

    monkeypatch.setattr(sys, "argv", ["qcompile", *words.split()])
    monkeypatch.setattr(cli.cli, "main", interrupted)
    with pytest.raises(SystemExit, match=status):
        cli.main()
    assert capsys.readouterr().err == f"error: {said}{lost}\n"


def test_a_request_to_terminate_ends_any_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generating(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("taken for an error")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["qcompile", "run", "folder", "x"])
    monkeypatch.setattr(running, "run_prompt", generating)
    with pytest.raises(SystemExit, match="143"):
        cli.main()
    assert capsys.readouterr() == ("", "error: terminated\n")
    assert signal.getsignal(signal.SIGTERM) is before


# What works.


def test_json_on_stdout_and_the_same_graph_in_another_process(
    compiled_tiny: qcompile.Artifact, tiny_opt: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(
        tiny_opt, "--target", "ort-cpu:avx2", "--calibration", tiny_opt / "calibration.txt",
        "--samples", 8, "--seq-len", 64, "--objective", "scheme", "-o", output, "--json",
        environment={"PYTHONHASHSEED": "12345"},
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert not stderr.strip()
    summary = json.loads(stdout)
    assert set(summary) == KEYS
    assert summary["path"] == str(output)
    assert summary["ops_by_precision"] == compiled_tiny.report.ops_by_precision
    for name in ("model.onnx", "model.onnx.data"):
        assert (output / name).read_bytes() == (compiled_tiny.path / name).read_bytes(), name


def test_json_is_all_that_a_pipe_gets(
    run_cli: RunCli, tiny_onnx: Path, texts: tuple[object, ...]
) -> None:
    outcome = run_cli(tiny_onnx, *texts, "--scheme", "fp32", "--json", "-o", "out")
    assert outcome.status == 0
    assert set(json.loads(outcome.stdout)) == KEYS
    assert outcome.stderr == ""


def test_quiet_prints_nothing(run_cli: RunCli, tiny_onnx: Path, texts: tuple[object, ...]) -> None:
    assert run_cli(tiny_onnx, *texts, "--scheme", "fp32", "-q", "-o", "out") == Outcome(0, "", "")


def test_the_default_output_and_the_summary(
    run_cli: RunCli, tiny_onnx: Path, texts: tuple[object, ...]
) -> None:
    outcome = run_cli("--scheme", "w8a8", tiny_onnx, "--target", "ort-cpu:vnni", *texts)
    assert outcome.status == 0
    assert [path.name for path in Path().iterdir()] == ["model-ort-cpu-vnni-w8a8"]
    for word in ("size", " int8", "mean KL", "top-1", "float, same process", "held-back"):
        assert word in outcome.stdout


def test_generated_data_is_never_silent(run_cli: RunCli, tiny_onnx: Path) -> None:
    outcome = run_cli(
        tiny_onnx, "--samples", 2, "--seq-len", 8, "--scheme", "w8a8", "-q", "-o", "out"
    )
    assert outcome.status == 0
    assert "warning: calibrated on text that" in outcome.stderr
    assert "--calibration" in outcome.stderr


def test_generated_inputs_are_told_of_where_nothing_is_calibrated(
    run_cli: RunCli, tiny_onnx: Path
) -> None:
    outcome = run_cli(tiny_onnx, "--scheme", "fp32", "--seq-len", 8, "-q", "-o", "out")
    assert outcome.status == 0
    said = "warning: accuracy was measured on random inputs, not on real data; give --calibration\n"
    assert outcome.stderr == said


def test_targets(run_cli: RunCli) -> None:
    outcome = run_cli("targets")
    assert (outcome.status, outcome.stderr) == (0, "")
    for word in ("ort-cpu", "avx2|vnni|arm64", "MatMulIntegerToFloat", "static", "token"):
        assert word in outcome.stdout


def test_schemes(run_cli: RunCli) -> None:
    outcome = run_cli("schemes")
    assert (outcome.status, outcome.stderr) == (0, "")
    names = [line.split()[0] for line in outcome.stdout.splitlines()]
    schemes = [
        "fp32", "fp16", "w8a8", "llm-int8", "fp8", "w8a16", "w4a16", "w4a8", "mixed",
        "zeroquant", "zeroquant4", "nf4", "fp4", "checkpoint",
    ]  # fmt: skip
    methods = [f":{method}" for method in METHODS]
    assert names == [*schemes, "Methods", *methods, "…kv8", "…kv4"]


def test_inspect(run_cli: RunCli, compiled_tiny: qcompile.Artifact) -> None:
    outcome = run_cli("inspect", compiled_tiny.path)
    assert (outcome.status, outcome.stderr) == (0, "")
    for op in compiled_tiny.report.ops:
        assert op.name in outcome.stdout
    assert "MatMulIntegerToFloat" in outcome.stdout
    outcome = run_cli("inspect", compiled_tiny.path, "--json")
    assert json.loads(outcome.stdout) == compiled_tiny.report.model_dump(mode="json")


def test_inspect_tells_of_files_that_were_changed(run_cli: RunCli, artifact_copy: Path) -> None:
    assert run_cli("inspect", artifact_copy).stderr == ""
    (artifact_copy / "tokenizer.json").write_text("{}")
    (artifact_copy / "check.npz").unlink()
    for words in ([], ["--json"]):
        outcome = run_cli("inspect", artifact_copy, *words)
        assert outcome.status == 0
        assert outcome.stderr == (
            "warning: check.npz, tokenizer.json: missing or changed since the artifact was made\n"
        )


def test_check(run_cli: RunCli, compiled_tiny: qcompile.Artifact, artifact_copy: Path) -> None:
    outcome = run_cli("check", compiled_tiny.path)
    assert (outcome.status, outcome.stderr) == (0, "")
    assert "sound on this machine" in outcome.stdout
    found = json.loads(run_cli("check", compiled_tiny.path, "--json").stdout)
    assert found["quantised ops"] == compiled_tiny.report.ops_by_precision["int8"]
    (artifact_copy / "config.json").write_text("{}")
    assert "config.json is missing or changed" in run_cli("check", artifact_copy).error


@pytest.mark.parametrize("command", ["inspect", "check", "bench", "report"])
def test_a_folder_that_is_no_artifact(run_cli: RunCli, tmp_path: Path, command: str) -> None:
    assert "is not a qcompile artifact" in run_cli(command, tmp_path).error
    assert "is not a qcompile artifact" in run_cli(command, tmp_path / "absent").error


def test_help_and_version(run_cli: RunCli) -> None:
    assert "MODEL" in run_cli("--help").stdout
    assert "--activations" in run_cli("compile", "--help").stdout
    assert run_cli("--version").stdout.split()[-1] == "0.1.0"


def test_a_factory_that_prints_leaves_stdout_clean(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(
        textwrap.dedent(
            """
            import torch

            print("imported")

            class Loud(torch.nn.Linear):
                def forward(self, x):
                    print("called")
                    return super().forward(x)

            def make():
                print("made")
                return Loud(8, 4), torch.randn(4, 8)
            """
        )
    )
    outcome = run_cli(f"{tmp_path / 'made.py'}:make", "--json", "-o", "out")
    assert outcome.status == 0
    assert json.loads(outcome.stdout)["model"] == "made-make"
    assert "imported" in outcome.stderr and "made" in outcome.stderr
