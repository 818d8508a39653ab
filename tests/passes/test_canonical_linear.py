"""CanonicalLinear: every constant-weight product is MatMul(x, W[K, N]) [+ Add(bias[N])]."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.canonical_linear import CanonicalLinear

from qcompile.linears import find_linears
from qcompile.names import MODULE_PATH_KEY
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
Weights = dict[str, np.ndarray]


def _random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


X, W, V, B = _random(5, 4), _random(4, 3), _random(3, 4), _random(3)
WIDE = _random(2, 5, 4)  # x of rank 3
FEED: Feed = {"x": X}


def assert_canonical(
    before: str, after: str, weights: Weights, expected: Weights, feed: Feed | None = None
) -> ir.Model:
    """`before` becomes `after`, computes the same, and a second run changes nothing."""
    model = typed(from_text(HEADER + before, **weights))
    wanted = run_model(model, feed or FEED, optimise=False)
    result = CanonicalLinear()(model)
    assert result.modified
    assert_same_graph(result.model, from_text(HEADER + after, **expected))
    check_model(result.model)
    found = run_model(result.model, feed or FEED, optimise=False)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-6)
    assert_idempotent(CanonicalLinear(), result.model)
    return result.model


def assert_left(text: str, weights: Weights, feed: Feed | None = None) -> None:
    """Same ops, same wiring, same results (names may be given)."""
    model = typed(from_text(HEADER + text, **weights))
    wanted = run_model(model, feed or FEED, optimise=False)
    result = CanonicalLinear()(model)
    assert_same_graph(result.model, typed(from_text(HEADER + text, **weights)))
    found = run_model(result.model, feed or FEED, optimise=False)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    assert_idempotent(CanonicalLinear(), result.model)


# 1. Gemm


def test_gemm() -> None:
    before = "g (float[M,4] x, float[4,3] w, float[3] b) => (float[M,3] y) { y = Gemm (x, w, b) }"
    after = """g (float[M,4] x, float[4,3] w, float[3] b) => (float[M,3] y) {
      h = MatMul (x, w) y = Add (h, b) }"""
    assert_canonical(before, after, {"w": W, "b": B}, {"w": W, "b": B})


def test_gemm_without_bias() -> None:
    before = "g (float[M,4] x, float[4,3] w) => (float[M,3] y) { y = Gemm (x, w) }"
    after = "g (float[M,4] x, float[4,3] w) => (float[M,3] y) { y = MatMul (x, w) }"
    assert_canonical(before, after, {"w": W}, {"w": W})


def test_transposed_gemm() -> None:
    before = """g (float[M,4] x, float[3,4] v, float[3] b) => (float[M,3] y) {
      y = Gemm <alpha = 1.0, beta = 1.0, transB = 1> (x, v, b) }"""
    after = """g (float[M,4] x, float[4,3] w, float[3] b) => (float[M,3] y) {
      h = MatMul (x, w) y = Add (h, b) }"""
    model = assert_canonical(before, after, {"v": V, "b": B}, {"w": V.T, "b": B})
    assert len(model.graph.initializers) == 2


def test_transposed_gemm_of_a_shared_weight_keeps_it_stored_once() -> None:
    before = """g (float[M,4] x, int64[T] i, float[3,4] v) => (float[M,3] y, float[T,4] e) {
      e = Gather (v, i) y = Gemm <transB = 1> (x, v) }"""
    after = """g (float[M,4] x, int64[T] i, float[3,4] v) => (float[M,3] y, float[T,4] e) {
      e = Gather (v, i) w = Transpose <perm = [1, 0]> (v) y = MatMul (x, w) }"""
    feed = FEED | {"i": np.array([2, 0])}
    model = assert_canonical(before, after, {"v": V}, {"v": V}, feed)
    assert len(model.graph.initializers) == 1


def test_gemm_with_a_bias_of_two_axes_is_final_after_one_run() -> None:
    before = "g (float[M,4] x, float[4,3] w, float[1,3] b) => (float[M,3] y) { y = Gemm (x, w, b) }"
    after = """g (float[M,4] x, float[4,3] w, float[3] b) => (float[M,3] y) {
      h = MatMul (x, w) y = Add (h, b) }"""
    assert_canonical(before, after, {"w": W, "b": B[None]}, {"w": W, "b": B})


@pytest.mark.parametrize(
    "attributes", ["alpha = 0.5", "beta = 2.0", "transA = 1"], ids=["alpha", "beta", "transA"]
)
def test_other_gemms_are_left(attributes: str) -> None:
    x = "float[4,M] x" if "transA" in attributes else "float[M,4] x"
    feed = {"x": np.ascontiguousarray(X.T)} if "transA" in attributes else FEED
    text = f"""g ({x}, float[4,3] w, float[3] b) => (float[M,3] y) {{
      y = Gemm <{attributes}> (x, w, b) }}"""
    assert_left(text, {"w": W, "b": B}, feed)


def test_gemm_of_two_activations_is_left() -> None:
    text = "g (float[M,4] x, float[4,3] w) => (float[M,3] y) { y = Gemm (x, w) }"
    assert_left(text, {}, FEED | {"w": W})


# 2. Transpose


def test_transpose_is_absorbed() -> None:
    before = """g (float[S,M,4] x, float[3,4] v) => (float[S,M,3] y) {
      w = Transpose <perm = [1, 0]> (v) y = MatMul (x, w) }"""
    after = "g (float[S,M,4] x, float[4,3] w) => (float[S,M,3] y) { y = MatMul (x, w) }"
    assert_canonical(before, after, {"v": V}, {"w": V.T}, {"x": WIDE})


def test_transpose_of_a_shared_weight_is_left() -> None:
    text = """g (float[M,4] x, int64[T] i, float[3,4] v) => (float[M,3] y, float[T,4] e) {
      e = Gather (v, i) w = Transpose <perm = [1, 0]> (v) y = MatMul (x, w) }"""
    assert_left(text, {"v": V}, FEED | {"i": np.array([2, 0])})


@pytest.mark.parametrize("second", ["w", "t"])
def test_products_of_one_transposed_weight_share_the_result(second: str) -> None:
    head = "(float[M,4] x, float[M,4] z, float[{}] {}) => (float[M,3] y, float[M,3] u)"
    before = f"""g {head.format("3,4", "v")} {{
      w = Transpose <perm = [1, 0]> (v) t = Transpose <perm = [1, 0]> (v)
      y = MatMul (x, w) u = MatMul (z, {second}) }}"""
    after = f"g {head.format('4,3', 'w')} {{ y = MatMul (x, w) u = MatMul (z, w) }}"
    model = assert_canonical(before, after, {"v": V}, {"w": V.T}, FEED | {"z": -X})
    assert len(model.graph.initializers) == 1
    assert [(x.tied, x.shared) for x in find_linears(model.graph)] == [(False, 2), (False, 2)]


def test_a_transpose_that_something_else_reads_is_left() -> None:
    text = """g (float[M,4] x, float[3,4] v) => (float[M,3] y, float[4,3] u) {
      w = Transpose <perm = [1, 0]> (v) y = MatMul (x, w) u = Neg (w) }"""
    assert_left(text, {"v": V}, FEED)


def test_transpose_that_permutes_nothing_does_not_transpose() -> None:
    square = _random(4, 4)
    text = """g (float[M,4] x, float[4,4] v) => (float[M,4] y) {
      w = Transpose <perm = [0, 1]> (v) y = MatMul (x, w) }"""
    model = typed(from_text(HEADER + text, v=square))
    CanonicalLinear()(model)
    found = run_model(model, FEED, optimise=False)["y"]
    np.testing.assert_allclose(found, X @ square, rtol=1e-5, atol=1e-6)


# 3. bias


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("order", ["h, b", "b, h"])
def test_bias_is_flattened(axes: int, order: str) -> None:
    ones = ",".join(["1"] * (axes - 1))
    before = f"""g (float[S,M,4] x, float[4,3] w, float[{ones},3] b) => (float[S,M,3] y) {{
      h = MatMul (x, w) y = Add ({order}) }}"""
    after = f"""g (float[S,M,4] x, float[4,3] w, float[3] b) => (float[S,M,3] y) {{
      h = MatMul (x, w) y = Add ({order}) }}"""
    shaped = B.reshape([1] * (axes - 1) + [3])
    assert_canonical(before, after, {"w": W, "b": shaped}, {"w": W, "b": B}, {"x": WIDE})


def test_bias_that_adds_an_axis_keeps_the_shape_of_the_output() -> None:
    text = """g (float[M,4] x, float[4,3] w, float[1,1,3] b) => (float[1,M,3] y) {
      h = MatMul (x, w) y = Add (h, b) }"""
    assert_left(text, {"w": W, "b": B[None, None]})


def test_bias_with_rows_is_left() -> None:
    text = """g (float[5,4] x, float[4,3] w, float[5,3] b) => (float[5,3] y) {
      h = MatMul (x, w) y = Add (h, b) }"""
    assert_left(text, {"w": W, "b": _random(5, 3)})


def test_residual_is_left() -> None:
    text = """g (float[M,4] x, float[M,3] r, float[4,3] w) => (float[M,3] y) {
      h = MatMul (x, w) y = Add (h, r) }"""
    assert_left(text, {"w": W}, FEED | {"r": _random(5, 3)})


# 4. names


def test_linears_are_named_by_module_path() -> None:
    text = """g (float[M,4] x, float[4,4] w, float[4,4] v) => (float[M,4] z) {
      y = MatMul (x, w) z = MatMul (y, v) }"""
    model = typed(from_text(HEADER + text, w=_random(4, 4), v=_random(4, 4)))
    first, second = model.graph
    first.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model.fc1', 'linear']"
    second.name = "/model/fc2/MatMul_1"
    result = CanonicalLinear()(model)
    assert result.modified
    assert [node.name for node in model.graph] == ["model.fc1", "model.fc2"]
    assert_idempotent(CanonicalLinear(), model)


def test_a_module_called_twice_gives_two_names() -> None:
    text = """g (float[M,4] x, float[4,4] w) => (float[M,4] z) {
      y = MatMul (x, w) z = MatMul (y, w) }"""
    model = typed(from_text(HEADER + text, w=_random(4, 4)))
    for node in model.graph:
        node.metadata_props[MODULE_PATH_KEY] = "shared"
    assert CanonicalLinear()(model).modified
    assert [node.name for node in model.graph] == ["shared", "shared#1"]
    assert_idempotent(CanonicalLinear(), model)


def test_a_linear_made_of_gemm_has_the_name_of_its_module() -> None:
    text = "g (float[M,4] x, float[4,3] w, float[3] b) => (float[M,3] y) { y = Gemm (x, w, b) }"
    model = typed(from_text(HEADER + text, w=W, b=B))
    model.graph[0].name = "/classifier/Gemm"
    CanonicalLinear()(model)
    assert model.graph[0].name == "classifier"


def test_linears_of_unnamed_nodes_get_distinct_names() -> None:
    text = """g (float[M,4] x, float[4,4] w, float[4,4] v) => (float[M,4] z) {
      y = MatMul (x, w) z = MatMul (y, v) }"""
    model = typed(from_text(HEADER + text, w=_random(4, 4), v=_random(4, 4)))
    CanonicalLinear()(model)
    names = [str(node.name) for node in model.graph]
    assert len(set(names)) == 2 and all(names)


# 5. constant factor


@pytest.mark.parametrize("order", ["a, c", "c, a"])
def test_scalar_is_folded_into_weight_and_bias(order: str) -> None:
    before = f"""g (float[M,4] x, float[4,3] w, float[3] b, float c) => (float[M,3] y) {{
      h = MatMul (x, w) a = Add (h, b) m = Mul ({order}) y = Relu (m) }}"""
    after = """g (float[M,4] x, float[4,3] w, float[3] b) => (float[M,3] y) {
      h = MatMul (x, w) a = Add (h, b) y = Relu (a) }"""
    weights = {"w": W, "b": B, "c": np.array(0.125, np.float32)}
    assert_canonical(before, after, weights, {"w": W / 8, "b": B / 8})


def test_scalar_is_folded_into_a_weight_without_bias() -> None:
    before = """g (float[M,4] x, float[4,3] w, float[1] c) => (float[M,3] y) {
      h = MatMul (x, w) m = Mul (h, c) y = Relu (m) }"""
    after = "g (float[M,4] x, float[4,3] w) => (float[M,3] y) { h = MatMul (x, w) y = Relu (h) }"
    weights = {"w": W, "c": np.array([-0.3], np.float32)}
    assert_canonical(before, after, weights, {"w": W * np.float32(-0.3)})


def test_graph_output_keeps_its_name() -> None:
    before = """g (float[M,4] x, float[4,3] w, float c) => (float[M,3] y) {
      h = MatMul (x, w) y = Mul (h, c) }"""
    after = "g (float[M,4] x, float[4,3] w) => (float[M,3] y) { y = MatMul (x, w) }"
    assert_canonical(before, after, {"w": W, "c": np.array(2.0, np.float32)}, {"w": W * 2})


def test_scalar_that_adds_an_axis_keeps_the_shape_of_the_output() -> None:
    text = """g (float[M,4] x, float[4,3] w, float[1,1,1] c) => (float[1,M,3] y) {
      h = MatMul (x, w) m = Mul (h, c) y = Relu (m) }"""
    assert_left(text, {"w": W, "c": np.full((1, 1, 1), 2.0, np.float32)})


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(
            """g (float[M,4] x, float[4,3] w, float[3] c) => (float[M,3] y) {
              h = MatMul (x, w) m = Mul (h, c) y = Relu (m) }""",
            id="vector",
        ),
        pytest.param(
            """g (float[M,4] x, float[4,3] w, float c) => (float[M,3] y, float[M,3] h) {
              h = MatMul (x, w) y = Mul (h, c) }""",
            id="linear-read-elsewhere",
        ),
        pytest.param(
            """g (float[M,4] x, float[4,3] w, float c) => (float[M,3] y, float[M,3] z) {
              h = MatMul (x, w) m = Mul (h, c) y = Relu (m) n = Abs (x) z = MatMul (n, w) }""",
            id="weight-shared",
        ),
        pytest.param(
            """g (float[M,4] x, float[4,3] w, float c) => (float[M,3] y) {
              h = MatMul (x, w) r = Relu (h) y = Mul (r, c) }""",
            id="something-between",
        ),
    ],
)
def test_other_products_are_left(text: str) -> None:
    factor = np.full(3 if "float[3] c" in text else (), 2.0, np.float32)
    assert_left(text, {"w": W, "c": factor})


def test_a_factor_that_is_not_constant_is_left() -> None:
    text = """g (float[M,4] x, float c, float[4,3] w) => (float[M,3] y) {
      h = MatMul (x, w) y = Mul (h, c) }"""
    assert_left(text, {"w": W}, FEED | {"c": np.array(2.0, np.float32)})


def test_all_cases_at_once() -> None:
    before = """g (float[M,4] x, float[3,4] v, float[1,3] b, float c) => (float[M,3] y) {
      w = Transpose <perm = [1, 0]> (v) h = MatMul (x, w) a = Add (b, h) y = Mul (a, c) }"""
    model = typed(
        from_text(HEADER + before, v=V, b=B[None], c=np.array(3.0, np.float32)),
    )
    assert CanonicalLinear()(model).modified
    assert ops(model) == ["MatMul", "Add"]
    found = next(iter(run_model(model, FEED, optimise=False).values()))
    np.testing.assert_allclose(found, 3 * (X @ V.T + B), rtol=1e-5, atol=1e-5)
    assert_idempotent(CanonicalLinear(), model)
