"""Outlier channels on several INT8 channels: codes of copies add up, whatever the channel holds."""

from __future__ import annotations

import dataclasses

import hypothesis.extra.numpy as hnp
import numpy as np
import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st
from qcompile.passes.integer_matmul import CONTRIB, KERNEL, IntegerMatMul
from qcompile.passes.quantize import Quantize

from qcompile.calibration.stats import BINS, GRAM_BLOCK, Stats
from qcompile.linears import find_linears
from qcompile.outliers import LARGEST_SHARE, Split, can_split, find_split
from qcompile.precision import ActivationQuant, OpPlan, PrecisionPlan, SitePlan
from qcompile.weights import quantize_weight
from tests.passes.rewriting import HEADER, typed
from tests.support import assert_idempotent, check_model, from_text, ops, run_model

RNG = np.random.default_rng(0)
K, N = 64, 24
CHANNELS = np.array([3, 40])


def stats_of(x: np.ndarray) -> Stats:
    """Extremes and second moments of `x` [rows, K]; what a split does not read is empty."""
    width = x.shape[1]
    blocks = -(-width // GRAM_BLOCK)
    return Stats(
        count=len(x),
        minimum=x.min(axis=0).astype(np.float64),
        maximum=x.max(axis=0).astype(np.float64),
        power_sums=np.stack([(x.astype(np.float64) ** n).sum(axis=0) for n in range(1, 5)]),
        histogram=np.zeros((width, BINS), np.int32),
        gram=np.zeros((blocks, GRAM_BLOCK, GRAM_BLOCK)),
    )


@given(
    copies=st.integers(1, 16),
    x=hnp.arrays(np.float64, 50, elements=st.floats(-100.0, 100.0)),
    step=st.floats(1e-3, 10.0),
)
def test_the_codes_of_all_copies_add_up_to_the_value_rounded_once(
    copies: int, x: np.ndarray, step: float
) -> None:
    split = Split(np.array([0]), copies)
    assert abs(split.offsets.mean()) < 1e-12
    codes = np.rint((x[:, None] + split.offsets * step) / (copies * step))
    assert (np.abs(codes.sum(axis=1) * step - x) <= step / 2 * (1 + 1e-9)).all()


@given(copies=st.integers(1, 8), values=hnp.arrays(np.float64, (K, 3), elements=st.floats(-9, 9)))
def test_an_extended_weight_computes_the_same_product(copies: int, values: np.ndarray) -> None:
    split = Split(CHANNELS, copies)
    x = RNG.standard_normal((5, K))
    extended = split.extend(x.T, copies).T
    assert (extended[:, CHANNELS] == 0).all()
    np.testing.assert_allclose(extended @ split.extend(values), x @ values, rtol=1e-9, atol=1e-9)


@given(
    outliers=st.integers(0, 6),
    factor=st.floats(1.0, 200.0),
    one_sided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_split_that_is_found_fits(
    outliers: int, factor: float, one_sided: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, K))
    x[:, :outliers] *= factor
    stats = stats_of(np.abs(x) if one_sided else x)
    split = find_split(stats)
    assert len(split.channels) >= 1
    assert len(split.appended) <= max(K * LARGEST_SHARE, 1)
    low = split.extend(stats.minimum, split.copies)
    high = split.extend(stats.maximum, split.copies)
    span = max(float(high.max()), 0.0) - min(float(low.min()), 0.0)
    whole = max(float(stats.maximum.max()), 0.0) - min(float(stats.minimum.min()), 0.0)
    assert span <= whole * (1 + 1e-9)


def test_a_few_large_channels_are_found() -> None:
    x = RNG.standard_normal((500, 256))
    x[:, [7, 100]] *= 6.0
    split = find_split(stats_of(x))
    assert set(split.channels) >= {7, 100}
    assert 5 <= split.copies <= 12


def test_too_few_channels_cannot_be_split() -> None:
    assert not can_split(8)
    assert can_split(64)


def test_the_gram_matrix_of_copies() -> None:
    split = Split(CHANNELS, 3)
    a = RNG.standard_normal((30, K))
    gram = np.zeros((1, GRAM_BLOCK, GRAM_BLOCK))
    gram[0, :K, :K] = a.T @ a
    extended = split.extended_gram(gram, K)
    assert extended.shape == gram.shape
    assert (extended[0, CHANNELS] == 0).all()
    assert (extended[0, :, CHANNELS] == 0).all()
    others = np.setdiff1d(np.arange(K), CHANNELS)
    np.testing.assert_array_equal(
        extended[0][np.ix_(others, others)], gram[0][np.ix_(others, others)]
    )
    for at, channel in enumerate(split.appended):
        assert extended[0, K + at, K + at] == gram[0, channel, channel] / 9


def split_model() -> tuple[ir.Model, PrecisionPlan, np.ndarray, np.ndarray]:
    """A Linear with two outlier channels, its plan, the weight that the codes stand for, inputs."""
    weight = RNG.standard_normal((K, N)).astype(np.float32)
    text = f"g (float[B,M,{K}] x, float[{K},{N}] w) => (float[B,M,{N}] y) {{ y = MatMul (x, w) }}"
    model = typed(from_text(HEADER + text, w=weight))
    model.graph[0].name = "fc"
    x = RNG.uniform(-1, 1, (2, 7, K)).astype(np.float32)
    x[..., CHANNELS] *= 5.0
    split = Split(CHANNELS, 5)
    codes = quantize_weight(split.extend(weight), highest=np.full(K + len(split.appended), 255))
    name = find_linears(model.graph)[0].name
    activation = ActivationQuant("static", 2.0 / 255, 128, np.full(K + 10, 255), split)
    plan = PrecisionPlan(
        (SitePlan(name, "x", activation, (name,)),),
        (OpPlan(name, name, "int8", "test", K, N, "y", codes),),
    )
    assert plan.label(plan.ops[0]) == "split"
    return model, plan, codes.dequantized(), x


def test_the_graph_computes_the_sum_over_copies() -> None:
    model, plan, weight, x = split_model()
    Quantize(plan)(model)
    check_model(model)
    assert ops(model)[:6] == [
        "QuantizeLinear", "Gather", "Add", "QuantizeLinear", "Concat", "DequantizeLinear",
    ]  # fmt: skip
    assert_idempotent(Quantize(plan), model)
    step = np.float32(2.0 / 255)
    split = plan.sites[0].activation.split
    assert split is not None
    rest = np.clip(np.rint(x / step) + 128, 0, 255) - 128
    copies = x[..., split.appended] + (split.offsets * step).astype(np.float32)
    copies = np.clip(np.rint(copies / (5 * step)) + 128, 0, 255) - 128
    expected = np.concatenate([rest, copies], axis=-1) * step @ weight
    found = run_model(model, {"x": x}, optimise=False)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-4)

    IntegerMatMul()(model)
    assert f"{CONTRIB}.{KERNEL}" in ops(model)
    np.testing.assert_allclose(run_model(model, {"x": x})["y"], expected, rtol=1e-5, atol=2e-4)


