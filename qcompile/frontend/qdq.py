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
from qcompile.linears import is_constant, is_matrix_transpose
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
        name: of the constant that it is in the graph.
        codes: unsigned.
        scale: float32, of every value.
        zero_point: unsigned, of every value.
        bits: of a code.
        block_size: values that share a scale along one axis; 0: all of them along one.
    """

    name: str
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


@dataclasses.dataclass
class _Pair:
    """A pair around an activation that was taken out.

    Attributes:
        name: of the value that it rounded.
        readers: nodes that read it rounded, and at which input.
        is_output: whether the graph gives it, rounded.
        activation: how it rounded, or None where codes are not of 8 bits.
    """

    name: str
    readers: list[tuple[ir.Node, int]]
    is_output: bool
    activation: StoredActivation | None


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
        ModelError: a pair that is neither a weight's nor an activation's with one constant scale,
            or codes of a type that is not read.
    """
    graph = model.graph
    weights: dict[ir.Value, _Weight] = {}
    pairs: list[_Pair] = []
    for node in list(graph):
        if node.op_type == "DequantizeLinear":
            codes = _weight_codes(node)
            if codes is not None:
                _to_float(graph, node, codes, weights)
    for node in list(graph):
        if node.op_type == "DequantizeLinear":
            _take_out(graph, node, pairs)
    left = next((n for n in graph.all_nodes() if n.op_type in _PAIR and _is_read(n)), None)
    if left is not None:
        raise ModelError(f"{left.op_type} {left.name} is no pair with one constant scale")
    return _by_linear(graph, weights, pairs)


def _is_read(node: ir.Node) -> bool:
    return any(v.uses() or v.is_graph_output() for v in node.outputs)


def _weight_codes(node: ir.Node) -> Array | None:
    """The codes that a DequantizeLinear of a constant reads, or None where it is none.

    Raises:
        ModelError: they are of a type that is not read.
    """
    source = node.inputs[0]
    if source is None or not _is_weight(node) or not _constant_parameters(node):
        return None
    quantize = None if is_constant(source) else source.producer()
    dtype = _code_type(quantize or node)
    if dtype not in _UNSIGNED and (dtype != ir.DataType.INT32 or quantize is not None):
        kind = dtype.name.lower() if dtype is not None else "an unknown type"
        raise ModelError(
            f"{node.outputs[0].name} is dequantised from {kind}, which is not read",
            hint="int8, uint8, int4 and uint4 are",
        )
    if quantize is None:
        return _array(source).astype(np.int32)
    if not _constant_parameters(quantize):
        return None
    bits, shift = _UNSIGNED[dtype]
    x = _array(quantize.inputs[0])
    scale, zero = _spread(quantize, x.shape)
    codes = np.clip(np.rint(x / scale) + zero, -shift, 2**bits - 1 - shift)
    signed: Array = codes.astype(np.int32)
    return signed


def _constant_parameters(node: ir.Node) -> bool:
    return all(is_constant(value) for value in node.inputs[1:] if value is not None)


def _code_type(node: ir.Node) -> ir.DataType | None:
    """Of the codes that a Q or DQ node writes or reads; None where the graph does not say."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type == "QuantizeLinear" and zero is None:
        return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
    value = node.inputs[0] if node.op_type == "DequantizeLinear" else zero
    assert value is not None
    return value.const_value.dtype if value.const_value is not None else value.dtype


def _spread(node: ir.Node, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Scale and zero point of a Q or DQ node, for every value of `shape`."""
    scale = _array(node.inputs[1]).astype(np.float32)
    zero = _zero_point(node, scale.shape)
    axis = _axis(node, len(shape))
    size = node.attributes.get_int("block_size", 0)

    def spread(values: Array) -> Array:
        if values.size == 1:
            return np.broadcast_to(values.reshape(()), shape)
        if size:
            return np.repeat(values, size, axis=axis).take(range(shape[axis]), axis=axis)
        lengths = [1] * len(shape)
        lengths[axis] = -1
        return np.broadcast_to(values.reshape(lengths), shape)

    return spread(scale), spread(zero)


def _zero_point(node: ir.Node, shape: tuple[int, ...] = ()) -> Array:
    """int32; zeros of `shape` where a Q or DQ node has none."""
    given = node.inputs[2] if len(node.inputs) > 2 else None
    return np.zeros(shape, np.int32) if given is None else _array(given).astype(np.int32)


def _axis(node: ir.Node, rank: int) -> int:
    axis = node.attributes.get_int("axis", 1)
    return axis + rank if axis < 0 else min(axis, rank - 1)


def _to_float(
    graph: ir.Graph, node: ir.Node, codes: Array, weights: dict[ir.Value, _Weight]
) -> None:
    scale, zero = _spread(node, codes.shape)
    name = str(node.outputs[0].name)
    made = constant(graph, f"{name}/dequantized", (codes - zero).astype(np.float32) * scale)
    source = node.inputs[0]
    quantize = source.producer() if source is not None else None
    dtype = _code_type(quantize or node)
    if dtype in _UNSIGNED:
        bits, shift = _UNSIGNED[dtype]
        unsigned, zero_point = ((part + shift).astype(np.uint8) for part in (codes, zero))
        size = node.attributes.get_int("block_size", 0)
        weights[made] = _Weight(name, unsigned, scale, zero_point, bits, size)
    node.outputs[0].replace_all_uses_with(made)
    graph.remove(node, safe=True)


