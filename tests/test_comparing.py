"""Several schemes from one trace and one calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import qcompile
from qcompile import pipeline
from qcompile.errors import ConfigError, OutputError
from qcompile.schemes import parse_schemes
from qcompile.staging import COMPARISON
from tests.cli_runner import RunCli
from tests.support import narrow


def test_each_scheme_is_an_artifact(
    tiny_onnx: Path, tiny_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as one compiled by itself; the model is traced once and calibrated once."""
    calls: list[str] = []
    for name in ("calibrate", "load_calibration"):
        given = getattr(pipeline, name)

        def counted(*args: object, name: str = name, given: object = given, **kw: object) -> object:
            calls.append(name)
            return given(*args, **kw)  # type: ignore[operator]

        monkeypatch.setattr(pipeline, name, counted)
    config = qcompile.CompileConfig(samples=8, seq_len=64, objective="scheme")
    schemes = ["fp32", "w8a8", "w4a16:awq"]
    text = tiny_opt / "calibration.txt"
    out = tmp_path / "out"
    rows = qcompile.compare(tiny_onnx, schemes, calibration=text, config=config, output=out)
    assert sorted(calls) == ["calibrate", "load_calibration"]
    assert [row.scheme for row in rows] == schemes
    assert sorted(path.name for path in out.iterdir()) == [
        "fp32", "qcompile-compare.json", "w4a16-awq", "w8a8",
    ]  # fmt: skip
    assert json.loads((out / COMPARISON).read_text("utf-8")) == [r.model_dump() for r in rows]
    assert rows[0].accuracy["kl"] < rows[1].accuracy["kl"] < rows[2].accuracy["kl"]
    assert rows[2].bytes < rows[1].bytes < rows[0].bytes
    for row in rows:
        assert row.folder is not None and len(row.speed) == 2
        alone = qcompile.compile(
            tiny_onnx, scheme=row.scheme, calibration=text, config=config,
            output=tmp_path / f"alone-{row.folder}",
        )  # fmt: skip
        name = "model.onnx.data"
        assert (out / row.folder / name).read_bytes() == (alone.path / name).read_bytes()


def test_names_are_checked_first(tiny_onnx: Path, run_cli: RunCli) -> None:
    for names, message in (
        ("w4a16,nf4:dq", "takes them as floats"),
        ("w4a16,w8", "unknown scheme 'w8'"),
        ("w4a16,w4a16", "names w4a16 twice"),
        ("w4a16,nf4,", "a scheme is missing beside a comma of 'w4a16,nf4,'"),
        ("", "names no scheme"),
        ("w4a16,checkpoint", "is for a source that is quantised already"),
    ):
        assert message in run_cli(tiny_onnx, "--compare", names).error
    with pytest.raises(ConfigError, match="names no scheme"):
        qcompile.compare(tiny_onnx, [])
    with pytest.raises(ConfigError, match="names nf4 twice"):
        qcompile.compare(tiny_onnx, ["nf4", "nf4"])
    both = run_cli(tiny_onnx, "--compare", "w4a16,nf4", "--scheme", "w8a8")
    assert "--scheme has no effect" in both.error


def test_one_that_fails_is_a_row(tmp_path: Path) -> None:
    feeds = [
        {"x": np.random.default_rng(at).standard_normal((2, 96)).astype(np.float32)}
        for at in range(8)
    ]
    config = qcompile.CompileConfig(objective="scheme")
    made, failed = qcompile.compare(
        narrow(tmp_path), ["w4a16", "nf4"], calibration=feeds, config=config,
        output=tmp_path / "out",
    )  # fmt: skip
    assert made.error is None and made.folder == "w4a16"
    assert failed.folder is None and failed.error is not None
    assert "no multiple of the block's 64" in failed.error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "qcompile-compare.json",
        "w4a16",
    ]
    with pytest.raises(qcompile.ModelError, match="no multiple"):
        qcompile.compare(
            narrow(tmp_path), ["nf4"], calibration=feeds, config=config, output=tmp_path / "none"
        )
    assert not (tmp_path / "none").exists()


def test_the_table(tiny_onnx: Path, tiny_opt: Path, run_cli: RunCli, tmp_path: Path) -> None:
    words = ["--calibration", tiny_opt / "calibration.txt", "--samples", 4, "--seq-len", 32]
    words += ["--objective", "scheme", "-o", tmp_path / "out", "--overwrite"]
    outcome = run_cli(tiny_onnx, "--compare", "w4a16:rtn,nf4", *words)
    assert outcome.status == 0
    for heading in ("scheme", "size", "mean KL to float", "perplexity", "speed at 1×128"):
        assert heading in outcome.stdout
    outcome = run_cli(tiny_onnx, "--compare", "nf4", *words, "--json")
    (row,) = json.loads(outcome.stdout)["rows"]
    assert row["scheme"] == row["folder"] == "nf4" and row["accuracy"]["kl"] > 0


def test_names() -> None:
    assert parse_schemes(" w8a8, w4a16:gptq ") == ["w8a8", "w4a16:gptq"]
    for text, message in ((",", "names no scheme"), ("nf4,nf4", "names nf4 twice")):
        with pytest.raises(ConfigError, match=message):
            parse_schemes(text)


def test_what_is_of_one_scheme_is_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a plan is of one scheme"):
        qcompile.compare(
            tiny_onnx,
            ["w8a8"],
            config=qcompile.CompileConfig(plan_out=tmp_path / "plan.json"),
            output=tmp_path / "out",
        )
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists"):
        qcompile.compare(tiny_onnx, ["w8a8"], output=tmp_path / "there")
