"""Keep weights on disk: graphs between phases are memory-mapped."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import onnx_ir as ir

_EXTERNAL_OVER_BYTES: Final = 1024


def spill(model: ir.Model, work: Path, stem: str) -> ir.Model:
    """Write `model` to ``work/stem.onnx`` and give it back memory-mapped, so that RAM is free.

    The model given has no weights afterwards: its nodes refer to each other in circles, and may
    stay for long.
    """
    path = work / f"{stem}.onnx"
    ir.save(
        model,
        path,
        external_data=f"{stem}.onnx.data",
        size_threshold_bytes=_EXTERNAL_OVER_BYTES,
        alignment=4096,
    )
    for graph in model.graphs():
        for value in graph.initializers.values():
            value.const_value = None
    return ir.load(path)


def spill_derived(model: ir.Model, path: Path) -> None:
    """Write the weights that passes derived beside `path`, where `model` will be saved.

    Those that are on disk already stay where they are.
    """
    derived = [
        value
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.LazyTensor)
        and value.const_value.nbytes > _EXTERNAL_OVER_BYTES
    ]
    written = ir.external_data.convert_tensors_to_external(
        [value.const_value for value in derived if value.const_value is not None],
        path.parent,
        f"{path.name}.data",
    )
    for value, tensor in zip(derived, written, strict=True):
        value.const_value = tensor


def release(model: ir.Model) -> None:
    """Unmap what was read of the weights of `model`; it is mapped again when it is needed."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                with contextlib.suppress(BufferError):  # an array of it is still in use
                    value.const_value.release()
