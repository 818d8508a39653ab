"""What llm-int8 asks of its neighbours: of ops that read the same, of heads, of float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.targets.ort_cpu import OrtCpu

from qcompile.calibration.run import calibrate
from qcompile.config import CompileConfig
from qcompile.decomposition import scale_away
from qcompile.errors import ConfigError
from qcompile.linears import find_sites
from qcompile.options import Options, find_options
from qcompile.planfile import PlanFile
from qcompile.precision import Choice, Label
from qcompile.schemes import get_scheme
from qcompile.smoothing import plan_smoothing
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text
from tests.test_outliers import stats_of

RNG = np.random.default_rng(0)
TARGET = OrtCpu("vnni")


def attention() -> ir.Model:
    """Two heads of keys for four of queries: channel 5 of what o reads is made with channel 1."""
    text = """g (float[B,S,16] x, float[16,16] wq, float[16,8] wk, float[16,8] wv, float[16,4] wo)
      => (float[B,S,4] o) {
      [q] q = MatMul (x, wq) [k] k = MatMul (x, wk) [v] v = MatMul (x, wv)
      [a] a = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v) [o] o = MatMul (a, wo) }"""
    shapes = {"wq": (16, 16), "wk": (16, 8), "wv": (16, 8), "wo": (16, 4)}
    weights = {n: RNG.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    model = typed(from_text(HEADER + text, **weights))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    return model


def options_of(scheme: str, recipe: dict[str, Any]) -> dict[str, Options]:
    sites = find_sites(attention().graph)
    config = CompileConfig(recipe=recipe)  # type: ignore[arg-type]
    return find_options(sites, config, get_scheme(scheme), TARGET)


@pytest.mark.parametrize("precision", ["w8a16", "w4a16"])
def test_no_blocks_of_codes_beside_it(precision: str) -> None:
    with pytest.raises(ConfigError, match=r"q cannot be weight\d beside llm-int8"):
        options_of("llm-int8", {"q": precision})
    assert options_of("llm-int8", {"o": precision})["o"].labels[0].startswith("weight")
    assert options_of("llm-int8", {"q": "float"})["q"].labels == ("float",)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_who_stays_in_float_for_it_says_so(scheme: str) -> None:
    alone, found = options_of(scheme, {}), options_of(scheme, {"q": "llm-int8"})
    assert found["q"].labels == ("llm-int8",)
    for name in ("k", "v"):
        assert found[name].labels == ("float",)
        lost = alone[name].labels[0]
        assert found[name].reason == (
            f"scheme {scheme}; not {lost}, for what others make of its activation"
        )
    assert found["o"] == alone["o"]


def plan_file(labels: dict[str, Label]) -> PlanFile:
    return PlanFile(target="ort-cpu", scheme="llm-int8", ops=labels, smoothing={})


def test_a_plan_has_none_beside_it_either() -> None:
    sites, options = find_sites(attention().graph), options_of("llm-int8", {})
    labels: dict[str, Label] = dict.fromkeys("qkvo", "llm-int8")
    assert plan_file(labels).chosen(options, sites, TARGET)["k"] == Choice("llm-int8", "plan")
    with pytest.raises(ConfigError, match="in two ways"):
        plan_file({**labels, "k": "weight4"}).chosen(options, sites, TARGET)
    plan_file({**labels, "k": "float"}).chosen(options, sites, TARGET)


def test_a_plan_that_keeps_no_channel_is_none(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_file({"q": "llm-int8"}).model_dump_json().replace(
        '"kept":{}', '"kept":{"q":[]}'
    ), "utf-8")  # fmt: skip
    with pytest.raises(ConfigError, match=r"is not a plan: kept\.q"):
        PlanFile.read(path)


def test_a_plan_keeps_channels_of_shared_heads_together(tmp_path: Path) -> None:
    model = attention()
    sites = find_sites(model.graph)
    x = RNG.standard_normal((4, 6, 16)).astype(np.float32)
    stats = calibrate(model, sites, [{"x": x}], tmp_path)
    chosen = {n: Choice("llm-int8" if n == "o" else "float", "test") for n in "qkvo"}
    config = CompileConfig()
    plan = plan_smoothing(sites, stats, config, chosen, kept={"o": [1, 5]})
    found = plan.of("o")
    assert found is not None and found.kept is not None and found.kept.tolist() == [1, 5]
    with pytest.raises(ConfigError, match="share stay in float together: the plan leaves 5 out"):
        plan_smoothing(sites, stats, config, chosen, kept={"o": [1]})


def test_rows_of_float16_weights_stay_in_its_range() -> None:
    x = np.full((10, 16), 1e-2, np.float32)
    x[:, 3] = 5e3
    stats, alone, found = stats_of(x), np.arange(16), np.array([3])
    rows = np.full(16, 0.7)
    assert scale_away(stats, found, alone)[3] * 0.7 > 65504
    scale = scale_away(stats, found, alone, rows)
    assert 65504 / 2 < scale[3] * 0.7 <= 65504
    x[:, 3] = 1.0
    near = scale_away(stats_of(x), found, alone, rows)
    np.testing.assert_array_equal(near, scale_away(stats_of(x), found, alone))
