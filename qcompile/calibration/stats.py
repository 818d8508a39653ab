"""Calibration statistics: values that merge, so that data can be split in any way.

Channels are the last axis of an activation. Extremes, power sums and histograms on a fixed grid all
merge by maximum or sum, so the order of batches, processes or machines does not matter (power sums:
up to float64 rounding).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

# The histogram's grid: per sign, STEPS bins an octave over magnitudes 2**LOW to 2**HIGH, and one
# bin for everything nearer to zero. Logarithmic, so that no first pass has to find the range, and
# so that dividing a channel by a smoothing scale only shifts its bins.
STEPS: Final = 8
LOW: Final = -16
HIGH: Final = 16
BINS_PER_SIGN: Final = STEPS * (HIGH - LOW)
BINS: Final = 2 * BINS_PER_SIGN + 1


GRAM_BLOCK: Final = 128
"""Channels per block of the Gram matrix: its cost is linear in the width, and most of what
error-compensated rounding gains comes from near neighbours."""


def bin_centers() -> Array:
    """The value each histogram bin stands for, ascending, shape [BINS]."""
    magnitude = 2.0 ** (LOW + (np.arange(BINS_PER_SIGN) + 0.5) / STEPS)
    return np.concatenate([-magnitude[::-1], [0.0], magnitude])


@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of one activation, per channel.

    Attributes:
        count: rows (tokens) seen.
        minimum, maximum: float64 [channels].
        power_sums: float64 [4, channels], the sums of x, x², x³ and x⁴.
        histogram: int32 [channels, BINS] counts over `bin_centers`, of some or all rows.
        gram: float64 [blocks, GRAM_BLOCK, GRAM_BLOCK], the sum of xᵀx within blocks of channels, of
            some or all rows; the last block is padded with zeros.
    """

    count: int
    minimum: Array
    maximum: Array
    power_sums: Array
    histogram: Array
    gram: Array

    def merge(self, other: Stats) -> Stats:
        """Statistics of both data sets together. Both must have observed the same things."""
        return Stats(
            count=self.count + other.count,
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
            power_sums=self.power_sums + other.power_sums,
            histogram=self.histogram + other.histogram,
            gram=self.gram + other.gram,
        )

    def scaled(self, scale: Array) -> Stats:
        """Statistics of x / scale, for a positive `scale` of shape [channels].

        Exact for all but the histogram, whose counts move by whole bins (9 % of a value each).
        """
        powers = scale[None, :] ** np.arange(1, 5)[:, None]
        blocked = np.pad(scale, (0, -len(scale) % GRAM_BLOCK), constant_values=1.0)
        blocked = blocked.reshape(-1, GRAM_BLOCK)
        return dataclasses.replace(
            self,
            minimum=self.minimum / scale,
            maximum=self.maximum / scale,
            power_sums=self.power_sums / powers,
            histogram=_shifted(self.histogram, np.rint(-STEPS * np.log2(scale)).astype(int)),
            gram=self.gram / (blocked[:, :, None] * blocked[:, None, :]),
        )

    def permuted(self, order: Array) -> Stats:
        """Statistics of x[..., order].

        Exact for all but the Gram matrix, which loses what a channel that changed places had in
        common with others.
        """
        width = len(order)
        moved = np.flatnonzero(order != np.arange(width))
        gram = self.gram.copy()
        block, at = np.divmod(moved, GRAM_BLOCK)
        old = np.divmod(order[moved], GRAM_BLOCK)
        diagonal = self.gram[old[0], old[1], old[1]]
        gram[block, at, :] = gram[block, :, at] = 0.0
        gram[block, at, at] = diagonal
        return dataclasses.replace(
            self,
            minimum=self.minimum[order],
            maximum=self.maximum[order],
            power_sums=self.power_sums[:, order],
            histogram=self.histogram[order],
            gram=gram,
        )

    def weighted_values(self, scale: Array | None = None) -> tuple[Array, Array]:
        """The histogram as (values, counts), both [channels, BINS], of x / scale."""
        values = np.broadcast_to(bin_centers(), self.histogram.shape)
        return (values if scale is None else values / scale[:, None]), self.histogram

    @property
    def absmax(self) -> Array:
        """Largest magnitude per channel."""
        result: Array = np.maximum(np.abs(self.minimum), np.abs(self.maximum))
        return result

    @property
    def second_moment(self) -> Array:
        """E[x²] per channel."""
        result: Array = self.power_sums[1] / self.count
        return result

    def summary(self) -> Summary:
        """AbsMax, standard deviation and kurtosis of the whole tensor."""
        m1, m2, m3, m4 = self.power_sums.mean(axis=1) / self.count
        variance = max(m2 - m1**2, 0.0)
        central4 = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return Summary(
            absmax=float(self.absmax.max()),
            std=float(np.sqrt(variance)),
            kurtosis=float(central4 / variance**2) if variance > 0 else 0.0,
        )


@dataclasses.dataclass(frozen=True)
class Summary:
    """Three numbers that tell how hard a tensor is to quantise (a Gaussian's kurtosis is 3)."""

    absmax: float
    std: float
    kurtosis: float


def _shifted(histogram: Array, shifts: Array) -> Array:
    """Counts moved `shifts` [channels] bins away from zero, none beyond the grid's ends."""
    result = np.zeros_like(histogram)
    first, size = BINS_PER_SIGN + 1, BINS_PER_SIGN
    shifts = np.clip(shifts, -size, size - 1)
    for shift in np.unique(shifts):
        rows = shifts == shift
        counts = histogram[rows]
        moved = np.zeros_like(counts)
        moved[:, first - 1] = counts[:, first - 1]
        # Magnitudes ascend to the right of zero, and on its left in the second view.
        for old, new in ((counts, moved), (counts[:, ::-1], moved[:, ::-1])):
            if shift >= 0:
                new[:, first + shift :] = old[:, first : first + size - shift]
                new[:, -1] += old[:, first + size - shift :].sum(axis=1)
            else:
                new[:, first:shift] = old[:, first - shift :]
                new[:, first - 1] += old[:, first : first - shift].sum(axis=1)
        result[rows] = moved
    return result
