"""Distillation of layers: what a layer is, what learning starts from, and that it only helps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from qcompile.targets.ort_cpu import OrtCpu

from qcompile.codes import find_codes
from qcompile.config import CompileConfig
from qcompile.distill import distill, find_layers, learnable
from qcompile.errors import CalibrationError, ModelError
from qcompile.linears import find_linears
from qcompile.planning import weight_of
from qcompile.precision import Choice, QuantizedWeight
from qcompile.smoothing import SmoothingPlan
from qcompile.straight_through import LearnedWeight
from qcompile.weight_blocks import quantize_blocks
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text, run_model

RNG = np.random.default_rng(0)
W = {n: RNG.standard_normal((16, 16)).astype(np.float32) / 4 for n in ("w1", "w2", "w3", "w4")}
TEXT = """g (float[B,S,16] x, float[16,16] w1, float[16,16] w2, float[16,16] w3,
  float[16,16] w4) => (float[B,S,16] y) {
  a = MatMul (x, w1) r = ACT (a) b = MatMul (r, w2) h = Add (b, x)
  c = MatMul (h, w3) t = Relu (c) d = MatMul (t, w4) y = Add (d, h) }"""
BATCHES = [{"x": RNG.standard_normal((4, 16, 16)).astype(np.float32)} for _ in range(8)]
NAMES = ("m.0.up", "m.0.down", "m.1.up", "m.1.down")


def layered(act: str = "Relu") -> ir.Model:
    """Two layers of two Linears, each around a residual."""
    model = typed(from_text(HEADER + TEXT.replace("ACT", act), **W))
    names = iter(NAMES)
    for node in model.graph:
        node.name = next(names) if node.op_type == "MatMul" else str(node.outputs[0].name)
    return model


def rounded(model: ir.Model) -> dict[str, QuantizedWeight]:
    return {
        linear.name: quantize_blocks(weight_of(linear), bits=4, block_size=16, symmetric=False)
        for linear in find_linears(model.graph)
    }


def error(weights: dict[str, QuantizedWeight]) -> float:
    """Squared error of the outputs on all batches."""
    values = {f"w{at}": weights[name].dequantized() for at, name in enumerate(NAMES, 1)}
    model = typed(from_text(HEADER + TEXT.replace("ACT", "Relu"), **values))
    return sum(
        float(np.square(run_model(model, b)["y"] - run_model(layered(), b)["y"]).sum())
        for b in BATCHES
    )


def test_a_layer_is_what_is_under_one_number() -> None:
    layers = find_layers(layered().graph)
    assert [layer.name for layer in layers] == ["m.0", "m.1"]
    assert [[x.name for x in layer.linears] for layer in layers] == [[*NAMES[:2]], [*NAMES[2:]]]


def test_distilling_brings_the_outputs_nearer_and_is_the_same_again(tmp_path: Path) -> None:
    model = layered()
    before = ir.to_onnx_text(model)
    started = rounded(model)
    found, again = (distill(model, started, BATCHES, tmp_path) for _ in range(2))
    assert ir.to_onnx_text(model) == before
    assert set(found) == set(started)
    for name, weight in found.items():
        assert weight.codes.min() >= -8 and weight.codes.max() <= 7
        np.testing.assert_array_equal(weight.codes, again[name].codes)
        np.testing.assert_array_equal(weight.scale, again[name].scale)
    assert error(found) < error(started)


def test_a_quarter_of_a_single_batch_judges() -> None:
    graph, x = layered().graph, np.concatenate([batch["x"] for batch in BATCHES[:2]])
    assert learnable(graph, BATCHES) is BATCHES
    seen, aside = learnable(graph, [{"x": x}])
    np.testing.assert_array_equal(seen["x"], x[:6])
    np.testing.assert_array_equal(aside["x"], x[6:])
    seen, aside = learnable(graph, [{"x": x[:2]}])
    assert len(seen["x"]) == len(aside["x"]) == 1
    with pytest.raises(CalibrationError, match="one sample is too little"):
        learnable(graph, [{"x": x[:1]}])
    graph.inputs[0].shape = ir.Shape([8, 16, 16])
    with pytest.raises(CalibrationError, match="one sample is too little"):
        learnable(graph, [{"x": x}])


def test_one_sample_is_refused_before_anything_is_rounded(tmp_path: Path) -> None:
    model = layered()
    chosen = {name: Choice("weight4", "asked") for name in NAMES}
    config = CompileConfig(method="lkd", block_size=32)
    with pytest.raises(CalibrationError, match="one sample is too little"):
        find_codes(
            model, chosen, {}, SmoothingPlan(), config, OrtCpu(),
            [{"x": BATCHES[0]["x"][:1]}], tmp_path,
            lambda done, total: pytest.fail("a site was rounded"),
        )  # fmt: skip


def test_what_is_exact_is_kept(tmp_path: Path) -> None:
    """Nothing is learned where there is nothing to learn."""
    model = layered()
    exact = {name: quantize_blocks(w.dequantized(), bits=8, block_size=16, symmetric=False)
             for name, w in rounded(model).items()}  # fmt: skip
    for linear in find_linears(model.graph):
        linear.weight.const_value = ir.tensor(exact[linear.name].dequantized())
    found = distill(model, exact, BATCHES, tmp_path)
    assert all(found[name] is exact[name] for name in exact)


def test_what_overflows_is_no_gain(tmp_path: Path) -> None:
    model, started = layered(), rounded(layered())
    huge = [{"x": batch["x"] * np.float32(1e20)} for batch in BATCHES]
    found = distill(model, started, huge, tmp_path)
    assert all(found[name] is started[name] for name in started)


def test_an_op_without_a_gradient_is_named(tmp_path: Path) -> None:
    model = layered("Softplus")
    with pytest.raises(ModelError, match=r"m\.0 cannot be distilled: ai\.onnx\.Softplus"):
        distill(model, rounded(model), BATCHES, tmp_path)


def test_learning_starts_at_the_codes_given() -> None:
    weight = RNG.standard_normal((40, 5)).astype(np.float32)
    started = quantize_blocks(weight * 1.1, bits=4, block_size=16, symmetric=True)
    learned = LearnedWeight(weight, started)
    np.testing.assert_array_equal(learned.quantized().codes, started.codes)
    np.testing.assert_allclose(learned.soft().detach().numpy(), started.dequantized(), rtol=1e-6)
    learned.soft().sum().backward()  # type: ignore[no-untyped-call]
    assert learned.codes.grad is not None and learned.growth.grad is not None
    scale = np.repeat(started.scale, 16, axis=0).reshape(learned.codes.shape)
    inside = np.abs(learned.codes.detach().numpy() + 0.5) < 7.5
    inside[-1, 8:] = False  # padding
    np.testing.assert_allclose(learned.codes.grad.numpy()[inside], scale[inside], rtol=1e-6)
    assert torch.isfinite(learned.growth.grad).all()
