"""Adapters of PEFT (LoRA and its kin) on a Transformers model."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from pathlib import Path
from typing import Any

from qcompile.checkpoints import Checkpoint
from qcompile.config import AdapterMode
from qcompile.errors import ModelError


def add_adapter(
    module: Any, checkpoint: Checkpoint | None, folder: Path, mode: AdapterMode
) -> tuple[Any, Checkpoint | None]:
    """The model with the adapter in `folder`.

    Args:
        module: the base model, in float32.
        checkpoint: the codes of the base, where it is quantised already.
        folder: as PEFT saves it.
        mode: ``merge`` adds it to the weights; ``keep`` leaves it beside them, in float: the base
            layer of a module ``q_proj`` is then called ``q_proj.base_layer``.

    Raises:
        ModelError: no adapter, one that is not for this model, or one to be merged into codes.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            "the package peft is not installed, and reads adapters",
            hint="pip install 'qcompile[adapter]'",
        )
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is no adapter: it has no adapter_config.json")
    if checkpoint is not None and mode == "merge":
        raise ModelError(
            "an adapter cannot be merged into weights that are codes already", hint="--keep-adapter"
        )
    from peft import PeftModel

    with warnings.catch_warnings():
        # It warns of its own deprecated calls, and of keys that do not fit, to go on without them.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        try:
            adapted = PeftModel.from_pretrained(module, folder)
        except Exception as error:  # PEFT raises whatever its readers raise
            lines = str(error).strip().splitlines()
            detail = lines[0] if lines else type(error).__name__
            raise ModelError(f"adapter {folder} cannot be loaded: {detail}") from error
    if mode == "merge":
        return adapted.merge_and_unload(safe_merge=True), None
    return adapted.get_base_model(), _renamed(checkpoint, adapted)


def _renamed(checkpoint: Checkpoint | None, adapted: Any) -> Checkpoint | None:
    if checkpoint is None:
        return None
    modules = dict(adapted.get_base_model().named_modules())

    def inner(name: str) -> str:
        return f"{name}.base_layer" if f"{name}.base_layer" in modules else name

    return dataclasses.replace(
        checkpoint,
        weights={inner(name): read for name, read in checkpoint.weights.items()},
        activations={inner(name): how for name, how in checkpoint.activations.items()},
    )
