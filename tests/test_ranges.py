"""How far channels reach: the numbers that the report's pictures show."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile.calibration.stats import Stats
from qcompile.linears import find_sites
from qcompile.ranges import BUCKETS, RANGES, Ranges, find_ranges
from qcompile.report import read_json
from qcompile.smoothing import Smoothing, SmoothingPlan
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text

ROUNDED = 6e-4
"""Four digits are kept: no more than this part of a number is lost."""


def linear(weight: np.ndarray, *, transposed: bool = False) -> ir.Model:
    """One Linear, its weight as it is or behind a Transpose."""
    k, n = weight.shape
    if transposed:
        graph = f"""g (float[B,{k}] x, float[{n},{k}] w) => (float[B,{n}] y) {{
          t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }}"""
        return typed(from_text(HEADER + graph, w=weight.T.copy()))
    graph = f"g (float[B,{k}] x, float[{k},{n}] w) => (float[B,{n}] y) {{ y = MatMul (x, w) }}"
    return typed(from_text(HEADER + graph, w=weight))


def ranges_of(
    weight: np.ndarray, x: np.ndarray, scale: np.ndarray, *, transposed: bool = False
) -> Ranges:
    """Of x @ weight, x [rows, K] being all that calibration saw, smoothed by `scale` [K]."""
    before = linear(weight, transposed=transposed)
    after = linear(weight * scale[:, None].astype(np.float32), transposed=transposed)
    (site,) = find_sites(before.graph)
    none = np.zeros(0)
    stats = Stats(len(x), x.min(axis=0), x.max(axis=0), none, none, none)
    plan = SmoothingPlan((Smoothing(site.name, 0.5, "", scale),))
    return find_ranges(before, after, {site.name: stats}, plan)


@pytest.mark.parametrize("transposed", [False, True])
def test_before_and_after_smoothing(transposed: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((64, 8)), rng.standard_normal((8, 5)).astype(np.float32)
    x[:, 3] *= 40.0
    scale = np.linspace(0.5, 20.0, 8)
    found = ranges_of(weight, x, scale, transposed=transposed)
    (site,), (row,) = found.sites, found.weights
    assert (site.channels, site.outlier, site.ops) == (8, 3, [row.name])
    assert site.after is not None and row.smoothed is not None
    for band, values in ((site.before, x), (site.after, x / scale)):
        np.testing.assert_allclose(band.low, values.min(axis=0), rtol=ROUNDED)
        np.testing.assert_allclose(band.high, values.max(axis=0), rtol=ROUNDED)
        reach = np.abs(values).max(axis=0)
        np.testing.assert_allclose([band.peak, band.median], [reach[3], np.median(reach)], ROUNDED)
    smoothed = np.abs(weight * scale[:, None])
    np.testing.assert_allclose(row.inputs, np.abs(weight).max(axis=1), rtol=ROUNDED)
    np.testing.assert_allclose(row.smoothed, smoothed.max(axis=1), rtol=ROUNDED)
    outputs = np.sort(smoothed.max(axis=0))
    np.testing.assert_allclose(row.outputs, outputs[[0, 2, 4]], rtol=ROUNDED)


def test_nothing_is_said_of_an_after_where_nothing_was_smoothed() -> None:
    found = ranges_of(np.ones((4, 2), np.float32), np.ones((3, 4)), np.ones(4))
    assert found.sites[0].after is None
    assert found.weights[0].smoothed is None


@given(st.integers(1, 3 * BUCKETS), st.integers(0, 2**32 - 1))
def test_no_outlier_is_lost_in_wide_layers(width: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((2, width))
    found = ranges_of(np.ones((width, 1), np.float32), x, np.ones(width))
    band = found.sites[0].before
    assert len(band.low) == len(band.high) == min(width, BUCKETS)
    size = len(band.low)
    for at in range(size):
        part = x[:, at * width // size : (at + 1) * width // size]
        np.testing.assert_allclose(
            [band.low[at], band.high[at]], [part.min(), part.max()], rtol=ROUNDED
        )


def test_they_are_kept_in_the_artifact(
    compiled_tiny: qcompile.Artifact, float_tiny: qcompile.Artifact
) -> None:
    found = read_json(Ranges, compiled_tiny.path / RANGES)
    report = compiled_tiny.report
    assert [site.name for site in found.sites] == [row.name for row in report.sites]
    for site, row in zip(found.sites, report.sites, strict=True):
        after = site.after or site.before
        for band, summary in ((site.before, row.before), (after, row.after)):
            assert max(*band.high, -min(band.low)) == pytest.approx(summary.absmax, rel=ROUNDED)
        assert (site.after is None) == (row.alpha is None)
    assert [weight.name for weight in found.weights] == [op.name for op in report.ops]
    assert not (float_tiny.path / RANGES).exists()
