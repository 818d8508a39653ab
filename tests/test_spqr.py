"""SpQR: whole input channels in float beside GPTQ's codes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import ConfigError
from qcompile.gptq import quantize_gptq
from qcompile.precision import QuantizedWeight
from qcompile.schemes import get_scheme
from qcompile.spqr import quantize_spqr

K, N, SIZE = 96, 16, 32


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight with a few large rows, and the moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((K, N)).astype(np.float32)
    weight[rng.permutation(K)[:2]] *= 6.0
    x = rng.standard_normal((400, K)) @ (np.eye(K) + 0.3 * rng.standard_normal((K, K)))
    return weight, x.T @ x


def error(weight: np.ndarray, made: QuantizedWeight, hessian: np.ndarray) -> float:
    missed = (made.dequantized() - weight).astype(np.float64)
    return float(np.einsum("kn,kn->", missed, hessian @ missed))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_few_float_rows_leave_less_error_than_gptq(symmetric: bool) -> None:
    for seed in range(4):
        weight, hessian = case(seed)
        options = {"bits": 4, "block_size": SIZE, "symmetric": symmetric}
        plain = quantize_gptq(weight, hessian, **options)  # type: ignore[arg-type]
        found = quantize_spqr(weight, hessian, **options, count=2)  # type: ignore[arg-type]
        assert error(weight, found, hessian) < 0.8 * error(weight, plain, hessian)


@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=5)
@given(seed=st.integers(0, 1000), count=st.integers(1, 12))
def test_codes_of_kept_rows_are_those_of_zero(symmetric: bool, seed: int, count: int) -> None:
    weight, hessian = case(seed)
    found = quantize_spqr(
        weight, hessian, bits=4, block_size=SIZE, symmetric=symmetric, count=count
    )
    assert found.kept is not None and found.kept.weight.shape == (count, N)
    assert (np.diff(found.kept.channels) > 0).all()
    codes = dataclasses.replace(found, kept=None).dequantized()
    assert not codes[found.kept.channels].any()


def test_the_large_rows_are_kept() -> None:
    weight, _ = case(0)
    large = np.sort(np.argsort(-np.square(weight).sum(axis=1))[:2])
    found = quantize_spqr(weight, np.eye(K), bits=4, block_size=SIZE, symmetric=False, count=2)
    assert found.kept is not None and found.kept.channels.tolist() == large.tolist()
    # Uncorrelated inputs leave nothing to make up for.
    np.testing.assert_array_equal(found.kept.weight, weight[large])


@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_no_other_float_rows_would_do_better(seed: int) -> None:
    weight, hessian = case(seed)
    found = quantize_spqr(weight, hessian, bits=4, block_size=SIZE, symmetric=False, count=3)
    assert found.kept is not None
    # With the damping that the rows were found by, the gradient vanishes there.
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(K)
    gradient = (damped @ (found.dequantized() - weight))[found.kept.channels]
    assert np.abs(gradient).max() < 1e-3 * np.abs(damped @ weight).max()


def test_channels_of_an_earlier_plan() -> None:
    weight, hessian = case(1)
    options = {"bits": 4, "block_size": SIZE, "symmetric": False, "count": 2}
    first = quantize_spqr(weight, hessian, **options)  # type: ignore[arg-type]
    assert first.kept is not None
    again = quantize_spqr(weight, hessian, **options, channels=first.kept.channels.tolist())  # type: ignore[arg-type]
    assert again.kept is not None
    np.testing.assert_array_equal(first.codes, again.codes)
    np.testing.assert_array_equal(first.kept.weight, again.kept.weight)
    other = quantize_spqr(weight, hessian, **options, channels=[5, 4, 4])  # type: ignore[arg-type]
    assert other.kept is not None and other.kept.channels.tolist() == [4, 5]


def test_a_short_last_block_has_no_further_rows_to_keep() -> None:
    found = quantize_spqr(
        np.zeros((40, N), np.float32), np.eye(40), bits=4, block_size=SIZE, symmetric=False, count=4
    )
    assert found.kept is not None and found.kept.channels.max() < 40
    assert len(np.unique(found.kept.channels)) == 4


def test_dead_inputs() -> None:
    weight, _ = case(2)
    found = quantize_spqr(
        weight, np.zeros((K, K)), bits=4, block_size=SIZE, symmetric=True, count=1
    )
    assert np.isfinite(found.dequantized()).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a16:spqr-sparse", "no fast product of a sparse matrix"),
        ("w8a16:spqr-bilevel", "MatMulNBits takes floats"),
        ("spqr", r"unknown scheme 'spqr' \(a method follows a scheme: w4a16:spqr\)"),
        ("llm-int8:spqr", "scheme llm-int8 has no method spqr"),
    ],
)
def test_what_is_refused_and_why(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_scheme(name)
