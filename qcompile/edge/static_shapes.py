"""Give a graph's inputs their shapes for good."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from onnxscript.optimizer import fold_constants

from qcompile.edge.options import Dims
from qcompile.edge.profiles import Profile
from qcompile.errors import ConfigError
from qcompile.passes.constants import drop_unused
from qcompile.passes.symbolic_shapes import SymbolicShapes
from qcompile.traced import TracedModel

_FOLDED_OVER: int = 1 << 24
"""Elements of a constant that is not computed ahead of time: masks are smaller."""


def check_input_shapes(
    model: TracedModel, shapes: Mapping[str, Dims], profile: Profile
) -> dict[str, int]:
    """Sizes of the graph's free dimensions, by their name.

    Raises:
        ConfigError: no such input, a shape that contradicts the model or another shape, or a
            profile that wants all shapes and has not got them.
    """
    specs = {spec.name: spec for spec in model.inputs}
    sizes: dict[str, int] = {}
    for name, dims in shapes.items():
        spec = specs.get(name)
        text = "x".join(map(str, dims))
        if spec is None:
            raise ConfigError(
                f"shape {name}={text}: the model has no input {name}",
                hint="one of " + ", ".join(specs),
            )
        wanted = "x".join(map(str, spec.shape)) or "a scalar"
        if len(dims) != len(spec.shape):
            raise ConfigError(f"shape {name}={text} contradicts the model, which takes {wanted}")
        for size, dim in zip(dims, spec.shape, strict=True):
            if size != (dim if isinstance(dim, int) else sizes.setdefault(dim, size)):
                against = "the model" if isinstance(dim, int) else "another shape"
                raise ConfigError(
                    f"shape {name}={text} contradicts {against}: the model takes {wanted}"
                )
        if spec.dtype.kind == "i" and len(dims) == 2 and dims[1] > (model.max_length or dims[1]):
            raise ConfigError(
                f"shape {name}={text} is longer than the model's {model.max_length} positions"
            )
    free = [
        spec
        for spec in model.inputs
        if any(isinstance(dim, str) and dim not in sizes for dim in spec.shape)
    ]
    if free and profile.static_shapes:
        raise ConfigError(
            f"profile {profile.name} wants every shape to be known, and input {free[0].name} is "
            + "x".join(map(str, free[0].shape)),
            hint=f"--shape {free[0].name}=" + "x".join("N" for _ in free[0].shape),
        )
    return sizes


def bind_shapes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Write `sizes` of named dimensions into the graph, and compute what follows from them."""
    if not sizes:
        return
    for value in model.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([_size(value, at, sizes) for at in range(len(value.shape))])
    for node in model.graph.all_nodes():
        for value in node.outputs:
            # Inferred again: what a symbol stood for may be in a product of several.
            value.shape = None
    for value in model.graph.outputs:
        value.shape = None
    fold_shapes(model)


def fold_shapes(model: ir.Model) -> None:
    """Shapes of everything, and what can be computed from them and from constants."""
    infer_shapes(model)
    fold_constants(model, input_size_limit=_FOLDED_OVER, output_size_limit=_FOLDED_OVER)
    drop_unused(model)
    infer_shapes(model)


def infer_shapes(model: ir.Model) -> None:
    """Shapes and types of everything, as far as they follow from the inputs."""
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    SymbolicShapes()(model)


def _size(value: ir.Value, at: int, sizes: Mapping[str, int]) -> int | str | None:
    assert value.shape is not None
    dim = value.shape[at]
    if isinstance(dim, int):
        return dim
    name = dim.value or f"{value.name}_{at}"
    return sizes.get(name, dim.value)
