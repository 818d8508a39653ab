"""What takes a smoothing scale, and why something cannot."""

from __future__ import annotations

import re

import numpy as np
import pytest

from qcompile.linears import find_linears, find_sites
from qcompile.producers import Producer, Refusal, find_producer
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

RNG = np.random.default_rng(0)


def _weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "w": _weight(4, 4),
    "v": _weight(4, 4),
    "u": _weight(4, 4),
    "wide": _weight(4, 12),
    "g": _weight(4),
    "b": _weight(4),
    "e": _weight(3, 4),
    "col": _weight(4, 1),
    "shape": np.array([0, -1, 4]),
    "heads": np.array([0, -1, 2]),
}
KINDS = {"shape": "int64", "heads": "int64"}


def find(
    body: str,
    outputs: str = "float[B,S,4] y",
    inputs: str = "",
    x: str = "float[B,S,4] x",
) -> Producer | Refusal:
    """The producer of the site that the Linear `y` reads. `y` is to read `h` by the weight `u`."""
    used = {n: array for n, array in CONSTANTS.items() if re.search(rf"[(,] ?{n}[,)]", body)}
    declared = "".join(
        f", {KINDS.get(name, 'float')}{list(array.shape)} {name}" for name, array in used.items()
    )
    text = f"g ({x}{inputs}{declared}) => ({outputs}) {{ {body} }}"
    model = typed(from_text(HEADER + text, **used))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    linears = find_linears(model.graph)
    (site,) = [site for site in find_sites(model.graph) if "y" in [li.name for li in site.linears]]
    return find_producer(site, linears)


Y = "y = MatMul (h, u)"


def assert_producer(
    found: Producer | Refusal, kind: str, name: str, channels: list[int], width: int
) -> None:
    assert isinstance(found, Producer), found
    assert (found.kind, found.name, found.width) == (kind, name, width)
    assert found.channels.tolist() == channels


FOUR = [0, 1, 2, 3]


@pytest.mark.parametrize(
    "norm",
    [
        "h = LayerNormalization <axis = -1> (x, g, b)",
        "h = LayerNormalization <axis = 2> (x, g)",
        "h = RMSNormalization <axis = -1> (x, g)",
    ],
)
def test_norms(norm: str) -> None:
    assert_producer(find(f"{norm} {Y}"), "norm", "h", FOUR, 4)


def test_a_norm_before_two_linears() -> None:
    found = find(
        f"h = RMSNormalization <axis = -1> (x, g) {Y} z = MatMul (h, w)",
        "float[B,S,4] y, float[B,S,4] z",
    )
    assert_producer(found, "norm", "h", FOUR, 4)


@pytest.mark.parametrize(
    "between",
    [
        "h = Relu (a)",
        "h = LeakyRelu <alpha = 0.1> (a)",
        "h = Identity (a)",
        "i = Relu (a) h = Reshape (i, shape)",
        "i = Neg (a) h = Abs (i)",
    ],
)
def test_a_linear_through_ops_that_commute(between: str) -> None:
    found = find(f"m = MatMul (x, w) a = Add (m, b) {between} {Y}")
    assert_producer(found, "linear", "m", FOUR, 4)


def test_a_linear_without_bias_and_nothing_between() -> None:
    assert_producer(find(f"h = MatMul (x, w) {Y}"), "linear", "h", FOUR, 4)


@pytest.mark.parametrize("order", ["s1, up", "up, s1"])
def test_the_linear_factor_of_a_gated_product(order: str) -> None:
    found = find(
        f"gate = MatMul (x, w) up = MatMul (x, v) s1 = Sigmoid (gate) h = Mul ({order}) {Y}"
    )
    assert_producer(found, "linear", "up", FOUR, 4)


def test_a_product_with_a_constant() -> None:
    assert_producer(find(f"m = MatMul (x, w) h = Mul (m, b) {Y}"), "linear", "m", FOUR, 4)


def test_parts_of_a_split() -> None:
    split = "p, q, h = Split <axis = -1, num_outputs = 3> (m)"
    found = find(f"m = MatMul (x, wide) {split} {Y}", "float[B,S,4] y, float[B,S,4] p")
    assert_producer(found, "linear", "m", [8, 9, 10, 11], 12)


