"""Recognising norms and attention must not change the function: checked on every compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from qcompile.session import first_sample, open_session, run_outputs
from qcompile.traced import Batch

TOLERANCE: Final = 1e-4
"""Largest difference relative to the largest output: float32 rounding gives some 1e-6."""


def float_problems(traced: Path, rewritten: Path, feed: Batch) -> list[str]:
    """How the rewritten float graph differs from the traced one, in sentences.

    Both run on the first sample of `feed`, and once more with its first quarter masked as left
    padding where the model takes a mask; outputs at masked positions do not count.
    """
    # The rewritten one first: its batch may be of one size only, where the traced one's is not.
    after = open_session(rewritten)
    sample = first_sample(after, feed)
    cases = {"": sample}
    padded = _padded(sample)
    if padded is not None:
        cases[" under padding"] = padded
    actual = {label: run_outputs(after, inputs) for label, inputs in cases.items()}
    del after  # two float models in memory at once are not needed
    before = open_session(traced)
    problems = []
    for label, inputs in cases.items():
        for name, reference in run_outputs(before, inputs).items():
            keep = _real(inputs, reference)
            wanted, got = reference[keep], actual[label][name][keep]
            largest = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
            difference = largest_difference(wanted, got)
            if not difference <= TOLERANCE * max(largest, 1e-6):
                problems.append(
                    f"rewriting changed the float model{label}: {name} differs by {difference:.3g} "
                    f"of {largest:.3g}; this is a bug in qcompile"
                )
    return problems


def largest_difference(wanted: np.ndarray, got: np.ndarray) -> float:
    """Of two arrays of one shape; what is NaN, or the same infinity, in both does not differ."""
    # Outputs may be truth values, or numbers without a sign.
    first, second = (np.asarray(array, np.float64) for array in (wanted, got))
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    off = np.subtract(first, second, out=np.zeros_like(first), where=~same)
    return float(np.abs(off).max(initial=0.0))


def _padded(feed: Batch) -> Batch | None:
    mask = feed.get("attention_mask")
    if mask is None or "input_ids" not in feed or mask.shape != feed["input_ids"].shape:
        return None
    if mask.shape[1] < 4:
        return None
    padded = {**feed, "attention_mask": mask.copy()}
    padded["attention_mask"][:, : mask.shape[1] // 4] = 0
    if "position_ids" in feed:
        positions = np.cumsum(padded["attention_mask"], axis=1) - 1
        padded["position_ids"] = np.maximum(positions, 0).astype(feed["position_ids"].dtype)
    return padded


def _real(feed: Batch, output: np.ndarray) -> np.ndarray:
    mask = feed.get("attention_mask")
    if mask is not None and output.ndim >= 2 and output.shape[:2] == mask.shape:
        return np.asarray(mask, bool)
    return np.ones(output.shape, bool)
