"""Calibration without data: text that a language model writes itself, or generated inputs.

A language model calibrates on its own samples (LLM-QAT, arXiv 2305.17888): they visit the values
that its own distribution visits, which random tokens do not. Other models have no such source.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import onnxruntime as ort

from qcompile.calibration.data import CalibrationData, assemble, samples_wanted
from qcompile.calibration.inputs import generated_samples
from qcompile.calibration.samples import Sample
from qcompile.calibration.tokens import TokenInputs, fixed_length_warnings, sequence_length
from qcompile.config import CompileConfig
from qcompile.errors import CalibrationError
from qcompile.traced import Batch, TracedModel

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (done, total)."""

GENERATED_TOKENS: Final = 64
"""Longest sample that a model writes."""

_SAMPLES_AT_ONCE: Final = 64
_LOGITS_BYTES: Final = 256 * 2**20


def generate_calibration(
    model: TracedModel,
    session: ort.InferenceSession,
    config: CompileConfig,
    *,
    progress: Progress | None = None,
) -> CalibrationData:
    """Make calibration data where the user gave none; `warnings` say what that costs.

    A causal language model writes `config.samples` samples (and a few more to hold back) of
    min(seq_len, 64) tokens. There is no cache to write with: a sample of S tokens takes S - 2
    forward passes over what it has so far, the compute of S / 2 full passes over it. With the
    defaults (80 samples of 64 tokens) that is as much as running the model on 160 000 tokens.

    Any other model gets inputs jittered from `model.example`, or random ones.

    Args:
        session: runs the float graph `model.ir`.
        progress: called after each forward pass, or each sample.

    Raises:
        CalibrationError: the graph does not take what can be generated, or its logits are NaN.
        ConfigError: `config.seq_len` is more than the model's positions.
    """
    wanted = samples_wanted(model.kind, config)
    report = progress or _silent
    if model.kind == "text-generation":
        return _self_generated(model, session, config, wanted, report)
    return _generated_inputs(model, session, config, wanted, report)


def _self_generated(
    model: TracedModel,
    session: ort.InferenceSession,
    config: CompileConfig,
    wanted: int,
    progress: Progress,
) -> CalibrationData:
    inputs = TokenInputs.of(model)
    length = sequence_length(model, inputs, config)
    if inputs.length is None:
        length = min(length, GENERATED_TOKENS)
    batch = inputs.batch or 1
    rows = _write(
        model, session, inputs, math.ceil(wanted / batch) * batch, length, config, progress
    )
    samples = [
        Sample(inputs.feed(rows[at : at + batch]), rows=batch, mergeable=inputs.batch is None)
        for at in range(0, len(rows), batch)
    ]
    warning = (
        f"calibrated on text that {model.name} generated itself ({length} tokens a sample): ranges "
        "and accuracy may not hold for your data; give --calibration"
    )
    notes = [warning, *fixed_length_warnings(inputs, config)]
    return assemble(samples, "self-generated text", notes, model.kind, config)


def _write(
    model: TracedModel,
    session: ort.InferenceSession,
    inputs: TokenInputs,
    wanted: int,
    length: int,
    config: CompileConfig,
    progress: Progress,
) -> np.ndarray:
    """`wanted` token sequences: [BOS, random token], then sampled at temperature 1."""
    run = _Logits(session, inputs)
    bos = model.bos_token_id
    vocabulary = run(np.full((inputs.batch or 1, 1), bos or 0)).shape[-1]
    rng = np.random.default_rng(config.seed)
    first = _ordinary_tokens(model.tokenizer, vocabulary)
    ids = np.zeros((wanted, length), dtype=np.int64)
    start = 0
    if bos is not None:
        ids[:, 0] = bos
        start = 1
    ids[:, start : start + 1] = rng.choice(first, size=(wanted, 1))[:, : length - start]
    # Drawn for each sample beforehand, so that they do not depend on how samples share batches.
    chances = rng.random((wanted, length))

    affordable = _LOGITS_BYTES // (length * vocabulary * 4)
    at_once = inputs.batch or max(1, min(_SAMPLES_AT_ONCE, affordable))
    groups = range(0, wanted, at_once)
    steps = range(start + 1, length)
    done = 0
    for at in groups:
        part = ids[at : at + at_once]
        for step in steps:
            logits = run(part[:, :step])
            part[:, step] = _draw(logits, chances[at : at + at_once, step])
            done += 1
            progress(done, len(groups) * len(steps))
    return ids


class _Logits:
    """Logits after the last token of a prefix, from a session without a cache."""

    def __init__(self, session: ort.InferenceSession, inputs: TokenInputs) -> None:
        names = [output.name for output in session.get_outputs()]
        self._output = "logits" if "logits" in names else names[0]
        self._session = session
        self._inputs = inputs

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        real = ids.shape[1]
        if self._inputs.length is not None:
            # What comes after a prefix cannot influence it: the model is causal.
            ids = np.pad(ids, ((0, 0), (0, self._inputs.length - real)))
        logits = _run(self._session, [self._output], self._inputs.feed(ids, real=real))[0]
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise CalibrationError(
                f"the graph's output {self._output!r} has shape {list(logits.shape)}, which is not "
                "(batch, sequence, vocabulary), so the model cannot generate its own text",
                hint="give --calibration",
            )
        last = np.asarray(logits[:, real - 1], dtype=np.float64)
        if np.isnan(last).any() or (last == np.inf).any():
            raise CalibrationError("the model's own logits are NaN or Inf, so it cannot generate")
        return last


def _draw(logits: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """One token a row, with the probabilities of softmax(logits), by inverting their sum."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    sums = np.cumsum(weights, axis=-1)
    # Against the sum itself, and not 1: rounding can never lead past the last token.
    targets = chances[:, None] * sums[:, -1:]
    return np.asarray((sums <= targets).sum(axis=-1))


def _ordinary_tokens(tokenizer: Any, vocabulary: int) -> np.ndarray:
    """Ids that a text can begin with: what the tokenizer knows, special tokens left out."""
    if tokenizer is None:
        return np.arange(vocabulary)
    known = np.arange(min(vocabulary, len(tokenizer)))
    ordinary = np.setdiff1d(known, np.asarray(tokenizer.all_special_ids, dtype=np.int64))
    return ordinary if ordinary.size else known


def _generated_inputs(
    model: TracedModel,
    session: ort.InferenceSession,
    config: CompileConfig,
    wanted: int,
    progress: Progress,
) -> CalibrationData:
    samples, how = generated_samples(model, config, wanted, progress)
    # One sample tells whether the graph takes such inputs; the whole calibration would fail late.
    _run(session, None, samples[0].feed)
    warning = (
        f"calibrated on {how}, whose ranges mean little for real data, and the accuracy in the "
        "report is on such inputs as well; give --calibration (or, where the target has it, "
        "--activations dynamic, whose ranges are found at run time)"
    )
    return assemble(samples, how, [warning], model.kind, config)


def _run(session: ort.InferenceSession, names: list[str] | None, feed: Batch) -> list[np.ndarray]:
    try:
        outputs: list[np.ndarray] = session.run(names, feed)
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        detail = " ".join(str(error).split())
        raise CalibrationError(
            f"the model does not run on generated inputs: {detail}", hint="give --calibration"
        ) from error
    return outputs


def _silent(done: int, total: int) -> None:
    """No progress wanted."""
