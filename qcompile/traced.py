"""What a frontend hands to the pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from qcompile.checkpoints import Checkpoint

Batch: TypeAlias = dict[str, np.ndarray]
"""One feed of a session: graph input name -> array."""

Kind: TypeAlias = Literal[
    "text-generation", "text-classification", "image-classification", "feature-extraction", "other"
]
"""How the outputs are compared: logits per token, per sequence, per image, embeddings, anything."""

LOGITS: Final[frozenset[Kind]] = frozenset(
    {"text-generation", "text-classification", "image-classification"}
)
"""The kinds whose outputs are distributions over classes."""

POSITIONS: Final = ("max_position_embeddings", "n_positions", "n_ctx")
"""What a Transformers configuration calls the tokens that a model has positions for."""


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """A graph input: its name, numpy dtype and dimensions (an int, or a symbol's name)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


@dataclasses.dataclass
class TracedModel:
    """A float ONNX graph and how to feed it.

    Attributes:
        ir: the graph; its initializers may lie in external files below the work folder.
        name: the model's name, for the default output folder.
        task: optimum's task name, or ``other``.
        kind: which accuracy measure applies.
        tokenizer: the model's own Transformers tokenizer, where it has one.
        image_processor: the model's own Transformers image processor, where it has one.
        assets: files to copy into the artifact (configuration, tokenizer).
        max_length: the longest sequence the model takes, where it says so.
        example: one valid feed, where the source gave one (``file.py:factory``).
        checkpoint: the codes that the float weights stand for, where the source holds codes.
        adapter: module paths that an adapter added beside the weights.
    """

    ir: ir.Model
    name: str
    task: str
    kind: Kind
    tokenizer: Any = None
    image_processor: Any = None
    assets: tuple[Path, ...] = ()
    max_length: int | None = None
    example: Batch | None = None
    bos_token_id: int | None = None
    checkpoint: Checkpoint | None = None
    adapter: frozenset[str] = frozenset()

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The graph's inputs, initializers left out."""
        return tuple(_input_spec(v) for v in self.ir.graph.inputs if v.const_value is None)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(str(v.name) for v in self.ir.graph.outputs)


def _input_spec(value: ir.Value) -> InputSpec:
    dims: list[int | str] = []
    for at, dim in enumerate(value.shape or ()):
        if isinstance(dim, int):
            dims.append(dim)
        else:
            dims.append(dim.value or f"{value.name}_{at}")
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    return InputSpec(name=str(value.name), dtype=np.dtype(dtype), shape=tuple(dims))
