"""Frontends: everything that qcompile can read becomes a `TracedModel`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from qcompile.config import CompileConfig
from qcompile.errors import ConfigError, ModelError, check_reachable
from qcompile.spill import spill
from qcompile.traced import TracedModel

if TYPE_CHECKING:
    import torch

Source: TypeAlias = "str | Path | tuple[torch.nn.Module, object]"
"""A model folder, a hub id, an .onnx file, ``path/file.py:factory``, or (module, examples)."""

_FACTORY = re.compile(r"\.py:[A-Za-z_]\w*$")


def load(source: Source, config: CompileConfig, work: Path) -> TracedModel:
    """Read and trace `source`.

    Args:
        source: see `Source`.
        config: task, opset, trust_remote_code.
        work: where every frontend leaves the traced graph, as ``traced.onnx``, and its weights.

    Raises:
        ModelError: the model is missing, corrupt, unsupported or unsafe to load.
        ConfigError: the task is unknown.
    """
    model = _load(source, config, work)
    shapes = [value.shape for value in model.ir.graph.outputs[:1]]
    scores = [shape is not None and shape[-1:] == (1,) for shape in shapes]
    if model.kind.endswith("-classification") and any(scores):
        # One number, as of rerankers: there is no distribution to compare.
        return dataclasses.replace(model, kind="other")
    return model


def _load(source: Source, config: CompileConfig, work: Path) -> TracedModel:
    if config.adapter is not None and (
        isinstance(source, tuple) or str(source).endswith(".onnx") or _FACTORY.search(str(source))
    ):
        raise ConfigError("an adapter is for a Transformers model: a folder or a hub id")
    # Imported where they are needed: torch and Transformers take seconds, an .onnx file neither.
    if isinstance(source, tuple):
        from torch.nn import Module

        from qcompile.frontend.module import trace_module

        if len(source) != 2 or not isinstance(source[0], Module):
            raise ModelError("a model that is a tuple has to be (torch.nn.Module, example_inputs)")
        module, example = source
        return trace_module(module, example, type(module).__name__.lower(), config, work)
    text = str(source)
    if not text.strip():
        raise ModelError("the model is an empty name")
    check_reachable(Path(text.rpartition(":")[0] if _FACTORY.search(text) else text), ModelError)
    if _FACTORY.search(text):
        from qcompile.frontend.module import load_factory

        return load_factory(text, config, work)
    if text.endswith(".py"):
        raise ModelError(f"{text} names no function", hint=f"give {text}:factory")
    if text.endswith(".onnx"):
        from qcompile.frontend.onnx_file import load_onnx

        model = load_onnx(Path(text), task=config.task)
        model.ir = spill(model.ir, work, "traced")
        return model
    from qcompile.frontend.huggingface import load_huggingface

    return load_huggingface(text, config, work)


def source_name(source: Source) -> str:
    """The model's name without loading it: what a default output folder is called after."""
    if isinstance(source, tuple):
        return type(source[0]).__name__.lower()
    text = str(source)
    if _FACTORY.search(text):
        file, _, function = text.rpartition(":")
        return f"{Path(file).stem}-{function}"
    if text.endswith((".onnx", ".gguf")):
        return Path(text).stem
    return Path(text).resolve().name if Path(text).exists() else text.rsplit("/", 1)[-1]
