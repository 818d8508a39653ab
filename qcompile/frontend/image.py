"""What the Transformers frontend needs for models of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from transformers import AutoImageProcessor

from qcompile.errors import ModelError

PROCESSOR: Final = "preprocessor_config.json"
_SIDE: Final = 224


class OneImageOutput(torch.nn.Module):
    """Names the model's input and its one output; attributes keep the model's own paths."""

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.inner = model  # the name that export.WRAPPED strips from paths
        self.output = output

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(self.inner(pixel_values=pixel_values), self.output)
        return result


def load_image_processor(source: str, trust: bool) -> Any:
    """The model's own, or None where its folder has none. Needs no torchvision: Pillow does."""
    if Path(source).is_dir() and not (Path(source) / PROCESSOR).is_file():
        return None
    return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        source, trust_remote_code=trust
    )


def any_size(module: Any, processor: Any) -> bool:
    """Whether neither the model nor its processor says how large an image is."""
    return processor is None and not hasattr(module.config, "image_size")


def image_example(module: Any, processor: Any) -> dict[str, torch.Tensor]:
    """Two black images, float32 [2, channels, height, width], of the size that the model takes.

    Raises:
        ModelError: the model's input is not called pixel_values.
    """
    name = getattr(module, "main_input_name", None)
    if name != "pixel_values":
        raise ModelError(
            f"{type(module).__name__} takes {name}, and not pixel_values: not an image model"
        )
    if processor is not None:
        blank = Image.new("RGB", (_SIDE, _SIDE))
        shape = processor(images=blank, return_tensors="pt")["pixel_values"].shape[1:]
    else:
        size = getattr(module.config, "image_size", _SIDE)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (getattr(module.config, "num_channels", 3), height, width)
    return {"pixel_values": torch.zeros(2, *shape)}