def _take_out(graph: ir.Graph, node: ir.Node, pairs: list[_Pair]) -> None:
    """One pair around an activation: its readers get what was quantised."""
    codes = node.inputs[0]
    quantize = codes.producer() if codes is not None else None
    most = None
    if quantize is not None and quantize.op_type == "Clip" and quantize.inputs[0] is not None:
        least, most = (*quantize.inputs[1:], None, None)[:2]
        quantize = quantize.inputs[0].producer()
        if most is None or (least is not None and not (is_constant(least) and _is_lowest(least))):
            return
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return
    x = quantize.inputs[0]
    given = [*quantize.inputs[1:], *node.inputs[1:], most]
    if x is None or not all(is_constant(v) for v in given if v is not None):
        return
    scale, again = (_array(v) for v in (quantize.inputs[1], node.inputs[1]))
    zero, zero_again = _zero_point(quantize), _zero_point(node)
    if scale.size != 1 or not np.array_equal(scale, again) or not np.array_equal(zero, zero_again):
        return
    restored = node.outputs[0]
    is_output, name = restored.is_graph_output(), restored.name
    if is_output and (x.is_graph_input() or x.is_graph_output()):
        return
    dtype, activation = _code_type(quantize), None
    if dtype in (ir.DataType.UINT8, ir.DataType.INT8):
        _, shift = _UNSIGNED[dtype]
        point = int(zero.reshape(())) + shift - 128
        highest = int(_array(most).item()) + shift if most is not None else 255
        activation = StoredActivation("static", float(scale.reshape(())), point, highest)
    if most is not None:
        x = _below(graph, node, x, (_array(most).astype(np.float32) - zero) * scale)
    # Of this pair alone: others may read x as it is, or rounded by another scale.
    readers = [(use.node, use.idx) for use in restored.uses()]
    pairs.append(_Pair(str(name), readers, is_output, activation))
    restored.replace_all_uses_with(x, replace_graph_outputs=is_output)
    graph.remove(node, safe=True)
    if most is not None and codes is not None and not codes.uses():
        graph.remove(codes.producer(), safe=True)  # type: ignore[arg-type]
    if is_output:
        restored.name, x.name = f"{name}/restored", name


def _is_lowest(code: ir.Value) -> bool:
    """Whether a constant is the lowest code of its type."""
    array = _array(code)
    return bool((array == np.iinfo(array.dtype).min).all())


def _below(graph: ir.Graph, node: ir.Node, x: ir.Value, most: Array) -> ir.Value:
    """`x` up to `most`, before `node`: where codes stop short of their type's last."""
    bound = constant(graph, f"{node.outputs[0].name}/most", most.astype(np.float32).reshape(()))
    clip = ir.node("Clip", [x, None, bound], name=f"{node.outputs[0].name}/clip")
    clip.outputs[0].shape, clip.outputs[0].type = x.shape, x.type
    graph.insert_before(node, clip)
    return clip.outputs[0]


def _by_linear(graph: ir.Graph, weights: dict[ir.Value, _Weight], pairs: list[_Pair]) -> Checkpoint:
    """What was found, by the module path of the product that reads it."""
    activations = {reader: pair.activation for pair in pairs for reader in pair.readers}
    reads: dict[str, Callable[[], QuantizedWeight]] = {}
    found: dict[str, StoredActivation] = {}
    read: set[ir.Value] = set()
    rounded: set[tuple[ir.Node, int]] = set()
    for number, node in enumerate(graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        source = node.inputs[1]
        transposed = bool(node.attributes.get_int("transB", 0))
        transpose = source.producer() if source is not None else None
        if transpose is not None and is_matrix_transpose(transpose):
            source, transposed = transpose.inputs[0], not transposed
        weight = weights.get(source) if source is not None else None
        if source is None or weight is None or weight.codes.ndim != 2:
            continue
        name = module_path(node)
        if not name or name in reads:
            name = f"{name or node.op_type}_{number}"  # a name of its own: two may share none
        set_module_path(node, name)
        read.add(source)
        reads[name] = partial(weight.read, name, transposed)
        activation = activations.get((node, 0))
        if activation is not None:
            found[name] = activation
            rounded.add((node, 0))
    if not reads:
        raise ModelError(
            "the graph is quantised, and no matrix product reads a weight in 4- or 8-bit codes",
            hint="give the float model",
        )
    how = "weights and activations" if found else "weights"
    unread = [weights[v].name for v in weights if v not in read and not _embeds(v)]
    lost = [p.name for p in pairs if p.is_output or not rounded.issuperset(p.readers)]
    notes = []
    if unread:
        notes.append(f"no matrix product reads the codes of {_named(unread)}: float there")
    if lost:
        notes.append(
            f"the graph rounds {_named(lost)} for readers other than products of 8-bit activations "
            "by weights in codes: not rounded there"
        )
    return Checkpoint(f"Q/DQ nodes, scales of {how}", reads, found, tuple(notes))


def _embeds(value: ir.Value) -> bool:
    """Whether it is an embedding's table, which stays in float, or nothing reads it."""
    return all(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses())


def _named(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _array(value: ir.Value | None) -> Array:
    assert value is not None and value.const_value is not None
    array: Array = value.const_value.numpy()
    return array
