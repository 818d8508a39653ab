"""Models that are named by their id on the Hugging Face hub, as folders on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from qcompile.errors import ModelError

_SMALL: Final = ["*.json", "*.txt", "*.jinja", "*.py", "*.model", "*.tiktoken"]
_WEIGHTS: Final = (["*.safetensors"], ["*.bin"])
"""The second where there is none of the first."""

_NOT_READ: Final = ["*/*", "consolidated*", "*.fp16*", "*.bf16*", "training_args.bin"]
"""Subfolders, and the same weights once more."""


def is_hub_id(source: object) -> bool:
    """Whether `source`, as `qcompile.frontend.load` takes it, is a name like ``org/model``."""
    text = str(source)
    return (
        isinstance(source, str | Path)
        and text.count("/") == 1
        and not text.startswith((".", "/", "~"))
        and not text.endswith((".onnx", ".gguf"))
        and ".py:" not in text
        and not Path(text).exists()
    )


def model_folder(source: str, *, weights: bool = False) -> Path:
    """The folder of a model: `source` itself, or of a hub id the cache's, filled as far as wanted.

    Downloads are huggingface_hub's, with its cache, tokens and environment variables.

    Args:
        source: a folder or a hub id.
        weights: fetch these too, not only configuration, tokenizer and code.

    Raises:
        ModelError: the hub has no such model, or does not give it out, or is out of reach.
    """
    if not is_hub_id(source):
        return Path(source)
    folder = _fetched(source, _SMALL)
    if weights:
        for patterns in _WEIGHTS:
            folder = _fetched(source, patterns)
            if any(path for pattern in patterns for path in folder.glob(pattern)):
                break
    return folder


def _fetched(source: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(
            huggingface_hub.snapshot_download(
                source, allow_patterns=patterns, ignore_patterns=_NOT_READ
            )
        )
    except Exception as error:  # the hub's errors, those of its transport, and the disk's
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"there is no folder {source}, and the hub does not give such a model: {said[:200]}",
            hint="give a folder in Hugging Face form, or a hub id that this machine may read",
        ) from error
