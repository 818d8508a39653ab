"""int8 weights: within half a step, safe where it is asked, and better than the plain ways."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.precision import QuantizedWeight
from qcompile.weights import LEVELS, LIMIT, Neighbours, quantize_weight, violations

# Weights of any sign and of very different size, exact zeros among them.
values = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1.0, -1.0, 127.0, 1e-6])
weights = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=values
)  # fmt: skip
codes_highest = st.integers(0, 255)


@st.composite
def constrained(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the highest code of each of its input channels."""
    weight = draw(weights)
    highest = draw(hnp.arrays(np.int64, len(weight), elements=codes_highest))
    return weight, highest


def restored(quantized: QuantizedWeight) -> np.ndarray:
    result: np.ndarray = quantized.codes.astype(np.float64) * quantized.scale.astype(np.float64)
    return result


def errors(weight: np.ndarray, quantized: QuantizedWeight, moment: np.ndarray) -> np.ndarray:
    """Squared error of each output channel, weighted by the second moment of its inputs."""
    squares = np.square(weight.astype(np.float64) - restored(quantized))
    result: np.ndarray = (squares * moment[:, None]).sum(axis=0)
    return result


def rounded(weight: np.ndarray, scale: np.ndarray, levels: int = LEVELS) -> QuantizedWeight:
    """Round to nearest, in float32 as a kernel's scale is."""
    scale = scale.astype(np.float32)
    codes = np.clip(np.rint(weight / scale), -levels, levels).astype(np.int8)
    return QuantizedWeight(codes, scale)


