"""Graphs for PyTorch to evaluate: what they are fed, and all that it computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.torch_graph import Values, check_supported, evaluate, frontier
from tests.support import Feed

TOLERANCE = 1e-5


def draw(model: ir.Model, seed: int = 0) -> Feed:
    """Inputs by type and name: `p` is positive, `eye` and `left` are masks of their names."""
    rng = np.random.default_rng(seed)
    feed: Feed = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = value.shape.numpy()
        array: np.ndarray = rng.standard_normal(shape)
        if value.name == "p":
            array = np.abs(array) + 0.5
        elif value.name == "eye":
            array = rng.random(shape) < 0.5
            if len(shape) > 1:  # no row is without a token
                array |= np.eye(*shape[-2:], dtype=np.bool_)
        elif value.name == "left":
            array = np.ones(shape, bool)
            array[..., :2] = False  # two tokens of padding on the left
        elif value.dtype == ir.DataType.INT64:
            array = rng.integers(1, 9, shape)
        feed[str(value.name)] = array.astype(value.dtype.numpy())
    return feed


def evaluated(model: ir.Model, feed: Feed) -> Values:
    nodes = list(model.graph)
    check_supported(nodes)
    return evaluate(nodes, {value: feed[str(value.name)] for value in frontier(nodes)}, {})
