"""Checkpoints that are quantised already: their codes and scales, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qcompile.config import Activations
from qcompile.hub import model_folder
from qcompile.precision import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class StoredActivation:
    """How a checkpoint wants an activation quantised.

    Attributes:
        mode: ``static`` (per tensor) or ``token``.
        scale: of signed 8-bit codes, for static.
        zero_point: of signed 8-bit codes, for static.
        highest: the largest code, as unsigned: 127 where a bit was left out against saturation.
    """

    mode: Activations
    scale: float | None = None
    zero_point: int = 0
    highest: int = 255


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What the checkpoint of a model holds in codes.

    Attributes:
        description: for the report, like ``GPTQ, 4 bit, groups of 128``.
        weights: of every quantised Linear by module path, read when it is asked for.
        activations: of the same, where the checkpoint quantises what they read.
        notes: what a user has to know of how it was read.
    """

    description: str
    weights: Mapping[str, Callable[[], QuantizedWeight]]
    activations: Mapping[str, StoredActivation] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def quantized_by(source: object) -> str | None:
    """What quantised the model at `source`, or None: found without loading it, so that of Python
    code only modules are known, not what a factory makes or a function does.

    Args:
        source: as `qcompile.frontend.load` takes it.

    Raises:
        ModelError: a hub id whose configuration cannot be had.
    """
    if isinstance(source, tuple):
        from qcompile.frontend.fake_quant import has_fake_quantise

        return "fake-quantise modules" if any(map(has_fake_quantise, source[:1])) else None
    if not isinstance(source, str | Path):
        return None
    path = Path(source)
    if path.suffix == ".gguf":
        return "GGUF"
    if path.suffix == ".onnx":
        from qcompile.frontend.qdq import file_has_scales

        return "Q/DQ nodes" if file_has_scales(path) else None
    settings = quantization_settings(model_folder(str(source)))
    return str(settings.get("quant_method", "an unknown method")) if settings else None


def quantization_settings(folder: Path) -> dict[str, Any]:
    """``quantization_config`` of a model folder; empty where it has none or no readable config."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # the frontend says what is wrong with it
    if not isinstance(config, dict):
        return {}
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, dict) else {}
