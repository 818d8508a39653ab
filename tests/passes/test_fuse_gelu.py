"""FuseGelu: both definitions, in every arrangement, and ONNX Runtime's ops."""

from __future__ import annotations

import numpy as np
import pytest
from qcompile.passes.fuse_gelu import FuseGelu

from tests.passes.rewriting import assert_leaves, assert_rewrites

X = np.linspace(-6, 6, 48, dtype=np.float32).reshape(2, 3, 8)
B = np.random.default_rng(0).standard_normal(8).astype(np.float32)
CONSTANTS = """<float root2 = {1.4142135}, float inverse = {0.70710677}, float half = {0.5},
  float one = {1.0}, float two = {2.0}, float three = {3.0}, float cubic = {0.044715},
  float outer = {0.7978846}>"""
SIGNATURE = f"g (float[N,S,8] x) => (float[N,S,8] y) {CONSTANTS}"
GATE = "u = Div (x, root2) e = Erf (u) f = Add (e, one)"
INNER = "p = Pow (x, three) q = Mul (p, cubic) i = Add (x, q) t = Mul (i, outer)"
TANH = "h = Tanh (t) f = Add (one, h)"


def _after(approximate: str) -> str:
    return (
        'g (float[N,S,8] x) => (float[N,S,8] y) { y = Gelu <approximate = "'
        + approximate
        + '"> (x) }'
    )


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(f"{GATE} m = Mul (x, f) y = Mul (m, half)", id="torch"),
        pytest.param(f"{GATE} m = Mul (x, half) y = Mul (m, f)", id="half-first"),
        pytest.param(f"{GATE} m = Mul (f, half) y = Mul (x, m)", id="half-on-the-gate"),
        pytest.param(f"{GATE} m = Mul (x, f) y = Div (m, two)", id="divided"),
        pytest.param(
            "u = Mul (inverse, x) e = Erf (u) f = Add (one, e) m = Mul (f, x) y = Mul (half, m)",
            id="multiplied-by-the-inverse",
        ),
    ],
)
def test_fuses_erf(body: str) -> None:
    before = f"{SIGNATURE} {{ {body} }}"
    assert_rewrites(FuseGelu(), before, _after("none"), {"x": X}, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(f"{INNER} {TANH} m = Mul (x, half) y = Mul (m, f)", id="torch"),
        pytest.param(
            "s = Mul (x, x) c = Mul (s, x) q = Mul (cubic, c) i = Add (q, x) t = Mul (outer, i)"
            f" {TANH} m = Mul (f, half) y = Mul (m, x)",
            id="cube-by-products",
        ),
        pytest.param(
            "s = Mul (x, x) q = Mul (s, cubic) i = Add (one, q) o = Mul (x, outer) t = Mul (o, i)"
            f" {TANH} m = Mul (x, f) y = Mul (m, half)",
            id="factored",
        ),
    ],
)
def test_fuses_tanh(body: str) -> None:
    before = f"{SIGNATURE} {{ {body} }}"
    assert_rewrites(FuseGelu(), before, _after("tanh"), {"x": X}, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "approximate"),
    [
        ("Gelu (x)", "none"),
        ("FastGelu (x)", "tanh"),
    ],
)
def test_replaces_runtime_ops(op: str, approximate: str) -> None:
    before = f"g (float[N,S,8] x) => (float[N,S,8] y) {{ y = com.microsoft.{op} }}"
    assert_rewrites(FuseGelu(), before, _after(approximate), {"x": X}, atol=1e-6)


@pytest.mark.parametrize(("op", "approximate"), [("BiasGelu", "none"), ("FastGelu", "tanh")])
def test_replaces_runtime_ops_with_bias(op: str, approximate: str) -> None:
    signature = "g (float[N,S,8] x, float[8] b) => (float[N,S,8] y)"
    before = f"{signature} {{ y = com.microsoft.{op} (x, b) }}"
    after = f'{signature} {{ s = Add (x, b) y = Gelu <approximate = "{approximate}"> (s) }}'
    assert_rewrites(FuseGelu(), before, after, {"x": X}, atol=1e-6, b=B)


@pytest.mark.parametrize(
    ("change", "to"),
    [
        pytest.param("Add (e, one)", "Add (e, half)", id="gate-not-one-plus"),
        pytest.param("Mul (m, half)", "Mul (m, cubic)", id="not-halved"),
        pytest.param("Div (x, root2)", "Div (x, two)", id="another-width"),
        pytest.param("Mul (x, f)", "Mul (e, f)", id="gates-itself"),
    ],
)
def test_leaves_what_is_no_gelu(change: str, to: str) -> None:
    text = f"{SIGNATURE} {{ {GATE} m = Mul (x, f) y = Mul (m, half) }}"
    assert change in text
    assert_leaves(FuseGelu(), text.replace(change, to))
