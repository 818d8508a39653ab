"""Quantize: a precision plan becomes standard QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.quantize import Quantize

from qcompile.config import Activations
from qcompile.errors import ModelError
from qcompile.linears import find_sites
from qcompile.names import MODULE_PATH_KEY
from qcompile.precision import (
    ActivationQuant,
    OpPlan,
    PrecisionPlan,
    QuantizedWeight,
    SitePlan,
    uint8_affine,
)
from tests.passes.rewriting import HEADER, typed
from tests.support import (
    Feed,
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

RNG = np.random.default_rng(0)
OPSETS = HEADER.replace("]", ', "qcompile" : 1]')
MODES: tuple[Activations, ...] = get_args(Activations)
X = RNG.standard_normal((2, 5, 4)).astype(np.float32)
W, V = RNG.standard_normal((2, 4, 3)).astype(np.float32)
B = RNG.standard_normal(3).astype(np.float32)
FEED: Feed = {"x": X}
SCALE, ZERO = uint8_affine(float(X.min()), float(X.max()))


def codes_of(weight: np.ndarray) -> QuantizedWeight:
    """Codes of at most 63: no kernel that adds in 16 bits can saturate."""
    scale = (np.abs(weight).max(axis=0) / 63).astype(np.float32)
    return QuantizedWeight(np.rint(weight / scale).astype(np.int8), scale)


def plan_of(model: ir.Model, mode: Activations, floats: tuple[str, ...] = ()) -> PrecisionPlan:
    """Everything int8 but the ops in `floats`."""
    sites, planned = [], []
    scale, zero = (SCALE, ZERO) if mode == "static" else (None, None)
    for site in find_sites(model.graph):
        names = tuple(linear.name for linear in site.linears if linear.name not in floats)
        activation = ActivationQuant(mode, scale, zero, np.full(site.channels, 255))
        if names:
            sites.append(SitePlan(site.name, str(site.x.name), activation, names))
        for linear in site.linears:
            tensor = linear.weight.const_value
            assert tensor is not None
            transposed = linear.matmul.inputs[1] is not linear.weight
            weight = tensor.numpy().T if transposed else tensor.numpy()
            int8 = linear.name in names
            planned.append(
                OpPlan(
                    name=linear.name,
                    site=site.name,
                    precision="int8" if int8 else "float",
                    reason="test",
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                    output=str(linear.output.name),
                    weight=codes_of(weight) if int8 else None,
                )
            )
    return PrecisionPlan(tuple(sites), tuple(planned))


def named(text: str, **weights: np.ndarray) -> ir.Model:
    """The model, every MatMul named after the value it computes."""
    model = typed(from_text(HEADER + text, **weights))
    for node in model.graph:
        if node.op_type == "MatMul":
            node.name = node.outputs[0].name
    return model


def fake_quantized(x: np.ndarray, mode: Activations) -> np.ndarray:
    """What the activation becomes, by numpy."""
    if mode == "token":
        top = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-20))
        step = top / np.float32(127)
        rounded: np.ndarray = np.rint(x / step) * step
        return rounded
    scale, zero = SCALE, ZERO
    if mode == "dynamic":
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = float(np.float32(np.float32(high - low) / np.float32(255)))
        zero = int(np.clip(np.rint(-low / scale), 0, 255))
    codes = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255)
    restored: np.ndarray = ((codes - zero) * np.float32(scale)).astype(np.float32)
    return restored


TEXT = """g (float[M,N,4] x, float[4,3] w, float[3] b) => (float[M,N,3] y) {
  m = MatMul (x, w) y = Add (m, b) }"""
QUANTIZERS: dict[Activations, str] = {
    "static": "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)",
    "dynamic": "q, t, n = DynamicQuantizeLinear (x) d = DequantizeLinear (q, t, n)",
    "token": "q, t = qcompile.QuantizePerToken (x) d = qcompile.DequantizePerToken (q, t)",
}


@pytest.mark.parametrize("mode", MODES)
def test_one_linear(mode: Activations) -> None:
    model = named(TEXT, w=W, b=B)
    pass_ = Quantize(plan_of(model, mode))
    result = pass_(model)
    assert result.modified
    weight = codes_of(W)
    constants = {"wq": weight.codes, "ws": weight.scale, "b": B}
    declared = "int8[4,3] wq, float[3] ws, float[3] b"
    if mode == "static":
        constants |= {"s": np.array(SCALE, np.float32), "z": np.array(ZERO, np.uint8)}
        declared += ", float s, uint8 z"
    after = f"""g (float[M,N,4] x, {declared}) => (float[M,N,3] y) {{
      {QUANTIZERS[mode]} v = DequantizeLinear <axis = 1> (wq, ws) m = MatMul (d, v)
      y = Add (m, b) }}"""
    assert_same_graph(result.model, from_text(OPSETS + after, **constants))
    check_model(result.model)
    assert sorted(c.dtype.name for c in initializers(result.model)) == sorted(
        ["INT8", "FLOAT", "FLOAT"] + (["FLOAT", "UINT8"] if mode == "static" else [])
    )
    assert_idempotent(pass_, result.model)


def initializers(model: ir.Model) -> list[ir.TensorProtocol]:
    found = [value.const_value for value in model.graph.initializers.values()]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("optimise", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_computes_what_the_plan_says(mode: Activations, optimise: bool) -> None:
    """Also optimised, where ONNX Runtime runs its own int8 kernels."""
    model = named(TEXT, w=W, b=B)
    Quantize(plan_of(model, mode))(model)
    found = run_model(model, FEED, optimise=optimise)["y"]
    weight = codes_of(W)
    wanted = fake_quantized(X, mode) @ (weight.codes * weight.scale) + B
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


SHARED = """g (float[M,N,4] x, float[4,3] w, float[4,3] v) =>
  (float[M,N,3] a, float[M,N,3] c, float[M,N,4] r) {
  r = Relu (x) a = MatMul (r, w) c = MatMul (r, v) }"""


@pytest.mark.parametrize("mode", MODES)
def test_linears_of_one_site_share_one_quantiser(mode: Activations) -> None:
    model = named(SHARED, w=W, v=V)
    pass_ = Quantize(plan_of(model, mode))
    assert pass_(model).modified
    kinds = ops(model)
    quantizers = ("QuantizeLinear", "DynamicQuantizeLinear", "qcompile.QuantizePerToken")
    assert sum(kinds.count(kind) for kind in quantizers) == 1
    matmuls = [node for node in model.graph if node.op_type == "MatMul"]
    assert matmuls[0].inputs[0] is matmuls[1].inputs[0]
    found = run_model(model, FEED, optimise=False)
    wanted = fake_quantized(np.maximum(X, 0), mode)
    for name, weight in (("a", codes_of(W)), ("c", codes_of(V))):
        right = wanted @ (weight.codes * weight.scale)
        np.testing.assert_allclose(found[name], right, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["r"], np.maximum(X, 0))
    assert_idempotent(pass_, model)


def test_other_readers_keep_the_float_value() -> None:
    model = named(SHARED, w=W, v=V)
    pass_ = Quantize(plan_of(model, "static", floats=("c",)))
    assert pass_(model).modified
    by_name = {node.name: node for node in model.graph}
    reads_float, reads_codes = by_name["c"].inputs[0], by_name["a"].inputs[0]
    assert reads_float is not None and reads_codes is not None
    assert reads_float.name == "r"
    producer = reads_codes.producer()
    assert producer is not None and producer.op_type == "DequantizeLinear"
    found = run_model(model, FEED, optimise=False)
    np.testing.assert_allclose(found["c"], np.maximum(X, 0) @ V, rtol=1e-6, atol=1e-6)
    assert_idempotent(pass_, model)


def test_a_plan_of_floats_changes_nothing() -> None:
    model = named(SHARED, w=W, v=V)
    assert_idempotent(Quantize(plan_of(model, "static", floats=("a", "c"))), model)
    assert ops(model) == ["Relu", "MatMul", "MatMul"]


def test_an_empty_plan_changes_nothing() -> None:
    model = named(TEXT, w=W, b=B)
    assert_idempotent(Quantize(PrecisionPlan()), model)
    assert ops(model) == ["MatMul", "Add"]


def test_a_tied_weight_stays_for_its_other_reader() -> None:
    text = """g (float[M,N,4] x, int64[T] i, float[3,4] e) => (float[M,N,3] y, float[T,4] z) {
      z = Gather (e, i) t = Transpose <perm = [1, 0]> (e) y = MatMul (x, t) }"""
    table = np.ascontiguousarray(W.T)
    model = named(text, e=table)
    pass_ = Quantize(plan_of(model, "dynamic"))
    assert pass_(model).modified
    assert "Transpose" not in ops(model)
    found = run_model(model, FEED | {"i": np.array([2, 0])}, optimise=False)
    weight = codes_of(W)
    wanted = fake_quantized(X, "dynamic") @ (weight.codes * weight.scale)
    np.testing.assert_array_equal(found["z"], table[[2, 0]])
    np.testing.assert_allclose(found["y"], wanted, rtol=1e-5, atol=1e-5)
    assert_idempotent(pass_, model)


def test_a_module_called_twice_and_quantised_once() -> None:
    """The second call keeps its own name when the first is no Linear any more."""
    text = """g (float[M,N,4] x, float[4,4] w, float[4,4] v) => (float[M,N,4] y) {
      m = MatMul (x, w) y = MatMul (m, v) }"""
    square = RNG.standard_normal((2, 4, 4)).astype(np.float32)
    model = named(text, w=square[0], v=square[1])
    for node, name in zip(model.graph, ("twice", "twice#1"), strict=True):
        node.name = name
        node.metadata_props[MODULE_PATH_KEY] = "twice"
    pass_ = Quantize(plan_of(model, "dynamic", floats=("twice#1",)))
    assert pass_(model).modified
    assert ops(model).count("DynamicQuantizeLinear") == 1
    assert_idempotent(pass_, model)


BLOCKS = """g (float[M,4] x, float[4,3] w, float[4,3] v) => (float[M,3] a, float[M,3] c) {
  r = Relu (x) a = MatMul (r, w) c = MatMul (r, v) }"""


def in_blocks(weight: np.ndarray, **others: Any) -> QuantizedWeight:
    scale = np.full((2, 3), np.abs(weight).max() / 127, np.float32)
    return QuantizedWeight(np.rint(weight / scale[0]).astype(np.int8), scale, 2, 8, **others)


@pytest.mark.parametrize(
    "others",
    [{"order": np.array([2, 0, 3, 1])}, {"offset": np.full((2, 3), 0.5, np.float32)}],
    ids=["order", "offset"],
)
def test_what_ops_share_is_before_all_of_them(others: dict[str, np.ndarray]) -> None:
    """Also where the one that is planned first is the last of the graph."""
    model = named(BLOCKS, w=W, v=V)
    plan = plan_of(model, "dynamic")
    weights = {"a": in_blocks(W, **others), "c": in_blocks(V, **others)}
    planned = tuple(
        dataclasses.replace(op, precision="weight8", weight=weights[op.name])
        for op in reversed(plan.ops)
    )
    pass_ = Quantize(PrecisionPlan((), planned))
    assert pass_(model).modified
    kinds = ops(model)
    assert kinds[1] == ("Gather" if "order" in others else "Reshape")
    assert kinds.count("Gather") + kinds.count("ReduceSum") == 1
    check_model(model)
    found = run_model(model, {"x": X[0]}, optimise=False)
    for name, weight in weights.items():
        wanted = np.maximum(X[0], 0) @ weight.dequantized()
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-5)
    assert_idempotent(pass_, model)


def test_offsets_want_a_known_shape() -> None:
    model = named(BLOCKS, w=W, v=V)
    plan = plan_of(model, "dynamic", floats=("c",))
    weight = in_blocks(W, offset=np.full((2, 3), 0.5, np.float32))
    planned = tuple(
        dataclasses.replace(op, precision="weight8", weight=weight) if op.name == "a" else op
        for op in plan.ops
    )
    next(iter(model.graph)).outputs[0].shape = None
    with pytest.raises(ModelError, match="a: the shape of what it reads is not known"):
        Quantize(PrecisionPlan((), planned))(model)


def test_codes_without_weights_are_refused() -> None:
    model = named(TEXT, w=W, b=B)
    plan = plan_of(model, "static")
    broken = PrecisionPlan(
        plan.sites, (OpPlan("m", plan.sites[0].name, "int8", "test", 4, 3, "y"),)
    )
    with pytest.raises(AssertionError, match="without codes"):
        Quantize(broken)(model)
