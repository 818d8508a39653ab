"""NF4 and FP4: the tables, and what is nearest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from qcompile.float4 import TABLES, Float4, quantize_float4

kinds = st.sampled_from(list(TABLES))


def test_nf4_is_quantiles_of_the_normal_distribution() -> None:
    """Eight on one side, seven on the other, zero between: the paper's construction."""
    last = 0.9677083
    above = norm.ppf(np.linspace(last, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(last, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(TABLES["nf4"], values / values.max(), rtol=0, atol=1e-6)


def test_fp4_is_one_sign_two_exponent_bits_and_one_of_mantissa() -> None:
    table = TABLES["fp4"]
    np.testing.assert_array_equal(table[:8], -table[8:])
    assert sorted(table[:8] * 12) == pytest.approx([0, 0.0625, 2, 3, 4, 6, 8, 12])


@given(st.integers(0, 2**32 - 1), kinds, st.sampled_from([32, 64]))
def test_each_weight_gets_the_nearest_value(seed: int, kind: Float4, block_size: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((128, 3)) * rng.lognormal(0, 2, (1, 3))).astype(np.float32)
    found = quantize_float4(weight, kind, block_size=block_size)
    assert found.codes.dtype == np.int8 and found.codes.min() >= 0 and found.codes.max() < 16
    scale = np.abs(weight.reshape(-1, block_size, 3)).max(axis=1)
    np.testing.assert_array_equal(found.scale, scale)
    every = TABLES[kind][:, None, None] * np.repeat(scale, block_size, axis=0)
    nearest = np.abs(every - weight).min(axis=0)
    np.testing.assert_allclose(
        np.abs(found.dequantized() - weight), nearest, rtol=0, atol=1e-6 * scale.max()
    )


@given(st.integers(0, 2**32 - 1), kinds)
def test_values_of_the_table_come_back(seed: int, kind: Float4) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (64, 2))
    codes[0] = np.abs(TABLES[kind]).argmax()
    weight = TABLES[kind][codes] * np.float32(0.5)
    np.testing.assert_array_equal(quantize_float4(weight, kind).dequantized(), weight)


def test_zeros() -> None:
    for kind in TABLES:
        found = quantize_float4(np.zeros((64, 2), np.float32), kind)
        np.testing.assert_array_equal(found.dequantized(), np.zeros((64, 2)))
