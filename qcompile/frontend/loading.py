"""What Transformers' readers raise, as one line that says which file is wrong."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import transformers
from safetensors import SafetensorError

from qcompile.errors import ModelError, QcompileError

Part: TypeAlias = Literal["configuration", "weights", "tokenizer", "image processor"]

_FILES: Final = {"tokenizer": "tokenizer*.json", "image processor": "preprocessor_config.json"}


def guarded(part: Part, source: str, call: Any, *args: Any, **kwargs: Any) -> Any:
    """`call`, which reads `part` of the model `source`.

    Raises:
        ModelError: for whatever it raises.
    """
    try:
        with _silent_transformers():
            return call(*args, **kwargs)
    except QcompileError:
        raise
    except Exception as error:  # Transformers raises whatever its readers raise
        message, hint = _told(part, source, error)
        raise ModelError(message, hint=hint) from error


def check_loaded(source: str, info: Mapping[str, Any], present: Iterable[str], task: str) -> None:
    """Refuse a model that is not what its files hold, which Transformers only logs.

    Args:
        source: the model.
        info: Transformers' account of what it loaded.
        present: names of the model's own weights.
        task: what the model was loaded for.

    Raises:
        ModelError: weights are missing and would be random, have other shapes, or belong to layers
            that the model has not.
    """
    for name, stored, made in sorted(info["mismatched_keys"]):
        shapes = ("×".join(map(str, shape)) for shape in (stored, made))
        raise ModelError(
            "{}: {} is {}, and config.json makes it {}".format(source, name, *shapes),
            hint=f"is {task} the right task for this model?",
        )
    missing = sorted(info["missing_keys"])
    missing = [key for key in missing if "pooler" not in key or task == "text-classification"]
    if missing:
        raise ModelError(
            f"{source} has no usable weights for {missing[0]}{_more(missing)}",
            hint=f"is {task} the right task for this model?",
        )
    forms = {_form(name) for name in present}
    layers = [key for key in sorted(info["unexpected_keys"]) if _ends_like(_form(key), forms)]
    if layers:
        raise ModelError(
            f"{source} has weights of more layers than its config.json says: {layers[0]}"
            f"{_more(layers)} would be left out",
            hint="put the number of layers right in config.json",
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _form(name: str) -> str:
    """The name with every number left open: what the same weight is called in any layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _ends_like(form: str, forms: set[str]) -> bool:
    """Whether `form` is one of `forms` behind any prefix; only of what there are several of."""
    parts = form.split(".")
    endings = (".".join(parts[at:]) for at in range(len(parts)))
    return any("*" in ending and ending in forms for ending in endings)


def _told(part: Part, source: str, error: Exception) -> tuple[str, str | None]:
    """What is wrong, and what can be done or what Transformers says."""
    said = " ".join(str(error).split()) or type(error).__name__
    hint = f"Transformers says: {said[:200]}"
    folder = Path(source)
    if part == "weights":
        if isinstance(error, SafetensorError):
            return f"the weights of {source} are damaged or cut off", "copy the files again"
        if isinstance(error, OSError) and not any(folder.glob("*.safetensors*")):
            return f"{source} holds no weights", "they belong there as .safetensors files"
        return f"the weights of {source} do not fit its configuration", hint
    if folder.is_dir():
        for path in sorted(folder.glob(_FILES.get(part, "config.json"))):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, OSError):
                return f"{path} is damaged: no valid JSON", None
            if part == "configuration" and not (isinstance(found, dict) and "model_type" in found):
                return f"{path} names no model_type", "give a folder in Hugging Face form"
            if part == "configuration" and found["model_type"] not in transformers.CONFIG_MAPPING:
                return (
                    f"{path}: model type {found['model_type']!r} is none that Transformers "
                    f"{transformers.__version__} has"
                ), None
    return f"the {part} of {source} cannot be read", hint


@contextmanager
def _silent_transformers() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
