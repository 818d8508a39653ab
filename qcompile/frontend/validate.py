"""Checks that every frontend makes on the graph it produced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError

_CHUNK: Final = 1 << 20
_FLOATS: Final = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)


def check_finite(model: ir.Model) -> None:
    """Refuse NaN and Inf in the floating-point tensors of `model`, one tensor at a time.

    An infinity may stand in a tensor of nothing but infinities and zeros: attention masks hold it
    on purpose.

    Raises:
        ModelError: naming the first tensor with a NaN, or an Inf among weights.
    """
    for name, tensor in _tensors(model):
        if tensor.dtype in _FLOATS and not _is_sound(tensor):
            raise ModelError(f"weight {name} holds NaN or Inf values")


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    seen: set[int] = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and id(value.const_value) not in seen:
                seen.add(id(value.const_value))
                yield str(value.name), value.const_value
        for node in graph:
            attribute = node.attributes.get("value") if node.op_type == "Constant" else None
            if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
                yield str(node.outputs[0].name), attribute.as_tensor()


def _is_sound(tensor: ir.TensorProtocol) -> bool:
    mapped = isinstance(tensor, ir.ExternalTensor) and tensor.raw is None
    try:
        return _all_sound(tensor.numpy())
    finally:
        if mapped and isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # or every page read here stays in the process's resident memory


def _all_sound(array: Any) -> bool:
    flat = array.reshape(-1)
    infinite = weights = False
    for at in range(0, flat.size, _CHUNK):
        chunk = flat[at : at + _CHUNK]
        if chunk.dtype.kind != "f":  # bfloat16, which numpy's own functions do not know
            chunk = chunk.astype(np.float32)
        finite = np.isfinite(chunk)
        if not finite.all():
            if np.isnan(chunk).any():
                return False
            infinite = True
            chunk = chunk[finite]
        weights = weights or bool(chunk.any())
        if infinite and weights:
            return False
    return True
