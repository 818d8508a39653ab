"""Every op that PyTorch evaluates equals ONNX Runtime's."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.torch_graph import _OPS
from tests.passes.rewriting import HEADER
from tests.support import check_model, from_text, run_model
from tests.torch_graphs import TOLERANCE, draw, evaluated

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
