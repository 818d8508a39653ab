"""The view of a graph as Linears and the sites that feed them, and their names."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.linears import find_linears, find_sites
from qcompile.names import MODULE_PATH_KEY, join_paths, module_path, set_module_path
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 3)).astype(np.float32)
B = RNG.standard_normal(3).astype(np.float32)


def model_of(text: str, **weights: np.ndarray) -> ir.Model:
    """The model, every MatMul named after the value it computes."""
    model = typed(from_text(HEADER + text, **weights))
    for node in model.graph:
        if node.op_type == "MatMul":
            node.name = node.outputs[0].name
    return model


# find_linears


def test_a_linear_without_bias() -> None:
    text = "g (float[M,4] x, float[4,3] w) => (float[M,3] y) { y = MatMul (x, w) }"
    (linear,) = find_linears(model_of(text, w=W).graph)
    assert (linear.name, linear.in_features, linear.out_features) == ("y", 4, 3)
    assert (linear.x.name, linear.weight.name, linear.output.name) == ("x", "w", "y")
    assert linear.bias is None and linear.bias_add is None and not linear.tied


@pytest.mark.parametrize("order", ["m, b", "b, m"])
def test_a_linear_with_bias(order: str) -> None:
    text = f"""g (float[M,4] x, float[4,3] w, float[3] b) => (float[M,3] y) {{
      m = MatMul (x, w) y = Add ({order}) }}"""
    (linear,) = find_linears(model_of(text, w=W, b=B).graph)
    assert linear.bias is not None and linear.bias.name == "b"
    assert linear.output.name == "y"
    assert linear.bias_add is not None and linear.bias_add.op_type == "Add"


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        pytest.param("float[M,3] r", "m = MatMul (x, w) y = Add (m, r)", id="residual"),
        pytest.param("float[1] s", "m = MatMul (x, w) y = Add (m, s)", id="one-number"),
        pytest.param("float[1,3] t", "m = MatMul (x, w) y = Add (m, t)", id="two-axes"),
        pytest.param("float[3] b", "m = MatMul (x, w) y = Sub (m, b)", id="not-an-add"),
        pytest.param("float[3] b", "m = MatMul (x, w) a = Add (m, b) y = Add (a, m)", id="twice"),
    ],
)
def test_what_is_no_bias(inputs: str, body: str) -> None:
    constants = {"b": B, "s": B[:1], "t": B[None]}
    text = f"g (float[M,4] x, float[4,3] w, {inputs}) => (float[M,3] y) {{ {body} }}"
    weights = {k: v for k, v in constants.items() if f" {k}" in inputs}
    (linear,) = find_linears(model_of(text, w=W, **weights).graph)
    assert linear.bias is None
    assert linear.output.name == "m"


def test_a_product_that_is_a_graph_output_has_no_bias() -> None:
    text = """g (float[M,4] x, float[4,3] w, float[3] b) => (float[M,3] y, float[M,3] m) {
      m = MatMul (x, w) y = Add (m, b) }"""
    (linear,) = find_linears(model_of(text, w=W, b=B).graph)
    assert linear.output.name == "m"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(
            "g (float[M,4] x, float[4,3] w) => (float[M,3] y) { y = MatMul (x, w) }",
            id="two-activations",
        ),
        pytest.param(
            "g (float[3,M] x, float[4,3] c) => (float[4,M] y) { y = MatMul (c, x) }",
            id="constant-on-the-left",
        ),
        pytest.param(
            "g (float[4] x, float[4] d) => (float y) { y = MatMul (x, d) }", id="weight-of-one-axis"
        ),
        pytest.param(
            "g (float[2,M,4] x, float[2,4,3] e) => (float[2,M,3] y) { y = MatMul (x, e) }",
            id="weight-of-three-axes",
        ),
        pytest.param(
            "g (float[M,4] x, float[4,3] c) => (float[M,3] y) { y = Gemm (x, c) }",
            id="not-canonical",
        ),
        pytest.param(
            "g (double[M,4] x, double[4,3] f) => (double[M,3] y) { y = MatMul (x, f) }",
            id="double",
        ),
    ],
)
def test_what_is_no_linear(text: str) -> None:
    constants: dict[str, np.ndarray] = {
        "c": W,
        "d": W[:, 0],
        "e": np.stack([W, W]),
        "f": W.astype(np.float64),
    }
    weights = {k: v for k, v in constants.items() if f"] {k})" in text}
    assert find_linears(model_of(text, **weights).graph) == []


def test_an_initializer_that_callers_can_override_is_no_constant() -> None:
    text = "g (float[M,4] x, float[4,3] w) => (float[M,3] y) { y = MatMul (x, w) }"
    model = model_of(text)
    weight = model.graph.inputs[1]
    weight.const_value = ir.tensor(W, name="w")
    model.graph.register_initializer(weight)
    assert find_linears(model.graph) == []


def test_tied_weights() -> None:
    text = """g (float[M,4] x, int64[T] i, float[3,4] v, float[4,3] w, float[4,3] u)
      => (float[M,3] y, float[T,4] z, float[M,3] p, float[M,3] q, float[M,3] r) {
      z = Gather (v, i) t = Transpose <perm = [1, 0]> (v) y = MatMul (x, t)
      p = MatMul (x, w) n = Neg (x) q = MatMul (n, w) r = MatMul (x, u) }"""
    model = model_of(text, v=np.ascontiguousarray(W.T), w=W, u=W)
    found = {linear.name: linear for linear in find_linears(model.graph)}
    assert {name: linear.tied for name, linear in found.items()} == {
        "y": True,
        "p": False,
        "q": False,
        "r": False,
    }
    assert [found[name].shared for name in "pqr"] == [2, 2, 1]
    assert (found["y"].in_features, found["y"].out_features) == (4, 3)
    assert found["y"].weight.name == "v"


def test_a_transpose_that_permutes_nothing_keeps_the_features() -> None:
    text = """g (float[M,4] x, int64[T] i, float[4,3] w) => (float[M,3] y, float[T,3] z) {
      z = Gather (w, i) t = Transpose <perm = [0, 1]> (w) y = MatMul (x, t) }"""
    found = find_linears(model_of(text, w=W).graph)
    assert [(linear.in_features, linear.out_features) for linear in found] in ([], [(4, 3)])


def test_names_of_a_module_that_is_called_twice() -> None:
    text = """g (float[M,4] x, float[4,4] w) => (float[M,4] y) {
      m = MatMul (x, w) n = MatMul (m, w) y = MatMul (n, w) }"""
    model = model_of(text, w=np.eye(4, dtype=np.float32))
    for node in model.graph:
        set_module_path(node, "block.fc")
    names = [linear.name for linear in find_linears(model.graph)]
    assert names == ["block.fc", "block.fc#1", "block.fc#2"]


def test_names_stay_distinct_when_one_looks_like_a_second_call() -> None:
    text = """g (float[M,4] x, float[4,4] w) => (float[M,4] y) {
      m = MatMul (x, w) n = MatMul (m, w) y = MatMul (n, w) }"""
    model = model_of(text, w=np.eye(4, dtype=np.float32))
    for node, path in zip(model.graph, ("fc", "fc#1", "fc"), strict=True):
        node.name = path
        set_module_path(node, path)
    names = [linear.name for linear in find_linears(model.graph)]
    assert len(set(names)) == 3


# find_sites


def test_sites_group_linears_by_their_input() -> None:
    text = """g (float[M,4] x, float[4,4] w, float[4,3] v, float[4,3] u)
      => (float[M,3] q, float[M,3] k, float[M,4] y) {
      h = Relu (x) q = MatMul (h, v) y = MatMul (x, w) k = MatMul (h, u) }"""
    model = model_of(text, w=np.eye(4, dtype=np.float32), v=W, u=W)
    first, second = find_sites(model.graph)
    assert (first.name, first.x.name, first.channels) == ("{q,k}", "h", 4)
    assert [linear.name for linear in first.linears] == ["q", "k"]
    assert (second.name, second.x.name) == ("y", "x")


def test_a_graph_without_linears_has_no_sites() -> None:
    assert find_sites(model_of("g (float[M] x) => (float[M] y) { y = Relu (x) }").graph) == []


# names


def named(name: str = "", **metadata: str) -> ir.Node:
    return ir.Node("", "MatMul", inputs=[], name=name, metadata_props=metadata)


@pytest.mark.parametrize(
    ("node", "path"),
    [
        (named("MatMul_3"), "MatMul_3"),
        (named("/model/layers.0/mlp/fc1/MatMul"), "model.layers.0.mlp.fc1"),
        (named("/model/layers.0/mlp/fc1/MatMul_12"), "model.layers.0.mlp.fc1"),
        (named("/pooler/dense/Gemm"), "pooler.dense"),
        (named("/model/norm/Pow"), "model.norm"),
        (named("/MatMul_3"), "MatMul_3"),
        (named("n", **{"pkg.torch.onnx.name_scopes": "['', 'a.b.fc', 'linear_3']"}), "a.b.fc"),
        (named("n", **{"pkg.torch.onnx.name_scopes": "['', 'linear']"}), "n"),
        (named("n", **{"pkg.torch.onnx.name_scopes": "['linear']"}), "n"),
        (named("n", **{"pkg.torch.onnx.name_scopes": "not a list"}), "n"),
        (named("/a/MatMul", **{MODULE_PATH_KEY: "recorded"}), "recorded"),
    ],
)
def test_module_path(node: ir.Node, path: str) -> None:
    assert module_path(node) == path


def test_set_module_path_wins() -> None:
    node = named("/a/MatMul", **{"pkg.torch.onnx.name_scopes": "['', 'b', 'linear']"})
    set_module_path(node, "c")
    assert module_path(node) == "c"


@pytest.mark.parametrize(
    ("paths", "joined"),
    [
        (["a.b"], "a.b"),
        (["a.b", "a.b"], "a.b"),
        (["a.b.q", "a.b.k", "a.b.v"], "a.b.{q,k,v}"),
        (["a.mlp.up", "a.attn.q"], "a.{mlp.up,attn.q}"),
        (["q", "k"], "{q,k}"),
        (["a", "a.b"], "{a,a.b}"),
    ],
)
def test_join_paths(paths: list[str], joined: str) -> None:
    assert join_paths(paths) == joined
