"""Small models of many kinds of ops, as ONNX files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.support import Feed, from_text


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Normal float32 constants, scaled by their fan-in; the same for the same names."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }


def convolutional() -> ir.Model:
    """Convolutions (one depthwise), pools, Concat, a residual Add, and a classifier."""
    constants: dict[str, Any] = weights(
        w=(8, 3, 3, 3), b=(8,), d=(8, 1, 3, 3), e=(8,), g=(16, 5), h=(5,)
    )
    return from_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (float[N,3,8,8] x, float[8,3,3,3] w, float[8] b, float[8,1,3,3] d, float[8] e,
           float[16,5] g, float[5] h, int64[2] s) => (float[N,5] y) {
          c = Conv <pads=[1,1,1,1]> (x, w, b)
          r = Relu (c)
          k = Conv <pads=[1,1,1,1], group=8> (r, d, e)
          a = Add (r, k)
          t = Concat <axis=1> (a, r)
          p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (t)
          q = GlobalAveragePool (p)
          f = Reshape (q, s)
          y = Gemm (f, g, h)
        }""",
        **constants,
        s=np.array([0, -1]),
    )


def transformer() -> ir.Model:
    """An embedding, a norm, attention of two heads under a causal mask, and a gated MLP."""
    constants: dict[str, Any] = weights(
        t=(32, 16), n=(16,), o=(16,), q=(16, 16), k=(16, 16), v=(16, 16), u=(16, 32), b=(32,),
        z=(32, 16),
    )  # fmt: skip
    return from_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (int64[B,S] ids, float[32,16] t, float[16] n, float[16] o, float[16,16] q,
           float[16,16] k, float[16,16] v, float[16,32] u, float[32] b, float[32,16] z)
          => (float[B,S,16] y) {
          e = Gather (t, ids)
          l = LayerNormalization (e, n, o)
          qx = MatMul (l, q)
          kx = MatMul (l, k)
          vx = MatMul (l, v)
          a = Attention <q_num_heads=2, kv_num_heads=2, is_causal=1> (qx, kx, vx)
          r = Add (e, a)
          m = RMSNormalization (r, n)
          h = MatMul (m, u)
          i = Add (h, b)
          j = Gelu (i)
          w = MatMul (j, z)
          y = Add (r, w)
        }""",
        **constants,
    )


def saved(model: ir.Model, path: Path) -> Path:
    """`model` as a file."""
    ir.save(model, path)
    return path


def images(count: int = 24) -> list[Feed]:
    """Feeds of `convolutional`."""
    shape, rng = (1, 3, 8, 8), np.random.default_rng(1)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def sentences(count: int = 24, length: int = 8) -> list[Feed]:
    """Feeds of `transformer`."""
    rng = np.random.default_rng(2)
    return [{"ids": rng.integers(0, 32, (1, length))} for _ in range(count)]
