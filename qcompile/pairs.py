"""Pairs of ops between which a scale per channel can move: the walk back from one to the other.

Between them lie only ops f with f(x / s) = f(x) / s for every s > 0 per channel, or a Clip from 0,
whose upper limit the scale has to respect.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.linears import is_constant
from qcompile.names import module_path
from qcompile.weighted import Weighted

_ELEMENTWISE: Final = frozenset({"Relu", "LeakyRelu", "Identity", "Dropout", "Neg", "Abs"})
_FOLDING: Final = frozenset({"Abs", "Neg", "PRelu"})
"""May make large what is below zero, which a limit behind them is not asked about."""
_SPATIAL: Final = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two ops with nothing between them that would notice a scale.

    Attributes:
        first: its output channels are divided by the scale.
        second: its input channels are multiplied by it.
        channels: int64 [in of the second], the channel of the first that each comes from: several
            where a Conv's output is flattened.
        limit: upper limit of a Clip between them, or None.
    """

    first: Weighted
    second: Weighted
    channels: npt.NDArray[np.int64]
    limit: float | None = None


@dataclasses.dataclass(frozen=True)
class _Blocked(Exception):
    reason: str


def find_pairs(ops: list[Weighted]) -> tuple[list[Pair], dict[str, str]]:
    """All pairs in graph order, and why each of the other ops has no first."""
    by_output = {op.output: op for op in ops}
    pairs: list[Pair] = []
    refused: dict[str, str] = {}
    for op in ops:
        try:
            pairs.append(_pair(op, by_output))
        except _Blocked as blocked:
            refused[op.name] = blocked.reason
    return pairs, refused


def _pair(second: Weighted, by_output: dict[ir.Value, Weighted]) -> Pair:
    value, limit = second.x, None
    channels = np.arange(second.in_channels)
    # A Linear reads its channels from the last axis, where only a flattened image has them too.
    images = second.convolves
    while True:
        if len(value.uses()) > 1 or value.is_graph_output():
            raise _Blocked(f"{value.name} is read elsewhere too, and would be scaled there")
        first = by_output.get(value)
        if first is not None:
            if images != first.convolves:
                raise _Blocked(f"{first.name} has its channels on another axis")
            return Pair(first, second, channels, limit)
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            raise _Blocked("its input is not computed by an op that is known")
        source = node.inputs[0] if node.inputs else None
        if source is None:
            raise _Blocked(_stops(node))
        if limit is not None and node.op_type in _FOLDING:
            raise _Blocked(f"{_stops(node)} before a Clip")
        if node.op_type == "Clip":
            limit = _upper(node) if limit is None else min(limit, _upper(node))
        elif node.op_type in ("Reshape", "Flatten", "Squeeze"):
            images, channels = _unflattened(node, source, value, images, channels)
        elif not (
            node.op_type in _ELEMENTWISE
            or (images and (node.op_type in _SPATIAL or _spatial_mean(node)))
            or (node.op_type == "PRelu" and is_constant(node.inputs[1]))
        ):
            raise _Blocked(_stops(node))
        value = source


def _unflattened(
    node: ir.Node,
    source: ir.Value,
    value: ir.Value,
    images: bool,
    channels: npt.NDArray[np.int64],
) -> tuple[bool, npt.NDArray[np.int64]]:
    """Whether the channels are axis 1 of a Reshape's source, and which they are there."""
    before, after = source.shape, value.shape
    if before is None or after is None:
        raise _Blocked(f"{_stops(node)}: its shapes are not known")
    if not images and len(before) == 4 and len(after) == 2:
        sizes = [d for d in (*before[1:], after[1]) if isinstance(d, int)]
        if len(sizes) == 4 and int(np.prod(sizes[:3])) == sizes[3]:
            return True, channels // (sizes[1] * sizes[2])
    last = (before[-1], after[-1]) if len(before) and len(after) else (None, 0)
    if not images and isinstance(last[0], int) and last[0] == last[1]:
        return False, channels
    raise _Blocked(f"{_stops(node)}: it mixes channels")


def _upper(node: ir.Node) -> float:
    """The upper limit of a Clip from 0."""
    low, high = (
        None if len(node.inputs) <= at or node.inputs[at] is None else node.inputs[at]
        for at in (1, 2)
    )
    if not is_constant(low) or (high is not None and not is_constant(high)):
        raise _Blocked(f"{_stops(node)}: its limits are not constants from 0")
    assert low is not None and low.const_value is not None
    if float(low.const_value.numpy()) != 0.0:
        raise _Blocked(f"{_stops(node)}: its lower limit is not 0")
    if high is None or high.const_value is None:
        return float("inf")
    return float(high.const_value.numpy())


def _spatial_mean(node: ir.Node) -> bool:
    if node.op_type not in ("ReduceMean", "ReduceMax") or len(node.inputs) < 2:
        return False
    axes, shape = node.inputs[1], node.inputs[0].shape if node.inputs[0] is not None else None
    if axes is None or axes.const_value is None or shape is None or len(shape) != 4:
        return False
    kept = node.attributes.get_int("keepdims", 1)
    return bool(kept) and {int(a) % 4 for a in axes.const_value.numpy()} <= {2, 3}


def _stops(node: ir.Node) -> str:
    where = module_path(node) or node.name
    return f"{node.op_type} ({where}) does not pass on a scale per channel"
