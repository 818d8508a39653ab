"""calibrate: the observed graph against numpy, in any division of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calibration.run import GRAM_STRIDE, calibrate
from qcompile.calibration.stats import Array, Stats, bin_centers
from qcompile.errors import CalibrationError
from qcompile.linears import find_sites
from qcompile.names import set_module_path
from qcompile.traced import Batch
from tests.calibration.test_stats import gram_of, stats_of
from tests.support import from_text

WIDTH, HIDDEN = 4, 6
RNG = np.random.default_rng(0)
W1 = RNG.standard_normal((WIDTH, HIDDEN)).astype(np.float32)
W2 = RNG.standard_normal((HIDDEN, 2)).astype(np.float32)


def network(body: str = "a = MatMul(x, w1) h = Relu(a) y = MatMul(h, w2)") -> ir.Model:
    """Two Linears called up and down, `body` between input and output."""
    model = from_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[b, s, {WIDTH}] x, float[i, j] w1, float[k, l] w2) => (float y)
        <float[b, s, {HIDDEN}] h> {{ {body} }}""",
        w1=W1,
        w2=W2,
    )
    name_linears(model, ["mlp.up", "mlp.down"])
    return model


def name_linears(model: ir.Model, names: list[str]) -> None:
    linears = [node for node in model.graph if node.op_type == "MatMul"]
    for node, name in zip(linears, names, strict=True):
        set_module_path(node, name)


def statistics(
    batches: list[Array], work: Path, *, stride: int = 1, model: ir.Model | None = None
) -> dict[str, Stats]:
    graph = model or network()
    feeds: list[Batch] = [{"x": batch} for batch in batches]
    return calibrate(graph, find_sites(graph.graph), feeds, work, histogram_stride=stride)


def grid_values(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Values in the middle of histogram bins, where float32 cannot put them in another."""
    centers = bin_centers()
    usual = centers[np.abs(centers) < 50.0]
    return np.random.default_rng(seed).choice(usual, shape).astype(np.float32)


def assert_close(actual: Stats, expected: Stats) -> None:
    assert actual.count == expected.count
    np.testing.assert_allclose(actual.minimum, expected.minimum, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual.maximum, expected.maximum, rtol=1e-5, atol=1e-6)
    # Sums that cancel are as exact as the largest term: four powers of a float32.
    scale = np.abs(expected.power_sums).max(1, keepdims=True)
    np.testing.assert_array_less(np.abs(actual.power_sums - expected.power_sums) / scale, 1e-4)


def test_statistics_are_numpys(tmp_path: Path) -> None:
    batches = [grid_values((2, 5, WIDTH), seed) for seed in range(3)]
    found = statistics(batches, tmp_path)
    assert list(found) == ["mlp.up", "mlp.down"]
    rows = np.concatenate(batches).reshape(-1, WIDTH)
    assert_close(found["mlp.up"], stats_of(rows.astype(np.float64)))
    np.testing.assert_array_equal(found["mlp.up"].histogram, stats_of(rows).histogram)
    hidden = np.maximum(rows @ W1, 0.0).astype(np.float64)
    assert_close(found["mlp.down"], stats_of(hidden))
    assert (found["mlp.down"].histogram.sum(1) == len(rows)).all()


def test_the_gram_matrix_is_of_every_few_rows(tmp_path: Path) -> None:
    rows = grid_values((1, 4 * GRAM_STRIDE + 1, WIDTH))
    gram = statistics([rows], tmp_path)["mlp.up"].gram
    np.testing.assert_allclose(gram, gram_of(rows[0, ::GRAM_STRIDE].astype(np.float64)), rtol=1e-4)


def test_nothing_is_left_in_the_work_folder(tmp_path: Path) -> None:
    found = statistics([grid_values((1, 2, WIDTH))], tmp_path)
    assert found
    assert not list(tmp_path.iterdir())


def test_the_division_into_batches_does_not_matter(tmp_path: Path) -> None:
    everything = grid_values((12, GRAM_STRIDE, WIDTH))  # every part begins at a row that counts
    whole = statistics([everything], tmp_path)
    parts = statistics([everything[:1], everything[1:8], everything[8:]], tmp_path)
    turned = statistics([everything[8:], everything[:1], everything[1:8]], tmp_path)
    for name, stats in whole.items():
        for other in (parts[name], turned[name]):
            assert_close(other, stats)
            np.testing.assert_array_equal(other.histogram, stats.histogram)
            np.testing.assert_allclose(other.gram, stats.gram, rtol=1e-4, atol=1e-3)


def test_a_stride_thins_the_histogram_alone(tmp_path: Path) -> None:
    rows = grid_values((1, 32, WIDTH))
    thin = statistics([rows], tmp_path, stride=16)["mlp.up"]
    np.testing.assert_array_equal(thin.histogram, stats_of(rows[0, ::16]).histogram)
    assert thin.count == 32
    assert_close(thin, stats_of(rows[0].astype(np.float64)))


def test_the_graph_itself_is_not_changed(tmp_path: Path) -> None:
    model = network()
    before = ir.to_onnx_text(model)
    found = statistics([grid_values((1, 2, WIDTH))], tmp_path, model=model)
    assert found
    assert ir.to_onnx_text(model) == before


def test_linears_that_share_an_input_are_one_site(tmp_path: Path) -> None:
    model = from_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[b, s, {WIDTH}] x, float[i, j] w, float[k, l] v) => (float y)
        {{ a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b) }}""",
        w=W1,
        v=-W1,
    )
    name_linears(model, ["mlp.gate", "mlp.up"])
    assert list(statistics([grid_values((1, 2, WIDTH))], tmp_path, model=model)) == [
        "mlp.{gate,up}"
    ]


def test_progress_counts_batches(tmp_path: Path) -> None:
    graph, seen = network(), list[tuple[int, int]]()
    feeds: list[Batch] = [{"x": grid_values((1, 2, WIDTH))} for _ in range(3)]
    calibrate(
        graph,
        find_sites(graph.graph),
        feeds,
        tmp_path,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_no_sites_run_nothing(tmp_path: Path) -> None:
    assert calibrate(network(), [], [{}], tmp_path) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_not_finite_names_its_module(tmp_path: Path, value: float) -> None:
    rows = grid_values((1, 8, WIDTH))
    rows[0, 3, 1] = value
    with pytest.raises(CalibrationError, match=r"the input of mlp\.up is NaN or infinite"):
        statistics([grid_values((1, 8, WIDTH)), rows], tmp_path)


def test_an_activation_that_becomes_nan_names_the_module_that_reads_it(tmp_path: Path) -> None:
    model = network("a = MatMul(x, w1) h = Sqrt(a) y = MatMul(h, w2)")
    with pytest.raises(CalibrationError, match=r"the input of mlp\.down is NaN or infinite"):
        statistics([grid_values((1, 8, WIDTH))], tmp_path, model=model)


def test_a_large_activation_is_not_taken_for_infinite(tmp_path: Path) -> None:
    rows = grid_values((1, 8, WIDTH))
    rows[0, 3, 1] = 1e10  # its fourth power is no float32
    found = statistics([rows], tmp_path)
    assert found["mlp.up"].maximum[1] == np.float32(1e10)
