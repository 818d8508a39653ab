"""Whether the channels of a site can be put in another order where they are made.

A Linear gives its outputs in any order if its weight's columns and its bias are in that order. What
works on each channel alike lies between it and the site: then the site's channels change places for
nothing, and those that stay in float can be its last ones, a Slice.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.linears import Linear, Site, is_constant
from qcompile.names import module_path

Array = npt.NDArray[Any]

_ALIKE: Final = frozenset(
    ["Relu", "LeakyRelu", "Gelu", "Sigmoid", "Tanh", "Erf", "Neg", "Abs", "Identity", "Dropout"]
)
_OF_TWO: Final = frozenset(["Mul", "Add", "Sub", "Div"])


@dataclasses.dataclass(frozen=True)
class Permutation:
    """Another order of a site's channels.

    Attributes:
        order: int64 [channels], the old place of each new channel.
        producers: names of the Linears whose outputs are put in that order.
    """

    order: Array
    producers: tuple[str, ...]


def last_places(channels: int, outliers: Array) -> Array:
    """The order in which `outliers` are the last of `channels`, ascending; each changes places with
    one of those that were, and all others stay where they are."""
    order = np.arange(channels)
    first = channels - len(outliers)
    inside = outliers[outliers >= first]
    order[first:] = outliers
    moved = outliers[outliers < first]
    order[moved] = np.setdiff1d(np.arange(first, channels), inside)
    return order


def find_permutable(site: Site, linears: list[Linear]) -> tuple[str, ...] | str:
    """Names of the Linears that make the channels of `site`, or why they cannot be permuted."""
    if any(linear.tied for linear in site.linears):
        return "a consumer's weight is tied"
    by_output = {linear.output: linear for linear in linears}
    inside: set[ir.Node] = {linear.matmul for linear in site.linears}
    producers: list[str] = []
    values, at = [site.x], 0
    while at < len(values):
        value = values[at]
        at += 1
        linear = by_output.get(value)
        if linear is not None:
            if linear.tied:
                return f"the weight of {linear.name} is tied"
            producers.append(linear.name)
            continue
        node = value.producer()
        if node is None:
            return f"its input is {'a constant' if is_constant(value) else 'a graph input'}"
        where = f"{node.op_type} ({module_path(node)})"
        if node.domain not in ("", "ai.onnx") or node.op_type not in _ALIKE | _OF_TWO:
            return f"{where} does not work on each channel alike"
        inside.add(node)
        for source in node.inputs if node.op_type in _OF_TWO else node.inputs[:1]:
            if source is None or (is_constant(source) and _is_scalar(source)):
                continue
            if source.shape is None or len(source.shape) == 0 or source.shape[-1] != site.channels:
                return f"{where} reads something of another width"
            if is_constant(source):
                return f"{where} reads a constant per channel"
            if source not in values:
                values.append(source)
    for value in values:
        if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
            return "a value on the way is read elsewhere too"
    return tuple(producers)


def _is_scalar(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.size == 1
