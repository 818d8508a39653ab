"""Calibration from a folder of images, through the model's own image processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from qcompile.errors import CalibrationError
from qcompile.traced import TracedModel

SUFFIXES: Final = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def image_files(folder: Path) -> list[Path]:
    """The images below `folder`, at any depth (a folder per class is common), by path."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def image_feeds(
    files: list[Path], folder: Path, model: TracedModel
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where from, feed) of each image, read lazily. Every n-th file first, so that the first few
    are of all classes where a folder holds one class.

    Raises:
        CalibrationError: the model has no image processor, or a file is no image.
    """
    if model.image_processor is None:
        raise CalibrationError(
            f"calibration folder {folder} holds images, and the model has no image processor",
            hint="give the inputs by name in .npz files",
        )
    return _feeds(spread(files), model.image_processor)


def spread(files: list[Path]) -> list[Path]:
    """`files` in an order whose every beginning is spread over the whole list."""
    order = np.argsort([_reversed_bits(at) for at in range(len(files))], kind="stable")
    return [files[at] for at in order]


def _reversed_bits(number: int) -> int:
    return int(f"{number:032b}"[::-1], 2)


def _feeds(files: list[Path], processor: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    from PIL import Image  # where it is needed: texts need none

    for file in files:
        try:
            with Image.open(file) as image:
                pixels = processor(images=image.convert("RGB"), return_tensors="np")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CalibrationError(
                f"calibration file {file} is not a readable image: {' '.join(str(error).split())}"
            ) from error
        yield f"calibration file {file}", {"pixel_values": pixels["pixel_values"]}
