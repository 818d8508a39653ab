"""Calibration without data: what a language model writes, and generated inputs."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibration import generate
from qcompile.calibration.data import CalibrationData
from qcompile.calibration.generate import generate_calibration
from qcompile.config import CompileConfig
from qcompile.errors import CalibrationError, ConfigError
from qcompile.traced import TracedModel
from tests.calibration.models import (
    BOS,
    SPECIAL,
    VOCABULARY,
    encoder,
    float_model,
    language_model,
    rows,
    session,
    traced,
)

SMALL = CompileConfig(samples=8, seq_len=6)


def made(model: TracedModel, config: CompileConfig = SMALL) -> CalibrationData:
    return generate_calibration(model, session(model), config)


def successor() -> np.ndarray:
    """A language that always continues token t with t + 1."""
    return np.roll(np.eye(VOCABULARY, dtype=np.float32) * 100, 1, axis=1)


def test_a_model_writes_what_it_believes() -> None:
    data = made(language_model(bigram=successor()))
    everything = rows(data.calibration) + rows(data.held_back)
    assert data.samples == 8
    for row in everything:
        assert row[0] == BOS
        assert row[1] not in SPECIAL.values()
        assert all(b == (a + 1) % VOCABULARY for a, b in pairwise(row[1:]))
    assert not set(rows(data.calibration)) & set(rows(data.held_back))
    assert "text that tiny generated itself (6 tokens a sample)" in data.warnings[0]
    assert "--calibration" in data.warnings[0]
    (batch,) = data.calibration
    assert batch["position_ids"].dtype == np.int32
    assert (batch["attention_mask"] == 1).all()


def test_tokens_follow_the_softmax() -> None:
    table = np.full((VOCABULARY, VOCABULARY), -np.inf, dtype=np.float32)
    table[:, 10], table[:, 11] = np.log(0.75), np.log(0.25)
    data = made(language_model(bigram=table), CompileConfig(samples=64, seq_len=64))
    drawn = np.concatenate([np.ravel(row[2:]) for row in rows(data.calibration)])
    assert set(drawn) == {10, 11}
    assert np.mean(drawn == 10) == pytest.approx(0.75, abs=0.03)


def test_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    first = rows(made(model).calibration)
    assert rows(made(model).calibration) == first
    assert rows(made(model, SMALL.model_copy(update={"seed": 1})).calibration) != first
    # Memory bounds the samples that share a run, and must not change them.
    monkeypatch.setattr(generate, "_LOGITS_BYTES", 1)
    assert rows(made(model).calibration) == first


def test_memory_of_a_run_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    inner = session(model)
    sizes: list[int] = []

    class Spy:
        get_outputs = staticmethod(inner.get_outputs)

        @staticmethod
        def run(names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            outputs: list[np.ndarray] = inner.run(names, feed)
            sizes.append(outputs[0].nbytes)
            return outputs

    budget = 3 * 6 * VOCABULARY * 4
    monkeypatch.setattr(generate, "_LOGITS_BYTES", budget)
    generate_calibration(model, Spy(), SMALL)
    assert max(sizes) <= budget
    assert len(sizes) == 1 + 5 * 4  # the vocabulary, then 5 groups of 3 (14 samples), 4 tokens


def test_length_is_capped_and_checked() -> None:
    data = made(language_model(), CompileConfig(samples=1, seq_len=1000))
    assert {len(row) for row in rows(data.calibration)} == {generate.GENERATED_TOKENS}
    with pytest.raises(ConfigError, match="8 tokens is longer than the 4"):
        made(language_model(max_length=4), CompileConfig(seq_len=8))


def test_without_bos_or_tokenizer() -> None:
    data = made(language_model(bos_token_id=None, tokenizer=None, bigram=successor()))
    for row in rows(data.calibration):
        assert all(b == (a + 1) % VOCABULARY for a, b in pairwise(row))


def test_shortest_samples() -> None:
    data = made(language_model(bigram=successor()), CompileConfig(samples=2, seq_len=2))
    assert {len(row) for row in rows(data.calibration)} == {2}


def test_fixed_batch_and_sequence() -> None:
    model = language_model("int64[4, 5] input_ids, int64[4, 5] attention_mask", bigram=successor())
    data = made(model)
    assert [b["input_ids"].shape for b in data.calibration + data.held_back] == [(4, 5)] * 3
    for row in rows(data.calibration):
        assert all(b == (a + 1) % VOCABULARY for a, b in pairwise(row[1:]))
    assert "fixes the sequence at 5" in data.warnings[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(2, 7), st.integers(0, 2**32))
def test_generated_samples_are_well_formed(samples: int, seq_len: int, seed: int) -> None:
    steps: list[tuple[int, int]] = []
    model = language_model()
    data = generate_calibration(
        model,
        session(model),
        CompileConfig(samples=samples, seq_len=seq_len, seed=seed),
        progress=lambda done, total: steps.append((done, total)),
    )
    for batch in data.calibration + data.held_back:
        ids = batch["input_ids"]
        assert ids.shape[1] == seq_len
        assert ids.min() >= 0 and ids.max() < VOCABULARY
    total = seq_len - 2
    assert steps == [(i + 1, total) for i in range(total)]


def test_models_that_cannot_write() -> None:
    with pytest.raises(CalibrationError, match="logits are NaN"):
        made(language_model(bigram=np.full((VOCABULARY, VOCABULARY), np.nan, np.float32)))
    with pytest.raises(CalibrationError, match="does not determine the graph's input 'past'"):
        made(language_model("int64[b, s] input_ids, float[b, s] past"))
    headless = language_model(bigram=np.zeros((VOCABULARY, 2, 3), np.float32))
    with pytest.raises(CalibrationError, match="not \\(batch, sequence, vocabulary\\)"):
        made(headless)
    short = language_model(bigram=np.zeros((3, VOCABULARY), np.float32))
    with pytest.raises(CalibrationError, match="does not run on generated inputs") as caught:
        made(short)
    assert "\n" not in str(caught.value)


# Models of other kinds


def test_encoder_gets_tokens_that_it_knows() -> None:
    model = encoder("int64[b, s] input_ids, int64[b, s] attention_mask, int32[b, s] token_type_ids")
    data = made(model)
    (batch,) = data.calibration
    assert {array.shape for array in batch.values()} == {(8, 6)}
    assert batch["input_ids"].min() >= 0 and batch["input_ids"].max() < VOCABULARY
    assert (batch["attention_mask"] == 1).all() and not batch["token_type_ids"].any()
    assert re.search("random inputs.*accuracy.*--calibration", data.warnings[0])
    with pytest.raises(ConfigError, match="longer than the 4"):
        made(language_model(kind="text-classification", max_length=4))


def test_random_inputs_of_every_sort() -> None:
    model = traced(
        """<ir_version: 10, opset_import: ["" : 23]>
        f (float[b, 3, h, w] x, int64[b, s] ids, bool[b] keep, float[b, s] mask,
           int64[b, s] position_ids, int64[b] flag, float16[b, 5] half, float[7, 2] table)
        => (float y, float z) {
            shape = Constant <value = int64[2] {-1, 1}> ()
            cast = Cast <to = 6> (ids)
            flat = Reshape (cast, shape)
            y = Gather (table, flat)
            z = Abs (x)
        }""",
        weights={"table": np.zeros((7, 2), np.float32)},
    )
    (batch,) = made(model).calibration
    assert batch["x"].shape == (8, 3, 224, 224)
    assert abs(batch["x"].std() - 1) < 0.01
    assert set(np.unique(batch["ids"])) <= set(range(7)) and len(np.unique(batch["ids"])) > 2
    assert batch["keep"].all() and (batch["mask"] == 1).all()
    assert (batch["position_ids"] == np.arange(6)).all()
    assert set(np.unique(batch["flag"])) <= {0, 1}
    assert batch["half"].dtype == np.float16


def test_example_with_jitter() -> None:
    model = float_model("float[b, 3] x, int32[b] k")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    model.example = {"x": x, "k": np.array([3, 9], np.int32)}
    data = made(model)
    batch = data.calibration[0]
    assert data.origin == "the example input with jitter"
    assert batch["x"].shape == (8, 3) and set(batch["k"].tolist()) == {3, 9}
    np.testing.assert_array_equal(batch["x"][:2], x)
    assert 0 < np.abs(batch["x"][2:4] - x).max() < 5
    assert "example input with jitter" in data.warnings[0]


def test_example_without_anything_to_change() -> None:
    model = float_model("float[b, 3] x, bool[b] attention_mask")
    model.example = {"x": np.zeros((1, 3), np.float32), "attention_mask": np.array([True])}
    data = made(model)
    assert data.samples == 1
    assert "single sample" in data.warnings[1]


def test_inputs_that_cannot_be_generated() -> None:
    huge = float_model("float[100000, 100000] x")
    with pytest.raises(CalibrationError, match="too large to generate"):
        made(huge)
    wrong = float_model("float[b, 3] x")
    wrong.example = {"y": np.zeros((1, 3), np.float32)}
    with pytest.raises(CalibrationError, match="expected x; found y"):
        made(wrong)
    picky = traced(
        """<ir_version: 10, opset_import: ["" : 23]>
        f (float[b, s] x, float[b, t] z) => (float y) { y = MatMul (x, z) }"""
    )
    with pytest.raises(CalibrationError, match="does not run on generated inputs"):
        made(picky)


def test_progress_reaches_its_total() -> None:
    steps: list[tuple[int, int]] = []
    model = float_model("float[b, 3] x")
    generate_calibration(
        model, session(model), SMALL, progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(i, 26) for i in range(1, 27)]  # 8 calibrate, 2 are held back, 16 estimate
