"""Vision models for onnx-edge: a trained CNN keeps its accuracy, random ones their logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import qcompile
from tests.edge.vision_models import compiled, mobilenet, resnet, vit


class DigitsNet(torch.nn.Module):
    """A Conv, a depthwise-separable one and a residual branch, with norms, pooling, HardSwish."""

    def __init__(self) -> None:
        super().__init__()
        layers = torch.nn
        self.stem = layers.Sequential(
            layers.Conv2d(1, 16, 3, padding=1), layers.BatchNorm2d(16), layers.ReLU()
        )
        self.separable = layers.Sequential(
            layers.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            layers.BatchNorm2d(16),
            layers.ReLU6(),
            layers.Conv2d(16, 16, 1, bias=False),
            layers.BatchNorm2d(16),
        )
        self.head = layers.Sequential(
            layers.Hardswish(), layers.MaxPool2d(2), layers.Flatten(), layers.Linear(256, 10)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixels)
        logits: torch.Tensor = self.head(x + self.separable(x))
        return logits


def test_digits_keep_their_accuracy(tmp_path: Path) -> None:
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    seen, new = images[:1200], images[1200:]
    torch.manual_seed(0)
    net: Any = DigitsNet()
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(4):
        for part in torch.chunk(torch.randperm(len(seen)), 20):
            optimiser.zero_grad()
            loss: Any = torch.nn.functional.cross_entropy(
                net(torch.from_numpy(seen)[part]), torch.from_numpy(digits.target)[part]
            )
            loss.backward()
            optimiser.step()
    made = qcompile.compile(
        (net, torch.zeros(2, 1, 8, 8)),
        target="onnx-edge",
        calibration=[{"pixels": seen}],
        config=qcompile.CompileConfig(task="image-classification"),
        output=tmp_path / "digits",
    )
    convs = [unit for unit in made.report.units if unit.op == "Conv"]
    assert len(convs) == 3 and all(unit.codes == "uint8" for unit in convs)

    def accuracy(logits: np.ndarray) -> float:
        return float((logits.argmax(1) == digits.target[1200:]).mean())

    with torch.no_grad():
        expected = accuracy(net.eval()(torch.from_numpy(new)).numpy())
    found = accuracy(made.session().run(None, {"pixels": new})[0])
    assert expected > 0.9
    assert abs(found - expected) <= 0.005


NEITHER_AND_BOTH = ((False, False), (True, True))


@pytest.mark.parametrize("make", [resnet, mobilenet])
def test_random_convolutions_keep_their_logits(tmp_path: Path, make: Callable[[], Any]) -> None:
    """More than 20 dB with equalisation and bias correction, and more than without."""
    torch.manual_seed(0)
    plain, corrected = (made.report for made in compiled(make(), tmp_path, NEITHER_AND_BOTH))
    assert corrected.accuracy["sqnr_db"] > 20
    assert corrected.accuracy["sqnr_db"] > plain.accuracy["sqnr_db"]
    assert all(unit.codes for unit in corrected.units if unit.op in ("Conv", "Gemm"))
    floats = [unit for unit in corrected.units if unit.op == "Add" and not unit.codes]
    # A ResNet's last, which only its mean over the image follows.
    assert len(floats) <= 1 and all("no product reads" in unit.reason for unit in floats)
    assert any(unit.corrected for unit in corrected.units)


def test_a_random_vit_keeps_its_logits(tmp_path: Path) -> None:
    """Norms and GELU leave nothing to equalise, and the residual path stays in float."""
    torch.manual_seed(0)
    plain, corrected = (made.report for made in compiled(vit(), tmp_path, NEITHER_AND_BOTH))
    for report in (plain, corrected):
        assert report.accuracy["sqnr_db"] > 25
        assert all(unit.codes for unit in report.units if unit.op in ("Conv", "MatMul"))
        assert not any(unit.codes for unit in report.units if unit.op == "Add")
    assert any(unit.corrected for unit in corrected.units)
    assert not any("of the predicted error" in (unit.equalized or "") for unit in corrected.units)
