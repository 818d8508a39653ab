"""Samples: what one piece of calibration data is, and how samples become batches."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from qcompile.traced import Batch

_TOKENS_PER_BATCH: Final = 1024
_ROWS_WITHOUT_TOKENS: Final = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A feed that is never divided further.

    Attributes:
        feed: graph input name -> array.
        rows: how many samples, along axis 0, it counts for.
        mergeable: it may be joined along axis 0 with others of the same shape. False where the
            graph fixes the batch, or where axis 0 is not a batch in every input.
    """

    feed: Batch
    rows: int = 1
    mergeable: bool = True


def held_back_size(asked: int) -> int:
    """How many samples verification gets when `asked` calibrate and the source has plenty."""
    return max(1, min(16, asked // 4))


def distinct(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Each sample once: a repeat adds no range, and must not be held back after being seen."""
    seen: set[bytes] = set()
    for sample in samples:
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(sample.feed):
            array = sample.feed[name]
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        if digest.digest() not in seen:
            seen.add(digest.digest())
            yield sample


def grouped(samples: Iterable[Sample], batch: int | None) -> Iterator[Sample]:
    """Join every `batch` samples of equal shape, as a graph with a fixed batch takes them.

    Samples left over are dropped, because filling up would repeat or invent data. Without a fixed
    batch the samples pass through unchanged.
    """
    if batch is None:
        yield from samples
        return
    waiting: dict[object, list[Sample]] = {}
    for sample in samples:
        group = waiting.setdefault(_shapes(sample), [])
        group.append(sample)
        if len(group) == batch:
            yield Sample(_join(group), rows=batch, mergeable=False)
            group.clear()


def take(samples: Iterable[Sample], rows: int) -> list[Sample]:
    """Samples from the front until they count for `rows`; the rest is never produced."""
    taken: list[Sample] = []
    have = 0
    for sample in samples:
        taken.append(sample)
        have += sample.rows
        if have >= rows:
            break
    return taken


def split(samples: Sequence[Sample], asked: int) -> tuple[list[Sample], list[Sample]]:
    """What calibrates, and what is held back for verification.

    The first `asked` calibrate and up to `held_back_size(asked)` of the rest are held back; where
    there is no rest, the last eighth is held back. A single sample serves both.
    """
    if len(samples) == 1:
        return list(samples), list(samples)
    total = count(samples)
    if total > asked:
        # The last sample is never offered to calibration: it may count for many rows.
        calibration = take(samples[:-1], asked)
        return calibration, take(samples[len(calibration) :], held_back_size(asked))
    held_back = take(reversed(samples[1:]), max(1, total // 8))[::-1]
    return list(samples[: len(samples) - len(held_back)]), held_back


def count(samples: Iterable[Sample]) -> int:
    return sum(sample.rows for sample in samples)


def batches(samples: Iterable[Sample]) -> tuple[Batch, ...]:
    """Samples of equal shape joined, about 1024 tokens a batch, in order of first appearance."""
    groups: dict[object, list[Sample]] = {}
    for at, sample in enumerate(samples):
        key: object = _shapes(sample) if sample.mergeable else at
        groups.setdefault(key, []).append(sample)
    made: list[Batch] = []
    for group in groups.values():
        size = max(1, _TOKENS_PER_BATCH // _tokens(group[0].feed))
        made += [_join(group[at : at + size]) for at in range(0, len(group), size)]
    return tuple(made)


def _join(samples: Sequence[Sample]) -> Batch:
    if len(samples) == 1:
        return samples[0].feed
    names = samples[0].feed
    return {name: np.concatenate([sample.feed[name] for sample in samples]) for name in names}


def _shapes(sample: Sample) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, array.shape) for name, array in sorted(sample.feed.items()))


def _tokens(feed: Batch) -> int:
    """Tokens, or frames, of one row; where there are none, a share that makes a modest batch."""
    lengths = [
        array.shape[1]
        for array in feed.values()
        if (array.ndim == 2 and array.dtype.kind in "iu") or array.ndim == 3
    ]
    return max(1, *lengths) if lengths else _TOKENS_PER_BATCH // _ROWS_WITHOUT_TOKENS
