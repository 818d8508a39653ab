"""GGUF files: Transformers maps their architectures, the codes are taken from the file itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from transformers.pytorch_utils import Conv1D

from qcompile.checkpoints import Checkpoint
from qcompile.checkpoints.gguf_blocks import TYPES, read_blocks
from qcompile.errors import ModelError
from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]

_FLOATS: Final = ("F32", "F16", "BF16", "F64")


def open_gguf(path: Path, module: torch.nn.Module) -> Checkpoint:
    """The quantised tensors of the file `path`, by the Linears of `module` that have their values.

    Transformers renames tensors and moves their rows about, differently for every architecture. A
    tensor is found again by its values: rows that are the same to the last bit, in any order.

    Args:
        path: the file.
        module: what Transformers made of it, in float32.

    Raises:
        ModelError: the file is damaged, or none of its types is read.
    """
    tensors = {tensor.name: tensor for tensor in _tensors(path)}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    quantised = [name for name, kind in kinds.items() if kind not in _FLOATS]
    if not quantised:
        raise ModelError(f"{path} holds no quantised tensors", hint="give the model's folder")
    found = {name: kind for name, kind in kinds.items() if kind in TYPES}
    if not found:
        raise ModelError(
            f"{path} holds tensors of {', '.join(sorted(set(kinds.values()) - set(_FLOATS)))}, "
            "none of which is read",
            hint=", ".join(TYPES) + " are",
        )
    keys: dict[str, bytes] = {}
    by_values: dict[bytes, tuple[str, Array]] = {}
    for name in found:
        rows = _row_keys(_read(tensors[name]).dequantized().T)
        keys[name] = _key(rows)
        by_values[keys[name]] = (name, rows)
    matched: set[bytes] = set()
    weights: dict[str, Callable[[], QuantizedWeight]] = {}
    for name, weight in _linears(module):
        rows = _row_keys(weight)
        key = _key(rows)
        match = by_values.get(key)
        if match is not None:
            matched.add(key)
            weights[name] = partial(_rows_moved, tensors[match[0]], match[1], rows)
    if not weights:
        raise ModelError(f"{path}: no Linear of the model has the values of a quantised tensor")
    unread = [name for name, key in keys.items() if key not in matched and not _embeds(name)]
    return Checkpoint(f"GGUF, {_counts(found)}", weights, notes=_notes(kinds, unread, path))


def has_tokenizer(path: Path) -> bool:
    """Whether the file carries one."""
    return "tokenizer.ggml.model" in _reader(path).fields


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # of whatever the damaged part was taken for
        raise ModelError(f"{path} is no GGUF file, or a damaged one") from error


def _tensors(path: Path) -> list[Any]:
    tensors: list[Any] = _reader(path).tensors
    return tensors


def _read(tensor: Any) -> QuantizedWeight:
    depth = int(tensor.shape[0])
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    return read_blocks(tensor.name, rows, tensor.tensor_type.name, depth)


def _rows_moved(tensor: Any, rows: Array, wanted: Array) -> QuantizedWeight:
    """The weight with its output channels in the order of `wanted`; `rows` are the tensor's."""
    weight = _read(tensor)
    place = np.empty(len(rows), np.int64)
    place[np.argsort(wanted, kind="stable")] = np.argsort(rows, kind="stable")
    if (place == np.arange(len(rows))).all():
        return weight

    def moved(values: Array | None) -> Array | None:
        return None if values is None else np.ascontiguousarray(values[:, place])

    return QuantizedWeight(
        codes=weight.codes[:, place],
        scale=weight.scale[:, place],
        block_size=weight.block_size,
        bits=weight.bits,
        zero_point=moved(weight.zero_point),
        offset=moved(weight.offset),
    )


def _linears(module: torch.nn.Module) -> Iterator[tuple[str, Array]]:
    """Module path and weight [N, K] of everything that becomes a Linear."""
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear):
            yield name, part.weight.detach().numpy()
        elif isinstance(part, Conv1D):
            yield name, part.weight.detach().numpy().T


def _row_keys(weight: Array) -> Array:
    """A fingerprint of every row of `weight` [N, K]; rows of another length have others."""
    rows = np.ascontiguousarray(weight + 0.0, np.float32)  # −0 and 0 are one number
    keys = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in rows)
    return np.frombuffer(keys, np.dtype([("high", "<u8"), ("low", "<u8")]))


def _key(rows: Array) -> bytes:
    return np.sort(rows).tobytes()


def _counts(kinds: Mapping[str, str]) -> str:
    counts = {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _embeds(name: str) -> bool:
    """Whether `name` is of an embedding's table, which stays in float."""
    return "_embd" in name or name.startswith("token_types")


def _notes(kinds: Mapping[str, str], unread: list[str], path: Path) -> tuple[str, ...]:
    """What a user has to know; `unread` are the tensors in codes that no Linear has."""
    notes = []
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        notes.append(f"{path.name}: no Linear has the codes of {unread[0]}{more}: float there")
    others = sorted({kind for kind in kinds.values() if kind not in TYPES and kind not in _FLOATS})
    if others:
        notes.append(f"{path.name}: tensors of {', '.join(others)} are dequantised to float")
    wider = sorted(kind for kind in set(kinds.values()) if kind[:2] in ("Q5", "Q6"))
    if wider:
        notes.append(f"{path.name}: {', '.join(wider)} take eight bits here, the same weights")
    return tuple(notes)
