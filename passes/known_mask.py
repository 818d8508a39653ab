"""What an attention mask keeps, found out by asking the part of the graph that computes it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.linears import is_constant

_SHAPES: Final = ((2, 4), (1, 3), (3, 5), (2, 1))
_MASKED: Final = -1e4
"""A float mask adds no more than this to what it masks."""


@dataclasses.dataclass(frozen=True)
class MaskMeaning:
    """Which scores [batch, 1, queries, keys] a mask keeps.

    Attributes:
        causal: only keys that do not come after the query.
        padding: the graph input [batch, sequence] whose zeros mask keys, or None.
    """

    causal: bool
    padding: ir.Value | None


def meaning_of(model: ir.Model, mask: ir.Value) -> MaskMeaning | None:
    """What `mask` keeps, where that is causality, padding or both; else None.

    The part of the graph that computes it runs on small inputs: every pattern of padding of up to
    five tokens, in batches of several. A mask that equals its meaning on all of them is taken for
    it; that the compiled model agrees with the traced one, under padding too, is verified at the
    end of every compilation.
    """
    sources = _sources(mask)
    if sources is None or any(not _is_tokens(value) for value in sources):
        return None
    session = _session(model, mask)
    if session is None:
        return None
    candidates: list[ir.Value | None] = [*sources, None]
    for padding, causal in itertools.product(candidates, (True, False)):
        if padding is None and not causal:
            continue
        if all(_agrees(session, feed, mask, padding, causal) for feed in _feeds(session, padding)):
            return MaskMeaning(causal, padding)
    return None


def _sources(mask: ir.Value) -> list[ir.Value] | None:
    """The graph inputs that `mask` follows from; None where it follows from a weight as well."""
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    pending = [mask]
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_input():
            found[value] = None
            continue
        node = value.producer()
        if node is None:
            if not is_constant(value):
                return None
            continue
        if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            return None
        pending.extend(v for v in node.inputs if v is not None)
    return list(found)


def _is_tokens(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.INT64 and len(value.shape or ()) == 2


def _session(model: ir.Model, mask: ir.Value) -> ort.InferenceSession | None:
    part = model.clone()
    values = ir.convenience.create_value_mapping(part.graph)
    part.graph.outputs[:] = [values[str(mask.name)]]
    RemoveUnusedNodesPass()(part)
    for value in list(part.graph.inputs):
        if not value.uses():
            part.graph.inputs.remove(value)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        return ort.InferenceSession(
            ir.to_proto(part).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # onnxruntime raises its own, unexported types
        return None


def _feeds(session: ort.InferenceSession, padding: ir.Value | None) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    for batch, length in _SHAPES:
        patterns = np.array(list(itertools.product((0, 1), repeat=length)), np.int64)
        for at in range(0, len(patterns), batch):
            kept = np.resize(patterns[at : at + batch], (batch, length))
            # What is not the padding says nothing, whatever it holds.
            yield {
                i.name: kept
                if padding is not None and i.name == padding.name
                else rng.integers(0, 2, (batch, length))
                for i in session.get_inputs()
            }


def _agrees(
    session: ort.InferenceSession,
    feed: dict[str, Any],
    mask: ir.Value,
    padding: ir.Value | None,
    causal: bool,
) -> bool:
    batch, length = next(iter(feed.values())).shape
    keep = np.ones((batch, 1, length, length), bool)
    if causal:
        keep &= np.tril(np.ones((length, length), bool))
    if padding is not None:
        keep &= feed[str(padding.name)].astype(bool)[:, None, None, :]
    try:
        found = session.run(None, feed)[0]
    except Exception:  # onnxruntime raises its own, unexported types
        return False
    if found.dtype != bool:
        if not np.all((found == 0) | (found <= _MASKED)):
            return False
        found = found == 0
    if found.ndim != 4 or any(
        a not in (1, b) for a, b in zip(found.shape, keep.shape, strict=True)
    ):
        return False
    return bool((np.broadcast_to(found, keep.shape) == keep).all())
