"""Models that are named by their id on the Hugging Face hub, as folders on this machine."""

from __future__ import annotations

import os
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
    """Whether `source`, as `qcompile.frontend.load` takes it, is a name like ``gpt2`` or
    ``org/model``, and no path: neither it nor the folder that it would be in is here."""
    text = str(source)
    if not isinstance(source, str | Path) or text.endswith((".onnx", ".gguf", ".py")):
        return False
    # Not by Path, which raises where the system does not say that a path is absent.
    if os.path.exists(text) or os.path.exists(text.rpartition("/")[0]):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def why_not_fetched(name: str) -> str | None:
    """Why `name`, which is not here, was not looked for on the hub, if a user would wonder."""
    here = "" if name.startswith((".", "/", "~")) else name.rpartition("/")[0]
    if not os.path.isdir(here):
        return None
    return f"{here} is a folder here, so it was not looked for on the hub"


def model_folder(source: str, *, weights: bool = False, kind: str = "model") -> Path:
    """The folder of a model: `source` itself, or of a hub id the cache's, filled as far as wanted.

    Downloads are huggingface_hub's, with its cache, tokens and environment variables.

    Args:
        source: a folder or a hub id.
        weights: fetch these too, not only configuration, tokenizer and code.
        kind: what it is called where it cannot be had: ``model`` or ``adapter``.

    Raises:
        ModelError: the hub has no such model, or does not give it out, or is out of reach.
    """
    if not is_hub_id(source):
        return Path(source)
    folder = _fetched(source, _SMALL, kind)
    if weights:
        for patterns in _WEIGHTS:
            folder = _fetched(source, patterns, kind)
            if any(path for pattern in patterns for path in folder.glob(pattern)):
                break
    return folder


def _fetched(source: str, patterns: list[str], kind: str) -> Path:
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
            f"there is no folder {source}, and the hub gives no such {kind}: {said}",
            hint="give a folder, or a hub id that this machine may read",
        ) from error
