"""The shapes that speed is measured at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.config import Shape
from qcompile.errors import ConfigError
from qcompile.session import open_session
from qcompile.traced import Batch, TracedModel

_PROMPT: Final = 128

_ONE: Final = re.compile(r"([1-9]\d*)[x×]([1-9]\d*)")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """``1x128,8x512``: batch × sequence, from the command line.

    Raises:
        ConfigError: anything else.
    """
    found = [_ONE.fullmatch(part.strip()) for part in text.split(",")]
    shapes = [(int(match[1]), int(match[2])) for match in found if match is not None]
    if len(shapes) != len(found):
        raise ConfigError(f"shapes: {text!r} is not a list like 1x128,8x512 (batch x sequence)")
    return tuple(shapes)


def check_shapes(shapes: Sequence[Shape], model: TracedModel) -> None:
    """Refuse what `model` does not take: inputs that are no tokens, fixed sizes, too long.

    Raises:
        ConfigError: naming the shape or the input.
    """
    for spec in model.inputs if shapes else ():
        if len(spec.shape) != 2 or not np.issubdtype(spec.dtype, np.integer):
            raise ConfigError(
                f"shapes are of token inputs, and input {spec.name} is none",
                hint="leave them out: speed is then measured on a held-back sample",
            )
        for shape in shapes:
            if any(isinstance(d, int) and d != n for n, d in zip(shape, spec.shape, strict=True)):
                raise ConfigError(
                    f"shape {shape[0]}x{shape[1]} does not fit input {spec.name}, which is "
                    + "x".join(map(str, spec.shape))
                )
    check_lengths(shapes, model.max_length)


def check_lengths(shapes: Sequence[Shape], positions: int | None) -> None:
    """Refuse shapes of more tokens than a model has `positions`; None: it has any number.

    Raises:
        ConfigError: naming the shape.
    """
    for batch, sequence in shapes:
        if positions is not None and sequence > positions:
            raise ConfigError(
                f"shape {batch}x{sequence} is longer than the model's {positions} positions"
            )


def default_shapes(model: TracedModel) -> tuple[Shape, ...]:
    """One prompt, and one decode step of what generates; none where inputs are no tokens."""
    free = all(
        len(spec.shape) == 2
        and np.issubdtype(spec.dtype, np.integer)
        and not any(isinstance(dim, int) for dim in spec.shape)
        for spec in model.inputs
    )
    tokens = any(spec.name == "input_ids" for spec in model.inputs)
    if not free or (model.kind == "other" and not tokens):
        return ()
    prompt = (1, min(_PROMPT, model.max_length or _PROMPT))
    return (prompt, (1, 1)) if model.kind == "text-generation" else (prompt,)


def prompt_length(model: TracedModel) -> int:
    """Tokens that come before a decode step that is timed."""
    return min(_PROMPT, (model.max_length or 1 << 20) - 1)


def timing_feeds(shapes: Sequence[Shape], held_back: Batch) -> list[Batch]:
    """One feed a shape: the first held-back sample, repeated and cut, without padding.

    Args:
        shapes: (batch, sequence) pairs that the model takes.
        held_back: token inputs by name, each [samples, tokens].
    """
    return [
        {name: _filled(name, value, *shape) for name, value in held_back.items()}
        for shape in shapes
    ]


def _filled(name: str, value: np.ndarray, batch: int, sequence: int) -> np.ndarray:
    if name == "position_ids":
        row = np.arange(sequence, dtype=value.dtype)
    elif name == "attention_mask":
        row = np.ones(sequence, value.dtype)
    else:
        row = np.resize(value[0], sequence)
    return np.tile(row, (batch, 1))


def shape_of(feed: Batch) -> Shape:
    """Batch and sequence of `feed`: the first two sizes of its first input, or 1."""
    dims = (*next(iter(feed.values())).shape, 1, 1)
    return dims[0], dims[1]


def rows_of(
    model: ir.Model, values: Mapping[str, str], feeds: Sequence[Batch], work: Path
) -> dict[str, list[int]]:
    """Rows, the product of all axes but the last, of some values on each feed.

    Args:
        model: the graph; it is cloned.
        values: key -> name of a value.
        feeds: to run on.
        work: the folder that holds the graph's external weights.

    Returns:
        key -> rows, one for each feed.
    """
    clone = model.clone()
    found = ir.convenience.create_value_mapping(clone.graph)
    clone.graph.outputs.clear()
    for at, name in enumerate(values.values()):
        tape = ir.tape.Tape()
        shape = tape.op("Shape", [found[name]])
        shape.name, shape.dtype = f"rows.{at}", ir.DataType.INT64
        clone.graph.extend(list(tape.nodes))
        clone.graph.outputs.append(shape)
    RemoveUnusedNodesPass()(clone)
    path = work / "rows.onnx"
    ir.save(clone, path)
    session = open_session(path)
    path.unlink()
    wanted = [i.name for i in session.get_inputs()]
    rows: dict[str, list[int]] = {key: [] for key in values}
    for feed in feeds:
        shapes = session.run(None, {name: feed[name] for name in wanted})
        for key, shape in zip(values, shapes, strict=True):
            rows[key].append(int(np.prod(shape[:-1])))
    return rows
