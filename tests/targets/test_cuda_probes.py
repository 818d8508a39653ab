"""What is timed for ort-cuda, and what is planned from a stored table; no GPU is needed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.targets.cuda import library
from qcompile.targets.cuda.schema import DOMAIN
from qcompile.targets.ort_cuda import OrtCuda

from qcompile.costs import CostTable
from qcompile.makers import MAKERS, Maker
from qcompile.precision import Label
from qcompile.probe import IDLE, Prober
from qcompile.probe_graphs import (
    Shape,
    cut_to_activations,
    linear_graph,
    maker_graph,
    plan_of,
    uncast_inputs,
)
from qcompile.session import HERE, Runtime
from tests.support import from_text

COPIES = 8
HALF = ir.DataType.FLOAT16


class Imagined(OrtCuda):
    """Its kernels' bodies run on the CPU and are timed there, as if on a GPU."""

    runs_here = True
    probe_bytes = 1 << 16

    def runtime(self, *_: Any, **__: Any) -> Runtime:
        return HERE


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "gpu", lambda: None)


def lowered(model: ir.Model, label: Label) -> Counter[str]:
    """The ops of a probe, lowered."""
    Prober(OrtCuda("sm90"), CostTable(machine={}), Path())._lower(model, label)
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        ("float", {"MatMul": COPIES}),
        ("token", {"MatMulInt8": COPIES, "QuantizeInt8": 1}),
        ("static", {"MatMulInt8": COPIES, "QuantizeInt8": 1}),
        ("fp8", {"MatMulFp8": COPIES, "QuantizeFp8": 1}),
        ("fp8-static", {"MatMulFp8": COPIES, "QuantizeFp8": 1}),
        ("weight8", {"MatMulNBits": COPIES}),
        ("weight4", {"MatMulNBits": COPIES}),
    ],
)
def test_a_probe_runs_the_kernels_of_a_model(
    label: Label, wanted: dict[str, int], bias: bool
) -> None:
    """And none besides: its input is of the type that the kernels read, its outputs stay whole."""
    model = linear_graph(Shape(1, 64, 32, bias), COPIES, sites=1, corners=False)
    adds = {"Add": COPIES} if bias and label == "float" else {}
    assert lowered(model, label) == wanted | adds
    assert [value.dtype for value in model.graph.inputs] == [HALF]
    assert [value.dtype for value in model.graph.outputs] == [HALF] * COPIES


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("label", ["float", "token", "static"])
def test_what_makes_an_activation_quantises_it(maker: Maker, label: Label) -> None:
    model = maker_graph(maker, 64, COPIES)
    lowered(model, label)
    cut_to_activations(model, corners=False)
    found = Counter(node.op_type for node in model.graph)
    fused = "ActivationInt8"
    if maker in ("LayerNormalization", "RMSNormalization"):
        fused = "LayerNormInt8" if maker == "LayerNormalization" else "RMSNormInt8"
    if label == "float":
        assert not any(node.domain == DOMAIN for node in model.graph)
    else:
        assert found == {fused: COPIES}
    assert all(value.dtype == HALF for value in model.graph.inputs)
    dtype = HALF if label == "float" else ir.DataType.INT8
    assert [value.dtype for value in model.graph.outputs] == [dtype] * COPIES


def test_only_an_input_that_is_cast_alone_changes_its_type() -> None:
    model = from_text(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[2] x, float[2] y) '
        "=> (float16[2] a, float16[2] b, float[2] c) "
        "{ p = Cast<to=10>(x) q = Cast<to=10>(x) r = Cast<to=10>(y) "
        "a = Add(p, q) b = Relu(r) c = Relu(y) }"
    )
    uncast_inputs(model.graph)
    assert [value.dtype for value in model.graph.inputs] == [HALF, ir.DataType.FLOAT]
    assert [node.op_type for node in model.graph] == ["Cast", "Add", "Relu", "Relu"]


def test_every_time_of_a_plan_can_be_taken(tmp_path: Path) -> None:
    table = CostTable(machine={})
    prober = Prober(Imagined("sm90"), table, tmp_path, seconds=0.01)
    labels: list[Label] = ["float", "token", "static", "weight8"]
    for rows in (1, 5):
        times = prober.linear(Shape(rows, 64, 32, False), labels)
        assert all(0.0 < seconds < np.inf for seconds in times.values())
        assert times["static"] == times["token"], "one kernel"
        for mode in ("token", "static"):
            assert prober.conversion(mode, rows, 64) > 0.0
            assert prober.fused("GatedSilu", mode, rows, 64) is not None
    linears = [
        f"{label} {rows}x64x32" for rows in (1, 5) for label in ("float", "token", "weight8")
    ]
    conversions = [f"quantize-{mode} {rows}x64" for rows in (1, 5) for mode in ("token", "static")]
    makers = [f"GatedSilu{end} {rows}x64" for rows in (1, 5) for end in ("", "-token", "-static")]
    assert sorted(table.seconds) == sorted(linears + conversions + makers)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_nothing_is_no_part_of_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 50 seconds, 10 are the run's own; a conversion takes one eighth of the rest."""
    monkeypatch.setattr(Prober, "_corners", False)
    monkeypatch.setattr("qcompile.probe._WARM", 0.0)
    found = {IDLE: 10.0, "quantize-token": 50.0, "float": 90.0, "token": 95.0}
    monkeypatch.setattr(
        "qcompile.probe.steady_medians",
        lambda runs, seconds: {key: found[key.partition(" ")[0]] for key in runs},
    )
    prober = Prober(Imagined("sm90"), CostTable(machine={}), tmp_path)
    times = prober.linear(Shape(1, 64, 32, False), ["float", "token"])
    assert prober.conversion("token", 1, 64) == 5.0
    assert times == {"float": 10.0, "token": 10.0}


def test_codes_of_a_probe_are_what_its_label_says() -> None:
    model = linear_graph(Shape(1, 64, 32, False), 1, sites=1)
    (op,) = plan_of(model, "weight4", "float16").ops
    assert op.weight is not None and op.weight.block_size == 32
    assert (op.weight.codes.min(), op.weight.codes.max()) == (-7, 7)
