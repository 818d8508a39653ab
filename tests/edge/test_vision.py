"""Vision models for onnx-edge: a trained CNN keeps its accuracy, random ones their logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from qcompile.targets import get_target
from sklearn.datasets import load_digits

import qcompile
from qcompile.pipeline import compile_shared
from qcompile.progress import Phases
from qcompile.schemes import get_scheme
from qcompile.shared import Shared

MODELS: Any = transformers  # whose configurations leave num_labels out of their types


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


def images(count: int, seed: int) -> np.ndarray:
    """Smooth patterns and a little noise, float32 [count, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(patterns, size=(32, 32), mode="bilinear")
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return np.asarray((smooth + 0.2 * noise).numpy(), np.float32)


def resnet() -> Any:
    config = MODELS.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], num_labels=10
    )
    return MODELS.ResNetForImageClassification(config)


def mobilenet() -> Any:
    """Its weights are drawn so that signals neither die out, as they do by default (to 1e-26 after
    52 layers), nor grow until ReLU6 is all that is left of them."""
    config = MODELS.MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=10)
    model: Any = MODELS.MobileNetV2ForImageClassification(config)
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Conv2d):
            bottleneck = name.startswith("mobilenet_v2.layer") and "expand" in name
            linear = bottleneck or "first_conv" in name  # no ReLU is before it
            torch.nn.init.kaiming_normal_(part.weight, nonlinearity="linear" if linear else "relu")
    for layer in model.mobilenet_v2.layer:
        if layer.use_residual:
            layer.reduce_1x1.convolution.weight.data *= 0.5
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    return model


def vit() -> Any:
    """The token that is classified is as large as the others: it starts near zero by default."""
    config = MODELS.ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8, initializer_range=0.1, num_labels=10,
    )  # fmt: skip
    model: Any = MODELS.ViTForImageClassification(config)
    torch.nn.init.normal_(model.vit.embeddings.cls_token)
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
    return model


Pair = tuple[qcompile.Artifact, qcompile.Artifact]


def compiled(model: Any, folder: Path) -> Pair:
    """Without equalisation and bias correction, and with both, from one trace."""
    norms: list[Any] = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for part in norms:
        torch.nn.init.uniform_(part.weight, 0.5, 1.5)
        torch.nn.init.normal_(part.bias, std=0.1)
        torch.nn.init.normal_(part.running_mean, std=0.1)
        torch.nn.init.uniform_(part.running_var, 0.5, 1.5)
    model.save_pretrained(folder / "model")
    (folder / "work").mkdir()
    calibration = [{"pixel_values": images(144, seed=1)}]
    shared = Shared(str(folder / "model"), calibration, folder / "work", several=True)
    target, scheme = get_target("onnx-edge"), get_scheme("w8a8")

    def artifact(corrected: bool) -> qcompile.Artifact:
        path = folder / f"{corrected}"
        path.mkdir()
        config = qcompile.CompileConfig(equalize=corrected, bias_correction=corrected)
        report = compile_shared(shared, target, "onnx-edge", scheme, config, path, Phases())
        return qcompile.Artifact(path, report)

    return artifact(False), artifact(True)


@pytest.mark.parametrize("make", [resnet, mobilenet])
def test_random_convolutions_keep_their_logits(tmp_path: Path, make: Callable[[], Any]) -> None:
    """More than 20 dB with equalisation and bias correction, and more than without."""
    torch.manual_seed(0)
    plain, corrected = (made.report for made in compiled(make(), tmp_path))
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
    plain, corrected = (made.report for made in compiled(vit(), tmp_path))
    for report in (plain, corrected):
        assert report.accuracy["sqnr_db"] > 25
        assert all(unit.codes for unit in report.units if unit.op in ("Conv", "MatMul"))
        assert not any(unit.codes for unit in report.units if unit.op == "Add")
    assert any(unit.corrected for unit in corrected.units)
    assert not any("of the predicted error" in (unit.equalized or "") for unit in corrected.units)
