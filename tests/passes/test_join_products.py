"""JoinProducts: products that read one activation become one."""

from __future__ import annotations

import numpy as np
import pytest
from qcompile.passes.join_products import JoinProducts
from qcompile.passes.weight_only import pack

from qcompile.names import apart
from tests.passes.rewriting import assert_leaves, assert_rewrites

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 32)).astype(np.float32)
W, V = (RNG.standard_normal((32, n)).astype(np.float32) for n in (8, 4))
B, C = (RNG.standard_normal(n).astype(np.float32) for n in (8, 4))
CODES = RNG.integers(0, 256, (2, 3, 32)).astype(np.uint8)
WQ, VQ = (RNG.integers(-64, 64, (32, n)).astype(np.int8) for n in (8, 4))
S, T = (RNG.uniform(0.01, 0.02, n).astype(np.float32) for n in (8, 4))
OUT = "(float[B,S,8] y, float[B,S,4] z)"
FLOAT = "float[B,S,32] x, float[32,8] w, float[32,4] v"
JOINED = "float[32,12] wv, int64[2] n"
WV, BOTH = np.concatenate([W, V], 1), np.array([8, 4])


def test_float_products() -> None:
    assert_rewrites(
        JoinProducts(),
        f"""g ({FLOAT}, {JOINED}) => {OUT} {{
            a = MatMul (x, w) b = MatMul (x, v) y = Relu (a) z = Neg (b) }}""",
        f"""g (float[B,S,32] x, {JOINED}) => {OUT} {{
            ab = MatMul (x, wv) a, b = Split <axis = -1> (ab, n) y = Relu (a) z = Neg (b) }}""",
        {"x": X},
        atol=1e-5,
        w=W,
        v=V,
        wv=WV,
        n=BOTH,
    )


def test_biases_go_with_float_products() -> None:
    assert_rewrites(
        JoinProducts(),
        f"""g ({FLOAT}, {JOINED}, float[8] b, float[4] c, float[12] bc) => {OUT} {{
            p = MatMul (x, w) a = Add (p, b) q = MatMul (x, v) d = Add (c, q)
            y = Relu (a) z = Neg (d) }}""",
        f"""g (float[B,S,32] x, {JOINED}, float[12] bc) => {OUT} {{
            pq = MatMul (x, wv) ad = Add (pq, bc) a, d = Split <axis = -1> (ad, n)
            y = Relu (a) z = Neg (d) }}""",
        {"x": X},
        atol=1e-5,
        w=W,
        v=V,
        b=B,
        c=C,
        wv=WV,
        bc=np.concatenate([B, C]),
        n=BOTH,
    )


@pytest.mark.parametrize("biased", [False, True])
def test_integer_products(biased: bool) -> None:
    """Each output is what it was, bit for bit: the sums of integers are exact."""
    shared = "uint8[B,S,32] x, float s, uint8 z0"
    first, second, joined = (f", , {name}" if biased else "" for name in ("b", "c", "bc"))
    kernel = "com.microsoft.MatMulIntegerToFloat"
    after = "int8[32,12] wv, float[12] tu, float[12] bc, int64[2] n"
    assert_rewrites(
        JoinProducts(),
        f"""g ({shared}, int8[32,8] w, int8[32,4] v, float[8] t, float[4] u, float[8] b, float[4] c,
            {after}) => {OUT} {{
            d = {kernel} (x, w, s, t, z0{first}) e = {kernel} (x, v, s, u, z0{second})
            y = Relu (d) z = Neg (e) }}""",
        f"""g ({shared}, {after}) => {OUT} {{
            de = {kernel} (x, wv, s, tu, z0{joined}) d, e = Split <axis = -1> (de, n)
            y = Relu (d) z = Neg (e) }}""",
        {"x": CODES},
        atol=0,
        s=np.float32(0.05),
        z0=np.uint8(120),
        w=WQ,
        v=VQ,
        t=S,
        u=T,
        b=B,
        c=C,
        wv=np.concatenate([WQ, VQ], 1),
        tu=np.concatenate([S, T]),
        bc=np.concatenate([B, C]),
        n=BOTH,
    )


def test_blocks_of_weights() -> None:
    kernel = "com.microsoft.MatMulNBits"
    form = "K = 32, bits = 4, block_size = 32, accuracy_level = 4"
    after = "uint8[12,1,16] wv, float[12] tu, int64[2] n"
    w, v = (pack(codes >> 4, 4, 32) for codes in (WQ, VQ))
    assert_rewrites(
        JoinProducts(),
        f"""g (float[B,S,32] x, uint8[8,1,16] w, uint8[4,1,16] v, float[8] t, float[4] u,
            {after}) => {OUT} {{
            d = {kernel} <{form}, N = 8> (x, w, t) e = {kernel} <{form}, N = 4> (x, v, u)
            y = Relu (d) z = Neg (e) }}""",
        f"""g (float[B,S,32] x, {after}) => {OUT} {{
            de = {kernel} <{form}, N = 12> (x, wv, tu) d, e = Split <axis = -1> (de, n)
            y = Relu (d) z = Neg (e) }}""",
        {"x": X},
        atol=0,
        w=w,
        v=v,
        t=S,
        u=T,
        wv=np.concatenate([w, v]),
        tu=np.concatenate([S, T]),
        n=BOTH,
    )


@pytest.mark.parametrize(
    "body",
    [
        "a = MatMul (x, w) y = Relu (a) z = MatMul (x, v)",
        "r = Neg (x) a = MatMul (x, w) d = MatMul (r, v) y = Relu (a) z = Neg (d)",
        "p = MatMul (x, w) a = Add (p, b) d = MatMul (x, v) y = Relu (a) z = Neg (d)",
        "a = MatMul (x, w) e = MatMul (x, w) y = Add (a, e) d = MatMul (x, v) z = Neg (d)",
    ],
    ids=["output of the graph", "two activations", "one bias", "weight that two read"],
)
def test_products_that_stay(body: str) -> None:
    assert_leaves(JoinProducts(), f"g ({FLOAT}, float[8] b) => {OUT} {{ {body} }}", w=W, v=V, b=B)


def test_the_name_says_what_was_joined() -> None:
    model = assert_rewrites(
        JoinProducts(),
        f"""g ({FLOAT}, {JOINED}) => {OUT} {{
            [one] a = MatMul (x, w) [two] b = MatMul (x, v) y = Relu (a) z = Neg (b) }}""",
        f"""g (float[B,S,32] x, {JOINED}) => {OUT} {{
            ab = MatMul (x, wv) a, b = Split <axis = -1> (ab, n) y = Relu (a) z = Neg (b) }}""",
        {"x": X},
        atol=1e-5,
        w=W,
        v=V,
        wv=WV,
        n=BOTH,
    )
    assert apart(str(next(iter(model.graph)).name)) == ["one", "two"]
