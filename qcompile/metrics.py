"""How far a compiled model is from the float one, by kind of model.

Sums are gathered batch by batch, so that no more than one batch of outputs is held at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.traced import LOGITS, Batch, Kind

Array = npt.NDArray[Any]
_LOGITS_AT_ONCE = 1 << 21
"""A comparison holds some six float64 arrays of this size."""


@dataclasses.dataclass
class Accuracy:
    """Accumulates a comparison; `result` gives the figures.

    For logits (of tokens, of texts, of images): mean KL(float ‖ compiled) in nats per row,
    top-1 agreement, and for text-generation the perplexity of both on the text itself. For
    embeddings (feature-extraction): cosine similarity of mean-pooled vectors, one per sample. For
    anything else: cosine similarity per sample over the flattened first output. Always SQNR in dB.
    """

    kind: Kind
    rows: int = 0
    kl: float = 0.0
    agree: int = 0
    nll_float: float = 0.0
    nll: float = 0.0
    predicted: int = 0
    cosines: list[float] = dataclasses.field(default_factory=list)
    signal: float = 0.0
    noise: float = 0.0
    finite: bool = True
    reference_finite: bool = True

    @np.errstate(invalid="ignore")  # of what is not finite there are no figures, but a sentence
    def add_all(
        self, feed: Batch, reference: Mapping[str, Array], actual: Mapping[str, Array]
    ) -> None:
        """Compare outputs by name: the first by the measure of the kind, the others by cosine.

        Of a graph that gives the last token's logits, these are compared.
        """
        for at, (name, expected) in enumerate(reference.items()):
            if at == 0:
                if self.kind == "text-generation" and actual[name].shape[1] < expected.shape[1]:
                    feed, expected = {n: v[:, -1:] for n, v in feed.items()}, expected[:, -1:]
                self.add(feed, expected, actual[name])
            else:
                expected, found = _as_numbers(expected), _as_numbers(actual[name])
                self._note_infinite(expected, found)
                rows = len(expected)
                self._add_vectors(expected.reshape(rows, -1), found.reshape(rows, -1))

    def add(self, feed: Batch, reference: Array, actual: Array) -> None:
        """Compare one batch of outputs, of equal shapes [batch, ...]."""
        reference, actual = _as_numbers(reference), _as_numbers(actual)
        self._note_infinite(reference, actual)
        difference = reference - actual
        self.signal += float(np.square(reference, dtype=np.float64).sum())
        self.noise += float(np.square(difference, dtype=np.float64).sum())
        if self.kind in LOGITS:
            self._add_logits(feed, reference, actual)
        elif self.kind == "feature-extraction" and reference.ndim == 3:
            weights = feed.get("attention_mask", np.ones(reference.shape[:2]))[..., None]
            self._add_vectors((reference * weights).sum(1), (actual * weights).sum(1))
        else:
            self._add_vectors(
                reference.reshape(len(reference), -1), actual.reshape(len(actual), -1)
            )

    def _note_infinite(self, reference: Array, actual: Array) -> None:
        self.finite = self.finite and bool(np.isfinite(actual).all())
        self.reference_finite = self.reference_finite and bool(np.isfinite(reference).all())

    def _add_logits(self, feed: Batch, reference: Array, actual: Array) -> None:
        classes = reference.shape[-1]
        flat_reference, flat_actual = reference.reshape(-1, classes), actual.reshape(-1, classes)
        targets = _next_tokens(feed, reference) if self.kind == "text-generation" else None
        keep = _real_rows(feed, reference)
        step = max(1, _LOGITS_AT_ONCE // classes)
        for start in range(0, len(flat_reference), step):
            rows = slice(start, start + step)
            valid = keep[rows]
            p, q = log_softmax(flat_reference[rows]), log_softmax(flat_actual[rows])
            divergence = (np.exp(p) * (p - q)).sum(-1)
            self.kl += float(divergence[valid].sum())
            self.agree += int((p.argmax(-1) == q.argmax(-1))[valid].sum())
            self.rows += int(valid.sum())
            if targets is not None:
                chosen = targets[rows]
                at = np.flatnonzero((chosen >= 0) & valid)
                self.nll_float -= float(p[at, chosen[at]].sum())
                self.nll -= float(q[at, chosen[at]].sum())
                self.predicted += len(at)

    def _add_vectors(self, reference: Array, actual: Array) -> None:
        reference, actual = reference.astype(np.float64), actual.astype(np.float64)
        dot = (reference * actual).sum(-1)
        norms = np.linalg.norm(reference, axis=-1) * np.linalg.norm(actual, axis=-1)
        same = (reference == actual).all(-1)  # two zero vectors have no angle, and no difference
        self.cosines.extend(np.where(same, 1.0, dot / np.maximum(norms, 1e-300)).tolist())

    def result(self) -> dict[str, float]:
        """The figures, by name."""
        figures: dict[str, float] = {}
        if self.rows:
            figures["kl"] = max(self.kl / self.rows, 0.0)
            figures["top1_agreement"] = self.agree / self.rows
        if self.predicted:
            figures["perplexity_float"] = float(np.exp(self.nll_float / self.predicted))
            figures["perplexity"] = float(np.exp(self.nll / self.predicted))
        if self.cosines:
            figures["cosine"] = float(np.mean(self.cosines))
            figures["cosine_min"] = float(np.min(self.cosines))
        figures["sqnr_db"] = sqnr_db(self.signal, self.noise)
        return figures


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantisation-noise ratio in dB, capped at 200 where nothing differs."""
    if noise <= 0.0:
        return 200.0
    return float(min(200.0, 10.0 * np.log10(max(signal, 1e-300) / noise)))


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64: differences of small divergences must not cancel."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _as_numbers(output: Array) -> Array:
    """Outputs may be of any type and rank; a comparison needs numbers, one row per sample."""
    output = np.atleast_1d(output)
    return output if np.issubdtype(output.dtype, np.floating) else output.astype(np.float64)


def _next_tokens(feed: Batch, logits: Array) -> Array:
    """The token that each position should predict, -1 where there is none."""
    ids = feed["input_ids"]
    targets = np.full(ids.shape, -1, np.int64)
    if logits.ndim == 3 and logits.shape[:2] == ids.shape:
        targets[:, :-1] = ids[:, 1:]
        mask = feed.get("attention_mask")
        if mask is not None and mask.shape == ids.shape:
            targets[:, :-1][mask[:, 1:] == 0] = -1
    return targets.reshape(-1)


def _real_rows(feed: Batch, logits: Array) -> Array:
    """False for rows of logits that belong to padding."""
    mask = feed.get("attention_mask")
    if mask is not None and logits.ndim == 3 and mask.shape == logits.shape[:2]:
        return np.asarray(mask, bool).reshape(-1)
    return np.ones(int(np.prod(logits.shape[:-1])), bool)
