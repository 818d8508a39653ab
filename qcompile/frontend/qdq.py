"""ONNX graphs with QuantizeLinear / DequantizeLinear: the scales that were trained become the plan.

The pairs are taken out, so that every later phase sees a float graph as of any other source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.checkpoints import Checkpoint, StoredActivation
from qcompile.checkpoints.layout import in_blocks
from qcompile.errors import ModelError
from qcompile.linears import is_constant
from qcompile.names import module_path, set_module_path
from qcompile.passes.constants import constant
from qcompile.precision import QuantizedWeight

Array = npt.NDArray[Any]

_PAIR: Final = ("QuantizeLinear", "DequantizeLinear")
_INTEGER_OPS: Final = ("Integer", "QLinear", "QGemm", "QAttention", "NBits", "Bnb4", "Dynamic")
_UNSIGNED: Final = {
    ir.DataType.UINT8: (8, 0),
    ir.DataType.INT8: (8, 128),
    ir.DataType.UINT4: (4, 0),
    ir.DataType.INT4: (4, 8),
}
"""Bits of a code, and what makes it unsigned."""


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight as the graph has it, [K, N] or [N, K].

    Attributes:
        codes: unsigned.
        scale: float32, of every value.
        zero_point: unsigned, of every value.
        bits: of a code.
        block_size: values that share a scale along one axis; 0: all of them along one.
    """

    codes: Array
    scale: Array
    zero_point: Array
    bits: int
    block_size: int

    def read(self, name: str, transposed: bool) -> QuantizedWeight:
        """Codes [K, N] of the module `name`.

        Raises:
            ModelError: input channels have scales of their own.
        """
        parts = (self.codes, self.scale, self.zero_point)
        codes, scale, zeros = (part.T if transposed else part for part in parts)
        group = self.block_size or len(codes)
        of_row = np.arange(len(codes)) // group * group
        if not (np.array_equal(scale, scale[of_row]) and np.array_equal(zeros, zeros[of_row])):
            raise ModelError(f"{name}: its input channels have scales of their own")
        return in_blocks(
            name, codes, scale[::group], zeros[::group], bits=self.bits, group=group
        )  # fmt: skip


def trained_scales(model: ir.Model) -> bool:
    """Whether weights of `model` are behind a DequantizeLinear, and nothing is in integers."""
    nodes = list(model.graph.all_nodes())
    if any(part in node.op_type for node in nodes for part in _INTEGER_OPS):
        return False
    return any(_is_weight(node) for node in model.graph)


def _is_weight(node: ir.Node) -> bool:
    """Whether it dequantises a constant, in codes or quantised by the graph itself."""
    source = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    if source is None or _stays(source):
        return source is not None
    quantize = source.producer()
    return (
        quantize is not None and quantize.op_type == "QuantizeLinear" and _stays(quantize.inputs[0])
    )


