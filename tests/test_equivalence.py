"""What counts as a difference, where numbers are not finite, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qcompile
from qcompile.equivalence import largest_difference
from qcompile.errors import VerificationError
from tests.edge.models import saved, weights
from tests.support import from_text

INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("wanted", "got", "difference"),
    [
        ([INF, -INF, NAN, 1.0], [INF, -INF, NAN, 1.5], 0.5),
        ([INF], [-INF], INF),
        ([1.0], [INF], INF),
        ([], [], 0.0),
    ],
)
def test_only_the_same_infinity_is_no_difference(
    wanted: list[float], got: list[float], difference: float
) -> None:
    found = largest_difference(np.array(wanted, np.float32), np.array(got, np.float32))
    assert found == difference


def test_one_that_is_not_a_number_differs() -> None:
    assert np.isnan(largest_difference(np.array([1.0]), np.array([NAN])))


def test_numbers_without_a_sign() -> None:
    assert largest_difference(np.array([0], np.uint8), np.array([1], np.uint8)) == 1.0


@pytest.mark.parametrize("target", ["ort-cpu:vnni", "onnx-edge"])
@pytest.mark.parametrize("outputs", ["float[N,16] l", "float[N,16] m, float[N,16] l"])
def test_infinite_outputs_are_refused_for_what_they_are(
    target: str, outputs: str, tmp_path: Path
) -> None:
    """And not for a rewriting, or for what ONNX Runtime's optimisations do."""
    model = from_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[N,32] x, float[32,16] w) => ({outputs}) {{
          m = MatMul (x, w) r = Relu (m) l = Log (r) }}""",
        **weights(w=(32, 16)),
    )
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((4, 32)).astype(np.float32)} for _ in range(8)]
    with pytest.raises(VerificationError) as caught:
        qcompile.compile(
            saved(model, tmp_path / "model.onnx"), target=target, calibration=feeds,
            config=qcompile.CompileConfig(objective="scheme"), output=tmp_path / "out",
        )  # fmt: skip
    said = "the float model's own outputs are NaN or infinite on the held-back data"
    assert str(caught.value).startswith(said) and ";" not in str(caught.value)