@pytest.mark.parametrize(
    ("kv_heads", "channels"),
    [
        pytest.param(4, [0, 1, 2, 3, 4, 5, 6, 7], id="as-many"),
        pytest.param(2, [0, 1, 0, 1, 2, 3, 2, 3], id="two"),
        pytest.param(1, [0, 1, 0, 1, 0, 1, 0, 1], id="one"),
    ],
)
def test_attention(kv_heads: int, channels: list[int]) -> None:
    assert_producer(_attention(kv_heads), "linear", "v", channels, 2 * kv_heads)


def _attention(
    kv_heads: int = 2,
    attention: str = "h = Attention <{heads}> (q, k, v)",
    outputs: str = "",
    inputs: str = "",
    heads: str = "q_num_heads = 4, kv_num_heads = {kv}",
) -> Producer | Refusal:
    width = 2 * kv_heads
    filled = attention.replace("{heads}", heads.replace("{kv}", str(kv_heads)))
    text = f"""g (float[B,S,4] x{inputs}, float[4,8] wq, float[4,{width}] wk, float[4,{width}] wv,
      float[8,4] wo) => (float[B,S,4] y{outputs}) {{
      q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) {filled} y = MatMul (h, wo) }}"""
    weights = {
        "wq": _weight(4, 8),
        "wk": _weight(4, width),
        "wv": _weight(4, width),
        "wo": _weight(8, 4),
    }
    model = typed(from_text(HEADER + text, **weights))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    linears = find_linears(model.graph)
    (site,) = [site for site in find_sites(model.graph) if site.name == "y"]
    return find_producer(site, linears)


CACHE = ", float[B,2,T,2] pk, float[B,2,T,2] pv"


@pytest.mark.parametrize(
    ("attention", "outputs", "inputs"),
    [
        pytest.param(
            "h, nk, nv = Attention <{heads}> (q, k, v, , pk, pv)",
            ", float[B,2,U,2] nk, float[B,2,U,2] nv",
            CACHE,
            id="cache-in-and-out",
        ),
        pytest.param(
            "h, nk, nv = Attention <{heads}> (q, k, v, , pk, pv)", "", CACHE, id="cache-in"
        ),
        pytest.param(
            "h, nk, nv = Attention <{heads}> (q, k, v)",
            ", float[B,2,U,2] nk, float[B,2,U,2] nv",
            "",
            id="cache-out",
        ),
        pytest.param(
            "h, nk, nv = Attention <{heads}> (q, k, v) z = Relu (nv)",
            ", float[B,2,U,2] z",
            "",
            id="cache-read",
        ),
    ],
)
def test_the_cache_of_attention_is_not_rescaled(attention: str, outputs: str, inputs: str) -> None:
    """A scaled V is cached scaled: callers would see it, and feed unscaled values."""
    found = _attention(attention=attention, outputs=outputs, inputs=inputs)
    assert isinstance(found, Refusal)
    assert "cache" in found.reason and "Attention (h)" in found.reason


def test_attention_whose_values_are_its_keys() -> None:
    found = _attention(attention="h = Attention <{heads}> (q, v, v) z = Relu (k)")
    assert isinstance(found, Refusal)
    assert found.reason == "the input of Attention (h) is read elsewhere too"