def _stays(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return is_constant(value) or (producer is not None and producer.op_type == "Constant")


def file_has_scales(path: Path) -> bool:
    """The same of a file; False where it cannot be read, as the frontend will say."""
    try:
        return path.is_file() and trained_scales(ir.load(path))
    except Exception:  # protobuf and onnx_ir raise many unrelated types
        return False


def keep_scales(model: ir.Model) -> Checkpoint:
    """Take the pairs out of `model`, in place, and give what they held.

    Weights become float constants, what their codes stand for; activations are no longer rounded.

    Raises:
        ModelError: a pair that is neither a weight's nor an activation's with one constant scale.
    """
    graph = model.graph
    weights: dict[ir.Value, _Weight] = {}
    activations: dict[ir.Value, StoredActivation] = {}
    for node in list(graph):
        if node.op_type == "DequantizeLinear":
            codes = _weight_codes(node)
            if codes is not None:
                _to_float(graph, node, codes, weights)
    for node in list(graph):
        if node.op_type == "DequantizeLinear":
            _take_out(graph, node, activations)
    left = next((n for n in graph.all_nodes() if n.op_type in _PAIR and _is_read(n)), None)
    if left is not None:
        raise ModelError(f"{left.op_type} {left.name} is no pair with one constant scale")
    return _by_linear(graph, weights, activations)


def _is_read(node: ir.Node) -> bool:
    return any(v.uses() or v.is_graph_output() for v in node.outputs)


def _weight_codes(node: ir.Node) -> Array | None:
    """The codes that a DequantizeLinear of a constant reads, or None where it is none."""
    source = node.inputs[0]
    if source is None or not _is_weight(node) or not _constant_parameters(node):
        return None
    if is_constant(source):
        return _array(source)
    quantize = source.producer()
    assert quantize is not None
    bits, shift = _code_type(quantize)
    if bits == 0 or not _constant_parameters(quantize):
        return None
    x = _array(quantize.inputs[0])
    scale, zero = _spread(quantize, x.shape)
    codes = np.clip(np.rint(x / scale) + zero, -shift, 2**bits - 1 - shift)
    signed: Array = codes.astype(np.int16)
    return signed


def _constant_parameters(node: ir.Node) -> bool:
    return all(is_constant(value) for value in node.inputs[1:] if value is not None)


def _code_type(node: ir.Node) -> tuple[int, int]:
    """See `_UNSIGNED`, of what a Q or DQ node writes or reads; zeros where it is none of these."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    value = zero if zero is not None else node.inputs[0]
    if zero is None and node.op_type == "QuantizeLinear":
        return _UNSIGNED[ir.DataType.UINT8]
    dtype = value.dtype if value is not None else None
    return _UNSIGNED.get(dtype, (0, 0)) if dtype is not None else (0, 0)


def _spread(node: ir.Node, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Scale and zero point of a Q or DQ node, for every value of `shape`."""
    scale = _array(node.inputs[1]).astype(np.float32)
    zero = np.zeros(scale.shape, np.int16)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero = _array(node.inputs[2]).astype(np.int16)
    axis = _axis(node, len(shape))
    size = node.attributes.get_int("block_size", 0)

    def spread(values: Array) -> Array:
        if values.size == 1:
            return np.full(shape, values.reshape(()))
        if size:
            return np.repeat(values, size, axis=axis).take(range(shape[axis]), axis=axis)
        lengths = [1] * len(shape)
        lengths[axis] = -1
        return np.broadcast_to(values.reshape(lengths), shape)

    return spread(scale), spread(zero)


def _axis(node: ir.Node, rank: int) -> int:
    axis = node.attributes.get_int("axis", 1)
    return axis + rank if axis < 0 else min(axis, rank - 1)


def _to_float(
    graph: ir.Graph, node: ir.Node, codes: Array, weights: dict[ir.Value, _Weight]
) -> None:
    scale, zero = _spread(node, codes.shape)
    signed = codes.astype(np.int32 if codes.dtype == np.int32 else np.int16)
    made = constant(
        graph, f"{node.outputs[0].name}/dequantized", (signed - zero).astype(np.float32) * scale
    )
    source = node.inputs[0]
    quantize = source.producer() if source is not None else None
    bits, shift = _code_type(quantize or node)
    if bits and codes.ndim == 2:
        unsigned = ((part + shift).astype(np.uint8) for part in (signed, zero))
        codes, zero_point = unsigned
        size = node.attributes.get_int("block_size", 0)
        weights[made] = _Weight(codes, scale, zero_point, bits, size)
    node.outputs[0].replace_all_uses_with(made)
    graph.remove(node, safe=True)


def _take_out(
    graph: ir.Graph, node: ir.Node, activations: dict[ir.Value, StoredActivation]
) -> None:
    """One pair around an activation: its readers get what was quantised."""
    codes = node.inputs[0]
    quantize = codes.producer() if codes is not None else None
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return
    x = quantize.inputs[0]
    given = [*quantize.inputs[1:], *node.inputs[1:]]
    if x is None or not all(is_constant(v) for v in given if v is not None):
        return
    scale, again = (_array(v) for v in (quantize.inputs[1], node.inputs[1]))
    zero = _array(quantize.inputs[2]) if len(quantize.inputs) > 2 else np.zeros((), np.uint8)
    zero_again = _array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.uint8)
    if scale.size != 1 or not np.array_equal(scale, again) or not np.array_equal(zero, zero_again):
        return
    bits, shift = _code_type(quantize)
    if bits == 8:
        point = int(zero.reshape(())) + shift - 128
        activations[x] = StoredActivation("static", float(scale.reshape(())), point)
    restored = node.outputs[0]
    is_output, name = restored.is_graph_output(), restored.name
    if is_output and (x.is_graph_input() or x.is_graph_output()):
        return
    restored.replace_all_uses_with(x, replace_graph_outputs=is_output)
    graph.remove(node, safe=True)
    if is_output:
        restored.name, x.name = f"{name}/restored", name


def _by_linear(
    graph: ir.Graph,
    weights: dict[ir.Value, _Weight],
    activations: dict[ir.Value, StoredActivation],
) -> Checkpoint:
    """What was found, by the module path of the product that reads it."""
    reads: dict[str, Callable[[], QuantizedWeight]] = {}
    found: dict[str, StoredActivation] = {}
    taken: set[str] = set()
    for number, node in enumerate(graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        source = node.inputs[1]
        transposed = bool(node.attributes.get_int("transB", 0))
        transpose = source.producer() if source is not None else None
        if transpose is not None and transpose.op_type == "Transpose":
            source, transposed = transpose.inputs[0], not transposed
        weight = weights.get(source) if source is not None else None
        if weight is None:
            continue
        name = module_path(node)
        if not name or name in taken:
            name = f"{name or node.op_type}_{number}"  # a name of its own: two may share none
        set_module_path(node, name)
        taken.add(name)
        reads[name] = partial(weight.read, name, transposed)
        activation = activations.get(node.inputs[0]) if node.inputs[0] is not None else None
        if activation is not None:
            found[name] = activation
    if not reads:
        raise ModelError(
            "the graph is quantised, and no matrix product reads a weight in 4- or 8-bit codes",
            hint="give the float model",
        )
    how = "weights and activations" if found else "weights"
    return Checkpoint(f"Q/DQ nodes, scales of {how}", reads, found)


def _array(value: ir.Value | None) -> Array:
    assert value is not None and value.const_value is not None
    array: Array = value.const_value.numpy()
    return array