def test_the_error_is_that_of_the_finer_scale() -> None:
    model, plan, weight, x = split_model()
    exact = x @ _folded(plan, weight)
    Quantize(plan)(model)
    fine = np.square(run_model(model, {"x": x}, optimise=False)["y"] - exact).mean()
    coarse_model, coarse_plan, _, _ = split_model()
    site = coarse_plan.sites[0]
    whole = dataclasses.replace(site.activation, scale=10.0 / 255, split=None)
    op = dataclasses.replace(
        coarse_plan.ops[0], weight=quantize_weight(_folded(plan, weight).astype(np.float32))
    )
    plain = PrecisionPlan((dataclasses.replace(site, activation=whole),), (op,))
    Quantize(plain)(coarse_model)
    coarse = np.square(run_model(coarse_model, {"x": x}, optimise=False)["y"] - exact).mean()
    # Five times the step is 25 times the variance, of which weights keep a part.
    assert fine < coarse / 10


def _folded(plan: PrecisionPlan, weight: np.ndarray) -> np.ndarray:
    """The weight [K, N] that an extended one stands for."""
    split = plan.sites[0].activation.split
    assert split is not None
    folded = weight[:K].copy()
    for at, channel in enumerate(split.appended):
        folded[channel] += weight[K + at] / split.copies
    return folded
