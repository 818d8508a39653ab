"""ConstantShapes: shapes that are known but for batch and sequence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.constant_shapes import ConstantShapes

from tests.passes.rewriting import HEADER, typed
from tests.support import assert_idempotent, assert_same_graph, check_model, from_text, run_model

WIDTHS = {"heads": np.array([4]), "width": np.array([8]), "rest": np.array([-1])}
DECLARED = "int64[1] heads, int64[1] width, int64[1] rest"
SPLIT = """batch = Shape <start = 0, end = 1> (x) length = Shape <start = 1, end = 2> (x)
    size = Concat <axis = 0> (batch, length, heads, width)"""


def model_of(body: str, *dims: str | int) -> ir.Model:
    text = f"{HEADER}g (float[B,S,32] x, {DECLARED}) => (float[{','.join(map(str, dims))}] y)"
    model = typed(from_text(f"{text} {{ {body} }}", **WIDTHS))
    model.graph.outputs[0].shape = ir.Shape(dims)
    return model


@pytest.mark.parametrize("allowzero", ["", "<allowzero = 1>"])
def test_rewrite(allowzero: str) -> None:
    body = f"{SPLIT} y = Reshape {allowzero} (x, size)"
    before, model = (model_of(body, "B", "S", 4, 8) for _ in range(2))
    assert ConstantShapes()(model).modified
    after = f"{HEADER}g (float[B,S,32] x, int64[4] shape) => (float[B,S,4,8] y)"
    wanted = from_text(f"{after} {{ y = Reshape (x, shape) }}", shape=np.array([0, 0, 4, 8]))
    assert_same_graph(model, wanted)
    check_model(model)
    assert_idempotent(ConstantShapes(), model)
    feed = {"x": np.random.default_rng(0).random((2, 3, 32)).astype(np.float32)}
    np.testing.assert_array_equal(run_model(model, feed)["y"], run_model(before, feed)["y"])


@pytest.mark.parametrize(
    ("body", "dims"),
    [
        pytest.param(
            f"{SPLIT} turned = Concat <axis = 0> (length, batch, heads, width)"
            " y = Reshape (x, turned)",
            ("S", "B", 4, 8),
            id="dimensions that change places",
        ),
        pytest.param(
            f"{SPLIT} rows = Concat <axis = 0> (rest, width) y = Reshape (x, rows)",
            (None, 8),
            id="dimensions that become one",
        ),
        pytest.param(
            f"{SPLIT} y = Reshape <allowzero = 1> (x, size)", ("B", 0, 4, 8), id="an axis of none"
        ),
    ],
)
def test_other_shapes_stay(body: str, dims: tuple[str | int | None, ...]) -> None:
    model = model_of(body, *dims)  # type: ignore[arg-type]
    kinds = [node.op_type for node in model.graph]
    assert not ConstantShapes()(model).modified
    assert [node.op_type for node in model.graph] == kinds
