"""What an attention mask keeps, found out by asking the part of the graph that computes it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass
from qcompile.passes.matching import is_op, scalar_of

from qcompile.linears import is_constant

_SHAPES: Final = ((2, 4), (1, 3), (3, 5), (2, 1))
_WIDEST: Final = 8192
"""Of a sliding window: a mask that is tried out beyond it has as many rows and columns."""
_MASKED: Final = -1e4
"""A float mask adds no more than this to what it masks."""


@dataclasses.dataclass(frozen=True)
class MaskMeaning:
    """Which scores [batch, 1, queries, keys] a mask keeps.

    Attributes:
        causal: only keys that do not come after the query.
        padding: the graph input [batch, sequence] whose zeros mask keys, or None.
        window: only so many keys, those of the query itself and of the tokens just before it;
            None: all.
        slopes: of every head, what a key's score gains by its place among the tokens that are no
            padding (ALiBi, arXiv 2108.12409; softmax does not see what a whole row gains); None:
            nothing.
    """

    causal: bool
    padding: ir.Value | None
    window: int | None = None
    slopes: tuple[float, ...] | None = None


def meaning_of(model: ir.Model, mask: ir.Value) -> MaskMeaning | None:
    """What `mask` keeps, where that is causality, perhaps in a window, padding or both; else None.

    To scores that causality and padding keep it may add ALiBi's biases.

    The part of the graph that computes it runs on small inputs: every pattern of padding of up to
    five tokens, in batches of several. The width of a window is a number that stands in that part,
    so one longer input is tried for each number there. A mask that equals its meaning on all of
    them is taken for it; that the compiled model agrees with the traced one, under padding too, is
    verified at the end of every compilation.
    """
    sources = _sources(mask)
    if sources is None or any(not _is_tokens(value) for value in sources[0]):
        return None
    session = session_of(model, [mask])
    if session is None:
        return None
    inputs, numbers = sources
    for padding, causal in itertools.product([*inputs, None], (True, False)):
        if padding is None and not causal:
            continue
        for window in (None, *numbers) if causal else (None,):
            meaning = MaskMeaning(causal, padding, window)
            if all(_agrees(session, f, meaning) for f in _feeds(session, padding, numbers)):
                return meaning
            sloped = _sloped(session, meaning)
            if sloped is not None and all(
                _agrees(session, f, sloped) for f in _feeds(session, padding, numbers)
            ):
                return sloped
    return None


def _sloped(session: ort.InferenceSession, meaning: MaskMeaning) -> MaskMeaning | None:
    """`meaning` with the slopes that two tokens without padding show; None where there are none."""
    if meaning.padding is None or not meaning.causal or meaning.window is not None:
        return None
    found = _run(session, {i.name: np.ones((1, 2), np.int64) for i in session.get_inputs()})
    if found is None or found.dtype == bool or found.ndim != 4 or len(found) != 1:
        return None
    slopes = tuple(found[0, :, -1, -1].tolist())
    return dataclasses.replace(meaning, slopes=slopes) if any(slopes) else None


def _sources(mask: ir.Value) -> tuple[list[ir.Value], list[int]] | None:
    """The graph inputs that `mask` follows from, and the numbers that may be a window's width.

    None where it follows from a weight as well, or a window could be too wide to be tried.
    """
    found: dict[ir.Value, None] = {}
    numbers: set[int] = set()
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
        if node is None or is_op(node, "Constant"):
            if node is None and not is_constant(value):
                return None
            if _is_wide(value):
                return None
            number = scalar_of(value)
            if number is not None and 1 <= abs(number) < _WIDEST:
                # Of `i - j < w` and of `i - j <= w - 1`.
                numbers |= {abs(int(number)), abs(int(number)) + 1}
            continue
        if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            return None
        pending.extend(v for v in node.inputs if v is not None)
    return list(found), sorted(numbers)


def _is_wide(value: ir.Value) -> bool:
    """Whether a number may be the width of a window that is too wide to try."""
    number = scalar_of(value) if value.dtype in (ir.DataType.INT32, ir.DataType.INT64) else None
    # The largest integers stand for an end that is open.
    return number is not None and _WIDEST <= abs(number) < np.iinfo(np.int32).max


def _is_tokens(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.INT64 and len(value.shape or ()) == 2


def session_of(model: ir.Model, outputs: Sequence[ir.Value]) -> ort.InferenceSession | None:
    """A session on the part of `model` that gives `outputs`; None where it does not run alone."""
    part = model.clone()
    values = ir.convenience.create_value_mapping(part.graph)
    part.graph.outputs[:] = [values[str(value.name)] for value in outputs]
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


def _feeds(
    session: ort.InferenceSession, padding: ir.Value | None, numbers: Sequence[int]
) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def feed(kept: Any) -> dict[str, Any]:
        # What is not the padding says nothing, whatever it holds.
        return {
            i.name: kept
            if padding is not None and i.name == padding.name
            else rng.integers(0, 2, kept.shape)
            for i in session.get_inputs()
        }

    for batch, length in _SHAPES:
        patterns = np.array(list(itertools.product((0, 1), repeat=length)), np.int64)
        for at in range(0, len(patterns), batch):
            yield feed(np.resize(patterns[at : at + batch], (batch, length)))
    for number in numbers:
        yield feed(np.ones((1, number + 3), np.int64))
        yield feed(rng.integers(0, 2, (1, number + 3)))


def _run(session: ort.InferenceSession, feed: dict[str, Any]) -> Any:
    """The mask; None where the part of the graph does not run."""
    try:
        return session.run(None, feed)[0]
    except Exception:  # onnxruntime raises its own, unexported types
        return None


def _agrees(session: ort.InferenceSession, feed: dict[str, Any], meaning: MaskMeaning) -> bool:
    batch, length = next(iter(feed.values())).shape
    keep = np.ones((batch, 1, length, length), bool)
    if meaning.causal:
        keep &= np.tril(np.ones((length, length), bool))
    if meaning.window is not None:
        keep &= np.triu(np.ones((length, length), bool), 1 - meaning.window)
    if meaning.padding is not None:
        keep &= feed[str(meaning.padding.name)].astype(bool)[:, None, None, :]
    found = _run(session, feed)
    if found is None:
        return False
    if meaning.slopes is not None:
        assert meaning.padding is not None
        slopes = np.array(meaning.slopes, np.float32)[:, None, None]
        known = feed[str(meaning.padding.name)]
        added = slopes * (np.cumsum(known, 1) - 1)[:, None, None, :]
        keep = keep.repeat(len(slopes), axis=1)
        if found.shape != keep.shape:
            return False
        close = np.isclose(found, np.broadcast_to(added, keep.shape), rtol=1e-5, atol=0)
        return bool(np.where(keep, close, found <= _MASKED).all())
    if found.dtype != bool:
        if not np.all((found == 0) | (found <= _MASKED)):
            return False
        found = found == 0
    if found.ndim != 4 or any(
        a not in (1, b) for a, b in zip(found.shape, keep.shape, strict=True)
    ):
        return False
    return bool((np.broadcast_to(found, keep.shape) == keep).all())
