"""Observe: reductions over chosen values become the graph's only outputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.observe import PARTS, Observe, output_name

from qcompile.calibration.stats import (
    BINS,
    BINS_PER_SIGN,
    GRAM_BLOCK,
    HIGH,
    LOW,
    STEPS,
    Stats,
    bin_centers,
)
from tests.passes.rewriting import HEADER, typed
from tests.support import (
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

RNG = np.random.default_rng(0)
TEXT = """g (float[B,S,3] x, float[3,4] w) => (float[B,S,4] y) {
  h = Relu (x) y = MatMul (h, w) z = Abs (y) }"""
W = RNG.standard_normal((3, 4)).astype(np.float32)
TINY = 2.0**LOW


def observe(x: np.ndarray, value: str = "x", stride: int = 1) -> dict[str, np.ndarray]:
    """Results of the observers of one value, by part."""
    model = typed(from_text(HEADER + TEXT, w=W))
    Observe({0: value}, histogram_stride=stride)(model)
    results = run_model(model, {"x": x.astype(np.float32)})
    return {name.removeprefix("observer.0."): array for name, array in results.items()}


def bins_of(x: np.ndarray) -> np.ndarray:
    """The bin of each value, by numpy in float64."""
    magnitude = np.abs(x.astype(np.float64))
    octaves = np.log2(np.maximum(magnitude, TINY)) - LOW
    step = np.minimum(np.floor(octaves * STEPS), BINS_PER_SIGN - 1).astype(int) + 1
    return BINS_PER_SIGN + np.where(magnitude > TINY, step * np.sign(x), 0).astype(int)


def test_graph() -> None:
    before = typed(from_text(HEADER + TEXT, w=W))
    result = Observe({7: "h"}, histogram_stride=5, gram_stride=2)(before)
    assert result.modified
    constants = {
        "flat_rows": np.array([-1, 3]),
        "first": np.array(0),
        "axis": np.array([0]),
        "start": np.array([0]),
        "end": np.array([2**62]),
        "stride": np.array([5]),
        "tiny": np.float32(2.0**-16),
        "nothing": np.float32(0.0),
        "octave": np.float32(8 / np.log(2.0)),
        "last": np.float32(255.0),
        "one": np.float32(1.0),
        "offsets": np.array([256, 256 + 513, 256 + 2 * 513]),
        "all": np.array([-1]),
        "zeros": np.zeros(3 * 513, np.float32),
        "second": np.array([2]),
        "pads": np.array([0, 0, 0, 125]),
        "blocks": np.array([-1, 1, 128]),
    }
    declared = ", ".join(f"float {name}" for name in constants)
    expected = f"""g (float[B,S,3] x, {declared}) =>
      (int64 n, float[3] low, float[3] high, float[3] s1, float[3] s2, float[3] s3, float[3] s4,
       float[1539] counts, float[1,128,128] gram) {{
      h = Relu (x)
      rows = Reshape (h, flat_rows) dims = Shape (rows) n = Gather (dims, first)
      p2 = Mul (rows, rows) p3 = Mul (p2, rows) p4 = Mul (p2, p2)
      low = ReduceMin <keepdims = 0> (rows, axis) high = ReduceMax <keepdims = 0> (rows, axis)
      s1 = ReduceSum <keepdims = 0> (rows, axis) s2 = ReduceSum <keepdims = 0> (p2, axis)
      s3 = ReduceSum <keepdims = 0> (p3, axis) s4 = ReduceSum <keepdims = 0> (p4, axis)
      strided = Slice (rows, start, end, axis, stride)
      nan = IsNaN (strided) some = Where (nan, nothing, strided)
      size = Abs (some) floored = Max (size, tiny) ratio = Div (floored, tiny)
      log = Log (ratio) steps = Mul (log, octave) floor = Floor (steps)
      inside = Min (floor, last) step = Add (inside, one)
      greater = Greater (size, tiny) nonzero = Cast <to = 1> (greater)
      kept = Mul (step, nonzero) sign = Sign (some) signed = Mul (kept, sign)
      code = Cast <to = 7> (signed) index = Add (code, offsets)
      flat = Reshape (index, all) length = Shape (flat) ones = Expand (one, length)
      counts = ScatterElements <reduction = "add"> (zeros, flat, ones)
      few = Slice (rows, start, end, axis, second) wide = Pad (few, pads)
      split = Reshape (wide, blocks) left = Transpose <perm = [1, 2, 0]> (split)
      right = Transpose <perm = [1, 0, 2]> (split) gram = MatMul (left, right) }}"""
    assert_same_graph(result.model, from_text(HEADER + expected, **constants))
    check_model(result.model)
    assert_idempotent(Observe({7: "h"}, histogram_stride=5, gram_stride=2), result.model)


def test_outputs_are_the_observers_alone() -> None:
    model = typed(from_text(HEADER + TEXT, w=W))
    Observe({0: "x", 3: "h"})(model)
    parts = ["rows", *PARTS, "histogram", "gram"]
    wanted = [output_name(key, part) for key in (0, 3) for part in parts]
    assert [value.name for value in model.graph.outputs] == wanted
    assert "Relu" in ops(model)
    assert "w" not in model.graph.initializers


def test_every_value_can_be_observed() -> None:
    """A graph input, an intermediate value and a graph output."""
    x = RNG.standard_normal((2, 5, 3)).astype(np.float32)
    model = typed(from_text(HEADER + TEXT, w=W))
    Observe({0: "x", 1: "h", 2: "y"})(model)
    results = run_model(model, {"x": x})
    h = np.maximum(x, 0).reshape(-1, 3)
    for key, value in enumerate([x.reshape(-1, 3), h, h @ W]):
        found = results[output_name(key, "maximum")]
        np.testing.assert_allclose(found, value.max(axis=0), rtol=1e-6)


@pytest.mark.parametrize("value", ["x", "h"])
def test_extremes_and_power_sums(value: str) -> None:
    x = (RNG.standard_normal((3, 50, 3)) * [0.01, 1.0, 30.0] + 0.3).astype(np.float32)
    found = observe(x, value)
    rows = (x if value == "x" else np.maximum(x, 0)).reshape(-1, 3).astype(np.float64)
    assert int(found["rows"]) == 150
    np.testing.assert_array_equal(found["minimum"], rows.min(axis=0))
    np.testing.assert_array_equal(found["maximum"], rows.max(axis=0))
    for power in range(1, 5):
        wanted = np.power(rows, power).sum(axis=0)
        size = np.power(np.abs(rows), power).sum(axis=0)
        assert (np.abs(found[f"sum{power}"] - wanted) <= 1e-5 * size).all()


def test_histogram_equals_numpy() -> None:
    x = (RNG.standard_normal((4, 100, 3)) * np.exp(RNG.normal(0, 4, (4, 100, 3)))).astype(
        np.float32
    )
    counts = observe(x)["histogram"].reshape(3, BINS)
    rows = x.reshape(-1, 3)
    wanted = np.stack([np.bincount(bins_of(rows[:, c]), minlength=BINS) for c in range(3)])
    assert (counts.sum(axis=1) == 400).all()
    np.testing.assert_array_equal(counts, wanted)


def test_every_bin_counts_the_value_it_stands_for() -> None:
    """Channel 0 visits each bin once, channel 1 twice, channel 2 stays at zero."""
    centers = bin_centers()
    x = np.zeros((1, 2 * BINS, 3))
    x[0, :BINS, 0], x[0, :BINS, 1], x[0, BINS:, 1] = centers, centers, centers
    counts = observe(x)["histogram"].reshape(3, BINS)
    middle = np.zeros(BINS)
    middle[BINS_PER_SIGN] = BINS
    np.testing.assert_array_equal(counts[0], np.ones(BINS) + middle)
    np.testing.assert_array_equal(counts[1], np.full(BINS, 2.0))
    np.testing.assert_array_equal(counts[2], 2 * middle)


@pytest.mark.parametrize(
    ("value", "bin_"),
    [
        pytest.param(0.0, BINS_PER_SIGN, id="zero"),
        pytest.param(-0.0, BINS_PER_SIGN, id="minus-zero"),
        pytest.param(TINY, BINS_PER_SIGN, id="the-smallest-magnitude"),
        pytest.param(-TINY / 3, BINS_PER_SIGN, id="below-it"),
        pytest.param(1e-45, BINS_PER_SIGN, id="subnormal"),
        pytest.param(TINY * 1.01, BINS_PER_SIGN + 1, id="first-positive-bin"),
        pytest.param(-TINY * 1.01, BINS_PER_SIGN - 1, id="first-negative-bin"),
        pytest.param(1.01, BINS_PER_SIGN + 1 - LOW * STEPS, id="one"),
        pytest.param(2.0**HIGH * 0.99, BINS - 1, id="last-bin"),
        pytest.param(1e7, BINS - 1, id="beyond-the-grid"),
        pytest.param(-1e7, 0, id="beyond-it-below"),
    ],
)
def test_bin_of(value: float, bin_: int) -> None:
    counts = observe(np.full((1, 6, 3), value))["histogram"].reshape(3, BINS)
    assert counts.sum() == 18
    np.testing.assert_array_equal(counts[:, bin_], [6, 6, 6])


@pytest.mark.parametrize("stride", [2, 3, 16, 1000])
def test_stride_thins_the_histogram_alone(stride: int) -> None:
    x = RNG.standard_normal((2, 25, 3)).astype(np.float32)
    all_rows, thinned = observe(x), observe(x, stride=stride)
    rows = x.reshape(-1, 3)[::stride]
    wanted = np.stack([np.bincount(bins_of(rows[:, c]), minlength=BINS) for c in range(3)])
    np.testing.assert_array_equal(thinned["histogram"].reshape(3, BINS), wanted)
    for part in ("rows", *PARTS):
        np.testing.assert_array_equal(thinned[part], all_rows[part])


def test_statistics_of_parts_merge_to_those_of_the_whole() -> None:
    x = RNG.standard_normal((6, 7, 3)).astype(np.float32)

    def stats(rows: np.ndarray) -> Stats:
        found = observe(rows)
        return Stats(
            count=int(found["rows"]),
            minimum=found["minimum"].astype(np.float64),
            maximum=found["maximum"].astype(np.float64),
            power_sums=np.stack([found[f"sum{i}"].astype(np.float64) for i in range(1, 5)]),
            histogram=found["histogram"].astype(np.int64).reshape(-1, BINS),
            gram=found["gram"].astype(np.float64),
        )

    whole, merged = stats(x), stats(x[:2]).merge(stats(x[2:]))
    assert merged.count == whole.count
    np.testing.assert_array_equal(merged.minimum, whole.minimum)
    np.testing.assert_array_equal(merged.maximum, whole.maximum)
    np.testing.assert_array_equal(merged.histogram, whole.histogram)
    np.testing.assert_allclose(merged.power_sums, whole.power_sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged.gram, whole.gram, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("channels", [3, GRAM_BLOCK, GRAM_BLOCK + 1, 2 * GRAM_BLOCK])
def test_gram_matrices_of_blocks_of_channels(channels: int, stride: int) -> None:
    text = f"g (float[B,S,{channels}] x) => (float[B,S,{channels}] y) {{ y = Relu (x) }}"
    model = typed(from_text(HEADER + text))
    Observe({0: "x"}, histogram_stride=1000, gram_stride=stride)(model)
    x = RNG.standard_normal((2, 15, channels)).astype(np.float32)
    found = run_model(model, {"x": x})["observer.0.gram"]
    blocks = -(-channels // GRAM_BLOCK)
    rows = np.zeros((30, blocks * GRAM_BLOCK))
    rows[:, :channels] = x.reshape(30, channels)
    split = rows[::stride].reshape(-1, blocks, GRAM_BLOCK)
    wanted = np.einsum("rbi,rbj->bij", split, split)
    assert found.shape == (blocks, GRAM_BLOCK, GRAM_BLOCK)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_a_value_that_does_not_exist_is_an_error() -> None:
    model = typed(from_text(HEADER + TEXT, w=W))
    with pytest.raises(KeyError, match="nowhere"):
        Observe({0: "nowhere"})(model)


def test_sites_of_one_width_share_the_empty_histogram() -> None:
    text = """g (float[M,3] x) => (float[M,3] z) { y = Relu (x) z = Neg (y) }"""
    model = from_text(HEADER + text)
    Observe({0: "x", 1: "y"}, channels={0: 3, 1: 3})(model)
    large = [v.name for v in model.graph.initializers.values() if v.shape == ir.Shape([3 * BINS])]
    assert len(large) == 1
