"""Image classifiers: from Transformers, from a module, from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qcompile.config import CompileConfig
from qcompile.errors import ModelError
from qcompile.frontend import load
from qcompile.session import open_session
from tests.support import from_text

CONFIG = CompileConfig()


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A small ViT of random weights, for images of 16 × 8 pixels."""
    torch.manual_seed(0)
    configure: Any = transformers.ViTConfig  # its own types leave num_labels out
    config = configure(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=(16, 8), patch_size=8, num_labels=3,
    )  # fmt: skip
    folder = tmp_path / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_a_classifier_takes_images_in_any_number(vit: Path, tmp_path: Path) -> None:
    model = load(str(vit), CONFIG, tmp_path)
    assert (model.task, model.kind) == ("image-classification", "image-classification")
    (spec,) = model.inputs
    assert (spec.name, spec.shape[1:]) == ("pixel_values", (3, 16, 8))
    assert spec.dtype == np.float32
    assert isinstance(spec.shape[0], str)
    session = open_session(tmp_path / "traced.onnx")
    images = np.random.default_rng(0).standard_normal((3, 3, 16, 8)).astype(np.float32)
    (logits,) = session.run(None, {"pixel_values": images})
    expected: Any = transformers.ViTForImageClassification.from_pretrained(vit)
    with torch.no_grad():
        wanted = expected.eval()(torch.from_numpy(images)).logits.numpy()
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_the_size_is_the_image_processor_s(vit: Path, tmp_path: Path) -> None:
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 8}}
    (vit / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = load(str(vit), CONFIG, tmp_path)
    assert model.image_processor is not None
    assert model.inputs[0].shape[1:] == (3, 16, 8)
    assert "preprocessor_config.json" in [asset.name for asset in model.assets]


def test_a_damaged_processor_is_one_line(vit: Path, tmp_path: Path) -> None:
    (vit / "preprocessor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json is damaged"):
        load(str(vit), CONFIG, tmp_path)


def test_a_text_model_is_none(tiny_opt: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"task": "image-classification"})
    with pytest.raises(ModelError):
        load(str(tiny_opt), config, tmp_path)


def test_a_module_is_a_classifier_where_the_task_says_so(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8), torch.nn.Flatten())
    source = (module, torch.zeros(2, 3, 8, 8))
    assert load(source, CONFIG, tmp_path).kind == "other"
    asked = CONFIG.model_copy(update={"task": "image-classification"})
    assert load(source, asked, tmp_path).kind == "image-classification"


@pytest.mark.parametrize(
    ("name", "output", "task"),
    [
        ("pixel_values", "logits", "image-classification"),
        ("pixel_values", "other", "other"),
        ("x", "logits", "other"),
    ],
)
def test_a_file_is_known_by_its_names(tmp_path: Path, name: str, output: str, task: str) -> None:
    import onnx_ir as ir

    text = f"""<ir_version: 10, opset_import: ["" : 23]>
      g (float[N,3,2,2] {name}, float[12,5] w) => (float[N,5] {output}) {{
      f = Flatten ({name})
      {output} = MatMul (f, w)
    }}"""
    path = tmp_path / "model.onnx"
    ir.save(from_text(text, w=np.ones((12, 5), np.float32)), path)
    assert load(str(path), CONFIG, tmp_path).task == task
