"""The graph inputs that token ids alone determine, and the sizes that the graph fixes."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from qcompile.config import CompileConfig
from qcompile.errors import CalibrationError, ConfigError
from qcompile.traced import Batch, InputSpec, TracedModel

_KNOWN: Final = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


@dataclasses.dataclass(frozen=True)
class TokenInputs:
    """How a graph takes token ids.

    Attributes:
        specs: the graph's inputs, all of them known.
        batch: the batch size, where the graph fixes it.
        length: the sequence length, where the graph fixes it.
    """

    specs: tuple[InputSpec, ...]
    batch: int | None
    length: int | None

    @classmethod
    def of(cls, model: TracedModel) -> TokenInputs:
        """Read from the graph's inputs.

        Raises:
            CalibrationError: an input that token ids do not determine, or none that takes them.
        """
        specs = model.inputs
        if not any(spec.name == "input_ids" for spec in specs):
            names = ", ".join(spec.name for spec in specs) or "no input"
            raise CalibrationError(
                f"text cannot be fed to this graph: it takes {names}, and not input_ids",
                hint=_NPZ_HINT,
            )
        for spec in specs:
            if spec.name not in _KNOWN:
                raise CalibrationError(
                    f"text alone does not determine the graph's input {spec.name!r}",
                    hint=_NPZ_HINT,
                )
            if len(spec.shape) != 2:
                raise CalibrationError(
                    f"the graph's input {spec.name!r} has {len(spec.shape)} dimensions, where text "
                    "gives two (batch, sequence)",
                    hint=_NPZ_HINT,
                )
        return cls(specs, batch=_fixed(specs, 0), length=_fixed(specs, 1))

    def feed(self, ids: np.ndarray, *, real: int | None = None) -> Batch:
        """The inputs for `ids` (batch, sequence), of which the first `real` columns are meant."""
        length = ids.shape[1]
        mask = np.arange(length) < (length if real is None else real)
        columns = {
            "input_ids": ids,
            "attention_mask": np.broadcast_to(mask, ids.shape),
            "position_ids": np.broadcast_to(np.arange(length), ids.shape),
            "token_type_ids": np.zeros(ids.shape),
        }
        return {
            spec.name: np.ascontiguousarray(columns[spec.name], dtype=spec.dtype)
            for spec in self.specs
        }


def sequence_length(model: TracedModel, inputs: TokenInputs, config: CompileConfig) -> int:
    """Tokens of a full sample: what the graph fixes, else `config.seq_len`.

    Raises:
        ConfigError: the model's positions end before that.
    """
    return check_length(inputs.length or config.seq_len, model)


def check_length(length: int, model: TracedModel) -> int:
    """`length`, if the model has as many positions.

    Raises:
        ConfigError: it has fewer.
    """
    return check_positions(length, model.max_length, model.name)


def check_positions(length: int, positions: int | None, name: str) -> int:
    """`length`, if the model `name` has as many `positions`; None: it has any number.

    Raises:
        ConfigError: it has fewer.
    """
    if positions is not None and length > positions:
        raise ConfigError(
            f"a sequence of {length} tokens is longer than the {positions} that {name} takes",
            hint=f"use --seq-len {positions} or less",
        )
    return length


def fixed_length_warnings(inputs: TokenInputs, config: CompileConfig) -> list[str]:
    """A sentence where the graph's own sequence length overrides the one asked for."""
    if inputs.length is None or inputs.length == config.seq_len:
        return []
    return [
        f"the graph fixes the sequence at {inputs.length} tokens, so samples have that length and "
        f"not the {config.seq_len} asked for"
    ]


_NPZ_HINT: Final = "give the inputs by name in .npz files"


def _fixed(specs: tuple[InputSpec, ...], axis: int) -> int | None:
    sizes = {spec.shape[axis] for spec in specs if isinstance(spec.shape[axis], int)}
    if len(sizes) > 1:
        listed = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in specs)
        raise CalibrationError(
            f"the graph's inputs fix different sizes for one axis: {listed}", hint=_NPZ_HINT
        )
    size = sizes.pop() if sizes else None
    return size if isinstance(size, int) else None
