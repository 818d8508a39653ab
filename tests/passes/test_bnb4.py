"""Weights as indices into a table: the function, and ONNX Runtime's kernel in its place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.bnb4 import KERNEL, TableMatMul, pack
from qcompile.passes.integer_matmul import CONTRIB
from qcompile.passes.per_token import DOMAIN
from qcompile.passes.quantize import Quantize
from qcompile.passes.table_codes import NAME

from qcompile.float4 import TABLES, Float4, quantize_float4
from qcompile.linears import find_sites
from qcompile.precision import OpPlan, PrecisionPlan, QuantizedWeight
from tests.passes.rewriting import HEADER, assert_leaves, typed
from tests.support import (
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

RNG = np.random.default_rng(0)
K, N = 128, 20
WEIGHT = RNG.standard_normal((K, N)).astype(np.float32)
BIAS = RNG.standard_normal(N).astype(np.float32)
X = RNG.standard_normal((2, 7, K)).astype(np.float32)
KINDS: tuple[Float4, ...] = ("nf4", "fp4")
TEXT = """g (float[B,M,128] x, float[128,20] w, float[20] b) => (float[B,M,20] y) {
  m = MatMul (x, w) y = Add (m, b) }"""


def quantized(kind: Float4, block_size: int = 64) -> tuple[ir.Model, QuantizedWeight]:
    """A Linear whose weight is codes, as `Quantize` writes it."""
    model = typed(from_text(HEADER + TEXT, w=WEIGHT, b=BIAS))
    next(iter(model.graph)).name = "fc"
    ((site,),) = (find_sites(model.graph),)
    weight = quantize_float4(WEIGHT, kind, block_size=block_size)
    name = site.linears[0].name
    op = OpPlan(name, site.name, kind, "test", K, N, "y", weight)
    plan = PrecisionPlan((), (op,))
    assert Quantize(plan)(model).modified
    assert_idempotent(Quantize(plan), model)
    return model, weight


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_computes_the_weight(kind: Float4) -> None:
    model, weight = quantized(kind)
    assert ops(model) == [f"{DOMAIN}.{NAME}", "MatMul", "Add"]
    check_model(model)
    found = run_model(model, {"x": X}, optimise=False)["y"]
    np.testing.assert_allclose(found, X @ weight.dequantized() + BIAS, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pattern(kind: Float4) -> None:
    model, weight = quantized(kind)
    assert TableMatMul()(model).modified
    after = f"""g (float[B,M,128] x, uint8[1280] wp, float[40] ws, float[20] b)
      => (float[B,M,20] y) {{
      m = com.microsoft.MatMulBnb4 <K = 128, N = 20, block_size = 64,
        quant_type = {KINDS.index("nf4") + 1 if kind == "nf4" else 0}> (x, wp, ws)
      y = Add (m, b) }}"""
    constants = {"wp": pack(weight.codes), "ws": weight.scale.T.reshape(-1), "b": BIAS}
    assert_same_graph(model, from_text(HEADER + after, **constants))
    check_model(model)
    assert_idempotent(TableMatMul(), model)


@pytest.mark.parametrize("rows", [(1, 1), (2, 7)])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_has_the_same_table(
    kind: Float4, block_size: int, rows: tuple[int, int]
) -> None:
    """Every code of it occurs; one row and many go through different kernels."""
    model, weight = quantized(kind, block_size)
    assert len(np.unique(weight.codes)) >= 15
    TableMatMul()(model)
    x = X[: rows[0], : rows[1]]
    found = run_model(model, {"x": x})["y"]
    np.testing.assert_allclose(found, x @ weight.dequantized() + BIAS, rtol=0, atol=2e-5)
    assert f"{CONTRIB}.{KERNEL}" in ops(model)


FUNCTION = """v = qcompile.DequantizeTable (c, s, t) y = MatMul (x, v) }
<domain: "qcompile", opset_import: ["" : 23]>
DequantizeTable (c, s, t) => (w) { w = Identity (s) }"""
CODES = quantize_float4(WEIGHT, "nf4").codes.astype(np.uint8).reshape(2, 64, N)
SCALE = quantize_float4(WEIGHT, "nf4").scale


@pytest.mark.parametrize(
    "changed",
    [
        {"t": np.linspace(-1, 1, 16).astype(np.float32)},
        {"c": CODES.reshape(16, 8, N)},
        {"t": None},
    ],
    ids=["another-table", "blocks-too-small", "a-table-that-is-an-input"],
)
def test_what_the_kernel_cannot_do_is_left(changed: dict[str, np.ndarray | None]) -> None:
    constants = {"c": CODES, "s": SCALE, "t": TABLES["nf4"]} | changed
    header = HEADER.replace("]>", ', "qcompile" : 1]>')
    declared = "float[M,128] x, uint8[2,64,20] c, float[2,20] s, float[16] t"
    text = f"g ({declared}) => (float[M,20] y) {{ {FUNCTION}"
    model = from_text(header + text, **{k: v for k, v in constants.items() if v is not None})
    before = ops(model)
    assert not TableMatMul()(model).modified
    assert ops(model) == before


def test_a_weight_in_float_is_left() -> None:
    assert_leaves(TableMatMul(), TEXT, w=WEIGHT, b=BIAS)