def test_attention_in_four_axes() -> None:
    text = """g (float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] x, float[4,4] w, float[4,4] u)
      => (float[B,2,S,4] y) {
      v = MatMul (x, w) h = Attention (q, k, v) y = MatMul (h, u) }"""
    model = typed(from_text(HEADER + text, w=CONSTANTS["w"], u=CONSTANTS["u"]))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    site = find_sites(model.graph)[1]
    found = find_producer(site, find_linears(model.graph))
    assert found == Refusal("Attention (h) is not in its three-dimensional form")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(f"h = Identity (x) {Y}", "its input is a graph input", id="graph-input"),
        pytest.param(
            f"n = RMSNormalization <axis = -1> (x, g) h = Add (n, x) {Y}",
            "Add (h) does not commute with a scale per channel",
            id="residual",
        ),
        pytest.param(
            f"m = MatMul (x, w) a = Add (m, b) h = Gelu (a) {Y}",
            "Gelu (h) does not commute with a scale per channel",
            id="gelu",
        ),
        pytest.param(
            f"m = MatMul (x, w) h = Sigmoid (m) {Y}",
            "Sigmoid (h) does not commute with a scale per channel",
            id="sigmoid",
        ),
        pytest.param(
            f"m = MatMul (x, w) h = Softmax <axis = -1> (m) {Y}",
            "Softmax (h) does not commute with a scale per channel",
            id="softmax",
        ),
        pytest.param(
            f"m = MatMul (x, w) h = com.microsoft.QuickGelu (m) {Y}",
            "com.microsoft.QuickGelu (h) may not commute with a scale",
            id="another-domain",
        ),
        pytest.param(
            f"m = MatMul (x, w) p, h = Split <axis = 1, num_outputs = 2> (m) {Y}",
            "Split (p) is not over the channels",
            id="split-of-rows",
        ),
        pytest.param(
            f"m = MatMul (x, w) n = Reshape (m, heads) h = Reshape (n, shape) {Y}",
            "Reshape (h) mixes its channels",
            id="reshape",
        ),
        pytest.param(
            f"m = MatMul (x, w) h = Mul (m, m) {Y}",
            "the input of Mul (h) is read elsewhere too",
            id="square",
        ),
        pytest.param(
            f"i = Sigmoid (x) j = Tanh (x) h = Mul (i, j) {Y}",
            "Sigmoid (i) does not commute with a scale per channel; "
            "Tanh (j) does not commute with a scale per channel",
            id="product-without-a-linear",
        ),
        pytest.param(
            f"m = MatMul (x, w) h = Transpose <perm = [0, 2, 1]> (m) {Y}",
            "Transpose (h) does not commute with a scale per channel",
            id="transpose",
        ),
    ],
)
def test_ops_that_stop_the_walk(body: str, reason: str) -> None:
    x = "float[B,4,4] x" if "Transpose" in body else "float[B,S,4] x"
    assert find(body, "float[B,T,4] y", x=x) == Refusal(reason)


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        pytest.param(
            f"h = RMSNormalization <axis = -1> (x, g) {Y} r = Add (h, x)",
            "float[B,S,4] y, float[B,S,4] r",
            "its input is also read by Add (r), which cannot take the scale",
            id="by-a-residual",
        ),
        pytest.param(
            f"h = RMSNormalization <axis = -1> (x, g) {Y}",
            "float[B,S,4] y, float[B,S,4] h",
            "its input is also read by a graph output, which cannot take the scale",
            id="by-the-caller",
        ),
        pytest.param(
            f"m = MatMul (x, w) h = Relu (m) {Y} z = Neg (m)",
            "float[B,S,4] y, float[B,S,4] z",
            "the input of Relu (h) is read elsewhere too",
            id="before-the-relu",
        ),
        pytest.param(
            f"m = MatMul (x, w) h = Relu (m) {Y}",
            "float[B,S,4] y, float[B,S,4] m",
            "the input of Relu (h) is read elsewhere too",
            id="before-the-relu-by-the-caller",
        ),
    ],
)
def test_other_readers(body: str, outputs: str, reason: str) -> None:
    assert find(body, outputs) == Refusal(reason)


def test_a_tied_consumer() -> None:
    found = find(
        "h = RMSNormalization <axis = -1> (x, g) t = Transpose <perm = [1, 0]> (e)"
        " y = MatMul (h, t) z = Gather (e, i)",
        "float[B,S,3] y, float[T,4] z",
        ", int64[T] i",
    )
    assert found == Refusal(
        "a consumer's weight is tied and cannot absorb the scale", insertable=False
    )


def test_a_producer_that_shares_its_weight_with_another_linear() -> None:
    """Each of the two gets constants of its own."""
    found = find(
        f"m = MatMul (x, w) h = Relu (m) {Y} z = MatMul (x, w)", "float[B,S,4] y, float[B,S,4] z"
    )
    assert_producer(found, "linear", "m", FOUR, 4)


def test_a_norm_whose_weight_is_computed() -> None:
    found = find(f"h = RMSNormalization <axis = -1> (x, c) {Y}", inputs=", float[4] c")
    assert found == Refusal("the weight of h is not a constant")


def test_a_product_that_repeats_a_column() -> None:
    """Of a column that is repeated over the channels, no channel has a scale of its own."""
    found = find(f"i = Sigmoid (x) m = MatMul (x, col) h = Mul (m, i) {Y}")
    assert found == Refusal("Sigmoid (i) does not commute with a scale per channel")
