"""A graph evaluated by PyTorch: every op equals ONNX Runtime, and its gradient is the slope."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.torch_graph import (
    _OPS,
    UnsupportedOpError,
    Values,
    check_supported,
    downstream,
    evaluate,
    frontier,
)
from tests.passes.rewriting import HEADER
from tests.support import Feed, check_model, from_text, run_model

TOLERANCE = 1e-5

# Op -> name of the case -> the graph. Inputs are drawn to fit their types and names: see `draw`.
CASES: dict[str, dict[str, str]] = {
    "Abs": {"": "(float[2,3] x) => (float[2,3] y) { y = Abs (x) }"},
    "Add": {
        "same": "(float[2,3] x, float[2,3] z) => (float[2,3] y) { y = Add (x, z) }",
        "broadcast": "(float[2,3,4] x, float[3,1] z) => (float[2,3,4] y) { y = Add (x, z) }",
        "integers": "(int64[3] i, int64[3] j) => (int64[3] y) { y = Add (i, j) }",
    },
    "Attention": {
        "3d": """(float[2,5,12] q, float[2,5,12] k, float[2,5,12] v) => (float[2,5,12] y) {
            y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v) }""",
        "3d-other-length": """(float[2,5,12] q, float[2,7,12] k, float[2,7,12] v)
            => (float[2,5,12] y) {
            y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v) }""",
        "3d-narrow-values": """(float[2,5,12] q, float[2,5,12] k, float[2,5,6] v)
            => (float[2,5,6] y) {
            y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v) }""",
        "grouped-queries": """(float[2,5,12] q, float[2,5,6] k, float[2,5,6] v)
            => (float[2,5,12] y) {
            y = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v) }""",
        "grouped-queries-causal-added-mask": """(float[2,5,12] q, float[2,5,6] k, float[2,5,6] v,
            float[2,1,5,5] m) => (float[2,5,12] y) {
            y = Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = 1> (q, k, v, m) }""",
        "added-mask": """(float[2,5,12] q, float[2,5,12] k, float[2,5,12] v, float[5,5] m)
            => (float[2,5,12] y) {
            y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v, m) }""",
        "boolean-mask": """(float[2,5,12] q, float[2,5,12] k, float[2,5,12] v, bool[2,1,5,5] eye)
            => (float[2,5,12] y) {
            y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v, eye) }""",
        "causal": """(float[2,5,12] q, float[2,5,12] k, float[2,5,12] v) => (float[2,5,12] y) {
            y = Attention <q_num_heads = 3, kv_num_heads = 3, is_causal = 1> (q, k, v) }""",
        "causal-other-length": """(float[2,3,12] q, float[2,7,12] k, float[2,7,12] v)
            => (float[2,3,12] y) {
            y = Attention <q_num_heads = 3, kv_num_heads = 3, is_causal = 1> (q, k, v) }""",
        "scale": """(float[2,5,12] q, float[2,5,12] k, float[2,5,12] v) => (float[2,5,12] y) {
            y = Attention <q_num_heads = 3, kv_num_heads = 3, scale = 0.1> (q, k, v) }""",
        "capped": """(float[2,5,12] q, float[2,5,12] k, float[2,5,12] v, bool[2,1,5,5] eye)
            => (float[2,5,12] y) {
            y = Attention <q_num_heads = 3, kv_num_heads = 3, softcap = 0.5> (q, k, v, eye) }""",
        "4d": """(float[2,3,5,4] q, float[2,3,5,4] k, float[2,3,5,4] v) => (float[2,3,5,4] y) {
            y = Attention (q, k, v) }""",
        "4d-grouped-causal": """(float[2,4,5,4] q, float[2,2,5,4] k, float[2,2,5,4] v)
            => (float[2,4,5,4] y) { y = Attention <is_causal = 1> (q, k, v) }""",
        "a-row-masked-whole": """(float[1,5,12] q, float[1,5,12] k, float[1,5,12] v,
            bool[1,1,5,5] left) => (float[1,5,12] y) {
            y = Attention <q_num_heads = 3, kv_num_heads = 3, is_causal = 1> (q, k, v, left) }""",
    },
    "Cast": {
        "to-float": "(int64[3] i) => (float[3] y) { y = Cast <to = 1> (i) }",
        "to-integer": "(float[2,3] x) => (int64[2,3] y) { y = Cast <to = 7> (x) }",
        "to-bool": "(int64[3] i) => (bool[3] y) { y = Cast <to = 9> (i) }",
        "to-half": "(float[2,3] x) => (float16[2,3] y) { y = Cast <to = 10> (x) }",
    },
    "Concat": {
        "last": "(float[2,3] x, float[2,4] z) => (float[2,7] y) { y = Concat <axis = -1> (x, z) }",
        "three": """(float[2,3] x, float[1,3] z, float[2,3] p) => (float[5,3] y) {
            y = Concat <axis = 0> (x, z, p) }""",
    },
    "Constant": {
        "tensor": """(float[2,3] x) => (float[2,3] y) {
            c = Constant <value = float[3] {0.5, -1.0, 2.0}> () y = Mul (x, c) }""",
    },
    "Cos": {"": "(float[2,3] x) => (float[2,3] y) { y = Cos (x) }"},
    "Div": {
        "": "(float[2,3] x, float[3] p) => (float[2,3] y) { y = Div (x, p) }",
        "integers": "(int64[3] i, int64[3] j) => (int64[3] y) { y = Div (i, j) }",
    },
    "Erf": {"": "(float[2,3] x) => (float[2,3] y) { y = Erf (x) }"},
    "Exp": {"": "(float[2,3] x) => (float[2,3] y) { y = Exp (x) }"},
    "Expand": {
        "": """(float[3,1] x) => (float[2,3,4] y) {
            s = Constant <value = int64[3] {2, 3, 4}> () y = Expand (x, s) }""",
        "keeps-the-larger": """(float[3,4] x) => (float[3,4] y) {
            s = Constant <value = int64[2] {3, 1}> () y = Expand (x, s) }""",
    },
    "Flatten": {
        "": "(float[2,3,4] x) => (float[2,12] y) { y = Flatten (x) }",
        "axis-0": "(float[2,3,4] x) => (float[1,24] y) { y = Flatten <axis = 0> (x) }",
        "axis-2": "(float[2,3,4] x) => (float[6,4] y) { y = Flatten <axis = 2> (x) }",
        "negative": "(float[2,3,4] x) => (float[6,4] y) { y = Flatten <axis = -1> (x) }",
    },
    "Gather": {
        "": """(float[4,3] x) => (float[2,2,3] y) {
            i = Constant <value = int64[2,2] {0, 3, 1, 1}> () y = Gather (x, i) }""",
        "negative-index": """(float[2,4,3] x) => (float[2,2,3] y) {
            i = Constant <value = int64[2] {-1, 0}> () y = Gather <axis = 1> (x, i) }""",
        "scalar-index": """(float[2,4,3] x) => (float[2,3] y) {
            i = Constant <value = int64 {-1}> () y = Gather <axis = 1> (x, i) }""",
        "last-axis-int32": """(float[2,4,3] x) => (float[2,4,2] y) {
            i = Constant <value = int32[2] {2, 0}> () y = Gather <axis = -1> (x, i) }""",
    },
    "Gelu": {
        "exact": "(float[2,3] x) => (float[2,3] y) { y = Gelu (x) }",
        "tanh": '(float[2,3] x) => (float[2,3] y) { y = Gelu <approximate = "tanh"> (x) }',
    },
    "Gemm": {
        "": "(float[2,3] x, float[3,4] w) => (float[2,4] y) { y = Gemm (x, w) }",
        "bias": "(float[2,3] x, float[3,4] w, float[4] b) => (float[2,4] y) { y = Gemm (x, w, b) }",
        "everything": """(float[3,2] x, float[4,3] w, float[2,1] b) => (float[2,4] y) {
            y = Gemm <alpha = 0.5, beta = -2.0, transA = 1, transB = 1> (x, w, b) }""",
    },
    "Identity": {"": "(float[2,3] x) => (float[2,3] y) { y = Identity (x) }"},
    "LayerNormalization": {
        "": """(float[2,3,4] x, float[4] w, float[4] b) => (float[2,3,4] y) {
            y = LayerNormalization (x, w, b) }""",
        "no-bias": """(float[2,3,4] x, float[4] w) => (float[2,3,4] y) {
            y = LayerNormalization <epsilon = 0.1> (x, w) }""",
        "two-axes": """(float[2,3,4] x, float[3,4] w, float[3,4] b) => (float[2,3,4] y) {
            y = LayerNormalization <axis = 1> (x, w, b) }""",
    },
    "LeakyRelu": {
        "": "(float[2,3] x) => (float[2,3] y) { y = LeakyRelu (x) }",
        "alpha": "(float[2,3] x) => (float[2,3] y) { y = LeakyRelu <alpha = 0.3> (x) }",
    },
    "MatMul": {
        "": "(float[2,3] x, float[3,4] w) => (float[2,4] y) { y = MatMul (x, w) }",
        "batched": "(float[2,5,3] x, float[2,3,4] w) => (float[2,5,4] y) { y = MatMul (x, w) }",
        "broadcast": "(float[2,5,3] x, float[3,4] w) => (float[2,5,4] y) { y = MatMul (x, w) }",
        "vector": "(float[2,5,3] x, float[3] w) => (float[2,5] y) { y = MatMul (x, w) }",
    },
    "Mul": {"": "(float[2,3] x, float z) => (float[2,3] y) { y = Mul (x, z) }"},
    "Neg": {"": "(float[2,3] x) => (float[2,3] y) { y = Neg (x) }"},
    "Pow": {
        "": "(float[2,3] p, float[3] x) => (float[2,3] y) { y = Pow (p, x) }",
        "square": """(float[2,3] x) => (float[2,3] y) {
            c = Constant <value = float {2.0}> () y = Pow (x, c) }""",
        "integer-exponent": """(float[2,3] x) => (float[2,3] y) {
            c = Constant <value = int64 {3}> () y = Pow (x, c) }""",
    },
    "RMSNormalization": {
        "": "(float[2,3,4] x, float[4] w) => (float[2,3,4] y) { y = RMSNormalization (x, w) }",
        "two-axes": """(float[2,3,4] x, float[3,4] w) => (float[2,3,4] y) {
            y = RMSNormalization <axis = 1, epsilon = 0.1> (x, w) }""",
    },
    "ReduceMean": {
        "": """(float[2,3,4] x) => (float[2,3,1] y) {
            a = Constant <value = int64[1] {-1}> () y = ReduceMean (x, a) }""",
        "dropped": """(float[2,3,4] x) => (float[3] y) {
            a = Constant <value = int64[2] {0, 2}> () y = ReduceMean <keepdims = 0> (x, a) }""",
        "all": "(float[2,3,4] x) => (float[1,1,1] y) { y = ReduceMean (x) }",
    },
    "ReduceSum": {
        "": """(float[2,3,4] x) => (float[2,1,4] y) {
            a = Constant <value = int64[1] {1}> () y = ReduceSum (x, a) }""",
        "all": "(float[2,3,4] x) => (float y) { y = ReduceSum <keepdims = 0> (x) }",
    },
    "Relu": {"": "(float[2,3] x) => (float[2,3] y) { y = Relu (x) }"},
    "Reshape": {
        "zero-and-rest": """(float[2,3,4] x) => (float[2,2,6] y) {
            s = Constant <value = int64[3] {0, 2, -1}> () y = Reshape (x, s) }""",
        "flat": """(float[2,3,4] x) => (float[24] y) {
            s = Constant <value = int64[1] {-1}> () y = Reshape (x, s) }""",
        "computed-shape": """(float[2,3,4] x) => (float[3,8] y) {
            t = Shape <start = 1, end = 2> (x) r = Constant <value = int64[1] {-1}> ()
            s = Concat <axis = 0> (t, r) y = Reshape (x, s) }""",
    },
    "RotaryEmbedding": {
        "4d": """(float[2,3,5,8] x, float[2,5,4] cos, float[2,5,4] sin) => (float[2,3,5,8] y) {
            y = RotaryEmbedding (x, cos, sin) }""",
        "4d-interleaved": """(float[2,3,5,8] x, float[2,5,4] cos, float[2,5,4] sin)
            => (float[2,3,5,8] y) { y = RotaryEmbedding <interleaved = 1> (x, cos, sin) }""",
        "3d": """(float[2,5,24] x, float[2,5,4] cos, float[2,5,4] sin) => (float[2,5,24] y) {
            y = RotaryEmbedding <num_heads = 3> (x, cos, sin) }""",
        "3d-interleaved": """(float[2,5,24] x, float[2,5,4] cos, float[2,5,4] sin)
            => (float[2,5,24] y) {
            y = RotaryEmbedding <num_heads = 3, interleaved = 1> (x, cos, sin) }""",
        "positions": """(float[2,3,5,8] x, float[6,4] cos, float[6,4] sin) => (float[2,3,5,8] y) {
            i = Constant <value = int64[2,5] {0, 1, 2, 3, 4, 1, 2, 3, 4, 5}> ()
            y = RotaryEmbedding (x, cos, sin, i) }""",
        "a-part-of-each-head": """(float[2,3,5,8] x, float[2,5,2] cos, float[2,5,2] sin)
            => (float[2,3,5,8] y) {
            y = RotaryEmbedding <rotary_embedding_dim = 4> (x, cos, sin) }""",
    },
    "Shape": {
        "": "(float[2,3,4] x) => (int64[3] y) { y = Shape (x) }",
        "start": "(float[2,3,4] x) => (int64[2] y) { y = Shape <start = 1> (x) }",
        "negative": "(float[2,3,4] x) => (int64[1] y) { y = Shape <start = -2, end = -1> (x) }",
    },
    "Sigmoid": {"": "(float[2,3] x) => (float[2,3] y) { y = Sigmoid (x) }"},
    "Sin": {"": "(float[2,3] x) => (float[2,3] y) { y = Sin (x) }"},
    "Slice": {
        "": """(float[4,6] x) => (float[2,6] y) {
            s = Constant <value = int64[1] {1}> () e = Constant <value = int64[1] {3}> ()
            y = Slice (x, s, e) }""",
        "axes-and-steps": """(float[4,6] x) => (float[4,2] y) {
            s = Constant <value = int64[1] {1}> () e = Constant <value = int64[1] {5}> ()
            a = Constant <value = int64[1] {-1}> () t = Constant <value = int64[1] {2}> ()
            y = Slice (x, s, e, a, t) }""",
        "from-the-end-to-infinity": """(float[4,6] x) => (float[3,6] y) {
            s = Constant <value = int64[1] {-3}> ()
            e = Constant <value = int64[1] {9223372036854775807}> ()
            a = Constant <value = int64[1] {0}> () y = Slice (x, s, e, a) }""",
        "steps-without-axes": """(float[4,6] x) => (float[2,2] y) {
            s = Constant <value = int64[2] {0, 1}> () e = Constant <value = int64[2] {4, 6}> ()
            t = Constant <value = int64[2] {2, 3}> () y = Slice (x, s, e, , t) }""",
    },
    "Softmax": {
        "": "(float[2,3,4] x) => (float[2,3,4] y) { y = Softmax (x) }",
        "axis": "(float[2,3,4] x) => (float[2,3,4] y) { y = Softmax <axis = 1> (x) }",
    },
    "Split": {
        "equal": """(float[2,6] x) => (float[2,3] y, float[2,3] z) {
            y, z = Split <axis = -1, num_outputs = 2> (x) }""",
        "last-is-smaller": """(float[7,2] x) => (float[3,2] y, float[3,2] z, float[1,2] p) {
            y, z, p = Split <num_outputs = 3> (x) }""",
        "sizes": """(float[2,6] x) => (float[2,1] y, float[2,5] z) {
            s = Constant <value = int64[2] {1, 5}> () y, z = Split <axis = 1> (x, s) }""",
    },
    "Sqrt": {"": "(float[2,3] p) => (float[2,3] y) { y = Sqrt (p) }"},
    "Squeeze": {
        "axes": """(float[1,2,1,3] x) => (float[1,2,3] y) {
            a = Constant <value = int64[1] {-2}> () y = Squeeze (x, a) }""",
        "all": "(float[1,2,1,3] x) => (float[2,3] y) { y = Squeeze (x) }",
    },
    "Sub": {"": "(float[2,3] x, float[2,1] z) => (float[2,3] y) { y = Sub (x, z) }"},
    "Tanh": {"": "(float[2,3] x) => (float[2,3] y) { y = Tanh (x) }"},
    "Transpose": {
        "reversed": "(float[2,3,4] x) => (float[4,3,2] y) { y = Transpose (x) }",
        "perm": "(float[2,3,4] x) => (float[2,4,3] y) { y = Transpose <perm = [0, 2, 1]> (x) }",
    },
    "Unsqueeze": {
        "": """(float[2,3] x) => (float[1,2,3,1] y) {
            a = Constant <value = int64[2] {0, -1}> () y = Unsqueeze (x, a) }""",
        "unordered": """(float[2,3] x) => (float[2,1,1,3] y) {
            a = Constant <value = int64[2] {2, 1}> () y = Unsqueeze (x, a) }""",
    },
    "Where": {
        "": """(bool[2,3] eye, float[2,3] x, float[2,3] z) => (float[2,3] y) {
            y = Where (eye, x, z) }""",
        "broadcast": """(bool[3] eye, float[2,3] x) => (float[2,3] y) {
            c = Constant <value = float {-1.0}> () y = Where (eye, x, c) }""",
    },
}
ALL = [
    pytest.param(op, text, id=f"{op}-{name}".strip("-"))
    for op, cases in CASES.items()
    for name, text in cases.items()
]


def draw(model: ir.Model, seed: int = 0) -> Feed:
    """Inputs by type and name: `p` is positive, `eye` and `left` are masks of their names."""
    rng = np.random.default_rng(seed)
    feed: Feed = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = value.shape.numpy()
        array: np.ndarray = rng.standard_normal(shape)
        if value.name == "p":
            array = np.abs(array) + 0.5
        elif value.name == "eye":
            array = rng.random(shape) < 0.5
            if len(shape) > 1:  # no row is without a token
                array |= np.eye(*shape[-2:], dtype=np.bool_)
        elif value.name == "left":
            array = np.ones(shape, bool)
            array[..., :2] = False  # two tokens of padding on the left
        elif value.dtype == ir.DataType.INT64:
            array = rng.integers(1, 9, shape)
        feed[str(value.name)] = array.astype(value.dtype.numpy())
    return feed


def evaluated(model: ir.Model, feed: Feed) -> Values:
    nodes = list(model.graph)
    check_supported(nodes)
    return evaluate(nodes, {value: feed[str(value.name)] for value in frontier(nodes)}, {})


@pytest.mark.parametrize(("op", "text"), ALL)
def test_an_op_equals_onnx_runtime(op: str, text: str) -> None:
    model = from_text(f"{HEADER} g {text}")
    check_model(model)
    assert op in {node.op_type for node in model.graph}
    feed = draw(model)
    wanted = run_model(model, feed, optimise=False)
    values = evaluated(model, feed)
    for output in model.graph.outputs:
        found, right = values[output].numpy(), wanted[str(output.name)]
        assert found.dtype == right.dtype and found.shape == right.shape
        np.testing.assert_allclose(found, right, rtol=TOLERANCE, atol=TOLERANCE)


def test_every_op_has_a_case() -> None:
    assert set(CASES) == set(_OPS)


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
