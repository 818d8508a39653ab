"""Image classifiers of random weights, compiled for onnx-edge with and without corrections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from qcompile.targets import get_target

import qcompile
from qcompile.pipeline import compile_shared
from qcompile.progress import Phases
from qcompile.schemes import get_scheme
from qcompile.shared import Shared

MODELS: Any = transformers  # whose configurations leave num_labels out of their types


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


def compiled(
    model: Any, folder: Path, corrections: Sequence[tuple[bool, bool]]
) -> list[qcompile.Artifact]:
    """One artifact for each (equalize, bias_correction), from one trace."""
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

    def artifact(equalize: bool, correct: bool) -> qcompile.Artifact:
        path = folder / f"{equalize}-{correct}"
        path.mkdir()
        config = qcompile.CompileConfig(equalize=equalize, bias_correction=correct)
        report = compile_shared(shared, target, "onnx-edge", scheme, config, path, Phases())
        return qcompile.Artifact(path, report)

    return [artifact(*correction) for correction in corrections]
