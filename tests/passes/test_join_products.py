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
W, V = (pack(RNG.integers(-8, 8, (32, n)).astype(np.int8), 4, 32) for n in (8, 4))
S, T, B, C = (RNG.uniform(0.01, 0.02, n).astype(np.float32) for n in (8, 4, 8, 4))
FORM = "K = 32, bits = 4, block_size = 32, accuracy_level = 4"
KERNEL = "com.microsoft.MatMulNBits"
WEIGHTS = "uint8[8,1,16] w, uint8[4,1,16] v, float[8] s, float[4] t, float[8] b, float[4] c"
ARRAYS = {"w": W, "v": V, "s": S, "t": T, "b": B, "c": C}
AFTER = "uint8[12,1,16] wv, float[12] st, float[12] bc, int64[2] n"
JOINED = {
    "wv": np.concatenate([W, V]),
    "st": np.concatenate([S, T]),
    "bc": np.concatenate([B, C]),
    "n": np.array([8, 4]),
}
OUT = "(float[B,S,8] y, float[B,S,4] z)"


def body(first: str = "", second: str = "", form: str = FORM) -> str:
    return f"""[one] d = {KERNEL} <{FORM}, N = 8> (x, w, s{first})
        [two] e = {KERNEL} <{form}, N = 4> (x, v, t{second}) y = Relu (d) z = Neg (e)"""


@pytest.mark.parametrize("biased", [False, True])
def test_all_of_one_activation(biased: bool) -> None:
    first, second, both = (f", , , {name}" if biased else "" for name in ("b", "c", "bc"))
    model = assert_rewrites(
        JoinProducts(["one", "two"]),
        f"g (float[B,S,32] x, {WEIGHTS}, {AFTER}) => {OUT} {{ {body(first, second)} }}",
        f"""g (float[B,S,32] x, {AFTER}) => {OUT} {{
            de = {KERNEL} <{FORM}, N = 12> (x, wv, st{both}) d, e = Split <axis = -1> (de, n)
            y = Relu (d) z = Neg (e) }}""",
        {"x": X},
        atol=0,
        **ARRAYS,
        **JOINED,
    )
    assert apart(str(next(iter(model.graph)).name))[1:] == ["one", "two"]


def test_products_of_codes() -> None:
    """Per-channel scales go with their columns."""
    codes = [RNG.integers(-127, 128, (32, n)).astype(np.int8) for n in (8, 4)]
    integer = "com.microsoft.MatMulIntegerToFloat"
    weights = "int8[32,8] w, int8[32,4] v, float[8] s, float[4] t, float[8] b, float[4] c"
    after = "int8[32,12] wv, float[12] st, float[12] bc, int64[2] n"
    common = "float a, uint8 o"
    model = assert_rewrites(
        JoinProducts(["one", "two"]),
        f"""g (uint8[B,S,32] x, {common}, {weights}, {after}) => {OUT} {{
            [one] d = {integer} (x, w, a, s, o, , b) [two] e = {integer} (x, v, a, t, o, , c)
            y = Relu (d) z = Neg (e) }}""",
        f"""g (uint8[B,S,32] x, {common}, {after}) => {OUT} {{
            de = {integer} (x, wv, a, st, o, , bc) d, e = Split <axis = -1> (de, n)
            y = Relu (d) z = Neg (e) }}""",
        {"x": RNG.integers(0, 256, (2, 3, 32)).astype(np.uint8)},
        atol=0,
        **ARRAYS | JOINED | {"w": codes[0], "v": codes[1], "wv": np.concatenate(codes, axis=1)},
        a=np.float32(0.02),
        o=np.uint8(120),
    )
    assert apart(str(next(iter(model.graph)).name))[1:] == ["one", "two"]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("one",), body()),
        (("one", "two"), body(first=", , , b")),
        (("one", "two"), body(form=FORM.replace("level = 4", "level = 0"))),
        (("one", "two"), "r = Neg (x) " + body().replace("(x, v", "(r, v")),
        (("one", "two"), body().replace("z = Neg (e)", "").replace("] e =", "] z =")),
    ],
    ids=["not asked for", "one bias", "another level", "two activations", "output of the graph"],
)
def test_products_that_stay(names: tuple[str, ...], text: str) -> None:
    assert_leaves(
        JoinProducts(names), f"g (float[B,S,32] x, {WEIGHTS}) => {OUT} {{ {text} }}", **ARRAYS
    )
