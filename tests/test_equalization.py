"""Which scales move between ops, and why others do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.equalize import Equalize

from qcompile.calibration.channels import ChannelStats, observe_channels
from qcompile.equalization import EqualizationPlan, plan_equalization, wanted_values
from qcompile.pairs import find_pairs
from qcompile.weighted import find_weighted
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text, run_model

RNG = np.random.default_rng(0)
SPREAD = np.exp(2.0 * RNG.standard_normal(8))


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


X = random(4, 3, 6, 6)
W = (random(8, 3, 3, 3) * SPREAD[:, None, None, None]).astype(np.float32)
V = (random(5, 8, 1, 1) / SPREAD[None, :, None, None]).astype(np.float32)


def two_convs(between: str = "r = Relu (t)", **constants: np.ndarray) -> ir.Model:
    declared = "".join(
        f", float[{','.join(map(str, c.shape))}] {name}" if c.ndim else f", float {name}"
        for name, c in constants.items()
    )
    text = f"""g (float[N,3,6,6] x, float[8,3,3,3] w, float[5,8,1,1] v{declared})
      => (float[N,5,A,B] y) {{
      t = Conv <pads=[1,1,1,1]> (x, w)
      {between}
      y = Conv (r, v)
    }}"""
    return typed(from_text(HEADER + text, w=W, v=V, **constants))


def planned(model: ir.Model, folder: Path, *, per_channel: bool = False) -> EqualizationPlan:
    ops = find_weighted(model.graph)
    stats = observe_channels(model, wanted_values(ops), [{"x": X}], folder)
    return plan_equalization(ops, stats, per_channel=per_channel)


def ranges(model: ir.Model) -> tuple[np.ndarray, np.ndarray]:
    first, second = find_weighted(model.graph)
    return np.abs(first.blocks()).max((0, 2, 3)), np.abs(second.blocks()).max((0, 1, 3))


def test_one_scale_per_weight_makes_the_ranges_of_a_pair_equal(tmp_path: Path) -> None:
    """Equation 11 of the paper: both become √(r1 · r2), up to a factor for all channels."""
    model = two_convs()
    (one, two), plan = ranges(model), planned(model, tmp_path)
    (pair,) = plan.pairs
    scale = np.sqrt(one / two)
    np.testing.assert_allclose(pair.scale, scale / np.exp(np.log(scale).mean()), rtol=1e-6)
    assert pair.gain < 0.1
    Equalize(plan)(model)
    first, second = ranges(model)
    np.testing.assert_allclose(first / second, (first / second)[0], rtol=1e-5)


def test_a_scale_per_channel_wants_equal_activations_instead(tmp_path: Path) -> None:
    """Ranges of the first weight's rows cost nothing then; those of what it computes do."""
    model = two_convs()
    (pair,) = planned(model, tmp_path, per_channel=True).pairs
    before = np.abs(run_model(exposed(model), {"x": X})["t"]).max((0, 2, 3))
    assert pair.gain < 0.5
    assert np.ptp(np.log(before / pair.scale)) < 0.5 * np.ptp(np.log(before))


def exposed(model: ir.Model) -> ir.Model:
    clone = model.clone()
    clone.graph.outputs.append(clone.graph[0].outputs[0])
    return clone


def test_a_second_plan_finds_nothing_left(tmp_path: Path) -> None:
    model = two_convs()
    Equalize(planned(model, tmp_path))(model)
    again = planned(model, tmp_path)
    assert not again.pairs
    assert list(again.refused.values())[-1] == "no scale would bring the predicted error below 70%"


