"""Decompose: fused operators as primitive ones, with the same results."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.decompose import SINCE, Decompose

from qcompile.errors import ModelError
from tests.passes.rewriting import HEADER, assert_leaves, assert_rewrites, typed
from tests.support import Feed, assert_idempotent, check_model, from_text, ops, run_model

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


MASK = np.tril(np.ones((1, 1, 5, 5), bool))
ANGLES = RNG.uniform(0, 6, (9, 4)).astype(np.float32)
CASES: dict[str, tuple[str, Feed]] = {
    "three dimensions, shared heads, bool mask": (
        """g (float[2,5,32] q, float[2,5,16] k, float[2,5,16] v, bool[1,1,5,5] m)
           => (float[2,5,32] y) {
             y = Attention <q_num_heads=4, kv_num_heads=2> (q, k, v, m) }""",
        {"q": normal(2, 5, 32), "k": normal(2, 5, 16), "v": normal(2, 5, 16), "m": MASK},
    ),
    "four dimensions, causal, a scale": (
        """g (float[2,4,S,8] q, float[2,4,S,8] k, float[2,4,S,8] v) => (float[2,4,S,8] y) {
             y = Attention <is_causal=1, scale=0.5> (q, k, v) }""",
        {"q": normal(2, 4, 5, 8), "k": normal(2, 4, 5, 8), "v": normal(2, 4, 5, 8)},
    ),
    "float mask": (
        """g (float[2,5,16] q, float[2,5,16] k, float[2,5,16] v, float[2,1,5,5] m)
           => (float[2,5,16] y) {
             y = Attention <q_num_heads=2, kv_num_heads=2> (q, k, v, m) }""",
        {
            "q": normal(2, 5, 16), "k": normal(2, 5, 16), "v": normal(2, 5, 16),
            "m": np.where(MASK, np.float32(0.5), np.float32(-np.inf)).repeat(2, axis=0),
        },
    ),
    "capped scores under a mask": (
        """g (float[2,5,16] q, float[2,5,16] k, float[2,5,16] v, bool[1,1,5,5] m)
           => (float[2,5,16] y) {
             y = Attention <q_num_heads=2, kv_num_heads=2, scale=1.5, softcap=0.5>
               (q, k, v, m) }""",
        {"q": normal(2, 5, 16), "k": normal(2, 5, 16), "v": normal(2, 5, 16), "m": MASK},
    ),
    "rotation of heads, by position": (
        """g (float[2,5,24] x, float[9,4] c, float[9,4] s, int64[2,5] p) => (float[2,5,24] y) {
             y = RotaryEmbedding <num_heads=3> (x, c, s, p) }""",
        {
            "x": normal(2, 5, 24), "c": np.cos(ANGLES), "s": np.sin(ANGLES),
            "p": RNG.integers(0, 9, (2, 5)),
        },
    ),
    "rotation of pairs": (
        """g (float[1,3,5,8] x, float[1,5,4] c, float[1,5,4] s) => (float[1,3,5,8] y) {
             y = RotaryEmbedding <interleaved=1> (x, c, s) }""",
        {"x": normal(1, 3, 5, 8), "c": np.cos(ANGLES)[None, :5], "s": np.sin(ANGLES)[None, :5]},
    ),
    "rotation of a part": (
        """g (float[1,3,5,10] x, float[1,5,4] c, float[1,5,4] s) => (float[1,3,5,10] y) {
             y = RotaryEmbedding <rotary_embedding_dim=8> (x, c, s) }""",
        {"x": normal(1, 3, 5, 10), "c": np.cos(ANGLES)[None, :5], "s": np.sin(ANGLES)[None, :5]},
    ),
    "root mean square": (
        """g (float[2,5,8] x, float[8] w) => (float[2,5,8] y) {
             y = RMSNormalization <epsilon=0.001> (x, w) }""",
        {"x": normal(2, 5, 8), "w": normal(8)},
    ),
    "layer norm of two axes": (
        """g (float[2,5,8] x, float[5,8] w, float[5,8] b) => (float[2,5,8] y) {
             y = LayerNormalization <axis=1> (x, w, b) }""",
        {"x": normal(2, 5, 8), "w": normal(5, 8), "b": normal(5, 8)},
    ),
    "GELU": ("g (float[2,8] x) => (float[2,8] y) { y = Gelu (x) }", {"x": normal(2, 8)}),
    "GELU by tanh": (
        'g (float[2,8] x) => (float[2,8] y) { y = Gelu <approximate="tanh"> (x) }',
        {"x": normal(2, 8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_in_primitive_ops(case: str) -> None:
    text, feed = CASES[case]
    model = typed(from_text(HEADER + text))
    wanted = run_model(model, feed, optimise=False)["y"]
    pass_ = Decompose(13)
    assert pass_(model).modified
    check_model(model)
    assert not set(SINCE) & set(ops(model))
    found = run_model(model, feed, optimise=False)["y"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    assert_idempotent(pass_, model)


def test_hard_swish() -> None:
    assert_rewrites(
        Decompose(13),
        "g (float[2,8] x) => (float[2,8] y) { y = HardSwish (x) }",
        """g (float[2,8] x) => (float[2,8] y) {
             h = HardSigmoid <alpha=0.1666666716337204, beta=0.5> (x)
             y = Mul (x, h)
           }""",
        {"x": normal(2, 8)},
        atol=1e-6,
    )


def test_ops_that_the_opset_has_stay() -> None:
    for opset, text in (
        (23, "g (float[2,8] x, float[8] w) => (float[2,8] y) { y = RMSNormalization (x, w) }"),
        (20, "g (float[2,8] x) => (float[2,8] y) { y = Gelu (x) }"),
        (17, "g (float[2,8] x, float[8] w) => (float[2,8] y) { y = LayerNormalization (x, w) }"),
    ):
        assert_leaves(Decompose(opset), text)


def test_what_hides_a_score_is_finite() -> None:
    text, feed = CASES["float mask"]
    model = typed(from_text(HEADER + text))
    Decompose(23)(model)
    scores = next(node for node in model.graph if node.op_type == "Softmax").inputs[0]
    assert scores is not None
    model.graph.outputs.append(scores)
    assert np.isfinite(run_model(model, feed, optimise=False)[str(scores.name)]).all()


def test_a_form_that_is_not_known_is_refused() -> None:
    text = """g (float[2,2,5,8] q, float[2,2,5,8] k, float[2,2,5,8] v, float[2,2,3,8] a,
                 float[2,2,3,8] b) => (float[2,2,5,8] y) { y = Attention (q, k, v, , a, b) }"""
    model = typed(from_text(HEADER + text))
    with pytest.raises(ModelError, match="with a cache"):
        Decompose(23)(model)
    assert isinstance(model, ir.Model)


IN_A_BODY = """g (float[2,8] x, bool c, float[8] w) => (float[2,8] y) {
  y = If (c) <then_branch = t () => (float[2,8] a) { THEN },
              else_branch = e () => (float[2,8] b) { b = Identity (x) }> }"""


@pytest.mark.parametrize("chosen", [True, False])
def test_the_bodies_of_control_flow(chosen: bool) -> None:
    feed: Feed = {"x": normal(2, 8), "c": np.array(chosen)}
    before = IN_A_BODY.replace("THEN", "a = LayerNormalization (x, w)")
    model = typed(from_text(HEADER + before, w=normal(8)))
    wanted = run_model(model, feed, optimise=False)["y"]
    pass_ = Decompose(13)
    assert pass_(model).modified
    kinds = [node.op_type for node in model.graph.all_nodes()]
    assert "LayerNormalization" not in kinds and "Sqrt" in kinds and ops(model) == ["If"]
    check_model(model)
    found = run_model(model, feed, optimise=False)["y"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert_idempotent(pass_, model)


def test_names_are_given_once_in_the_graph_and_its_bodies() -> None:
    text = """g (float[2,8] x, bool c, float[8] w) => (float[2,8] y) {
      u = LayerNormalization (x, w) v = LayerNormalization (u, w)
      y = If (c) <then_branch = t () => (float[2,8] a) { a = LayerNormalization (v, w) },
                  else_branch = e () => (float[2,8] b) { b = LayerNormalization (v, w) }> }"""
    feed: Feed = {"x": normal(2, 8), "c": np.array(True)}
    model = typed(from_text(HEADER + text, w=normal(8)))
    wanted = run_model(model, feed, optimise=False)["y"]
    Decompose(13)(model)
    nodes = list(model.graph.all_nodes())
    for names in ([n.name for n in nodes], [v.name for n in nodes for v in n.outputs]):
        assert len(set(names)) == len(names)
    found = run_model(model, feed, optimise=False)["y"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_what_the_opset_has_stays_in_a_body() -> None:
    then = "a = Attention <q_num_heads=1, kv_num_heads=1> (x3, x3, x3)"
    text = IN_A_BODY.replace("THEN", then).replace("x, bool", "x, float[1,2,8] x3, bool")
    text = text.replace("(float[2,8] a)", "(float[1,2,8] a)")
    assert_leaves(Decompose(23), text)
