"""Outlier channels in float beside an INT8 product: LLM.int8() (arXiv 2208.07339).

With the outlier channels O, xW = x_O W_O + x_R W_R: the first product is narrow and in float, the
second one of int8 codes, a scale per token and one per output channel. The paper looks for outliers
at run time; here calibration finds them, so that they are a Gather of constant indices or a Slice.

The scale of a token must not see x_O. Masking it would be one more pass over the activation, so it
is divided out where the activation is made, as smoothing is: by powers of two, which change no
digit of it, until it lies far below what the other channels usually hold. Its rows of the codes are
zeros, and those of W_O are multiplied by the same powers.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompile.calibration.stats import GRAM_BLOCK, Stats
from qcompile.config import CompileConfig

Array = npt.NDArray[Any]

THRESHOLD: Final = 6.0
"""A channel that reaches it is an outlier, as in the paper."""

SHARE: Final = 0.01
"""Of the channels that a method keeps in float where no threshold says which."""

MOST: Final = 1 / 8
"""Of the channels that stay in float: more are no outliers, and no gain."""

BELOW: Final = 1 / 16
"""The largest value of an outlier, once divided, is at most this part of the others' root mean
square: a token whose scale it sets holds next to nothing else."""

LARGEST: Final = float(np.finfo(np.float16).max)


def kept_count(channels: int, share: float | None) -> int:
    """How many of `channels` a share of them is: at least one, at most `MOST` of them."""
    wanted = round(channels * (SHARE if share is None else share))
    return max(1, min(wanted, int(channels * MOST)))


def find_outliers(stats: Stats, groups: npt.NDArray[np.int64], config: CompileConfig) -> Array:
    """The channels of an activation that stay in float, int64, ascending; there may be none.

    Args:
        stats: of the activation.
        groups: [channels]; channels of one number are divided alike (grouped-query attention), so
            they are kept together.
        config: `outlier_threshold` or `outlier_share`.
    """
    absmax = np.zeros(int(groups.max()) + 1)
    np.maximum.at(absmax, groups, stats.absmax)
    sizes = np.bincount(groups, minlength=len(absmax))
    if config.outlier_share is not None:
        room, least = kept_count(len(groups), config.outlier_share), 0.0
    else:
        room, least = int(len(groups) * MOST), config.outlier_threshold or THRESHOLD
    order = np.argsort(-absmax, kind="stable")
    order = order[(absmax[order] >= least) & (sizes[order] > 0)]
    taken = order[np.cumsum(sizes[order]) <= room]
    found: Array = np.flatnonzero(np.isin(groups, taken)).astype(np.int64)
    return found


def why_these(stats: Stats, found: Array, config: CompileConfig) -> str:
    """In words, which channels were found."""
    width = len(stats.absmax)
    if config.outlier_share is not None:
        return f"the {len(found)} largest of {width} channels stay in float"
    threshold = config.outlier_threshold or THRESHOLD
    reaching = int((stats.absmax >= threshold).sum())
    if not len(found):
        return f"none of {width} channels reaches {threshold:g}"
    if reaching > len(found):
        return f"the {len(found)} largest of {reaching} that reach {threshold:g} stay in float"
    return f"{len(found)} of {width} channels reach {threshold:g} and stay in float"


def scale_away(
    stats: Stats, outliers: Array, groups: npt.NDArray[np.int64], rows: Array | None = None
) -> Array:
    """s, float64 [channels], that outliers are divided by: powers of two; ones for the others.

    Args:
        stats: of the activation.
        outliers: from `find_outliers`.
        groups: as for it.
        rows: [channels], the largest magnitude in each row of the weights, where s times it has to
            be a float16; None: it is a float32.
    """
    others = np.setdiff1d(np.arange(len(groups)), outliers)
    usual = float(np.sqrt(stats.second_moment[others].mean())) if len(others) else 0.0
    top = np.zeros(int(groups.max()) + 1)
    np.maximum.at(top, groups, stats.absmax)
    ratio = top[groups[outliers]] / max(BELOW * usual, 1e-6)
    scale = np.ones(len(groups))
    most = np.full(len(groups), 2.0**24)
    if rows is not None:
        largest = np.zeros(int(groups.max()) + 1)
        np.maximum.at(largest, groups, rows)
        most = np.minimum(most, LARGEST / np.maximum(largest, 1e-6)[groups])
    exponent = np.ceil(np.log2(np.maximum(ratio, 1.0)))
    scale[outliers] = 2.0 ** np.clip(exponent, 0, np.floor(np.log2(most[outliers])))
    return scale


def without(gram: Array, channels: Array) -> Array:
    """A Gram matrix in blocks, as `Stats` holds it, in which `channels` are alone and zero."""
    result = gram.copy()
    block, at = np.divmod(channels, GRAM_BLOCK)
    result[block, at, :] = 0.0
    result[block, :, at] = 0.0
    return result
