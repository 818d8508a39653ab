"""Models in a GGUF file, through Transformers' own support of the format."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
import transformers

from qcompile.checkpoints import Checkpoint
from qcompile.checkpoints.gguf_file import has_tokenizer, open_gguf
from qcompile.errors import ModelError


def is_gguf(source: str) -> bool:
    """Whether `source` names a GGUF file."""
    return source.endswith(".gguf")


def read_gguf_config(source: str) -> Any:
    """The configuration that Transformers makes of the file's header.

    Raises:
        ModelError: there is no such file, or what reads it is not installed.
    """
    if not Path(source).is_file():
        raise ModelError(f"model {source} does not exist")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"the package {package} is not installed, and reads {source}",
                hint="pip install 'qcompile[gguf]'",
            )
    has_tokenizer(Path(source))  # says that it is damaged, which Transformers says at length
    config = transformers.AutoConfig.from_pretrained(**_where(source))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_gguf(source: str, auto_class: Any) -> tuple[Any, dict[str, Any], Checkpoint]:
    """The model in float32, Transformers' account of what it loaded, and the file's codes."""
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        module, info = auto_class.from_pretrained(
            **_where(source), dtype=torch.float32, output_loading_info=True
        )
    return module, info, open_gguf(Path(source), module)


def load_gguf_tokenizer(source: str) -> Any:
    """The file's tokenizer, or None where it has none."""
    if not has_tokenizer(Path(source)):
        return None
    return transformers.AutoTokenizer.from_pretrained(**_where(source))


def _where(source: str) -> dict[str, Any]:
    path = Path(source)
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
