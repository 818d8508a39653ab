"""What a smoothing scale can be folded into: the walk from a site back to its producer.

The walk goes from the value that Linears read, backwards through ops that commute with a positive
scale per channel, to a norm or to another Linear. Every refusal says which op stopped it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.linears import Linear, Site, is_constant
from qcompile.names import module_path


@dataclasses.dataclass(frozen=True)
class Producer:
    """The op that takes the scale.

    Attributes:
        kind: ``norm`` (its weight and bias), ``linear`` (its output columns and bias), or ``mul``
            (a Mul that has to be inserted).
        name: the name of the norm's output value (nodes may have none), the Linear's name, or the
            name of the value to multiply.
        channels: int64 [site channels]: which of the producer's output channels each of the site's
            channels comes from. Several may share one (grouped-query attention).
        width: number of output channels of the producer.
    """

    kind: Literal["norm", "linear", "mul"]
    name: str
    channels: npt.NDArray[np.int64]
    width: int


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why nothing that is there can take a site's scale.

    `insertable` is false where not even an inserted Mul would do.
    """

    reason: str
    insertable: bool = True


# Elementwise ops f with f(x / s) = f(x) / s for every s > 0.
_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "Identity", "Dropout", "Neg", "Abs"})
_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


def find_producer(site: Site, linears: list[Linear]) -> Producer | Refusal:
    """Where diag(s)⁻¹ of `site` can be folded, or why it cannot."""
    if any(linear.tied for linear in site.linears):
        return Refusal("a consumer's weight is tied and cannot absorb the scale", insertable=False)
    readers = {linear.matmul for linear in site.linears}
    others = [use.node for use in site.x.uses() if use.node not in readers]
    if others or site.x.is_graph_output():
        who = f"{others[0].op_type} ({_where(others[0])})" if others else "a graph output"
        return Refusal(f"its input is also read by {who}, which cannot take the scale")
    by_output = {linear.output: linear for linear in linears}
    return _walk(site.x, np.arange(site.channels), by_output)


def inserted_mul(site: Site) -> Producer:
    """A Mul of its own for `site`: one more pass over the activation."""
    return Producer("mul", str(site.x.name), np.arange(site.channels), site.channels)


def _walk(
    value: ir.Value, channels: npt.NDArray[Any], by_output: dict[ir.Value, Linear]
) -> Producer | Refusal:
    """From `value`, whose last axis carries the site's channels in the order `channels`."""
    if value in by_output:
        linear = by_output[value]
        if linear.tied:
            return Refusal(f"the weight of {linear.name} is shared and cannot be rescaled")
        return Producer("linear", linear.name, channels, linear.out_features)
    node = value.producer()
    if node is None:
        return Refusal(f"its input is {'a constant' if is_constant(value) else 'a graph input'}")
    if node.domain not in ("", "ai.onnx"):
        return Refusal(
            f"{node.domain}.{node.op_type} ({_where(node)}) may not commute with a scale"
        )
    if node.op_type in _NORMS:
        parameters = [v for v in node.inputs[1:] if v is not None]
        if not all(is_constant(v) for v in parameters):
            return Refusal(f"the weight of {_where(node)} is not a constant")
        if any(v.shape is None or tuple(v.shape) != (len(channels),) for v in parameters):
            return Refusal(f"the weight of {_where(node)} is not one value per channel")
        return Producer("norm", str(value.name), channels, len(channels))
    if node.op_type in _HOMOGENEOUS:
        return _through(node, 0, channels, by_output)
    if node.op_type == "Reshape":
        source = node.inputs[0]
        if _width(source) is not None and _width(source) == _width(value):
            return _through(node, 0, channels, by_output)
        return Refusal(f"Reshape ({_where(node)}) mixes its channels")
    if node.op_type == "Mul":
        return _through_product(node, channels, by_output)
    if node.op_type == "Split":
        return _through_split(node, value, channels, by_output)
    if node.op_type == "Attention":
        return _through_attention(node, value, channels, by_output)
    return Refusal(f"{node.op_type} ({_where(node)}) does not commute with a scale per channel")


def _through(
    node: ir.Node, at: int, channels: npt.NDArray[Any], by_output: dict[ir.Value, Linear]
) -> Producer | Refusal:
    source = node.inputs[at]
    assert source is not None
    if len(source.uses()) > 1 or source.is_graph_output():
        return Refusal(f"the input of {node.op_type} ({_where(node)}) is read elsewhere too")
    return _walk(source, channels, by_output)


def _through_product(
    node: ir.Node, channels: npt.NDArray[Any], by_output: dict[ir.Value, Linear]
) -> Producer | Refusal:
    """One factor takes the scale: the one that leads to a Linear (``up`` of a gated MLP)."""
    reasons = []
    for at, factor in enumerate(node.inputs):
        if factor is None or is_constant(factor) or _width(factor) != _width(node.outputs[0]):
            continue
        found = _through(node, at, channels, by_output)
        if isinstance(found, Producer):
            return found
        reasons.append(found.reason)
    return Refusal("; ".join(dict.fromkeys(reasons)) or f"Mul ({_where(node)}) of constants")


def _through_split(
    node: ir.Node,
    value: ir.Value,
    channels: npt.NDArray[Any],
    by_output: dict[ir.Value, Linear],
) -> Producer | Refusal:
    source = node.inputs[0]
    rank = len(source.shape) if source is not None and source.shape is not None else None
    if rank is None or node.attributes.get_int("axis", 0) not in (-1, rank - 1):
        return Refusal(f"Split ({_where(node)}) is not over the channels")
    widths = [_width(output) for output in node.outputs]
    before = widths[: node.outputs.index(value)]
    if any(width is None for width in before):
        return Refusal(f"Split ({_where(node)}) has parts of unknown width")
    offset = sum(width for width in before if width is not None)
    return _through(node, 0, channels + offset, by_output)


def _through_attention(
    node: ir.Node,
    value: ir.Value,
    channels: npt.NDArray[Any],
    by_output: dict[ir.Value, Linear],
) -> Producer | Refusal:
    """Attention weighs whole rows of V, so a scale per channel of V passes through."""
    heads = node.attributes.get_int("q_num_heads", 0)
    kv_heads = node.attributes.get_int("kv_num_heads", heads)
    if not heads or not kv_heads or value is not node.outputs[0]:
        return Refusal(f"Attention ({_where(node)}) is not in its three-dimensional form")
    cache = [v for v in node.inputs[4:6] if v is not None]
    cache += [v for v in node.outputs[1:] if v.uses() or v.is_graph_output()]
    if cache:
        return Refusal(f"the cache of Attention ({_where(node)}) would be scaled too")
    size = len(channels) // heads
    head, within = np.divmod(channels, size)
    return _through(node, 2, head // (heads // kv_heads) * size + within, by_output)


def _width(value: ir.Value | None) -> int | None:
    """Size of the last axis, where it is known."""
    if value is None or value.shape is None or len(value.shape) == 0:
        return None
    last = value.shape[-1]
    return last if isinstance(last, int) else None


def _where(node: ir.Node) -> str:
    return module_path(node) or str(node.name)
