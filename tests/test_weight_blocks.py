"""Weights in blocks: within half a step, but for what the top code cuts off."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.precision import QuantizedWeight
from qcompile.weight_blocks import BITS, BLOCK_SIZE, quantize_blocks

# Of very different size, exact zeros and equal extremes of both signs among them.
values = st.floats(-1e4, 1e4, width=32, allow_subnormal=False).filter(
    lambda v: v == 0.0 or abs(v) > 1e-30
) | st.sampled_from([0.0, 1.0, -1.0, 7.0, -8.0, 127.0, 1e-6])
bits_of_code = st.sampled_from([8, 4])
block_sizes = st.sampled_from([16, 32])
weights = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 50), st.integers(1, 3)), elements=values, fill=values
)


def scale_of_each(quantized: QuantizedWeight) -> np.ndarray:
    """The scale of every weight, float64 [K, N]."""
    assert quantized.block_size is not None
    rows = np.arange(len(quantized.codes)) // quantized.block_size
    result: np.ndarray = quantized.scale[rows].astype(np.float64)
    return result


@given(weights, bits_of_code, block_sizes)
@example(np.ones((17, 2), np.float32), 4, 16)
@example(np.array([[7.0], [-7.0]], np.float32), 4, 32)
def test_the_error_is_half_a_step_at_most(weight: np.ndarray, bits: int, block_size: int) -> None:
    quantized = quantize_blocks(weight, bits=bits, block_size=block_size)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert quantized.codes.min() >= lowest and quantized.codes.max() <= highest
    step = np.abs(scale_of_each(quantized))
    error = np.abs(weight.astype(np.float64) - quantized.dequantized())
    # The extreme of the other sign wants one code more than there is.
    cut = quantized.codes == highest
    slack = 1.0 + 2.0 ** (bits - 20)  # scale, division and product are rounded to float32
    assert (error <= np.where(cut, 1.0, 0.5) * step * slack).all()


@given(weights, bits_of_code, block_sizes)
def test_the_largest_of_a_block_is_kept(
    weight: np.ndarray, bits: int, block_size: int
) -> None:  # fmt: skip
    """A power of two divides it exactly: the lowest code times the scale is the weight."""
    quantized = quantize_blocks(weight, bits=bits, block_size=block_size)
    restored = quantized.dequantized()
    for start in range(0, len(weight), block_size):
        rows = slice(start, start + block_size)
        for column in range(weight.shape[1]):
            at = int(np.abs(weight[rows, column]).argmax())
            assert restored[rows, column][at] == weight[rows, column][at]


@given(weights, bits_of_code, block_sizes)
def test_what_comes_out(weight: np.ndarray, bits: int, block_size: int) -> None:
    quantized = quantize_blocks(weight, bits=bits, block_size=block_size)
    depth, width = weight.shape
    assert quantized.codes.dtype == np.int8 and quantized.codes.shape == weight.shape
    assert quantized.scale.dtype == np.float32
    assert quantized.scale.shape == (math.ceil(depth / block_size), width)
    assert (quantized.bits, quantized.block_size) == (bits, block_size)
    assert quantized.dequantized().shape == weight.shape
    assert np.isfinite(quantized.scale).all() and (quantized.scale != 0).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_do_not_see_each_other(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((70, 3)).astype(np.float32)
    loud = weight.copy()
    loud[32:64, 1] *= 1e4
    plain, other = quantize_blocks(weight, bits=bits), quantize_blocks(loud, bits=bits)
    changed = plain.scale != other.scale
    np.testing.assert_array_equal(np.argwhere(changed), [[1, 1]])
    np.testing.assert_array_equal(plain.codes[:32], other.codes[:32])
    np.testing.assert_array_equal(plain.codes[64:], other.codes[64:])


@pytest.mark.parametrize("bits", [8, 4])
def test_padding_does_not_touch_the_last_block(bits: int) -> None:
    """A short block is quantised as if it stood alone."""
    weight = np.random.default_rng(1).standard_normal((37, 2)).astype(np.float32) + 5.0
    whole = quantize_blocks(weight, bits=bits)
    rest = quantize_blocks(weight[32:], bits=bits)
    np.testing.assert_array_equal(whole.codes[32:], rest.codes)
    np.testing.assert_array_equal(whole.scale[1:], rest.scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros(bits: int) -> None:
    weight = np.zeros((40, 2), np.float32)
    weight[35, 1] = -3.0
    quantized = quantize_blocks(weight, bits=bits)
    np.testing.assert_array_equal(quantized.dequantized(), weight)
    np.testing.assert_array_equal(quantized.scale[0], [1.0, 1.0])


def test_known_codes() -> None:
    """The lowest code is the extreme's, whatever its sign."""
    weight = np.array([[4.0, -4.0], [-4.0, 4.0], [2.0, 2.0], [0.2, 0.3]], np.float32)
    quantized = quantize_blocks(weight, bits=4, block_size=16)
    np.testing.assert_array_equal(quantized.scale, [[-0.5, 0.5]])
    np.testing.assert_array_equal(quantized.codes, [[-8, -8], [7, 7], [-4, 4], [0, 1]])
    np.testing.assert_array_equal(
        quantized.dequantized(), [[4.0, -4.0], [-3.5, 3.5], [2.0, 2.0], [0.0, 0.5]]
    )


def test_eight_bits_are_nearer_than_four() -> None:
    weight = np.random.default_rng(2).standard_normal((256, 64)).astype(np.float32)
    error = {
        bits: float(np.square(quantize_blocks(weight, bits=bits).dequantized() - weight).mean())
        for bits in BITS.values()
    }
    # 4 bits of error less: 2⁸ in the square, less what is cut off at the top code.
    assert error[4] / error[8] == pytest.approx(256, rel=0.1)
    step = np.abs(weight.reshape(-1, BLOCK_SIZE, 64)).max(axis=1) / 128
    assert error[8] == pytest.approx(float(np.square(step).mean()) / 12, rel=0.05)
