"""Small networks whose ops differ in what rounding them does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

IN, HIDDEN, OUT = 48, 64, 12
CLASSIFIER = """g (float[B,48] x, float[48,64] w, float[64] b, float[64,12] u, float[12] c)
  => (float[B,12] logits) {
  m = MatMul (x, w) a = Add (m, b) h = Tanh (a) n = MatMul (h, u) logits = Add (n, c) }"""
# Tokens before logits: the first two Linears share an input.
TOKENS = """g (float[B,S,48] x, float[48,64] w, float[48,64] v, float[64,12] u)
  => (float[B,S,12] {output}) {{
  m = MatMul (x, w) g = MatMul (x, v) s = Sigmoid (g) h = Mul (m, s)
  {output} = MatMul (h, u) }}"""


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Of unit gain, but for an input channel that is loud: int8 of a whole tensor suffers."""
    rng = np.random.default_rng(seed)
    found = {
        "w": rng.standard_normal((IN, HIDDEN)) / IN**0.5,
        "v": rng.standard_normal((IN, HIDDEN)) / IN**0.5,
        "b": rng.standard_normal(HIDDEN) / 10,
        "u": rng.standard_normal((HIDDEN, OUT)) / HIDDEN**0.5,
        "c": rng.standard_normal(OUT) / 10,
    }
    return {name: array.astype(np.float32) for name, array in found.items()}


def network(text: str, folder: Path, *, external: bool = False, **changed: np.ndarray) -> Path:
    """The file of a float graph, every MatMul named after the value it computes."""
    known = weights() | changed
    declared = text.partition("=>")[0]
    model = typed(
        from_text(HEADER + text, **{k: v for k, v in known.items() if f"] {k}" in declared})
    )
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    path = folder / "float.onnx"
    ir.save(model, path, external_data="float.onnx.data" if external else None)
    return path


def loaded(path: Path) -> ir.Model:
    """With its weights in memory."""
    return ir.external_data.load_to_model(ir.load(path))


def inputs(*shape: int, seed: int = 1) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((*shape, IN)).astype(np.float32)
    x[..., 7] *= 6.0
    return x
