"""Initializers derived from initializers, computed only when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

LARGEST: Final = 65504.0
"""Of float16. Its negative is what hides a score: a row that is hidden whole stays finite."""


def derived(
    source: ir.Value,
    suffix: str,
    function: Callable[[Any], Any],
    shape: ir.Shape | Sequence[int] | None,
) -> ir.Value:
    """A new initializer ``function(source)``, evaluated lazily and registered in source's graph.

    Args:
        source: an initializer; it is left as it is.
        suffix: appended to its name, made unique.
        function: array -> array of the same dtype.
        shape: the result's shape.
    """
    tensor, graph = source.const_value, source.graph
    assert tensor is not None and graph is not None and shape is not None

    def evaluate(tensor: ir.TensorProtocol = tensor) -> ir.Tensor[Any]:
        array = np.ascontiguousarray(function(tensor.numpy()))
        return ir.Tensor(array, name=name)

    name = unique_initializer_name(graph, f"{source.name}/{suffix}")
    dims = ir.Shape(shape)
    lazy = ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=dims, name=name)
    value = ir.Value(name=name, shape=dims, type=ir.TensorType(tensor.dtype), const_value=lazy)
    graph.register_initializer(value)
    return value


def constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """A new initializer that holds `array`, its name made unique."""
    name = unique_initializer_name(graph, name)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def shared_constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """The constant `array`, one for all who ask by `name`."""
    name = f"{name}.{'x'.join(map(str, np.ravel(array)))}"
    return graph.initializers[name] if name in graph.initializers else constant(graph, name, array)


def unique_initializer_name(graph: ir.Graph, name: str) -> str:
    """`name`, or `name.1`, `name.2`, … where it is taken."""
    taken, candidate, number = graph.initializers, name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}.{number}"
    return candidate


def sole_use(value: ir.Value | None) -> bool:
    """True where exactly one node input reads `value` and it is not a graph output."""
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads."""
    RemoveUnusedNodesPass()(model)
