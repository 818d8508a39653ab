"""Codes that come from checkpoints: with zero points, in another order, with offsets."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.canonical_linear import CanonicalLinear
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.quantize import Quantize
from qcompile.passes.weight_only import KERNEL, WeightOnlyMatMul

from qcompile.linears import find_linears
from qcompile.precision import OpPlan, PrecisionPlan, QuantizedWeight
from tests.passes.rewriting import HEADER, typed
from tests.support import (
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

RNG = np.random.default_rng(0)
K, N, SIZE = 64, 12, 16
BLOCKS = K // SIZE


def weight(bits: int, *, order: bool = False, offset: bool = False) -> QuantizedWeight:
    """Any codes and zero points."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return QuantizedWeight(
        codes=RNG.integers(lowest, highest, (K, N)).astype(np.int8),
        scale=RNG.uniform(0.01, 0.02, (BLOCKS, N)).astype(np.float32),
        block_size=SIZE,
        bits=bits,
        zero_point=RNG.integers(lowest, highest, (BLOCKS, N)).astype(np.int8),
        order=RNG.permutation(K) if order else None,
        offset=RNG.standard_normal((BLOCKS, N)).astype(np.float32) if offset else None,
    )


def planned(*weights: QuantizedWeight) -> PrecisionPlan:
    names = "ab"
    return PrecisionPlan(
        ops=tuple(
            OpPlan(name, "x", "weight4" if w.bits == 4 else "weight8", "test", K, N, f"y{name}", w)
            for name, w in zip(names, weights, strict=False)
        )
    )


def linears(*weights: QuantizedWeight) -> ir.Model:
    """One or two Linears that read x, in float."""
    two = len(weights) == 2
    text = f"""g (float[B,M,{K}] x, float[{K},{N}] wa, float[{K},{N}] wb, float[{N}] b)
      => (float[B,M,{N}] ya, float[B,M,{N}] yb) {{
      ma = MatMul (x, wa) ya = Add (ma, b) yb = MatMul (x, {"wb" if two else "wa"}) }}"""
    bias = RNG.standard_normal(N).astype(np.float32)
    floats = [w.dequantized() for w in weights]
    model = typed(from_text(HEADER + text, wa=floats[0], wb=floats[-1], b=bias))
    for node in model.graph:
        if node.op_type == "MatMul":
            node.name = "b" if node.outputs[0].name == "yb" else "a"
    return model


def exact_activation() -> np.ndarray:
    """Its codes in int8 are exact in blocks of any channels: what level 4 rounds is nothing."""
    codes = RNG.choice([-127.0, 0.0, 127.0], (2, 3, K))
    return (codes / 64.0).astype(np.float32)


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    size = float(np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("order", "offset"), [(False, False), (True, False), (False, True)])
def test_the_same_in_float_in_standard_ops_and_in_the_kernel(
    bits: int, order: bool, offset: bool
) -> None:
    both = [weight(bits, order=order, offset=offset) for _ in range(2)]
    model = linears(*both)
    feed = {"x": exact_activation()}
    wanted = run_model(model, feed, optimise=False)
    plan = planned(*both)
    assert Quantize(plan)(model).modified
    check_model(model)
    assert_idempotent(Quantize(plan), model)
    for optimise in (True, False):
        for name, found in run_model(model, feed, optimise=optimise).items():
            close(found, wanted[name])
    assert WeightOnlyMatMul()(model).modified
    assert ops(model).count(f"{CONTRIB}.{KERNEL}") == 2
    for name, found in run_model(model, feed).items():
        close(found, wanted[name])


def test_linears_of_one_order_share_a_gather() -> None:
    first = weight(4, order=True)
    other = QuantizedWeight(
        first.codes, first.scale, SIZE, 4, zero_point=first.zero_point, order=first.order
    )
    assert first.order is not None
    model = linears(first, other)
    Quantize(planned(first, other))(model)
    assert ops(model).count("Gather") == 1
    different = linears(first, weight(4, order=True))
    Quantize(planned(first, weight(4, order=True)))(different)
    assert ops(different).count("Gather") == 2


def test_linears_with_offsets_share_the_sums() -> None:
    both = [weight(4, offset=True) for _ in range(2)]
    model = linears(*both)
    Quantize(planned(*both))(model)
    assert ops(model).count("ReduceSum") == 1
    assert [str(v.name) for v in model.graph.outputs] == ["ya", "yb"]


def test_an_offset_in_text() -> None:
    stored = weight(8, offset=True)
    assert stored.zero_point is not None and stored.offset is not None
    text = f"""g (float[B,{K}] x, float[{K},{N}] w) => (float[B,{N}] y) {{
      y = MatMul (x, w) }}"""
    model = typed(from_text(HEADER + text, w=stored.dequantized()))
    model.graph[0].name = "a"
    Quantize(planned(stored))(model)
    after = f"""g (float[B,{K}] x, int8[{K},{N}] wq, float[{BLOCKS},{N}] ws, int8[{BLOCKS},{N}] wz,
        int64[3] s, int64[1] l, float[{BLOCKS},{N}] o) => (float[B,{N}] y) {{
      blocks = Reshape (x, s) sums = ReduceSum <keepdims = 0> (blocks, l)
      v = DequantizeLinear <axis = 0, block_size = {SIZE}> (wq, ws, wz) m = MatMul (x, v)
      p = MatMul (sums, o) y = Add (m, p) }}"""
    expected = from_text(
        HEADER + after,
        wq=stored.codes,
        ws=stored.scale,
        wz=stored.zero_point,
        s=np.array([0, -1, SIZE]),
        l=np.array([-1]),
        o=stored.offset,
    )
    assert_same_graph(model, expected)


def test_a_weight_that_is_kept_is_not_scaled() -> None:
    """A factor after a Linear goes into its weight, but where the weight is a checkpoint's."""
    text = f"""g (float[B,{K}] x, float[{K},{N}] w, float c) => (float[B,{N}] y) {{
      m = MatMul (x, w) y = Mul (m, c) }}"""
    array = RNG.standard_normal((K, N)).astype(np.float32)

    def model() -> ir.Model:
        made = typed(from_text(HEADER + text, w=array, c=np.float32(0.3)))
        made.graph[0].name = "attention.q_proj"
        return made

    kept, folded = model(), model()
    CanonicalLinear(["attention.q_proj"])(kept)
    CanonicalLinear()(folded)
    assert ops(kept) == ["MatMul", "Mul"] and ops(folded) == ["MatMul"]
    (linear,) = find_linears(kept.graph)
    assert linear.weight.const_value is not None
    np.testing.assert_array_equal(linear.weight.const_value.numpy(), array)
