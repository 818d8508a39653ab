"""What makes an activation, where its quantisation can be a part of that."""

from __future__ import annotations

import re

import numpy as np
import pytest

from qcompile.linears import find_sites
from qcompile.makers import Maker, maker_of
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

CONSTANTS = {
    "w": np.eye(4, dtype=np.float32),
    "v": np.eye(4, dtype=np.float32),
    "g": np.ones(4, np.float32),
    "b": np.ones(4, np.float32),
    "rows": np.array([-1, 4]),
}


def find(body: str, outputs: str = "float[B,S,4] y") -> Maker | None:
    """What makes the activation that `y` reads."""
    used = {n: array for n, array in CONSTANTS.items() if re.search(rf"[(,] ?{n}[,)]", body)}
    declared = "".join(
        f", {'int64' if name == 'rows' else 'float'}{list(array.shape)} {name}"
        for name, array in used.items()
    )
    text = f"g (float[B,S,4] x, float[B,S,4] u{declared}) => ({outputs}) {{ {body} }}"
    model = typed(from_text(HEADER + text, **used))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    (site,) = [s for s in find_sites(model.graph) if "y" in [li.name for li in s.linears]]
    return maker_of(site)


@pytest.mark.parametrize(
    ("body", "maker"),
    [
        ("h = LayerNormalization<axis=-1>(x, g, b)", "LayerNormalization"),
        ("s = Add(x, u) h = RMSNormalization<axis=-1>(s, g)", "RMSNormalization"),
        ("h = Relu(x)", "Relu"),
        ("h = Gelu(x)", "Gelu"),
        ("t = Sigmoid(x) h = Mul(x, t)", "Silu"),
        ("t = Sigmoid(x) s = Mul(t, x) h = Mul(u, s)", "GatedSilu"),
        ("s = Gelu(x) h = Mul(s, u)", "GatedGelu"),
        ("s = Relu(x) h = Mul(s, u)", "GatedRelu"),
        ("n = Relu(x) h = Reshape(n, rows)", "Relu"),
        ("h = Tanh(x)", None),
        ("t = Sigmoid(u) h = Mul(x, t)", None),
        ("h = Mul(x, u)", None),
        ("h = Identity(x)", None),
    ],
)
def test_makers(body: str, maker: Maker | None) -> None:
    rows = "float[R,4] y" if "Reshape" in body else "float[B,S,4] y"
    assert find(f"{body} y = MatMul (h, w)", rows) == maker


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("h = Relu(x) y = MatMul (h, w) z = Tanh(h)", "float[B,S,4] y, float[B,S,4] z"),
        ("h = Relu(x) y = MatMul (h, w)", "float[B,S,4] y, float[B,S,4] h"),
        (
            "n = Relu(x) h = Reshape(n, rows) y = MatMul (h, w) z = Tanh(n)",
            "float[R,4] y, float[B,S,4] z",
        ),
    ],
)
def test_what_something_else_reads_is_made_as_it_was(body: str, outputs: str) -> None:
    assert find(body, outputs) is None


def test_all_linears_of_a_site_count() -> None:
    body = "h = Relu(x) y = MatMul (h, w) z = MatMul (h, v)"
    assert find(body, "float[B,S,4] y, float[B,S,4] z") == "Relu"
