"""Codes in e4m3 (float8e4m3fn): four bits of precision, from 2⁻⁹ to 448 (arXiv 2209.05433).

Rounding makes an error that grows with the value: 1/16 of it at most, where it is no subnormal. So
there is little to be had from a finer scale, and outliers do not cost the others their precision.
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]

LARGEST: Final = 448.0
E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
SUBNORMAL: Final = 2.0**-9
"""Step of the codes below 2⁻⁶."""
RELATIVE: Final = 3.0 / (64 * 12 * 8 * np.log(2))
"""Mean squared relative error of rounding, over values whose logarithms are spread evenly: the
step is 1/8 of the power of two below a value."""

_SMALLEST_NORMAL: Final = -6
_MANTISSA: Final = 3


def quantize_e4m3(weight: Array) -> QuantizedWeight:
    """Round ``W [K, N]`` to nearest, the largest magnitude of each output channel to 448.

    Returns:
        codes float8e4m3fn [K, N], float32 scale [N].
    """
    scale = e4m3_scale(np.abs(weight).max(axis=0))
    codes = np.clip(weight / scale, -LARGEST, LARGEST).astype(np.float32).astype(E4M3)
    return QuantizedWeight(codes=codes, scale=scale)


def e4m3_scale(largest: Array | float) -> Array:
    """The scale, float32, that codes `largest` as 448; 1 where there is nothing to code."""
    scale = np.asarray(np.float32(largest) / np.float32(LARGEST))
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1.0), scale)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """`x` as e4m3 holds it, saturating."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype)


def squared_error(values: Array, scale: float) -> Array:
    """Expected squared error of `values` coded under `scale`, as if rounding were noise."""
    magnitudes = np.abs(values) / max(scale, 1e-30)
    exponents = np.frexp(np.maximum(magnitudes, 2.0**_SMALLEST_NORMAL))[1] - 1
    steps = np.exp2(exponents - float(_MANTISSA)) * scale
    # What is nearest to zero is lost.
    noise = np.square(steps) / 12.0
    result: Array = np.where(np.abs(values) < steps / 2.0, np.square(values), noise)
    return result
