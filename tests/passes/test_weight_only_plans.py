"""Weights in blocks, from the plan to ONNX Runtime's kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.quantize import Quantize
from qcompile.passes.weight_only import ACCURACY_LEVEL, KERNEL
from qcompile.targets.ort_cpu import OrtCpu

from qcompile.kernels import expected_kernels, read_back
from qcompile.linears import find_sites
from qcompile.precision import (
    ActivationQuant,
    OpPlan,
    Precision,
    PrecisionPlan,
    QuantizedWeight,
    SitePlan,
)
from qcompile.weight_blocks import BITS, quantize_blocks
from tests.passes.block_weights import (
    BIAS,
    BOTH,
    DEQUANTIZE,
    RNG,
    WEIGHT,
    Bits,
    K,
    N,
    activation,
    close,
    restored,
    rounded,
    stored,
)
from tests.passes.rewriting import HEADER, typed
from tests.support import (
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

TEXT = """g (float[M,R,80] x, float[80,20] w, float[20] b) => (float[M,R,20] y) {
  m = MatMul (x, w) y = Add (m, b) }"""
PLANNED: dict[Bits, Precision] = {bits: precision for precision, bits in BITS.items()}  # type: ignore[misc]


def named(text: str, **weights: np.ndarray) -> ir.Model:
    """The model, every MatMul named after the value it computes."""
    model = typed(from_text(HEADER + text, **weights))
    for node in model.graph:
        if node.op_type == "MatMul":
            node.name = node.outputs[0].name
    return model


def plan_of(model: ir.Model, chosen: dict[str, Precision]) -> PrecisionPlan:
    """What is not chosen stays in float; int8 with dynamic activations and codes of one size."""
    sites, planned = [], []
    for site in find_sites(model.graph):
        int8 = tuple(n.name for n in site.linears if chosen.get(n.name) == "int8")
        if int8:
            every = ActivationQuant("dynamic", None, None, np.full(site.channels, 255))
            sites.append(SitePlan(site.name, str(site.x.name), every, int8))
        for linear in site.linears:
            tensor = linear.weight.const_value
            assert tensor is not None
            array = tensor.numpy().T if linear.transposed else tensor.numpy()
            precision = chosen.get(linear.name, "float")
            weight = None
            if precision in BITS:
                weight = quantize_blocks(array, bits=BITS[precision])
            elif precision == "int8":
                scale = (np.abs(array).max(axis=0) / 63).astype(np.float32)
                weight = QuantizedWeight(np.rint(array / scale).astype(np.int8), scale)
            planned.append(
                OpPlan(
                    linear.name,
                    site.name,
                    precision,
                    "test",
                    linear.in_features,
                    linear.out_features,
                    str(linear.output.name),
                    weight,
                )
            )
    return PrecisionPlan(tuple(sites), tuple(planned))


@pytest.mark.parametrize("bits", BOTH)
def test_a_planned_weight_is_written_in_blocks(bits: Bits) -> None:
    model = named(TEXT, w=WEIGHT, b=BIAS)
    pass_ = Quantize(plan_of(model, {"m": PLANNED[bits]}))
    assert pass_(model).modified
    weight = quantize_blocks(WEIGHT, bits=bits)
    after = f"""g (float[M,R,80] x, int{bits}[80,20] wq, float[3,20] ws, float[20] b)
      => (float[M,R,20] y) {{ {DEQUANTIZE} m = MatMul (x, v) y = Add (m, b) }}"""
    expected = from_text(HEADER + after, wq=stored(weight), ws=weight.scale, b=BIAS)
    assert_same_graph(model, expected)
    check_model(model)
    kinds = {8: ir.DataType.INT8, 4: ir.DataType.INT4}
    found = {v.dtype for v in model.graph.initializers.values()}
    assert found == {kinds[bits], ir.DataType.FLOAT}
    assert_idempotent(pass_, model)
    x = RNG.standard_normal((2, 3, K)).astype(np.float32)
    close(run_model(model, {"x": x}, optimise=False)["y"], x @ restored(weight) + BIAS)


@pytest.mark.parametrize("bits", BOTH)
def test_plan_to_kernel(bits: Bits, tmp_path: Path) -> None:
    """All that a compilation runs, and the kernel that it then expects."""
    model = named(TEXT, w=WEIGHT, b=BIAS)
    plan = plan_of(model, {"m": PLANNED[bits]})
    target = OrtCpu()
    for pass_ in (Quantize(plan), *target.lower(plan)):
        pass_(model)
    assert ops(model) == [f"{CONTRIB}.{KERNEL}"]
    assert model.graph[0].attributes.get_int("accuracy_level") == ACCURACY_LEVEL == 4
    x = activation(2, 3, K)
    wanted = rounded(x) @ restored(quantize_blocks(WEIGHT, bits=bits)) + BIAS
    close(run_model(model, {"x": x})["y"], wanted)
    kernels = read_back(target.emit(model, tmp_path))
    assert kernels.mismatches(expected_kernels(plan, target)) == []
    assert kernels.by_name["m"] == f"{CONTRIB}.{KERNEL}"


SHARED = """g (float[M,R,80] x, float[80,20] w, float[80,20] u, float[80,20] t) =>
  (float[M,R,20] a, float[M,R,20] c, float[M,R,20] d) {
  r = Relu (x) a = MatMul (r, w) c = MatMul (r, u) d = MatMul (r, t) }"""


def test_of_one_input_some_read_codes_and_some_read_floats(tmp_path: Path) -> None:
    others = RNG.standard_normal((2, K, N)).astype(np.float32)
    model = named(SHARED, w=WEIGHT, u=others[0], t=others[1])
    plan = plan_of(model, {"a": "int8", "c": "weight8", "d": "weight4"})
    pass_ = Quantize(plan)
    assert pass_(model).modified
    assert ops(model).count("DynamicQuantizeLinear") == 1
    reads = {str(n.name): n.inputs[0] for n in model.graph if n.op_type == "MatMul"}
    assert reads["c"] is reads["d"] and reads["c"] is not None and reads["c"].name == "r"
    producer = reads["a"].producer() if reads["a"] is not None else None
    assert producer is not None and producer.op_type == "DequantizeLinear"
    assert_idempotent(pass_, model)
    x = activation(2, 3, K)
    found = run_model(model, {"x": x}, optimise=False)
    for name, weight in (("c", others[0]), ("d", others[1])):
        quantized = quantize_blocks(weight, bits=BITS[plan.op(name).precision])
        close(found[name], np.maximum(x, 0) @ restored(quantized))
    target = OrtCpu()
    for lowering in target.lower(plan):
        lowering(model)
    kernels = read_back(target.emit(model, tmp_path))
    assert kernels.mismatches(expected_kernels(plan, target)) == []


def test_a_tied_weight_stays_for_its_other_reader() -> None:
    text = """g (float[M,R,80] x, int64[T] i, float[20,80] e) => (float[M,R,20] y, float[T,80] z) {
      z = Gather (e, i) t = Transpose <perm = [1, 0]> (e) y = MatMul (x, t) }"""
    table = np.ascontiguousarray(WEIGHT.T)
    model = named(text, e=table)
    pass_ = Quantize(plan_of(model, {"y": "weight4"}))
    assert pass_(model).modified
    assert "Transpose" not in ops(model)
    x = RNG.standard_normal((2, 3, K)).astype(np.float32)
    found = run_model(model, {"x": x, "i": np.array([2, 0])}, optimise=False)
    np.testing.assert_array_equal(found["z"], table[[2, 0]])
    close(found["y"], x @ restored(quantize_blocks(WEIGHT, bits=4)))
    assert_idempotent(pass_, model)