@pytest.mark.parametrize("reach", [0.5, 3.0])
def test_channels_that_reach_the_limit_of_a_clip_are_not_moved(
    tmp_path: Path, reach: float
) -> None:
    """ReLU6 and its like: on calibration data the function stays the same."""
    model = two_convs()
    tops = run_model(exposed(model), {"x": X})["t"].max((0, 2, 3))
    limit = np.array(np.median(tops) * reach, np.float32)
    zero = np.array(0.0, np.float32)
    model = two_convs("r = Clip (t, zero, limit)", zero=zero, limit=limit)
    wanted = run_model(model, {"x": X})["y"]
    plan = planned(model, tmp_path)
    (pair,) = plan.pairs
    assert (pair.scale[tops * 1.25 > limit] == 1.0).all()
    assert (pair.scale != 1.0).any()
    Equalize(plan)(model)
    found = run_model(model, {"x": X})["y"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("r = HardSwish (t)", "HardSwish"),
        ("r = Gelu (t)", "Gelu"),
        ("s = Sigmoid (t) r = Mul (s, t)", "Mul"),
        ("s = Relu (t) r = Add (s, s)", "Add"),
        ("one = Constant <value=float {1.0}> () r = Clip (t, one)", "Clip"),
        ("a = Constant <value=int64[1] {1}> () r = Softmax <axis=1> (t)", "Softmax"),
        ("r = Transpose <perm=[0,1,3,2]> (t)", "Transpose"),
    ],
)
def test_what_is_not_homogeneous_stops_the_walk(between: str, reason: str) -> None:
    pairs, refused = find_pairs(find_weighted(two_convs(between).graph))
    assert not pairs
    assert reason in list(refused.values())[1]


@pytest.mark.parametrize("folding", ["Neg (t)", "Abs (t)", "PRelu (t, slope)"])
def test_what_turns_low_values_into_high_ones_before_a_limit_stops_it(folding: str) -> None:
    """The largest value of t says nothing about what reaches the limit then."""
    zero, six = np.array(0.0, np.float32), np.array(6.0, np.float32)
    slope = {"slope": np.full((8, 1, 1), -2.0, np.float32)} if "slope" in folding else {}
    model = two_convs(f"n = {folding} r = Clip (n, zero, six)", zero=zero, six=six, **slope)
    pairs, refused = find_pairs(find_weighted(model.graph))
    assert not pairs and "before a Clip" in list(refused.values())[1]


@pytest.mark.parametrize(
    "between",
    [
        "r = Identity (t)",
        "s = LeakyRelu (t) r = MaxPool <kernel_shape=[2,2]> (s)",
        "r = AveragePool <kernel_shape=[2,2]> (t)",
        "r = GlobalAveragePool (t)",
        "a = Constant <value=int64[2] {2,3}> () r = ReduceMean (t, a)",
    ],
)
def test_what_passes_a_scale_on(between: str) -> None:
    model = two_convs(between)
    for node in model.graph:  # as constant folding leaves them
        if node.op_type == "Constant":
            value = node.outputs[0]
            value.const_value = node.attributes["value"].as_tensor()
    (pair,), _ = find_pairs(find_weighted(model.graph))
    np.testing.assert_array_equal(pair.channels, np.arange(8))


def test_what_is_read_elsewhere_is_not_scaled() -> None:
    model = two_convs()
    model.graph.outputs.append(model.graph[1].outputs[0])
    pairs, refused = find_pairs(find_weighted(model.graph))
    assert not pairs
    assert "is read elsewhere too" in list(refused.values())[1]


def test_statistics_merge_and_scale(tmp_path: Path) -> None:
    model = two_convs()
    batches = [{"x": X[:1]}, {"x": X[1:]}]
    (one, two), whole = (
        (observe_channels(model, {"t": (1, 8)}, [batch], tmp_path)["t"] for batch in batches),
        observe_channels(model, {"t": (1, 8)}, batches, tmp_path)["t"],
    )
    t = run_model(exposed(model), {"x": X})["t"].transpose(1, 0, 2, 3).reshape(8, -1)
    of_t = ChannelStats(
        t.shape[1], t.min(1), t.max(1), t.sum(1, np.float64), np.square(t, dtype=np.float64).sum(1),
        (t != 0).sum(1),
    )  # fmt: skip
    for found in (one.merge(two), two.merge(one), whole):
        assert_same(found, of_t)
    assert_same(whole.scaled(SPREAD), ChannelStats(
        of_t.count, of_t.minimum / SPREAD, of_t.maximum / SPREAD, of_t.total / SPREAD,
        of_t.squares / SPREAD**2, of_t.nonzero,
    ))  # fmt: skip


def assert_same(found: ChannelStats, wanted: ChannelStats) -> None:
    assert found.count == wanted.count
    for field in ("minimum", "maximum", "total", "squares", "nonzero"):
        one, two = getattr(found, field), getattr(wanted, field)
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-3)
