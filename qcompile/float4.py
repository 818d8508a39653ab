"""NF4 and FP4 (QLoRA, arXiv 2305.14314): four bits that index a table of values, in blocks.

NF4's values are quantiles of the normal distribution, zero among them, scaled to [−1, 1]; FP4's
are floats of one sign, two exponent bits and one of mantissa. A block of input channels has one
float32 scale, its largest magnitude. QLoRA quantises these scales again; ONNX Runtime's kernel
takes them as floats, so that here they are.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]

Float4: TypeAlias = Literal["nf4", "fp4"]

BLOCK_SIZE: Final = 64

# As published with the format: float32, to the last bit.
_NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# By sign, exponent and mantissa, over the largest of them.
_FP4_MAGNITUDES: Final = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

TABLES: Final[dict[Float4, Array]] = {
    "nf4": np.array(_NF4, np.float32),
    "fp4": np.array([s * m / 12.0 for s in (1.0, -1.0) for m in _FP4_MAGNITUDES], np.float32),
}


def as_float4(label: str) -> Float4 | None:
    """`label` where it is one of the formats, else None."""
    if label == "nf4":
        return "nf4"
    return "fp4" if label == "fp4" else None


def quantize_float4(
    weight: Array, kind: Float4, *, block_size: int = BLOCK_SIZE
) -> QuantizedWeight:
    """Round ``W [K, N]`` to the nearest value of the table in blocks of input channels.

    Args:
        weight: float32 [K, N], K a multiple of `block_size`.
        kind: the table.
        block_size: input channels that share a scale.
    """
    depth, width = weight.shape
    blocks = weight.astype(np.float32).reshape(-1, block_size, width)
    scale = np.abs(blocks).max(axis=1)
    inverse = np.float32(1.0) / np.where(scale == 0.0, np.float32(1.0), scale)
    table = TABLES[kind]
    order = np.argsort(table, kind="stable")
    middles = (table[order][1:] + table[order][:-1]) / 2
    codes = order[np.searchsorted(middles, blocks * inverse[:, None])]
    return QuantizedWeight(
        codes=codes.reshape(depth, width).astype(np.int8),
        scale=scale,
        block_size=block_size,
        bits=4,
        table=table,
    )
