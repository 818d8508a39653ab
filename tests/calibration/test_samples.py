"""Splitting and batching, over samples of any mix of lengths and rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibration.samples import (
    Sample,
    batches,
    count,
    distinct,
    grouped,
    held_back_size,
    split,
    take,
)


def sample(value: int, *, length: int = 4, rows: int = 1, mergeable: bool = True) -> Sample:
    return Sample({"x": np.full((rows, length), value)}, rows=rows, mergeable=mergeable)


values = st.integers(0, 99)
lengths = st.sampled_from([3, 5, 900, 3000])
samples_lists = st.lists(
    st.builds(sample, values, length=lengths)
    | st.builds(sample, values, length=lengths, rows=st.integers(1, 3), mergeable=st.just(False)),
    min_size=1,
    max_size=30,
)


@settings(deadline=None)
@given(samples_lists, st.integers(1, 40))
def test_split_keeps_order_and_never_shares(samples: list[Sample], asked: int) -> None:
    calibration, held_back = split(samples, asked)
    assert calibration and held_back
    if len(samples) > 1:
        both = calibration + held_back
        assert [id(s) for s in both] == [id(s) for s in samples[: len(both)]]


@pytest.mark.parametrize(
    ("have", "asked", "calibrate", "held"),
    [
        (200, 64, 64, 16),
        (80, 64, 64, 16),
        (70, 64, 64, 6),
        (65, 64, 64, 1),
        (64, 64, 56, 8),
        (10, 64, 9, 1),
        (2, 64, 1, 1),
        (1, 64, 1, 1),
        (50, 8, 8, 2),
        (50, 1, 1, 1),
    ],
)
def test_split_sizes(have: int, asked: int, calibrate: int, held: int) -> None:
    calibration, held_back = split([sample(i) for i in range(have)], asked)
    assert (len(calibration), len(held_back)) == (calibrate, held)


def test_split_never_gives_everything_to_calibration() -> None:
    whole = [sample(i, rows=50, mergeable=False) for i in range(2)]
    assert split(whole, 64) == (whole[:1], whole[1:])


@settings(deadline=None)
@given(samples_lists)
def test_batches_hold_every_row_once(samples: list[Sample]) -> None:
    made = batches(samples)
    before = sorted(tuple(row) for s in samples for row in s.feed["x"].tolist())
    assert sorted(tuple(row) for feed in made for row in feed["x"].tolist()) == before
    for feed in made:
        joined, length = feed["x"].shape
        assert joined * length <= 1024 or joined == 1 or any(s.feed is feed for s in samples)
    assert [f["x"].tobytes() for f in batches(samples)] == [f["x"].tobytes() for f in made]


def test_batches_are_about_1024_tokens() -> None:
    made = batches([sample(i, length=256) for i in range(10)])
    assert [feed["x"].shape for feed in made] == [(4, 256), (4, 256), (2, 256)]
    assert [feed["x"].shape for feed in batches([sample(0, length=5000)] * 2)] == [(1, 5000)] * 2


def test_batches_without_tokens_are_modest() -> None:
    images = [Sample({"x": np.zeros((1, 3, 8, 8), dtype=np.float32)}) for _ in range(40)]
    assert [len(feed["x"]) for feed in batches(images)] == [32, 8]


def test_whole_feeds_stay_whole() -> None:
    made = batches([sample(0, mergeable=False), sample(1), sample(2, mergeable=False), sample(3)])
    assert [feed["x"][:, 0].tolist() for feed in made] == [[0], [1, 3], [2]]


def test_distinct_keeps_the_first() -> None:
    kept = list(distinct([sample(1), sample(2), sample(1), sample(1, length=5)]))
    assert [s.feed["x"].shape[1] for s in kept] == [4, 4, 5]


def test_grouped_joins_equal_shapes_and_drops_the_rest() -> None:
    mixed = [sample(0), sample(1, length=5), sample(2), sample(3, length=5), sample(4)]
    joined = list(grouped(mixed, 2))
    assert [s.feed["x"][:, 0].tolist() for s in joined] == [[0, 2], [1, 3]]
    assert all(s.rows == 2 and not s.mergeable for s in joined)
    assert list(grouped(mixed, None)) == mixed


def test_take_produces_no_more_than_needed() -> None:
    source = iter([sample(i, rows=2) for i in range(5)])
    assert count(take(source, 3)) == 4
    assert len(list(source)) == 3


def test_held_back_size() -> None:
    assert [held_back_size(n) for n in (1, 7, 8, 64, 1000)] == [1, 1, 2, 16, 16]
