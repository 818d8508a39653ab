"""A graph evaluated by PyTorch: what it refuses, parts of it, and that gradients are slopes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.torch_graph import UnsupportedOpError, check_supported, downstream, evaluate, frontier
from tests.passes.rewriting import HEADER
from tests.support import Feed, from_text, run_model
from tests.torch_graphs import TOLERANCE, draw, evaluated

# what is not known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "(float[2,3] x) => (float[2,3] y) { r = Relu (x) y = Tan (r) }",
            r"^ai\.onnx\.Tan$",
            id="op",
        ),
        # A contrib op may share its name with one of ONNX, and mean something else.
        pytest.param(
            "(float[2,3] x) => (float[2,3] y) { y = com.microsoft.Gelu (x) }",
            r"^com\.microsoft\.Gelu$",
            id="domain",
        ),
    ],
)
def test_an_unknown_op_is_named_before_anything_runs(text: str, message: str) -> None:
    nodes = list(from_text(f"{HEADER} g {text}").graph)
    with pytest.raises(UnsupportedOpError, match=message):
        check_supported(nodes)


QKV = "float[2,5,12] q, float[2,5,12] k, float[2,5,12] v"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            f"""({QKV}, float[2,3,4,4] c, float[2,3,4,4] d) => (float[2,5,12] y) {{
            y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v, , c, d) }}""",
            "Attention with a cache",
            id="cache-read",
        ),
        pytest.param(
            f"""({QKV}) => (float[2,5,12] y, float[2,3,5,4] c) {{
            y, p, r = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v) c = Relu (p) }}""",
            "a second output of Attention",
            id="cache-written",
        ),
        pytest.param(
            """(float[4] x) => (float[4] y) {
            s = Constant <value = int64[1] {-1}> () e = Constant <value = int64[1] {-9}> ()
            a = Constant <value = int64[1] {0}> () t = Constant <value = int64[1] {-1}> ()
            y = Slice (x, s, e, a, t) }""",
            "Slice with a negative step",
            id="backwards",
        ),
    ],
)
def test_a_form_that_is_not_known_is_named(text: str, message: str) -> None:
    model = from_text(f"{HEADER} g {text}")
    with pytest.raises(UnsupportedOpError, match=f"^{message}$"):
        evaluated(model, draw(model))


# parts of a graph

PARTS = """g (float[B,3] x, int64[B,3] i, float[3,4] w, float[4] b, float[4,4] u)
  => (float[B,4] y, float[B,3] z) {
  f = Cast <to = 1> (i) s = Mul (x, f) m = MatMul (s, w) a = Add (m, b) n = MatMul (a, u)
  t = ReduceMean (s) r = Relu (n) y = Mul (r, t) z = Neg (s) }"""


def parts() -> ir.Model:
    rng = np.random.default_rng(1)
    shapes = {"w": (3, 4), "b": (4,), "u": (4, 4)}
    weights = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    return from_text(HEADER + PARTS, **weights)


def made_by(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.outputs[0].name == name)


@pytest.mark.parametrize(
    ("roots", "reached", "needed"),
    [
        (["m"], ["m", "a", "n", "r", "y"], ["s", "t"]),
        (["n"], ["n", "r", "y"], ["a", "t"]),
        (["m", "n"], ["m", "a", "n", "r", "y"], ["s", "t"]),
        (["n", "z"], ["n", "r", "y", "z"], ["a", "t", "s"]),
        (["f"], ["f", "s", "m", "a", "n", "t", "r", "y", "z"], ["i", "x"]),
        ([], [], []),
    ],
)
def test_what_depends_on_some_ops_and_what_it_starts_from(
    roots: list[str], reached: list[str], needed: list[str]
) -> None:
    model = parts()
    nodes = downstream(model.graph, [made_by(model, name) for name in roots])
    assert [node.outputs[0].name for node in nodes] == reached
    assert sorted(str(value.name) for value in frontier(nodes)) == sorted(needed)


def test_a_part_is_evaluated_from_what_it_starts_from() -> None:
    model = parts()
    nodes = downstream(model.graph, [made_by(model, "m")])
    rng = np.random.default_rng(2)
    x, i = rng.standard_normal((2, 3)).astype(np.float32), rng.integers(1, 5, (2, 3))
    feed: Feed = {"x": x, "i": i}
    inner = model.clone()
    values = ir.convenience.create_value_mapping(inner.graph)
    leaves = frontier(nodes)
    inner.graph.outputs.extend(values[str(leaf.name)] for leaf in leaves)
    known = run_model(inner, feed, optimise=False)
    constants: dict[ir.Value, torch.Tensor] = {}
    result = evaluate(nodes, {leaf: known[str(leaf.name)] for leaf in leaves}, constants)
    found = result[model.graph.outputs[0]].numpy()
    np.testing.assert_allclose(found, known["y"], rtol=TOLERANCE, atol=TOLERANCE)
    assert set(result) == {*leaves, *(node.outputs[0] for node in nodes)}
    assert sorted(str(value.name) for value in constants) == ["b", "u", "w"]
    # A second call takes the constants from where the first left them.
    for tensor in constants.values():
        tensor.zero_()
    again = evaluate(nodes, {leaf: known[str(leaf.name)] for leaf in leaves}, constants)
    np.testing.assert_array_equal(again[model.graph.outputs[0]].numpy(), np.zeros((2, 4)))


def test_the_hook_computes_every_matmul() -> None:
    model = parts()
    nodes = downstream(model.graph, [made_by(model, "m")])
    given = {
        leaf: np.full((2, 3) if leaf.name == "s" else (1, 1), 0.5, np.float32)
        for leaf in frontier(nodes)
    }
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(node: ir.Node, inputs: list[torch.Tensor]) -> torch.Tensor:
        seen[str(node.outputs[0].name)] = inputs
        return 2 * torch.matmul(*inputs)

    plain, doubled = evaluate(nodes, given, {}), evaluate(nodes, given, {}, hook)
    assert list(seen) == ["m", "n"]
    first, last = made_by(model, "m").outputs[0], model.graph.outputs[0]
    np.testing.assert_array_equal(doubled[first].numpy(), 2 * plain[first].numpy())
    assert not np.allclose(doubled[last].numpy(), plain[last].numpy())


# gradients

NETWORK = """g (float[2,4,6] x, float[6,8] w, float[8] c, float[8,8] u, float[8] g, float[8] b,
  float[8,3] h, bool[1,1,4,4] left) => (float[2,4,3] y) {
  m = MatMul (x, w) a = Add (m, c) e = Gelu <approximate = "tanh"> (a)
  k = MatMul (e, u)
  t = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (k, k, e, left)
  r = Add (t, e) n = LayerNormalization (r, g, b)
  p, q = Split <axis = -1, num_outputs = 2> (n) s = Sigmoid (q) o = Mul (p, s)
  j = Concat <axis = -1> (o, p) l = MatMul (j, h) y = Softmax (l) }"""


@pytest.mark.parametrize("name", ["m", "k", "l"])
def test_gradients_are_slopes(name: str) -> None:
    """In float64, so that a difference of two values has digits left."""
    shapes = {"w": (6, 8), "c": (8,), "u": (8, 8), "g": (8,), "b": (8,), "h": (8, 3)}
    rng = np.random.default_rng(3)
    weights = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    weights["u"] *= 0.1  # no softmax is saturated
    model = from_text(HEADER + NETWORK, **weights)
    nodes = list(model.graph)
    feed = draw(model) | {"x": 0.3 * rng.standard_normal((2, 4, 6))}
    given = {value: feed[str(value.name)] for value in frontier(nodes)}
    constants = {
        value: torch.from_numpy(weights[str(value.name)].astype(np.float64))
        for value in model.graph.initializers.values()
    }
    direction = torch.from_numpy(rng.standard_normal((2, 4, 3)))

    def loss(added: torch.Tensor) -> torch.Tensor:
        def hook(node: ir.Node, inputs: list[torch.Tensor]) -> torch.Tensor:
            made = torch.matmul(*inputs)
            return made + added if node.outputs[0].name == name else made

        values = evaluate(nodes, given, constants, hook)
        return (values[model.graph.outputs[0]] * direction).sum()

    width = {"m": 8, "k": 8, "l": 3}[name]
    zero = torch.zeros((2, 4, width), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(zero), zero)
    step = 1e-5
    slopes = np.zeros(zero.shape)
    for at in np.ndindex(*zero.shape):
        change = torch.zeros(zero.shape, dtype=torch.float64)
        change[at] = step
        slopes[at] = float(loss(change) - loss(-change)) / (2 * step)
    assert np.abs(slopes).max() > 1e-3
    np.testing.assert_allclose(gradient.numpy(), slopes, rtol=1e-6, atol=1e-9)
