"""Generated inputs: random ones that a graph accepts, or an example with jitter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal

import numpy as np
import onnx_ir as ir

from qcompile.calibration.feeds import feed_samples
from qcompile.calibration.samples import Sample, take
from qcompile.calibration.tokens import check_length
from qcompile.config import CompileConfig
from qcompile.errors import CalibrationError
from qcompile.traced import Batch, InputSpec, TracedModel

_JITTER: Final = 0.1
_IMAGE_SIDE: Final = 224
_LARGEST_INPUT: Final = 2**28  # elements; more than any calibration input has

# Between an input and the table that it indexes.
_TRANSPARENT: Final = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


def generated_samples(
    model: TracedModel,
    config: CompileConfig,
    wanted: int,
    progress: Callable[[int, int], None],
) -> tuple[list[Sample], str]:
    """Samples that count for `wanted`, or fewer where they repeat; and what they are, in words.

    Raises:
        CalibrationError: the example does not fit the graph.
        ConfigError: `config.seq_len` is more than the model's positions.
    """
    rng = np.random.default_rng(config.seed)
    if model.example is None:
        how = "random inputs"
        feeds = _random_feeds(model, config, rng)
    else:
        how = "the example input with jitter"
        feeds = _jittered(model.example, rng)

    def numbered() -> Iterator[tuple[str, Batch]]:
        for done in range(wanted):
            yield how, next(feeds)
            progress(done + 1, wanted)

    samples = take(feed_samples(numbered(), model), wanted)
    progress(wanted, wanted)
    return samples, how


def _random_feeds(
    model: TracedModel, config: CompileConfig, rng: np.random.Generator
) -> Iterator[Batch]:
    shapes = _shapes(model, config)
    limits = {str(value.name): _limit(value, model) for value in model.ir.graph.inputs}
    while True:
        yield {
            spec.name: _random(spec, shapes[spec.name], limits[spec.name], rng)
            for spec in model.inputs
        }


def _random(
    spec: InputSpec, shape: tuple[int, ...], limit: int, rng: np.random.Generator
) -> np.ndarray:
    if spec.dtype == np.bool_ or _role(spec.name) == "mask":
        return np.ones(shape, dtype=spec.dtype)
    if spec.dtype.kind not in "iu":
        return rng.standard_normal(shape).astype(spec.dtype)
    if _role(spec.name) == "positions" and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(spec.dtype)
    if _role(spec.name) == "segments":
        return np.zeros(shape, dtype=spec.dtype)
    return rng.integers(0, limit, size=shape).astype(spec.dtype)


def _jittered(example: Batch, rng: np.random.Generator) -> Iterator[Batch]:
    """The example, then the same with noise on floats and with integers drawn from its own."""
    yield example
    while True:
        feed: Batch = {}
        for name, array in example.items():
            if array.dtype.kind == "f" and array.size:
                scale = _JITTER * float(np.std(array, dtype=np.float64))
                noise = rng.standard_normal((2, *array.shape))
                moved = array * (1 + _JITTER * noise[0]) + scale * noise[1]
                feed[name] = moved.astype(array.dtype)
            elif array.dtype.kind in "iu" and array.size and _role(name) is None:
                feed[name] = rng.choice(array.ravel(), size=array.shape)
            else:
                feed[name] = array
        yield feed


def _role(name: str) -> Literal["mask", "positions", "segments"] | None:
    """What an input is, where its name tells: then its values are not free."""
    name = name.lower()
    if "mask" in name:
        return "mask"
    if "position" in name:
        return "positions"
    if "token_type" in name or "segment" in name:
        return "segments"
    return None


def _shapes(model: TracedModel, config: CompileConfig) -> dict[str, tuple[int, ...]]:
    """Sizes for the symbolic dimensions: 1 for the batch, a square image, tokens for the rest."""
    sizes: dict[str, int] = {}
    for spec in model.inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                if axis == 0:
                    size = 1
                elif len(spec.shape) == 4 and axis >= 2:
                    size = _IMAGE_SIDE
                else:
                    size = check_length(config.seq_len, model)
                sizes.setdefault(dim, size)
    shapes = {
        spec.name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
        for spec in model.inputs
    }
    for name, shape in shapes.items():
        if np.prod(shape, dtype=float) > _LARGEST_INPUT:
            raise CalibrationError(
                f"input {name!r} of shape {list(shape)} is too large to generate",
                hint="give --calibration",
            )
    return shapes


def _limit(value: ir.Value, model: TracedModel) -> int:
    """How many values an integer input can take: rows of the tables that it indexes."""
    rows = list(_table_rows(value))
    if model.tokenizer is not None and "input_ids" in str(value.name):
        rows.append(len(model.tokenizer))
    # Without any table an integer is most likely a flag.
    return min(rows, default=2)


def _table_rows(value: ir.Value) -> Iterator[int]:
    for node, at in value.uses():
        if node.op_type == "Gather" and at == 1:
            table = node.inputs[0]
            axis = node.attributes.get_int("axis", 0)
            if table is not None and table.const_value is not None and axis == 0:
                yield int(table.const_value.shape.numpy()[0])
        elif node.op_type in _TRANSPARENT and at == 0:
            yield from _table_rows(node.outputs[0])