def widest_pairs(weight: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Per output channel, the largest |sum| of one sign that a pair of inputs can reach."""
    even = np.pad(weight.astype(np.float64), ((0, len(weight) % 2), (0, 0)))
    reach = np.pad(highest, (0, len(weight) % 2))[:, None]
    sides = [np.maximum(even, 0) * reach, np.maximum(-even, 0) * reach]
    result: np.ndarray = np.maximum(*[(s[0::2] + s[1::2]).max(axis=0) for s in sides])
    return result


# the bound


def test_violations_counts_pairs() -> None:
    highest = np.full(4, 255)
    assert violations(np.array([[127], [127], [-127], [-127]], np.int8), highest) == 2
    assert violations(np.array([[127], [-127], [127], [-127]], np.int8), highest) == 0
    # 64 · 255 + 64 · 255 = 32640 and 65 · 255 + 64 · 255 = 32895
    assert violations(np.array([[64], [64]], np.int8), highest[:2]) == 0
    assert violations(np.array([[65], [64]], np.int8), highest[:2]) == 1
    # pairs are (0, 1) and (2, 3), never (1, 2)
    assert violations(np.array([[0], [127], [127], [0]], np.int8), highest) == 0


def test_violations_of_many_channels_and_an_odd_one() -> None:
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([-127, 127, 3], np.int8), (261, 3))
    highest = rng.choice([255, 120], 261)
    found = 0
    for sign in (1, -1):
        reached = np.maximum(sign * codes.astype(int), 0) * highest[:, None]
        found += sum(int((reached[at] + reached[at + 1] > LIMIT).sum()) for at in range(0, 260, 2))
    assert violations(codes, highest) == found > 0


def test_violations_at_the_limit_itself() -> None:
    # 127 · 1 + 127 · 257 is out of uint8; 127 · 255 + 2 · 191 = 32767 and one more is not.
    assert violations(np.array([[127], [2]], np.int8), np.array([255, 191])) == 0
    assert violations(np.array([[127], [2]], np.int8), np.array([255, 192])) == 1
    assert violations(np.array([[-127], [-2]], np.int8), np.array([255, 192])) == 1


def test_violations_of_an_odd_number_of_rows() -> None:
    assert violations(np.array([[127], [127], [127]], np.int8), np.full(3, 255)) == 1
    assert violations(np.array([[127]], np.int8), np.full(1, 255)) == 0


@settings(deadline=None, max_examples=200)
@given(constrained())
@example((np.full((2, 1), 1.0, np.float32), np.array([255, 255])))
@example((np.full((3, 2), -1.0, np.float32), np.array([255, 255, 255])))
@example((np.array([[1.0], [0.99], [-1.0], [-1.0]], np.float32), np.array([255, 254, 1, 255])))
def test_no_pair_can_leave_16_bits(case: tuple[np.ndarray, np.ndarray]) -> None:
    weight, highest = case
    quantized = quantize_weight(weight, highest=highest)
    assert violations(quantized.codes, highest) == 0
    assert np.abs(quantized.codes.astype(int)).max() <= LEVELS


@settings(deadline=None, max_examples=100)
@given(constrained(), st.integers(0, 2**32 - 1))
def test_the_second_moment_does_not_weaken_the_bound(
    case: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    weight, highest = case
    moment = np.exp(np.random.default_rng(seed).normal(0, 6, len(weight)))
    moment[::3] = 0.0
    quantized = quantize_weight(weight, moment, highest)
    assert violations(quantized.codes, highest) == 0


def test_what_the_bound_allows_is_used() -> None:
    """Opposite signs, or channels that stay low, cost nothing."""
    rng = np.random.default_rng(0)
    weight = np.abs(rng.standard_normal((64, 8))).astype(np.float32)
    free = quantize_weight(weight)
    alternating = weight * np.where(np.arange(64) % 2, -1, 1)[:, None].astype(np.float32)
    for case, highest in ((alternating, np.full(64, 255)), (weight, np.full(64, 128))):
        safe, unbound = quantize_weight(case, highest=highest), quantize_weight(case)
        np.testing.assert_array_equal(safe.codes, unbound.codes)
        np.testing.assert_array_equal(safe.scale, unbound.scale)
    assert violations(free.codes, np.full(64, 255)) > 0


# the error


@settings(deadline=None, max_examples=200)
@given(weights)
def test_within_half_a_step_where_nothing_is_clipped(weight: np.ndarray) -> None:
    quantized = quantize_weight(weight)
    scale = quantized.scale.astype(np.float64)
    inside = np.abs(weight) <= LEVELS * scale
    # The quotient W / scale, up to 127, rounds in float32.
    bound = scale * (0.5 + LEVELS * 2.0**-23)
    difference = np.abs(weight.astype(np.float64) - restored(quantized))
    assert (difference <= bound)[inside].all()
    assert quantized.codes.dtype == np.int8 and quantized.scale.dtype == np.float32
    assert np.abs(quantized.codes.astype(int)).max() <= LEVELS
    assert (quantized.scale > 0).all()


@settings(deadline=None, max_examples=100)
@given(weights)
def test_never_worse_than_rounding_by_the_largest_weight(weight: np.ndarray) -> None:
    ones = np.ones(len(weight))
    top = np.maximum(np.abs(weight).max(axis=0), 1e-30) / LEVELS
    plain = errors(weight, rounded(weight, top), ones)
    found = errors(weight, quantize_weight(weight), ones)
    assert_not_above(found, plain, len(weight), top)


def assert_not_above(found: np.ndarray, plain: np.ndarray, depth: int, scale: np.ndarray) -> None:
    """Up to what comparing in float32 can mistake: W / scale is off by LEVELS · 2⁻²² at most."""
    slack = 2 * np.sqrt(depth) * scale * LEVELS * 2.0**-22
    assert (np.sqrt(found) <= np.sqrt(plain) * (1 + 1e-6 * depth) + slack).all()


@settings(deadline=None, max_examples=100)
@given(constrained())
def test_never_worse_than_a_scale_that_makes_rounding_safe(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    weight, highest = case
    ones, highest = np.ones(len(weight)), np.maximum(highest, 1)
    top = np.maximum(np.abs(weight).max(axis=0), 1e-30) / LEVELS
    safe = np.maximum(widest_pairs(weight, highest) / (LIMIT - 255), top)
    enlarged = rounded(weight, safe)
    assert violations(enlarged.codes, highest) == 0
    plain = errors(weight, enlarged, ones)
    found = errors(weight, quantize_weight(weight, highest=highest), ones)
    assert_not_above(found, plain, len(weight), safe)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("heavy", [False, True], ids=["gaussian", "laplacian"])
def test_better_than_seven_bits_and_than_enlargement(seed: int, heavy: bool) -> None:
    """Sound weights: the error is well below what the two plain ways cost, in every matrix."""
    rng = np.random.default_rng(seed)
    weight = (rng.laplace(size=(256, 48)) if heavy else rng.standard_normal((256, 48))).astype(
        np.float32
    )
    highest, ones = np.full(256, 255), np.ones(256)
    top = np.abs(weight).max(axis=0)
    seven_bits = rounded(weight, top / 64, 64)
    enlarged = rounded(weight, widest_pairs(weight, highest) / (LIMIT - 255))
    assert violations(seven_bits.codes, highest) == 0
    assert violations(enlarged.codes, highest) == 0
    quantized = quantize_weight(weight, highest=highest)
    assert violations(quantized.codes, highest) == 0
    error = errors(weight, quantized, ones).sum()
    assert error < 0.6 * errors(weight, seven_bits, ones).sum()
    assert error < errors(weight, enlarged, ones).sum()
    # and the constraint costs something, so that the comparison is about it
    assert error > errors(weight, quantize_weight(weight), ones).sum()


def test_the_second_moment_is_what_the_error_is_weighed_by() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    moment = np.exp(rng.normal(0, 3, 64))
    for highest in (None, np.full(64, 255)):
        weighed = errors(weight, quantize_weight(weight, moment, highest), moment).sum()
        even = errors(weight, quantize_weight(weight, None, highest), moment).sum()
        assert weighed < even


def test_a_channel_of_large_activations_keeps_its_weight_when_a_pair_must_give_way() -> None:
    weight = np.array([[1.0], [1.0]], np.float32)
    quantized = quantize_weight(weight, np.array([1e4, 1.0]), np.array([255, 255]))
    first, second = np.abs(weight - restored(quantized))[:, 0]
    assert first < second


# compensation (GPTQ)


def gram_of(inputs: np.ndarray, size: int) -> np.ndarray:
    """Σ xᵀx within blocks of `size` channels, padded with zeros."""
    rows, depth = inputs.shape
    padded = np.pad(inputs, ((0, 0), (0, -depth % size))).reshape(rows, -1, size)
    result: np.ndarray = np.einsum("rbi,rbj->bij", padded, padded)
    return result


def correlated(rng: np.random.Generator, rows: int, depth: int) -> np.ndarray:
    """Inputs of few degrees of freedom, as activations are."""
    mixed = rng.standard_normal((rows, depth // 4 + 1)) @ rng.standard_normal(
        (depth // 4 + 1, depth)
    )
    result: np.ndarray = mixed + 0.1 * rng.standard_normal((rows, depth))
    return result


def block_errors(weight: np.ndarray, quantized: QuantizedWeight, gram: np.ndarray) -> np.ndarray:
    """Squared output error of each output channel, channels of different blocks uncorrelated."""
    miss = weight.astype(np.float64) - restored(quantized)
    padded = np.pad(miss, ((0, -len(miss) % gram.shape[1]), (0, 0)))
    split = padded.reshape(len(gram), gram.shape[1], -1)
    result: np.ndarray = np.einsum("bin,bij,bjn->n", split, gram, split)
    return result


@settings(deadline=None, max_examples=60)
@given(constrained(), st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 128]))
def test_compensation_does_not_weaken_the_bound(
    case: tuple[np.ndarray, np.ndarray], seed: int, size: int
) -> None:
    weight, highest = case
    inputs = correlated(np.random.default_rng(seed), 20, len(weight))
    moment, gram = np.square(inputs).mean(axis=0), gram_of(inputs, size)
    quantized = quantize_weight(weight, moment, highest, Neighbours.of(gram))
    assert violations(quantized.codes, highest) == 0
    assert quantized.codes.dtype == np.int8
    assert np.abs(quantized.codes.astype(int)).max() <= LEVELS
    without = quantize_weight(weight, moment, highest)
    np.testing.assert_array_equal(quantized.scale, without.scale)


@settings(deadline=None, max_examples=50)
@given(constrained(), st.integers(0, 2**32 - 1))
def test_compensation_never_errs_more(case: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    weight, highest = case
    inputs = correlated(np.random.default_rng(seed), 20, len(weight))
    moment, gram = np.square(inputs).mean(axis=0), gram_of(inputs, 4)
    for bound in (None, highest):
        compensated = quantize_weight(weight, moment, bound, Neighbours.of(gram))
        found = block_errors(weight, compensated, gram)
        plain = block_errors(weight, quantize_weight(weight, moment, bound), gram)
        # float32 weights of restored codes differ by a rounding from the float64 ones here
        noise = np.abs(weight).max(axis=0) ** 2 * np.trace(gram, axis1=1, axis2=2).sum()
        assert (found <= plain + 1e-6 * np.sqrt(plain * noise) + 1e-12 * noise).all()


@pytest.mark.parametrize("safe", [False, True], ids=["free", "safe"])
@pytest.mark.parametrize(("depth", "size"), [(128, 128), (200, 128), (33, 128), (96, 32)])
def test_compensation_lessens_the_output_error(depth: int, size: int, safe: bool) -> None:
    """Of the outputs themselves, on inputs that were not calibrated on."""
    rng = np.random.default_rng(depth)
    inputs = correlated(rng, 1500, depth)
    weight = rng.standard_normal((depth, 40)).astype(np.float32)
    seen, fresh = inputs[:1000], inputs[1000:]
    highest = np.full(depth, 255) if safe else None
    moment = np.square(seen).mean(axis=0)
    compensated = quantize_weight(weight, moment, highest, Neighbours.of(gram_of(seen, size)))
    plain = quantize_weight(weight, moment, highest)
    error, before = (
        float(np.square(fresh @ (weight - restored(q))).sum()) for q in (compensated, plain)
    )
    assert error < 0.8 * before


@pytest.mark.parametrize("highest", [None, np.full(6, 255)], ids=["free", "safe"])
def test_a_gram_matrix_of_zeros_changes_nothing(highest: np.ndarray | None) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    found = quantize_weight(weight, None, highest, Neighbours.of(np.zeros((2, 4, 4))))
    np.testing.assert_array_equal(found.codes, quantize_weight(weight, None, highest).codes)


def test_a_dead_input_channel_does_not_disturb_the_others() -> None:
    rng = np.random.default_rng(0)
    inputs = correlated(rng, 200, 16)
    inputs[:, [3, 8, 9]] = 0.0
    weight = rng.standard_normal((16, 8)).astype(np.float32)
    gram = gram_of(inputs, 16)
    found = quantize_weight(
        weight, np.square(inputs).mean(axis=0), np.full(16, 255), Neighbours.of(gram)
    )
    assert violations(found.codes, np.full(16, 255)) == 0
    plain = quantize_weight(weight, np.square(inputs).mean(axis=0), np.full(16, 255))
    assert block_errors(weight, found, gram).sum() < block_errors(weight, plain, gram).sum()


# shapes


def channelwise(weight: np.ndarray, highest: np.ndarray | None) -> QuantizedWeight:
    """Each output channel quantised on its own."""
    parts = [quantize_weight(weight[:, [n]], highest=highest) for n in range(weight.shape[1])]
    return QuantizedWeight(
        np.concatenate([part.codes for part in parts], axis=1),
        np.concatenate([part.scale for part in parts]),
    )


@pytest.mark.parametrize("width", [1, 255, 256, 257, 513])
@pytest.mark.parametrize("depth", [1, 2, 7, 32])
def test_output_channels_do_not_see_each_other(width: int, depth: int) -> None:
    rng = np.random.default_rng(width * 100 + depth)
    weight = rng.standard_normal((depth, width)).astype(np.float32)
    highest = np.full(depth, 255)
    quantized = quantize_weight(weight, highest=highest)
    assert quantized.codes.shape == (depth, width) and quantized.scale.shape == (width,)
    assert violations(quantized.codes, highest) == 0
    some = sorted({0, width // 2, max(width - 2, 0), width - 1})
    alone = channelwise(weight[:, some], highest)
    np.testing.assert_array_equal(quantized.codes[:, some], alone.codes)
    np.testing.assert_array_equal(quantized.scale[some], alone.scale)


def test_the_last_row_of_an_odd_weight_has_no_partner() -> None:
    weight = np.full((3, 1), 1.0, np.float32)
    quantized = quantize_weight(weight, highest=np.full(3, 255))
    assert violations(quantized.codes, np.full(3, 255)) == 0
    alone = quantize_weight(weight[2:], highest=np.full(1, 255))
    assert abs(int(alone.codes[0, 0])) == LEVELS
    np.testing.assert_allclose(restored(alone), [[1.0]], rtol=1e-6)


@pytest.mark.parametrize("highest", [None, np.full(6, 255)], ids=["free", "safe"])
def test_channels_of_zeros(highest: np.ndarray | None) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    weight[:, 1] = 0.0
    weight[2] = 0.0
    quantized = quantize_weight(weight, highest=highest)
    assert (quantized.codes[:, 1] == 0).all() and (quantized.codes[2] == 0).all()
    assert np.isfinite(quantized.scale).all() and (quantized.scale > 0).all()
    zeros = quantize_weight(np.zeros((6, 4), np.float32), highest=highest)
    assert not zeros.codes.any() and np.isfinite(zeros.scale).all()


def test_inputs_that_are_never_seen() -> None:
    """All activations zero: no moment to weigh by, no code above the zero point."""
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    quantized = quantize_weight(weight, np.zeros(6), np.zeros(6, np.int64))
    plain = quantize_weight(weight)
    np.testing.assert_array_equal(quantized.codes, plain.codes)


@settings(deadline=None, max_examples=60)
@given(st.integers(-40, 40), st.integers(0, 2**32 - 1))
def test_the_codes_do_not_depend_on_the_unit(exponent: int, seed: int) -> None:
    """A power of two moves to the scale: small and large weights keep all their levels."""
    weight = np.random.default_rng(seed).standard_normal((16, 3)).astype(np.float32)
    scaled = quantize_weight(weight * np.float32(2.0**exponent))
    plain = quantize_weight(weight)
    np.testing.assert_array_equal(scaled.codes, plain.codes)
    np.testing.assert_array_equal(scaled.scale, plain.scale * np.float32(2.0**exponent))


def test_the_weight_given_is_not_changed() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    before, highest = weight.copy(), np.zeros(6, np.int64)
    quantize_weight(weight, np.ones(6), highest)
    np.testing.assert_array_equal(weight, before)
    assert not highest.any()
