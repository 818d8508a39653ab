"""Open a folder that is quantised already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from qcompile.checkpoints import (
    Checkpoint,
    StoredActivation,
    awq,
    bitsandbytes,
    compressed,
    gptq,
)
from qcompile.checkpoints.folder import TensorFolder
from qcompile.errors import ModelError

_READERS: Final[Mapping[str, Any]] = {
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed,
}


def open_folder(folder: Path, settings: Mapping[str, Any]) -> tuple[Checkpoint, TensorFolder]:
    """The quantised weights of `folder`, and all its tensors.

    Args:
        folder: in Hugging Face form.
        settings: its ``quantization_config``.

    Raises:
        ModelError: a method, or a form of it, that is not read; damaged files.
    """
    method = settings.get("quant_method")
    reader = _READERS.get(str(method))
    if reader is None:
        raise ModelError(
            f"{folder} is quantised by {method}, which is not read",
            hint="GPTQ, AWQ, bitsandbytes, compressed-tensors and GGUF are",
        )
    description = reader.check(settings)
    tensors = TensorFolder(folder)
    names = quantized_modules(tensors)
    if not names:
        raise ModelError(f"{folder} says that it is {description}, and holds no such tensors")
    weights: dict[str, Callable[[], Any]] = {
        name: partial(reader.read, tensors, name, settings) for name in names
    }
    activations: dict[str, StoredActivation] = {}
    if reader is compressed:
        found = {name: compressed.activation(tensors, name, settings) for name in names}
        activations = {name: how for name, how in found.items() if how is not None}
    notes: tuple[str, ...] = ()
    if settings.get("kv_cache_scheme"):
        notes = ("the checkpoint's scales of keys and values are left out",)
    return Checkpoint(description, weights, activations, notes), tensors


def quantized_modules(tensors: TensorFolder) -> list[str]:
    """Module paths of the weights that are codes, whatever the format."""
    marks = (".qweight", ".weight_packed", ".weight_scale", ".weight.absmax", ".SCB")
    found = (key.removesuffix(mark) for key in tensors for mark in marks if key.endswith(mark))
    return list(dict.fromkeys(found))


def stored_parts(name: str) -> set[str]:
    """Names of the tensors that take the place of a quantised module's ``weight``."""
    parts = {*gptq.PARTS, *awq.PARTS, *bitsandbytes.PARTS, *compressed.PARTS, "weight"}
    return {f"{name}.{part}" for part in parts}
