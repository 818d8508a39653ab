"""The inputs and outputs of a model that keeps its keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

PAST: Final = "past_key_values.{}.{}"
PRESENT: Final = "present.{}.{}"
"""Names by layer and by ``key`` or ``value``: those of optimum and of onnxruntime-genai."""

KINDS: Final = ("key", "value")

TOKENS: Final = "input_ids"
MASK: Final = "attention_mask"
POSITIONS: Final = "position_ids"
"""The other inputs: the new tokens, what is real of them and of what is in the cache, and each new
token's place among what is real."""

MAX_LENGTH: Final = "max_length"
"""In the graph's metadata: how many positions the model has."""

_TYPES: Final = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


def present_of(name: str) -> str:
    """The output that gives what the input `name`, one of `PAST`, takes in the next step."""
    return name.replace("past_key_values", "present", 1)


def is_past(name: str) -> bool:
    """Whether `name` is an input of a cache."""
    return name.startswith("past_key_values.")


def is_present(name: str) -> bool:
    """Whether `name` is an output that goes back into a cache."""
    return name.startswith("present.")


def has_cache(session: ort.InferenceSession) -> bool:
    """Whether the graph keeps keys and values."""
    return any(is_past(i.name) for i in session.get_inputs())


def positions_of(session: ort.InferenceSession) -> int | None:
    """How many positions the model has, where its graph says so."""
    found = session.get_modelmeta().custom_metadata_map.get(MAX_LENGTH, "")
    return int(found) if found.isdecimal() else None


def fed(session: ort.InferenceSession, feed: Mapping[str, Any]) -> dict[str, Any]:
    """What `session` takes of `feed`; a cache that is not in it is empty.

    An input that is neither is left out, for the caller to find.
    """
    made = {i.name: feed[i.name] for i in session.get_inputs() if i.name in feed}
    missing = [i for i in session.get_inputs() if is_past(i.name) and i.name not in feed]
    if missing:  # what else is fed may lie on a device, where no array says its shape
        batch = next((np.shape(value)[0] for value in made.values() if np.ndim(value)), 1)
        made |= {i.name: empty(i, batch, 0) for i in missing}
    return made


def empty(past: ort.NodeArg, batch: int, tokens: int) -> npt.NDArray[Any]:
    """Zeros for the input `past` [batch, heads, tokens, ...]: in its type."""
    return np.zeros((batch, past.shape[1], tokens, past.shape[3]), _TYPES[past.type])


def bind_shared(
    session: ort.InferenceSession, binding: ort.IOBinding, batch: int, tokens: int, device: str
) -> None:
    """Bind what is past and what is present to the same memory, so that nothing is copied.

    Args:
        session: with a cache, or without one, where nothing is bound.
        binding: of `session`.
        batch: sequences.
        tokens: room for as many in each, all of them zeros at first.
        device: where, as ONNX Runtime names it.
    """
    for i in filter(lambda i: is_past(i.name), session.get_inputs()):
        buffer = ort.OrtValue.ortvalue_from_numpy(empty(i, batch, tokens), device)
        binding.bind_ortvalue_input(i.name, buffer)
        binding.bind_ortvalue_output(present_of(i.name), buffer)


def after(session: ort.InferenceSession, feed: Mapping[str, Any], past: int) -> dict[str, Any]:
    """`feed`, with a cache of `past` tokens before it, where `session` keeps one.

    Args:
        session: takes what comes out.
        feed: token inputs without padding, each [batch, sequence].
        past: tokens in the cache, which is filled with random numbers.
    """
    if not has_cache(session):
        return dict(feed)
    made = fed(session, feed)
    rng = np.random.default_rng(0)
    for name, value in made.items():
        if is_past(name):
            shape = (value.shape[0], value.shape[1], past, value.shape[3])
            made[name] = (
                rng.standard_normal(shape, np.float32).astype(value.dtype)
                if np.issubdtype(value.dtype, np.floating)
                else rng.integers(0, 128, shape, value.dtype)
            )
    mask = made[MASK]
    made[MASK] = np.pad(mask, ((0, 0), (past, 0)), constant_values=1)
    if POSITIONS in made:
        made[POSITIONS] = made[POSITIONS] + past
    return made


def last_columns(feed: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Where each row of `feed` has its last real token, [batch, 1, 1]: of the new tokens."""
    mask = np.asarray(feed[MASK])[:, -np.shape(feed[TOKENS])[1] :] != 0
    found = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    return np.asarray(found, np.int64)[:, None, None]
