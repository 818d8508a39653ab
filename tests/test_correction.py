"""Bias correction: what is measured, and that a model is nearer to float with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcompile.passes.constants import derived
from qcompile.passes.correct_bias import CorrectBias

import qcompile
from qcompile.correction import plan_correction, shrunk
from qcompile.errors import CalibrationError
from qcompile.weighted import Weighted, find_weighted
from tests.cli_runner import RunCli
from tests.passes.rewriting import HEADER, typed
from tests.support import from_text, narrow, run_model

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def network() -> ir.Model:
    text = """g (float[N,3,6,6] x, float[8,3,3,3] w, float[8] b, float[8,1,3,3] d,
      float[128,5] u) => (float[N,5] y) {
      [one] t = Conv (x, w, b)
      [act] r = Relu (t)
      [two] s = Conv <pads=[1,1,1,1], group=8> (r, d)
      [flat] f = Flatten (s)
      [three] y = MatMul (f, u)
    }"""
    return typed(
        from_text(
            HEADER + text,
            w=random(8, 3, 3, 3), b=random(8), d=random(8, 1, 3, 3), u=random(128, 5),
        )
    )  # fmt: skip


def coarse(model: ir.Model) -> ir.Model:
    """The same with weights of five levels."""
    clone = model.clone()
    for op in find_weighted(clone.graph):
        step = np.abs(op.blocks()).max() / 2
        op.with_weight(derived(op.weight, "coarse", partial(rounded, step), op.weight.shape))
    return clone


def rounded(step: float, weight: np.ndarray) -> np.ndarray:
    return (np.rint(weight / step) * step).astype(np.float32)


FEED = {"x": random(200, 3, 6, 6) + 0.5}


def test_outputs_are_right_on_average_on_new_data(tmp_path: Path) -> None:
    model = network()
    compiled = coarse(model)
    batches = [{"x": part} for part in np.split(FEED["x"], 4)]
    plan = plan_correction(model, compiled, find_weighted(model.graph), batches, tmp_path)
    assert list(plan.shifts) == ["one", "two", "three"]
    new = {"x": random(200, 3, 6, 6) + 0.5}
    wanted, before = run_model(model, new)["y"], run_model(compiled, new)["y"]
    CorrectBias(plan)(compiled)
    after = run_model(compiled, new)["y"]
    assert np.abs((wanted - after).mean(0)).max() < 0.2 * np.abs((wanted - before).mean(0)).max()
    assert np.square(wanted - after).mean() < np.square(wanted - before).mean()


def test_what_is_exact_needs_no_correction(tmp_path: Path) -> None:
    model = network()
    plan = plan_correction(model, model.clone(), find_weighted(model.graph), [FEED], tmp_path)
    assert not any(shift.any() for shift in plan.shifts.values())


def test_an_op_without_a_bias_is_left_where_its_kernel_takes_none(tmp_path: Path) -> None:
    model = network()
    ops: list[Weighted] = find_weighted(model.graph)
    plan = plan_correction(model, coarse(model), ops, [FEED], tmp_path, unbiased=["two", "three"])
    assert list(plan.shifts) == ["one"]
    assert plan.refused == dict.fromkeys(
        ["two", "three"], "it has no bias that is a part of its kernel"
    )


def test_data_that_a_graph_fails_on_is_an_error_of_calibration(tmp_path: Path) -> None:
    model, narrow_images = network(), [{"x": random(2, 3, 6, 5)}]
    with pytest.raises(CalibrationError, match="the model fails on the calibration data"):
        plan_correction(model, coarse(model), find_weighted(model.graph), narrow_images, tmp_path)


@given(
    st.lists(st.floats(-10, 10), min_size=2, max_size=20),
    st.integers(2, 1000),
)
def test_a_mean_is_shrunk_by_its_own_uncertainty(values: list[float], times: int) -> None:
    """Never past zero, never beyond the mean, and ever less the more values there are."""
    x = np.array(values)[:, None]
    mean, square = x.mean(0), np.square(x).mean(0)
    few, many = (shrunk(mean, square, len(x) * n) for n in (1, times))
    for part in (few, many):
        assert (part * mean >= 0).all()
        assert (np.abs(part) <= np.abs(mean)).all()
    assert (np.abs(few) <= np.abs(many)).all()
    assert shrunk(mean, np.square(mean), 2) == pytest.approx(mean)


def test_one_value_tells_nothing_of_a_mean() -> None:
    mean = np.array([3.0])
    assert shrunk(mean, np.square(mean), 1) == 0.0


@pytest.mark.parametrize("corrected", [False, True])
def test_a_compiled_model_has_it(tmp_path: Path, corrected: bool) -> None:
    """A Linear without a bias has one then, and its kernel takes it."""
    made = qcompile.compile(
        str(narrow(tmp_path)),
        calibration=[{"x": random(64, 96) + 0.5}],
        config=qcompile.CompileConfig(objective="scheme", bias_correction=corrected),
        output=tmp_path / "made",
    )
    assert ("correct" in made.report.seconds) == corrected
    *_, kernel = ir.load(made.path / "model.onnx").graph
    assert kernel.op_type == "MatMulIntegerToFloat"
    bias = kernel.inputs[6] if len(kernel.inputs) > 6 else None
    assert (bias is not None) == corrected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scheme", "fp32", "--bias-correction"), "scheme fp32 quantises nothing"),
        (("--equalize",), "so equalize has no effect (--smooth moves scales there)"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    run_cli: RunCli, tiny_opt: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in run_cli(tiny_opt, *words).error
