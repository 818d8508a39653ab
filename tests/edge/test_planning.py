"""Which ops get codes, with which scales; and the codes of constants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes.common import NameFixPass
from qcompile.passes.quantize_tensors import QuantizeTensors

from qcompile.config import Recipe
from qcompile.edge.observing import observe_tensors
from qcompile.edge.operands import quantize_bias, quantize_constant
from qcompile.edge.plan import LIMITS, Code, EdgePlan
from qcompile.edge.planning import affine, plan_edge, require_any
from qcompile.edge.profiles import PROFILES, get_profile
from qcompile.edge.settings import Settings
from qcompile.edge.units import Operand, Unit, find_units, inner_ops, keep_float, name_units
from qcompile.errors import ConfigError, ModelError
from qcompile.methods import Method
from tests.edge.models import convolutional, images, transformer
from tests.passes.rewriting import HEADER, typed
from tests.support import Feed, from_text, run_model

RNG = np.random.default_rng(0)
finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)
METHODS: tuple[Method, ...] = ("rtn", "mse")
CODES: tuple[Code, ...] = ("uint8", "int8", "uint16", "int16")


@given(finite, finite, st.sampled_from(CODES), st.booleans(), st.booleans())
def test_a_scale_covers_its_range_and_holds_zero(
    a: float, b: float, code: Code, symmetric: bool, power_of_two: bool
) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero_point = affine(low, high, code, symmetric=symmetric, power_of_two=power_of_two)
    least, most = LIMITS[code]
    assert least <= zero_point <= most and np.float32(scale) == scale > 0
    if symmetric:
        assert zero_point == (least + most + 1) // 2
    if power_of_two:
        assert np.log2(scale) % 1 == 0
    if max(-low, high) > 1e-30:
        # Zero is moved to a code, by which the other end loses half a step.
        assert (most - zero_point) * scale >= max(high, 0.0) * (1 - 1e-6) - 0.51 * scale
        assert (least - zero_point) * scale <= min(low, 0.0) * (1 - 1e-6) + 0.51 * scale


def plan_of(
    model: ir.Model, feeds: list[Feed], work: Path, profile: str = "", code: Code = "uint8"
) -> tuple[list[Unit], EdgePlan]:
    model = typed(model)
    NameFixPass()(model)
    name_units(model.graph)
    chosen = get_profile(profile)
    units = find_units(model.graph, chosen)
    stats = observe_tensors(model, units, feeds, work)
    return units, plan_edge(units, stats, chosen, Settings(activation=code))


def test_what_moves_values_has_one_scale(tmp_path: Path) -> None:
    _, plan = plan_of(convolutional(), images(4), tmp_path)
    tensors = {tensor.value: tensor for tensor in plan.tensors}
    concat = {name: tensors[name] for name in ("a", "r", "t", "p")}
    assert len({(t.scale, t.zero_point, t.group) for t in concat.values()}) == 1
    assert concat["t"].low == min(t.low for t in concat.values()) < 0.0
    assert tensors["q"].group == tensors["f"].group != concat["t"].group


def test_nothing_between_an_op_its_bias_and_its_activation(tmp_path: Path) -> None:
    _, plan = plan_of(convolutional(), images(4), tmp_path)
    assert "c" not in {tensor.value for tensor in plan.tensors}
    first = plan.units[0]
    assert first.op == "Conv" and len(first.nodes) == 2 and first.output == "r"
    bias = next(c for c in plan.constants if c.value == "b")
    weight = next(c for c in plan.constants if c.value == "w")
    x = plan.tensor("x")
    assert x is not None and bias.code == "int32" and weight.axis == 0
    np.testing.assert_allclose(bias.scale, x.scale * weight.scale, rtol=1e-6)


def test_movers_between_floats_stay_float(tmp_path: Path) -> None:
    text = """
      g (float[2,8] x, float[8,8] w, int64[2] s) => (float[4,4] y, float[2,8] z) {
        e = Erf (x)
        y = Reshape (e, s)
        z = MatMul (x, w)
      }"""
    w = RNG.standard_normal((8, 8)).astype(np.float32)
    model = from_text(HEADER + text, w=w, s=np.array([4, 4]))
    feeds: list[Feed] = [{"x": RNG.standard_normal((2, 8)).astype(np.float32)}]
    _, plan = plan_of(model, feeds, tmp_path, "nnapi")
    reasons = {unit.op: (unit.code, unit.reason) for unit in plan.units}
    assert reasons["Erf"] == (None, "profile nnapi has no quantised Erf")
    assert reasons["Reshape"] == (None, "it only moves values, and no op beside it has codes")
    assert reasons["MatMul"] == ("uint8", "profile nnapi")


def test_what_its_codes_would_blur_stays_float(tmp_path: Path) -> None:
    """One value of ten thousand, and all others within a step of zero."""
    text = "g (float[1,1000] x) => (float[1,1000] y) { y = Relu (x) }"
    x = RNG.uniform(-1.0, 1.0, (1, 1000)).astype(np.float32)
    feeds: list[Feed] = [{"x": x}]
    assert plan_of(from_text(HEADER + text), feeds, tmp_path, "qnn")[1].quantized
    spiked = x.copy()
    spiked[0, 5] = -1e4  # no seventh value: the histogram passes over it
    _, plan = plan_of(from_text(HEADER + text), [{"x": spiked}], tmp_path, "qnn")
    assert not plan.quantized and "would keep" in plan.units[0].reason
    with pytest.raises(ModelError, match="nothing can be quantised"):
        require_any(plan)
    _, wide = plan_of(from_text(HEADER + text), [{"x": spiked}], tmp_path, "qnn", "uint16")
    assert wide.quantized


def test_a_product_may_leave_floats(tmp_path: Path) -> None:
    """Where kernels give floats, what no product reads has no codes."""
    text = """
      g (float[40,8] x, float[8,8] w) => (float[40,8] y) {
        a = MatMul (x, w)
        r = Relu (a)
        b = MatMul (r, w)
        y = Add (b, x)
      }"""
    w = RNG.standard_normal((8, 8)).astype(np.float32)
    feeds: list[Feed] = [{"x": RNG.standard_normal((40, 8)).astype(np.float32)}]
    _, plan = plan_of(from_text(HEADER + text, w=w), feeds, tmp_path)
    assert {tensor.value for tensor in plan.tensors} == {"x", "r"}
    assert next(u.reason for u in plan.units if u.op == "Add") == "no product reads its codes"
    _, plan = plan_of(from_text(HEADER + text, w=w), feeds, tmp_path, "qnn")
    assert {tensor.value for tensor in plan.tensors} == {"x", "r", "b", "y"}


def test_infinite_values_stay_float(tmp_path: Path) -> None:
    text = """g (float[1,4] x, float[1,4] m) => (float[1,4] y) { y = Add (x, m) }"""
    feeds: list[Feed] = [
        {"x": np.ones((1, 4), np.float32), "m": np.array([[0, 0, -np.inf, 0]], np.float32)}
    ]
    _, plan = plan_of(from_text(HEADER + text), feeds, tmp_path, "qnn")
    assert not plan.quantized and "uint8 codes of m" in plan.units[0].reason


def test_a_mask_does_not_pass_for_what_it_hides(tmp_path: Path) -> None:
    text = "g (float[200,5] x) => (float[200,5] y) { y = Softmax (x) }"
    x = RNG.standard_normal((200, 5)).astype(np.float32)
    assert plan_of(from_text(HEADER + text), [{"x": x}], tmp_path, "qnn")[1].quantized
    x[:, ::2] = -65504.0
    _, plan = plan_of(from_text(HEADER + text), [{"x": x}], tmp_path, "qnn")
    assert not plan.quantized and "uint8 codes of x" in plan.units[0].reason


def test_products_of_two_wide_activations(tmp_path: Path) -> None:
    text = "g (float[2,3,4] x, float[2,4,3] z) => (float[2,3,3] y) { y = MatMul (x, z) }"
    feeds: list[Feed] = [
        {
            "x": RNG.standard_normal((2, 3, 4)).astype(np.float32),
            "z": RNG.standard_normal((2, 4, 3)).astype(np.float32),
        }
    ]
    assert plan_of(from_text(HEADER + text), feeds, tmp_path, "qnn")[1].quantized
    _, wide = plan_of(from_text(HEADER + text), feeds, tmp_path, "qnn", "uint16")
    assert "no two activations of 16 bits" in wide.units[0].reason


def test_a_recipe_keeps_ops_in_float(tmp_path: Path) -> None:
    units, _ = plan_of(convolutional(), images(2), tmp_path)
    recipe = Recipe.from_mapping({"*Gemm*": "float"})
    names = [unit.name for unit in units if unit.op in ("Gemm", "MatMul")]
    if not recipe.unmatched(names):
        assert set(keep_float(units, recipe)) == set(names)
    with pytest.raises(ConfigError, match="matches no op"):
        keep_float(units, Recipe.from_mapping({"nothing": "float"}))


@pytest.mark.parametrize("code", ["int8", "uint8", "int4"])
@pytest.mark.parametrize("axis", [None, 1])
def test_weights_lie_within_half_a_step(code: Code, axis: int | None) -> None:
    weight = RNG.standard_normal((16, 5)).astype(np.float32) * np.array([1, 1, 9, 1, 0], np.float32)
    found = quantize_constant(_operand(), weight, code, axis, power_of_two=True)
    least, most = LIMITS[code]
    assert found.codes.min() >= least and found.codes.max() <= most
    step = found.scale if axis is None else found.scale[None, :]
    assert (np.abs(found.dequantized() - weight) <= 0.5001 * step).all()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("code", ["int8", "uint8", "int4"])
@pytest.mark.parametrize("axis", [None, 1])
def test_a_searched_range_errs_less_and_the_whole_one_clips_nothing(
    code: Code, axis: int | None, power_of_two: bool
) -> None:
    weight = np.random.default_rng(3).standard_normal((64, 5)).astype(np.float32)
    weight[::8] *= 0.01
    weight[0] = 3.9  # one that a finer step for all others is worth
    found = {
        method: quantize_constant(
            _operand(), weight, code, axis, power_of_two=power_of_two, method=method
        )
        for method in METHODS
    }
    step = found["rtn"].scale if axis is None else found["rtn"].scale[None, :]
    assert (np.abs(found["rtn"].dequantized() - weight) <= 0.5001 * step).all()
    error = {method: np.square(each.dequantized() - weight).sum() for method, each in found.items()}
    assert error["mse"] <= error["rtn"]
    if code == "int4" and not power_of_two:
        assert error["mse"] < error["rtn"]
    if power_of_two:
        assert (np.log2(found["mse"].scale) % 1 == 0).all()


@pytest.mark.parametrize("code", ["int8", "uint8"])
@pytest.mark.parametrize("axis", [None, 1])
def test_eight_bits_are_clipped_a_little(code: Code, axis: int | None) -> None:
    weight = np.random.default_rng(0).standard_normal((512, 4)).astype(np.float32)
    whole, clipped = (
        quantize_constant(_operand(), weight, code, axis, method=method) for method in METHODS
    )
    errors = [np.square(each.dequantized() - weight).sum() for each in (clipped, whole)]
    assert errors[0] < errors[1]
    assert (whole.scale * 0.9 < clipped.scale).all()


def test_a_bias_too_large_for_its_scale_enlarges_the_weight_s() -> None:
    weight = quantize_constant(
        _operand(), np.full((4, 2), 1e-9, np.float32), "int8", 1, power_of_two=True
    )
    bias = np.array([1e6, 0.0], np.float32)
    enlarged, found = quantize_bias(_operand(2), bias, weight, 1e-3)
    assert enlarged.scale[0] > weight.scale[0] and enlarged.scale[1] == weight.scale[1]
    np.testing.assert_allclose(found.dequantized(), bias, rtol=1e-6)
    assert np.abs(found.codes.astype(np.int64)).max() <= 2**30 + 1
    enlarged, found = quantize_bias(_operand(2), bias, weight, 2.0**-10, power_of_two=True)
    assert enlarged.scale[0] > weight.scale[0]
    assert (np.log2(enlarged.scale) % 1 == 0).all() and (np.log2(found.scale) % 1 == 0).all()
    assert np.abs(found.codes.astype(np.int64)).max() <= 2**30 + 1


def test_indices_have_no_codes(tmp_path: Path) -> None:
    text = """
      g (float[1,2,6,6] x, float[3,2,3,3] w) => (float[1,3,2,2] y, int64[1,3,2,2] i) {
        c = Conv (x, w)
        y, i = MaxPool <kernel_shape=[2,2], strides=[2,2]> (c)
      }"""
    w = RNG.standard_normal((3, 2, 3, 3)).astype(np.float32)
    feeds: list[Feed] = [{"x": RNG.standard_normal((1, 2, 6, 6)).astype(np.float32)}]
    _, plan = plan_of(from_text(HEADER + text, w=w), feeds, tmp_path, "qnn")
    pool = next(unit for unit in plan.units if unit.op == "MaxPool")
    assert pool.code is None and "indices" in pool.reason
    assert next(unit for unit in plan.units if unit.op == "Conv").code == "uint8"


def _operand(index: int = 1) -> Operand:
    node = ir.node("Gemm", [ir.Value(name=n) for n in "xwb"], name="gemm")
    value = node.inputs[index]
    assert value is not None
    return Operand(node, index, value, "weight" if index == 1 else "bias")


def test_an_embedding_is_looked_up_in_codes(tmp_path: Path) -> None:
    """Rows that calibration never reads have to fit the range, too."""
    text = """
      g (int64[1,4] ids, float[8,16] t, float[16,4] w) => (float[1,4,4] y) {
        e = Gather (t, ids)
        y = MatMul (e, w)
      }"""
    table = RNG.standard_normal((8, 16)).astype(np.float32)
    table[7, 3] = 9.0
    w = RNG.standard_normal((16, 4)).astype(np.float32)
    model = from_text(HEADER + text, t=table, w=w)
    feeds: list[Feed] = [{"ids": np.array([[0, 1, 2, 3]])}]
    _, plan = plan_of(model, feeds, tmp_path)
    looked_up = plan.tensor("e")
    assert looked_up is not None and looked_up.high == 9.0
    unread: Feed = {"ids": np.array([[7, 7, 7, 7]])}
    wanted = run_model(model, unread)["y"]
    QuantizeTensors(plan)(model)
    gather = next(node for node in model.graph if node.op_type == "Gather")
    data = gather.inputs[0]
    assert data is not None and data.producer() is not None
    # The output's own range is of other rows: it clips, but what feeds it does not.
    model.graph.outputs[:] = [next(n for n in model.graph if n.op_type == "MatMul").outputs[0]]
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    found = next(iter(run_model(model, unread, optimise=False).values()))
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


def test_a_table_has_codes_for_its_size_alone(tmp_path: Path) -> None:
    """Where no product reads them, too, unless they would blur it."""
    text = """
      g (int64[1,4] ids, float[8,64] t, float[64,4] w) => (float[1,4,4] y) {
        e = Gather (t, ids)
        f = Erf (e)
        y = MatMul (f, w)
      }"""
    table = RNG.uniform(-1.0, 1.0, (8, 64)).astype(np.float32)
    w = RNG.standard_normal((64, 4)).astype(np.float32)
    feeds: list[Feed] = [{"ids": np.array([[0, 1, 2, 3]])}]
    _, plan = plan_of(from_text(HEADER + text, t=table, w=w), feeds, tmp_path)
    assert {tensor.value for tensor in plan.tensors} == {"e", "f"}
    table[7, 3] = 35.0  # for the rows that are read, 23 dB
    _, plan = plan_of(from_text(HEADER + text, t=table, w=w), feeds, tmp_path)
    lookup = next(unit for unit in plan.units if unit.op == "Gather")
    assert lookup.code is None and "would keep 2" in lookup.reason
    assert {tensor.value for tensor in plan.tensors} == {"f"}


def test_every_profile_says_where_it_is_documented() -> None:
    for profile in PROFILES.values():
        assert profile.sources and all(s.url.startswith("https://") for s in profile.sources)
        assert profile.per_channel <= profile.computes | profile.weight_only or not profile.computes
        assert not profile.computes & profile.moves


def test_ops_in_a_branch_stay_in_float_and_are_told() -> None:
    model = from_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (float[2,4] x, bool c, float[4,4] w) => (float[2,4] y) {
          y = If (c) <
            then_branch = t () => (float[2,4] a) { a = MatMul (x, w) },
            else_branch = e () => (float[2,4] b) { b = Identity (x) }
          >
        }""",
        w=np.eye(4, dtype=np.float32),
    )
    (told,) = inner_ops(model.graph, get_profile(""))
    assert told.startswith("MatMul (") and "in a body of If" in told
    assert inner_ops(transformer().graph, get_profile("")) == []
