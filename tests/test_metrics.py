"""Accuracy: every figure against its definition, padding left out, and the extremes."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.calibration.stats import Array
from qcompile.metrics import Accuracy, log_softmax, sqnr_db
from qcompile.traced import Batch, Kind

RNG = np.random.default_rng(0)
CLASSES = 11


def logits(*shape: int) -> Array:
    return (3.0 * RNG.standard_normal((*shape, CLASSES))).astype(np.float32)


def softmax(values: Array) -> Array:
    powers = np.exp(values.astype(np.float64))
    result: Array = powers / powers.sum(-1, keepdims=True)
    return result


def figures(kind: Kind, feed: Batch, reference: Array, actual: Array) -> dict[str, float]:
    accuracy = Accuracy(kind)
    accuracy.add(feed, reference, actual)
    return accuracy.result()


def tokens(batch: int, length: int) -> Array:
    return RNG.integers(0, CLASSES, (batch, length))


def test_divergence_and_agreement_of_a_language_model() -> None:
    reference, actual = logits(2, 7), logits(2, 7)
    found = figures("text-generation", {"input_ids": tokens(2, 7)}, reference, actual)
    p, q = softmax(reference), softmax(actual)
    assert found["kl"] == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-9)
    assert found["top1_agreement"] == (reference.argmax(-1) == actual.argmax(-1)).mean()


def test_perplexity_is_of_the_next_token() -> None:
    ids, reference, actual = tokens(2, 7), logits(2, 7), logits(2, 7)
    found = figures("text-generation", {"input_ids": ids}, reference, actual)
    for name, values in (("perplexity_float", reference), ("perplexity", actual)):
        chosen = np.take_along_axis(softmax(values)[:, :-1], ids[:, 1:, None], -1)
        assert found[name] == pytest.approx(float(np.exp(-np.log(chosen).mean())), rel=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    ids, reference, actual = tokens(1, 6), logits(1, 6), logits(1, 6)
    plain = figures("text-generation", {"input_ids": ids}, reference, actual)
    widths = (2, 0) if side == "left" else (0, 2)
    fill = logits(1, 2), logits(1, 2)

    def pad(array: Array, value: Array) -> Array:
        parts = [value, array] if side == "left" else [array, value]
        return np.concatenate(parts, axis=1)

    feed = {
        "input_ids": np.pad(ids, ((0, 0), widths)),
        "attention_mask": np.pad(np.ones_like(ids), ((0, 0), widths)),
    }
    padded = figures("text-generation", feed, pad(reference, fill[0]), pad(actual, fill[1]))
    for name in ("kl", "top1_agreement", "perplexity", "perplexity_float"):
        assert padded[name] == pytest.approx(plain[name], rel=1e-12), name


def test_batches_add_up() -> None:
    ids, reference, actual = tokens(5, 9), logits(5, 9), logits(5, 9)
    whole = figures("text-generation", {"input_ids": ids}, reference, actual)
    parts = Accuracy("text-generation")
    for rows in (slice(0, 1), slice(1, 5)):
        parts.add({"input_ids": ids[rows]}, reference[rows], actual[rows])
    assert parts.result() == pytest.approx(whole, rel=1e-6)


def test_more_rows_than_are_compared_at_once() -> None:
    reference, actual = logits(1, 700), logits(1, 700)
    found = figures("text-generation", {"input_ids": tokens(1, 700)}, reference, actual)
    p, q = softmax(reference), softmax(actual)
    assert found["kl"] == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-9)


def test_classifier_logits_are_rows_without_perplexity() -> None:
    reference, actual = logits(4), logits(4)
    feed = {"input_ids": tokens(4, 3), "attention_mask": np.ones((4, 3), np.int64)}
    found = figures("text-classification", feed, reference, actual)
    p, q = softmax(reference), softmax(actual)
    assert found["kl"] == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-9)
    assert set(found) == {"kl", "top1_agreement", "sqnr_db"}


def test_embeddings_are_pooled_over_real_tokens() -> None:
    reference, actual = RNG.standard_normal((2, 3, 5)), RNG.standard_normal((2, 3, 5))
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    found = figures("feature-extraction", {"attention_mask": mask}, reference, actual)
    cosines = []
    for row, kept in enumerate((2, 3)):
        a, b = reference[row, :kept].mean(0), actual[row, :kept].mean(0)
        cosines.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    assert found["cosine"] == pytest.approx(np.mean(cosines))
    assert found["cosine_min"] == pytest.approx(min(cosines))


def test_other_outputs_are_flattened_per_sample() -> None:
    reference, actual = RNG.standard_normal((2, 3, 5)), RNG.standard_normal((2, 3, 5))
    found = figures("other", {}, reference, actual)
    a, b = reference.reshape(2, -1), actual.reshape(2, -1)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found["cosine"] == pytest.approx(cosines.mean())


def test_signal_to_noise_ratio() -> None:
    reference = RNG.standard_normal((2, 50))
    noise = 0.01 * RNG.standard_normal((2, 50))
    expected = 10 * np.log10((reference**2).sum() / (noise**2).sum())
    assert figures("other", {}, reference, reference + noise)["sqnr_db"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"), [(1.0, 0.0, 200.0), (100.0, 1.0, 20.0), (1.0, 1e-300, 200.0)]
)
def test_ratio_in_decibels(signal: float, noise: float, expected: float) -> None:
    assert sqnr_db(signal, noise) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["text-generation", "text-classification"])
def test_identical_logits(kind: Kind) -> None:
    reference = logits(2, 7)
    found = figures(kind, {"input_ids": tokens(2, 7)}, reference, reference.copy())
    assert (found["kl"], found["top1_agreement"], found["sqnr_db"]) == (0.0, 1.0, 200.0)
    assert found.get("perplexity") == found.get("perplexity_float")


@pytest.mark.parametrize("kind", ["feature-extraction", "other"])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_identical_vectors_of_any_size(kind: Kind, size: float) -> None:
    reference = (size * RNG.standard_normal((2, 3, 5))).astype(np.float32)
    found = figures(kind, {}, reference, reference.copy())
    assert found["cosine"] == pytest.approx(1.0)
    assert found["cosine_min"] == pytest.approx(1.0)
    assert found["sqnr_db"] == 200.0


def test_identical_zeros_are_no_difference() -> None:
    reference = np.array([[1.0, 2.0], [0.0, 0.0]], np.float32)
    found = figures("other", {}, reference, reference.copy())
    assert found["cosine_min"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "output",
    [np.array([True, False]), np.array([[3], [4]]), np.float32(2.0), np.array(1.5)],
    ids=["bool", "int", "scalar", "0-d"],
)
def test_an_output_of_any_type_can_be_compared(output: Array) -> None:
    found = figures("other", {}, output, output)
    assert found["cosine"] == pytest.approx(1.0)
    assert found["sqnr_db"] == 200.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_noticed(value: float) -> None:
    reference = RNG.standard_normal((2, 3))
    actual = reference.copy()
    accuracy = Accuracy("other")
    accuracy.add({}, reference, actual)
    assert accuracy.finite
    actual[1, 2] = value
    with np.errstate(invalid="ignore"):
        accuracy.add({}, reference, actual)
    assert not accuracy.finite


def test_log_softmax_keeps_small_divergences() -> None:
    values = np.array([[1000.0, 1000.5, 999.0]], np.float32)
    p = log_softmax(values)
    assert p.dtype == np.float64
    assert np.exp(p).sum() == pytest.approx(1.0, abs=1e-15)
    np.testing.assert_allclose(p - p.max(), values.astype(np.float64) - 1000.5)
