"""Outlier channels on several INT8 channels each, so that the others get a finer scale.

LLM.int8() (arXiv 2208.07339) keeps outlier channels in float beside the INT8 product. Here they
stay in it, as in outlier channel splitting (arXiv 1901.09504): with c copies, x_j w_j = Σ (x_j / c)
w_j, and x_j / c fits the range of the other channels. Copy k is shifted by (k − (c − 1) / 2) / c of
a step before it is rounded, so that the codes of all copies add up to x_j rounded by the step of
the other channels (Hermite's identity, Σ ⌊y + k / c⌋ = ⌊c y⌋). Calibration finds the channels: they
are a Gather of constant indices, the product has a few more channels, and nothing is added to its
output, which costs less than a float product beside it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.calibration.stats import GRAM_BLOCK, Stats

Array = npt.NDArray[Any]

COUNTS: Final = (1, 2, 4, 8, 16)
MOST_COPIES: Final = 16
LARGEST_SHARE: Final = 1 / 8
"""Copies are at most this part of the channels: each costs as much as a channel."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Which channels are spread, and over how many copies.

    Attributes:
        channels: int64 [n], ascending. Where they were they count as zero.
        copies: appended behind the others, all channels once, then all again.
    """

    channels: npt.NDArray[np.int64]
    copies: int

    @property
    def appended(self) -> npt.NDArray[np.int64]:
        """The channel that each appended one is a copy of, int64 [n · copies]."""
        return np.tile(self.channels, self.copies)

    @property
    def offsets(self) -> npt.NDArray[np.float64]:
        """What is added to each appended channel before rounding, in steps of the others; zero in
        the mean."""
        shifts = np.arange(self.copies) - (self.copies - 1) / 2.0
        return np.repeat(shifts, len(self.channels))

    def extend(self, values: Array, divisor: float = 1.0) -> Array:
        """Values per channel [K, ...] with the copies appended, [K + n · copies, ...]."""
        rest = values.copy()
        rest[self.channels] = 0
        copies = values[self.appended]
        if divisor != 1.0:
            copies = (copies / divisor).astype(values.dtype)
        return np.concatenate([rest, copies])

    def extended_gram(self, gram: Array, channels: int) -> Array:
        """A Gram matrix in blocks, as `Stats` holds it, of the extended activation.

        Products of copies with other channels, which no block holds, count as zero.
        """
        size = channels + len(self.appended)
        result = np.zeros((-(-size // GRAM_BLOCK), GRAM_BLOCK, GRAM_BLOCK))
        result[: len(gram)] = gram
        diagonal = np.einsum("bkk->bk", gram).reshape(-1)
        for at, channel in enumerate(self.appended):
            block, row = divmod(channels + at, GRAM_BLOCK)
            result[block, row, row] = diagonal[channel] / self.copies**2
        for channel in self.channels:
            block, row = divmod(int(channel), GRAM_BLOCK)
            result[block, row, :] = result[block, :, row] = 0.0
        return result


def can_split(channels: int) -> bool:
    """Whether copies of even one channel are a small part of so many."""
    return channels * LARGEST_SHARE >= 2 * COUNTS[0]


def find_split(stats: Stats) -> Split:
    """The split of least predicted error, for a static scale over all channels.

    Every channel is rounded by the step of those that are not copied, so the noise is step² · K,
    and it is weighed with the channels that the product has more.
    """
    width = len(stats.minimum)
    low, high = np.minimum(stats.minimum, 0.0), np.maximum(stats.maximum, 0.0)
    order = np.argsort(-(high - low), kind="stable")
    best, least = Split(order[:1].astype(np.int64), 1), np.inf
    for count in COUNTS:
        chosen, others = order[:count], order[count:]
        if count >= width:
            break
        floor, top = float(low[others].min()), float(high[others].max())
        span = max(top - floor, 1e-30)
        # The copies share the others' zero point, so each side has to fit by itself.
        sides = [high[chosen].max() / max(top, 1e-30), low[chosen].min() / min(floor, -1e-30)]
        reach = max(
            (s for s, whole in zip(sides, (high, low), strict=True) if whole[chosen].any()),
            default=1.0,
        )
        copies = int(np.ceil(min(reach, 2.0 * MOST_COPIES) - 1e-6))
        if copies > MOST_COPIES or count * copies > width * LARGEST_SHARE:
            continue
        noise = span**2 * (width + count * copies)
        if noise < least:
            best, least = Split(np.sort(chosen).astype(np.int64), max(copies, 1)), noise
    return best
