"""Adapters of PEFT (LoRA and its kin) on a Transformers model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any, Final

from qcompile.checkpoints import Checkpoint
from qcompile.config import AdapterMode
from qcompile.errors import ModelError, QcompileError
from qcompile.hub import model_folder, why_not_fetched

_SETTINGS: Final = "adapter_config.json"

_ORIGINAL: Final = (".base_layer", ".original_module")
"""What PEFT calls a module of the model once it stands beside an adapter's."""


def add_adapter(
    module: Any, checkpoint: Checkpoint | None, source: str | Path, mode: AdapterMode
) -> tuple[Any, Checkpoint | None, frozenset[str]]:
    """The model with the adapter `source`.

    Args:
        module: the base model, in float32.
        checkpoint: the codes of the base, where it is quantised already.
        source: a folder as PEFT saves it, or a hub id.
        mode: ``merge`` adds it to the weights; ``keep`` leaves it beside them, in float: the base
            layer of a module ``q_proj`` is then called ``q_proj.base_layer``.

    Returns:
        The model, the codes by the names that its modules have now, and the module paths that the
        adapter added; none where it is merged.

    Raises:
        ModelError: no adapter, one that is not for this model or of no kind that can be had in this
            mode, or one to be merged into codes.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            "the package peft is not installed, and reads adapters",
            hint="pip install 'qcompile[adapter]'",
        )
    folder = model_folder(str(source), weights=True, kind="adapter")
    if not folder.exists():
        raise ModelError(f"adapter {source} does not exist", hint=why_not_fetched(str(source)))
    if not (folder / _SETTINGS).is_file():
        raise ModelError(f"{source} is no adapter: it has no {_SETTINGS}")
    if checkpoint is not None and mode == "merge":
        raise ModelError(
            "an adapter cannot be merged into weights that are codes already", hint="--keep-adapter"
        )
    before = {name for name, _ in module.named_modules()}
    with warnings.catch_warnings():
        # It warns of its own deprecated calls, and of keys that do not fit, to go on without them.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        try:
            adapted = _load(module, folder, mode, source)
            if mode == "merge":
                return adapted.merge_and_unload(safe_merge=True), None, frozenset()
        except QcompileError:
            raise
        except Exception as error:  # PEFT raises whatever its readers raise
            lines = str(error).strip().splitlines()
            detail = lines[0] if lines else type(error).__name__
            raise ModelError(f"adapter {source} cannot be loaded: {detail}") from error
    base = adapted.get_base_model()
    added = {name for name, _ in base.named_modules()} - before
    return (
        base,
        _renamed(checkpoint, adapted),
        frozenset(name for name in added if not name.endswith(_ORIGINAL)),
    )


def check_no_adapter(folder: Path, named: str) -> None:
    """Refuse an adapter in the place of a model.

    Args:
        folder: has no configuration of a model.
        named: what the user calls it.

    Raises:
        ModelError: it has one of an adapter.
    """
    path = folder / _SETTINGS
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        found = None
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    raise ModelError(
        f"{named} is an adapter, and no model by itself",
        hint=f"give its base model{f', {base},' if base else ''} and --adapter {named}",
    )


def _load(module: Any, folder: Path, mode: AdapterMode, source: str | Path) -> Any:
    """What PEFT makes of `module`; `source` is what the user calls the adapter.

    Raises:
        ModelError: a kind of adapter that cannot be had in this mode.
    """
    from peft import PeftConfig, PeftModel

    settings = PeftConfig.from_pretrained(str(folder))
    kind = str(getattr(settings.peft_type, "value", settings.peft_type))
    if settings.is_prompt_learning:
        raise ModelError(f"adapter {source} is of type {kind}: learned prompts are not read")
    if mode == "keep" and (kind != "LORA" or getattr(settings, "use_dora", False)):
        kind = "DORA" if kind == "LORA" else kind
        raise ModelError(
            f"adapter {source} is of type {kind}, and only LoRA can be kept beside the weights",
            hint="into a float model such an adapter can be merged",
        )
    return PeftModel.from_pretrained(module, folder)


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
