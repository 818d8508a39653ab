"""Learned rounding, and the descent that mends it: never worse than where they start."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.adaround import learn_rounding, quantize_adaround
from qcompile.descent import damped, descend, fit_scales, output_errors, refine
from qcompile.gptq import quantize_gptq
from qcompile.weight_blocks import Grid, full_range, in_blocks, quantize_blocks
from tests.test_methods import missed, problem

seeds = st.integers(0, 2**32 - 1)


def started(
    seed: int, bits: int, symmetric: bool
) -> tuple[np.ndarray, Grid, np.ndarray, np.ndarray]:
    """A weight of 32 channels rounded to nearest in blocks of 16, and a damped Gram matrix."""
    weight, x = problem(seed, 32)
    blocks = in_blocks(weight, 16)
    grid = full_range(blocks, bits=bits, symmetric=symmetric)
    return weight, grid, grid.nearest(blocks), damped(x.T @ x)


@settings(max_examples=40)
@given(seeds, st.sampled_from([4, 8]), st.booleans())
def test_descent_never_adds_to_the_error(seed: int, bits: int, symmetric: bool) -> None:
    weight, grid, codes, gram = started(seed, bits, symmetric)
    before = output_errors(weight, grid, codes, gram)
    moved = descend(weight, grid, codes, gram, sweeps=3)
    assert (output_errors(weight, grid, moved, gram) <= before * (1 + 1e-4)).all()
    assert moved.min() >= grid.lowest and moved.max() <= grid.highest
    assert (moved == np.rint(moved)).all()
    fitted, moved = refine(weight, grid, codes, gram, rounds=2)
    assert (output_errors(weight, fitted, moved, gram) <= before * (1 + 1e-4)).all()


def test_no_single_code_is_left_to_move() -> None:
    weight, grid, codes, gram = started(1, 4, symmetric=False)
    found = descend(weight, grid, codes, gram, sweeps=50)
    least = output_errors(weight, grid, found, gram)
    for channel in range(32):
        for step in (-1, 1):
            other = found.reshape(32, -1).copy()
            other[channel] = np.clip(other[channel] + step, grid.lowest, grid.highest)
            error = output_errors(weight, grid, other.reshape(found.shape), gram)
            assert (error >= least * (1 - 1e-4)).all()


def test_scales_are_the_least_squares_ones() -> None:
    weight, grid, codes, gram = started(2, 4, symmetric=True)
    found = fit_scales(weight, grid, codes, gram).scale.astype(np.float64)
    steps = codes.astype(np.float64)
    root = np.linalg.cholesky(gram.astype(np.float64)).T
    for column in range(weight.shape[1]):
        spread = np.zeros((32, 2))
        spread[:16, 0], spread[16:, 1] = steps[0, :, column], steps[1, :, column]
        exact = np.linalg.lstsq(root @ spread, root @ weight[:, column], rcond=None)[0]
        np.testing.assert_allclose(found[:, column], exact, rtol=1e-3)


@settings(max_examples=6)
@given(seeds, st.sampled_from([16, 33]), st.sampled_from([4, 8]), st.booleans())
def test_learned_rounding_is_never_worse_than_gptq_or_nearest(
    seed: int, depth: int, bits: int, symmetric: bool
) -> None:
    weight, x = problem(seed, depth)
    gram = x.astype(np.float64).T @ x
    options = {"bits": bits, "block_size": 16, "symmetric": symmetric}
    found = quantize_adaround(weight, gram, **options)  # type: ignore[arg-type]
    half = 2 ** (bits - 1)
    assert found.codes.shape == weight.shape and found.codes.dtype == np.int8
    assert found.codes.min() >= -half and found.codes.max() < half
    assert (found.zero_point is None) == symmetric
    objective = damped(gram).astype(np.float64)

    def error(restored: np.ndarray) -> np.ndarray:
        off = restored.astype(np.float64) - weight
        result: np.ndarray = np.einsum("kn,kn->n", off, objective @ off)
        return result

    errors = error(found.dequantized())
    for quantize in (lambda w, **o: quantize_gptq(w, gram, **o), quantize_blocks):
        # Compared in float32.
        other = quantize(weight, **options)  # type: ignore[arg-type]
        assert (errors <= error(other.dequantized()) * (1 + 1e-3)).all()


def test_learned_rounding_beats_gptq_and_is_the_same_again() -> None:
    weight, x = problem(0, 64)
    gram = x.astype(np.float64).T @ x
    found, again = (
        quantize_adaround(weight, gram, bits=4, block_size=32, symmetric=False) for _ in range(2)
    )
    np.testing.assert_array_equal(found.codes, again.codes)
    np.testing.assert_array_equal(found.scale, again.scale)
    gptq = quantize_gptq(weight, gram, bits=4, block_size=32, symmetric=False)
    errors = [missed(weight, q.dequantized(), x).sum() for q in (found, gptq)]
    assert errors[0] < 0.95 * errors[1]


def test_what_is_learned_is_one_of_the_two_codes_around_a_weight() -> None:
    weight, grid, codes, gram = started(5, 4, symmetric=False)
    found = learn_rounding(weight, grid, codes, gram)
    exact = in_blocks(weight, 16) / grid.scale[:, None] + grid.zero_point[:, None]
    inside = (exact > grid.lowest) & (exact < grid.highest)
    assert (np.abs(found - exact)[inside] <= 1.0 + 1e-5).all()
    errors = [output_errors(weight, grid, each, gram).sum() for each in (found, codes)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_on_the_grid_stays(symmetric: bool) -> None:
    weight, x = problem(7, 32)
    options = {"bits": 4, "block_size": 16, "symmetric": symmetric}
    on_grid = quantize_blocks(weight, **options).dequantized()  # type: ignore[arg-type]
    found = quantize_adaround(on_grid, x.T @ x, **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.dequantized(), on_grid, atol=1e-4 * np.abs(on_grid).max())


def test_channels_that_are_dead() -> None:
    weight, x = problem(3, 33)
    x[:, 4:20] = 0.0
    for gram in (x.T @ x, np.zeros((33, 33))):
        found = quantize_adaround(weight, gram, bits=4, block_size=16, symmetric=False)
        restored = found.dequantized()
        assert np.isfinite(restored).all()
        assert np.abs(restored - weight).max() <= np.abs(weight).max()
