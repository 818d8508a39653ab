"""With a cache, a text must come out as it does in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort

from qcompile.equivalence import TOLERANCE
from qcompile.generation import Decoder, Logits
from qcompile.metrics import Accuracy
from qcompile.session import open_session, run_outputs
from qcompile.targets.base import Target
from qcompile.traced import Batch, Kind

_MOST: Final = 64


def check_steps(
    traced: Path, rewritten: Path, compiled: Path, target: Target, kind: Kind, feed: Batch
) -> tuple[Accuracy, list[str]]:
    """Decode the first sample of `feed`: a half as the prompt, then token by token.

    Args:
        traced: the float graph without a cache: what both others are compared with.
        rewritten: the float graph with one.
        compiled: the graph that will ship.
        target: whose kernels.
        kind: which accuracy measure applies.
        feed: token inputs, each [samples, tokens]. Of the first sample, up to 64 tokens are taken.

    Returns:
        The compiled graph's accuracy, and what is wrong with the float one, in sentences.
    """
    real = np.flatnonzero(feed["attention_mask"][0])[:_MOST]
    ids = feed["input_ids"][:1, real]
    whole = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    whole["position_ids"] = np.arange(ids.shape[1])[None]
    expected = next(iter(run_outputs(open_session(traced), whole).values()))
    problems = []
    found = _stepped(open_session(rewritten), ids)
    largest, difference = np.abs(expected).max(), np.abs(expected - found).max()
    if not difference <= TOLERANCE * max(largest, 1e-6):
        problems.append(
            f"with the cache, the float model's logits differ by {difference:.3g} of {largest:.3g} "
            "from those in one go"
        )
    accuracy = Accuracy(kind)
    session = open_session(compiled, target.runtime(), exact=not target.saturates)
    accuracy.add(whole, expected, _stepped(session, ids))
    return accuracy, problems


def _stepped(session: ort.InferenceSession, ids: np.ndarray) -> Logits:
    decoder = Decoder(session, 1, ids.shape[1])
    prompt = ids.shape[1] // 2
    steps = [decoder.step(ids[:, :prompt])] if prompt else []
    steps += [decoder.step(ids[:, at : at + 1]) for at in range(prompt, ids.shape[1])]
    return np.concatenate(steps, axis=1)
