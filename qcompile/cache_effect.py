"""What a cache of codes does to the output: keys and values apart, by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import onnx_ir as ir
import onnxruntime as ort

from qcompile.cache import KINDS
from qcompile.cache_plan import GRANULARITY, CachePlan
from qcompile.metrics import Accuracy
from qcompile.passes.float_cache import FloatCache
from qcompile.report import Cache, CacheEffect
from qcompile.session import open_session, run_outputs
from qcompile.targets.base import Target
from qcompile.traced import Batch, Kind

_RANGES: Final = {0: slice(0, 64), 64: slice(64, 128), 128: slice(128, None)}
"""Positions by the first of them: of short prompts, and of long ones."""

_SAMPLES: Final = 8
_FORMS: Final[dict[str, tuple[str, ...]]] = {
    "float": (),
    "keys": ("key",),
    "values": ("value",),
    "both": KINDS,
}


def cache_report(
    plan: CachePlan,
    traced: Path,
    compiled: Path,
    target: Target,
    kind: Kind,
    held_back: Sequence[Batch],
) -> Cache:
    """Measure the compiled graph on held-back samples, with parts of its cache in float.

    Args:
        plan: of the cache.
        traced: the float graph without a cache, which all are compared with.
        compiled: the graph that will ship, its weights beside it.
        target: whose kernels.
        kind: of a model with a KL.
        held_back: token inputs, each [samples, tokens]; no more than 8 samples are taken.
    """
    feeds = _first(held_back)
    found: dict[int, dict[str, Accuracy]] = {}
    reference = open_session(traced)
    for form, rounded in _FORMS.items():
        session = _opened(compiled, target, rounded)
        for feed in feeds:
            expected, logits = (
                next(iter(run_outputs(s, feed).values())) for s in (reference, session)
            )
            for start, cut in _RANGES.items():
                part = {name: value[:, cut] for name, value in feed.items()}
                accuracy = found.setdefault(start, {}).setdefault(form, Accuracy(kind))
                accuracy.add(part, expected[:, cut], logits[:, cut])
    longest = max(feed["input_ids"].shape[1] for feed in feeds)
    return Cache(
        bits=plan.bits,
        granularity=GRANULARITY,
        bytes_per_token=plan.bytes_per_token,
        bytes_per_token_float=plan.bytes_per_token_float,
        samples=len(feeds),
        effect=[
            CacheEffect(
                first=start,
                last=min(_RANGES[start].stop or longest, longest) - 1,
                kl={form: accuracy.result()["kl"] for form, accuracy in by.items()},
            )
            for start, by in found.items()
            if all(accuracy.rows for accuracy in by.values())
        ],
    )


def _first(batches: Sequence[Batch]) -> list[Batch]:
    """The first samples, one a feed: their logits may be large."""
    return [
        {name: value[at : at + 1] for name, value in batch.items()}
        for batch in batches
        for at in range(len(next(iter(batch.values()))))
    ][:_SAMPLES]


def _opened(compiled: Path, target: Target, rounded: tuple[str, ...]) -> ort.InferenceSession:
    """A session on `compiled`, where only keys and values of the kinds `rounded` are codes."""
    path = compiled
    if rounded != KINDS:
        model = ir.load(compiled)
        FloatCache(*rounded)(model)
        path = compiled.with_name("cache.onnx")
        ir.save(model, path)
    session = open_session(path, target.runtime(), exact=not target.saturates)
    if path != compiled:
        path.unlink()
    return session
