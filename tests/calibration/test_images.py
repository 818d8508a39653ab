"""Calibration from images, and from one array without a name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qcompile.calibration.data import CalibrationData, load_calibration
from qcompile.calibration.images import spread
from qcompile.config import CompileConfig
from qcompile.errors import CalibrationError
from qcompile.traced import TracedModel
from tests.calibration.models import language_model
from tests.support import from_text

SMALL = CompileConfig(samples=4, objective="scheme")
GRAPH = from_text(
    """<ir_version: 10, opset_import: ["" : 23]>
    g (float[batch,3,2,2] pixel_values) => (float[batch,3,2,2] y) { y = Relu (pixel_values) }"""
)


def processor(*, images: Any, return_tensors: str) -> dict[str, np.ndarray]:
    """Like those of Transformers: an image becomes [1, 3, 2, 2] in [0, 1]."""
    assert return_tensors == "np"
    small = np.asarray(images.resize((2, 2)), np.float32) / 255
    return {"pixel_values": small.transpose(2, 0, 1)[None]}


MODEL = TracedModel(
    ir=GRAPH,
    name="relu",
    task="image-classification",
    kind="image-classification",
    image_processor=processor,
)


def load(source: Path, model: TracedModel = MODEL) -> CalibrationData:
    return load_calibration(source, model, SMALL)


def refusal(source: Path, model: TracedModel = MODEL) -> str:
    with pytest.raises(CalibrationError) as caught:
        load(source, model)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty images of one colour each, in two folders, as PNG and as grey JPEG."""
    for at in range(40):
        kind, mode = ("cats", "RGB") if at < 20 else ("dogs", "L")
        (tmp_path / kind).mkdir(exist_ok=True)
        colour = 6 * at if mode == "L" else (6 * at, 0, 0)
        suffix = "png" if mode == "RGB" else "jpg"
        Image.new(mode, (5, 7), colour).save(tmp_path / kind / f"{at:02}.{suffix}")
    return tmp_path


def test_images_go_through_the_processor(folder: Path) -> None:
    data = load(folder)
    assert data.samples == 4
    (batch,) = data.calibration
    assert batch["pixel_values"].shape == (4, 3, 2, 2)
    greys = [bool(np.ptp(image.mean((1, 2))) < 0.05) for image in batch["pixel_values"]]
    assert True in greys and False in greys  # of both folders


@given(st.integers(1, 300))
def test_every_beginning_is_spread_over_all_files(count: int) -> None:
    files = [Path(str(at)) for at in range(count)]
    mixed = spread(files)
    assert sorted(mixed) == sorted(files)
    for size in (2, 4, 8):
        first = sorted(int(str(file)) for file in mixed[:size])
        if count >= size:
            assert max(np.diff([*first, count])) <= 2 * count / size + 1


def test_a_model_without_a_processor_takes_no_images(folder: Path) -> None:
    message = refusal(folder, dataclasses.replace(MODEL, image_processor=None))
    assert "holds images, and the model has no image processor" in message


def test_a_folder_is_of_one_kind(folder: Path) -> None:
    np.savez(folder / "more.npz", pixel_values=np.zeros((1, 3, 2, 2), np.float32))
    assert "holds images and .npz files" in refusal(folder)


def test_a_damaged_image_is_named(folder: Path) -> None:
    for file in sorted(folder.rglob("*.png")):
        file.write_bytes(file.read_bytes()[:30])
    assert "00.png is not a readable image" in refusal(folder)


def test_one_array_is_the_graph_s_one_input(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((12, 3, 2, 2)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    data = load(tmp_path / "images.npy")
    (batch,) = data.calibration
    np.testing.assert_array_equal(batch["pixel_values"], images[:4])


def test_an_array_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    path.write_bytes(b"no array")
    assert "images.npy is not a readable .npy file of numbers" in refusal(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    assert "images.npy is not a readable .npy file of numbers" in refusal(path)
    np.save(path, np.zeros((2, 3)))
    assert "has shape [2, 3]" in refusal(path)
    assert "holds one array, and the graph takes" in refusal(path, language_model())


def test_an_input_that_never_changes_is_told(tmp_path: Path) -> None:
    told = "pixel_values is 0.5 everywhere, which tells no range of it"
    images = np.full((8, 3, 2, 2), 0.5, np.float32)
    np.save(tmp_path / "same.npy", images)
    images[::2] *= np.arange(1, 5, dtype=np.float32)[:, None, None, None]
    np.save(tmp_path / "other.npy", images)
    assert any(told in warning for warning in load(tmp_path / "same.npy").warnings)
    assert not any("everywhere" in warning for warning in load(tmp_path / "other.npy").warnings)
