"""A Transformers model whose checkpoint holds codes: in float for tracing, the codes beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers.pytorch_utils import Conv1D

from qcompile.checkpoints import Checkpoint
from qcompile.checkpoints.folder import TensorFolder
from qcompile.checkpoints.open import open_folder, stored_parts
from qcompile.errors import ModelError
from qcompile.precision import QuantizedWeight

_SETTINGS: Final = ("quantization_config", "compression_config")


def load_quantized(
    folder: Path, hf_config: Any, auto_class: Any, settings: Mapping[str, Any], trust: bool
) -> tuple[Any, dict[str, Any], Checkpoint]:
    """The float model that the codes of `folder` stand for.

    Only what traces and verifies it is dequantised: it takes the memory of any float model.

    Args:
        folder: in Hugging Face form.
        hf_config: its configuration.
        auto_class: what makes the model of its task.
        settings: its ``quantization_config``.
        trust: whether Python code that it carries may run.

    Returns:
        The module in float32, Transformers' account of what it loaded, and the codes.

    Raises:
        ModelError: damaged files, or weights that are not the model's.
    """
    checkpoint, tensors = open_folder(folder, settings)
    plain = copy.deepcopy(hf_config)
    for key in _SETTINGS:
        if hasattr(plain, key):
            delattr(plain, key)
    with torch.device("meta"):
        skeleton = auto_class.from_config(plain, trust_remote_code=trust)
    state = _float_tensors(tensors, checkpoint)
    for name, read in checkpoint.weights.items():
        state[f"{name}.weight"] = _dequantized(skeleton, name, read)
    module, info = type(skeleton).from_pretrained(
        None, config=plain, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    return module, info, checkpoint


def _float_tensors(tensors: TensorFolder, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    taken = {part for name in checkpoint.weights for part in stored_parts(name)}
    return {name: tensors.tensor(name).float() for name in tensors if name not in taken}


def _dequantized(
    skeleton: torch.nn.Module, name: str, read: Callable[[], QuantizedWeight]
) -> torch.Tensor:
    """The weight of the module `name`, in the layout that it has there."""
    weight = torch.from_numpy(read().dequantized())
    try:
        module = skeleton.get_submodule(name)
    except AttributeError:
        return weight.T.contiguous()  # of a name that Transformers translates
    if not isinstance(module, Conv1D):
        weight = weight.T.contiguous()
    wanted = getattr(module, "weight", None)
    if wanted is not None and wanted.shape != weight.shape:
        raise ModelError(
            f"{name}: the checkpoint's codes make a weight of {_by(weight)}, and the model's is "
            f"{_by(wanted)}"
        )
    return weight


def _by(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape))
