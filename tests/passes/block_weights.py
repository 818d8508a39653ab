"""What the tests of weights in blocks share: a weight, and what the kernel makes of activations."""

from __future__ import annotations

import dataclasses
from typing import Literal

import ml_dtypes
import numpy as np

from qcompile.precision import QuantizedWeight
from qcompile.weight_blocks import BLOCK_SIZE

RNG = np.random.default_rng(0)
Bits = Literal[8, 4]
BOTH: tuple[Bits, ...] = (8, 4)
K, N = 80, 20  # the last block is half empty
WEIGHT = RNG.standard_normal((K, N)).astype(np.float32)
BIAS = RNG.standard_normal(N).astype(np.float32)
DEQUANTIZE = "v = DequantizeLinear <axis = 0, block_size = 32> (wq, ws)"


def activation(*shape: int, block_size: int = BLOCK_SIZE) -> np.ndarray:
    """Values whose codes in int8 leave no doubt: no fraction near a half.

    In every block one is 127 steps from zero, and the step is a power of two.
    """
    codes = RNG.integers(-126, 127, shape) + RNG.uniform(-0.45, 0.45, shape)
    codes[..., ::block_size] = RNG.choice([-127.0, 127.0], codes[..., ::block_size].shape)
    steps = 2.0 ** RNG.integers(-8, -3, codes[..., ::block_size].shape)
    result: np.ndarray = codes * np.repeat(steps, block_size, axis=-1)[..., : shape[-1]]
    return result.astype(np.float32)


def rounded(x: np.ndarray, block_size: int = BLOCK_SIZE) -> np.ndarray:
    """What the kernel makes of its input at level 4: symmetric int8 per row and block."""
    depth = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -depth % block_size)]).astype(np.float64)
    blocks = padded.reshape(*x.shape[:-1], -1, block_size)
    step = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), 1e-30) / 127
    result: np.ndarray = (np.rint(blocks / step) * step).reshape(padded.shape)[..., :depth]
    return result


def stored(weight: QuantizedWeight) -> np.ndarray:
    """Codes of the type that the graph holds."""
    return weight.codes if weight.bits == 8 else weight.codes.astype(ml_dtypes.int4)


def restored(weight: QuantizedWeight) -> np.ndarray:
    """Ŵ [K, N] in float64."""
    result: np.ndarray = dataclasses.replace(
        weight, scale=weight.scale.astype(np.float64)
    ).dequantized()
    return result


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    size = float(np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * size)
