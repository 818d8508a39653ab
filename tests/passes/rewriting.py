"""One assertion for a rewrite: the graph that comes out, what it computes, and that it is final."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from tests.support import (
    Feed,
    assert_idempotent,
    assert_same_graph,
    check_model,
    from_text,
    ops,
    run_model,
)

HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'


def assert_rewrites(
    pass_: ir.passes.PassBase,
    before: str,
    after: str,
    feed: Feed,
    *,
    atol: float,
    **weights: object,
) -> ir.Model:
    """`before` becomes `after`, computes the same, and a second run changes nothing.

    `weights` are constants by name, which the texts declare as inputs; where `after` declares one
    with fewer axes than it has, its leading ones are dropped.
    """
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    model = typed(from_text(HEADER + before, **arrays))
    wanted = run_model(model, feed, optimise=False)
    result = pass_(model)
    assert result.modified
    expected = ir.from_onnx_text(HEADER + after)
    needed = {
        str(v.name): arrays[str(v.name)].reshape(arrays[str(v.name)].shape[-len(v.shape or ()) :])
        for v in expected.graph.inputs
        if v.name in arrays
    }
    assert_same_graph(result.model, from_text(HEADER + after, **needed))
    check_model(result.model)
    found = run_model(result.model, feed, optimise=False)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol)
    assert_idempotent(pass_, result.model)
    return result.model


def assert_leaves(pass_: ir.passes.PassBase, text: str, **weights: object) -> None:
    """The pass rewrites nothing in `text` (it may still learn shapes)."""
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    model = typed(from_text(HEADER + text, **arrays))
    before = ops(model)
    pass_(model)
    assert ops(model) == before
    assert_idempotent(pass_, model)


def typed(model: ir.Model) -> ir.Model:
    """Types and shapes, as every frontend provides them."""
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    return model
