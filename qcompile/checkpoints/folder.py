"""The tensors of a model folder, memory-mapped, one shard after another."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from qcompile.errors import ModelError

Array = npt.NDArray[Any]

_INDEX: Final = "model.safetensors.index.json"


class TensorFolder:
    """The safetensors files of a folder as one mapping of names to tensors.

    Raises:
        ModelError: there are none, one that the index names is missing, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        for path in _shards(folder):
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is damaged or cut off") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, as it is stored.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        if name not in self._files:
            raise ModelError(f"{self._folder} has no tensor {name}")
        try:
            tensor: torch.Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self._folder}: {name} is damaged or cut off") from error
        return tensor

    def floats(self, name: str) -> Array:
        """Of a floating-point tensor, every value as float32 exactly.

        Raises:
            ModelError: it is missing, of another type, or holds NaN or infinite values.
        """
        tensor = self.tensor(name)
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ModelError(f"{name} is {_type(tensor)}, and a float was expected")
        array: Array = tensor.float().numpy()
        if not np.isfinite(array).all():
            raise ModelError(f"{name} holds NaN or Inf values")
        return array

    def integers(self, name: str, dtypes: Collection[torch.dtype] = (torch.int32,)) -> Array:
        """Of an integer tensor.

        Raises:
            ModelError: it is missing or of another type.
        """
        tensor = self.tensor(name)
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ModelError(f"{name} is {_type(tensor)}, and {wanted} was expected")
        array: Array = tensor.numpy()
        return array


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ModelError(f"{index} is damaged") from error
        # A name is of a file beside the index, not of anything elsewhere.
        odd = [name for name in names if Path(name).name != name]
        if odd:
            raise ModelError(f"{index} names {odd[0]}, which is no file beside it")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {missing[0]}, which its index names")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{folder} has no .safetensors file", hint="other formats are not read")
    if len(found) > 1:
        raise ModelError(f"{folder} has {len(found)} .safetensors files and no {_INDEX}")
    return found
