"""`load_calibration` of texts and files of them; what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibration.data import TOKEN_SAMPLES
from qcompile.config import CompileConfig
from qcompile.errors import CalibrationError, ConfigError
from tests.calibration.models import (
    BOS,
    CLS,
    SEP,
    WORDS,
    encoder,
    float_model,
    language_model,
    load,
    refusal,
    rows,
    words,
    written,
)

ENCODER = encoder()
FLOATS = float_model()


# Texts for a language model


def test_beginnings_of_documents_come_first_then_their_next_windows() -> None:
    config = CompileConfig(samples=3, seq_len=8, objective="scheme")
    data = load([words(20), words(3), words(9, first=20)], config=config)
    ids = rows(data.calibration) + rows(data.held_back)
    start = [4 + i for i in range(20)]
    assert ids == [
        (BOS, *start[:7]),
        (BOS, *range(24, 31)),
        (BOS, *start[7:14]),
        (BOS, *start[:3]),
    ]
    assert data.samples == 3
    assert data.warnings == (
        "the texts given: 1 of 4 samples are shorter than 8 tokens, because the text has too few "
        "long documents",
    )


def test_bos_is_not_doubled_and_not_invented() -> None:
    assert rows(load(["<s> w0 w1", "w2"]).calibration) == [(BOS, 4, 5)]
    without = language_model(bos_token_id=None)
    assert rows(load(["w0 w1", "w2", "w3 w4 w5"], without).calibration) == [(4, 5)]


def test_every_input_is_fed_in_its_dtype() -> None:
    (batch,) = load([words(8, first=i) for i in range(9)]).calibration
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "input_ids": "int64",
        "attention_mask": "int64",
        "position_ids": "int32",
    }
    assert (batch["attention_mask"] == 1).all()
    assert (batch["position_ids"] == np.arange(8)).all()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, WORDS - 1)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(2, 9),
)
def test_samples_are_disjoint_and_well_formed(
    documents: list[tuple[int, int]], samples: int, seq_len: int
) -> None:
    texts = [words(n, first) for n, first in documents]
    config = CompileConfig(samples=samples, seq_len=seq_len)
    if not any(texts):
        with pytest.raises(CalibrationError):
            load(texts, config=config)
        return
    data = load(texts, config=config)
    calibration, held_back = rows(data.calibration), rows(data.held_back)
    assert len(calibration) == data.samples <= samples
    assert len(set(calibration)) == len(calibration)
    assert data.seen == (calibration == held_back)
    if data.seen:
        assert any("single sample" in warning for warning in data.warnings)
    else:
        assert not set(calibration) & set(held_back)
    estimated = rows(data.estimated)
    assert not set(estimated) & set(held_back) or len(calibration) == 1
    if estimated != calibration:
        assert not set(estimated) & set(calibration)
    for row in calibration + held_back:
        assert row[0] == BOS and 2 <= len(row) <= seq_len
    for batch in data.calibration + data.held_back:
        assert {array.shape for array in batch.values()} == {batch["input_ids"].shape}
    assert rows(load(texts, config=config).calibration) == calibration


def test_only_as_much_is_read_as_is_needed() -> None:
    read: list[int] = []

    def endless() -> Iterator[str]:
        for i in range(10**9):
            read.append(i)
            yield words(7, first=i % WORDS)

    assert load(endless()).samples == 4
    assert len(read) == 4 + 1 + TOKEN_SAMPLES


@pytest.mark.parametrize(
    ("documents", "few"), [(20, TOKEN_SAMPLES), (13, 3), (8, 1), (7, 0)], ids=str
)
def test_damage_is_estimated_on_what_nothing_else_sees(documents: int, few: int) -> None:
    texts = [words(7, first=i) for i in range(documents)]
    config = CompileConfig(samples=8, seq_len=8)
    data = load(texts, config=config)
    estimated, others = set(rows(data.estimated)), set(rows(data.held_back))
    if few:
        assert len(estimated) == few
        assert not estimated & (others | set(rows(data.calibration)))
    else:
        assert estimated == set(rows(data.calibration))
    assert any("to estimate damage on" in warning for warning in data.warnings) == (not few)
    unplanned = load(texts, config=config.model_copy(update={"objective": "scheme"}))
    assert rows(unplanned.calibration) == rows(data.calibration), "a plan can be replayed"


def test_repeated_documents_count_once() -> None:
    data = load(["w0 w1"] * 9)
    assert data.samples == 1
    assert data.warnings[1:] == (
        "the texts given: there is a single sample (repeats count once), so accuracy is measured "
        "on what calibrated",
        "the texts given: 1 samples calibrate, fewer than the 4 asked for",
    )


def test_fixed_batch_and_sequence_are_respected() -> None:
    model = language_model("int64[2, 4] input_ids, int64[2, 4] attention_mask")
    data = load([words(4, first=i) for i in range(7)] + ["w0"], model)
    assert [b["input_ids"].shape for b in data.calibration + data.held_back] == [(2, 4)] * 3
    assert data.warnings == (
        "the graph fixes the sequence at 4 tokens, so samples have that length and not the 8 "
        "asked for",
    )
    assert "does not fill one" in refusal([words(4)], model)
    one = language_model("int64[1, s] input_ids, int64[1, s] attention_mask")
    assert {b["input_ids"].shape for b in load([words(50)], one).calibration} == {(1, 8)}
    step = language_model("int64[b, 1] input_ids")
    assert rows(load([words(8)], step).calibration) == [(BOS,), (4,), (5,), (6,)]


# Texts for an encoder


def test_encoder_truncates_and_keeps_its_specials() -> None:
    data = load([words(20), "w1 w2", "w3 w4"], ENCODER)
    assert rows(data.calibration) == [(CLS, *range(4, 10), SEP), (CLS, 5, 6, SEP)]
    assert rows(data.held_back) == [(CLS, 7, 8, SEP)]
    types = data.calibration[0]["token_type_ids"]
    assert types.dtype == np.float32 and not types.any()
    assert "shorter" not in " ".join(data.warnings)


def test_encoder_takes_lines_where_nothing_separates(tmp_path: Path) -> None:
    text = written(tmp_path / "t.TXT", "w0 w1\n\n  \nw2\r\nw3 w4 w5\n")
    assert len(rows(load(text, ENCODER).calibration)) == 2
    text = written(tmp_path / "t.txt", "w0\nw1\n<|endoftext|>\nw2")
    assert rows(load(str(text), ENCODER).calibration) == [(CLS, 4, 5, SEP)]


# Text files


def test_txt_is_divided_at_separator_lines(tmp_path: Path) -> None:
    text = "\ufeff<|endoftext|>\nw0 w1\n<|endoftext|>w2\nw3\n<|endoftext|>\n \n<|endoftext|>"
    data = load(written(tmp_path / "t.txt", text))
    assert rows(data.calibration) + rows(data.held_back) == [(BOS, 4, 5), (BOS, 6, 7)]
    assert data.origin == str(tmp_path / "t.txt")


def test_txt_without_separators_is_one_document(tmp_path: Path) -> None:
    data = load(written(tmp_path / "t.txt", words(20) + "\n" + words(20)))
    assert {b["input_ids"].shape[1] for b in data.calibration} == {8}


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        '"w0 w1"',
        "",
        '{"text": "w2\u2028w3", "prompt": 3}',
        '{"content": "w4"}',
        '{"prompt": "w5"}',
    ]
    data = load(written(tmp_path / "t.jsonl", "\n".join(lines)))
    assert rows(data.calibration) + rows(data.held_back) == [
        (BOS, 4, 5),
        (BOS, 6, 7),
        (BOS, 8),
        (BOS, 9),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words_of_message"),
    [
        ("t.txt", "", "t.txt is empty"),
        ("t.txt", "\ufeff", "t.txt is empty"),
        ("t.jsonl", "", "t.jsonl is empty"),
        ("t.txt", " \n\t\n", "only white space"),
        ("t.jsonl", "\n \n", "only white space"),
        ("t.txt", "<|endoftext|>\n<|endoftext|>\n", "no document gives a sample"),
        ("t.txt", b"w0 \xff w1", "not UTF-8: byte 3 cannot"),
        ("t.txt", b"\xef\xbb\xbfw0 \xff", "not UTF-8: byte 6 cannot"),
        ("t.jsonl", b'"\xe9"', "not UTF-8: byte 1 cannot"),
        ("t.jsonl", '"w0"\n{"text": ', "line 2 of"),
        ("t.jsonl", '"w0"\n\n{"title": "w0"}', "line 3 of"),
        ("t.jsonl", "[1]", "one of text, prompt, content"),
        ("t.jsonl", '{"text": 3}', "line 1 of"),
        ("t.jsonl", "[" * 200_000, "not valid JSON"),
        ("t.jsonl", '"\\ud800"', "lone surrogate at character 0"),
        ("t.csv", "w0", "unknown kind"),
        ("t", "w0", "unknown kind"),
        ("t.npz", "", "not a readable .npz"),
        ("t.npz", "w0", "not a readable .npz"),
        ("t.npz", b"PK\x03\x04 broken", "not a readable .npz"),
        ("t.npz", b"\x80\x04N.", "not a readable .npz"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, words_of_message: str) -> None:
    message = refusal(written(tmp_path / name, content))
    assert words_of_message in message
    assert name in message


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "none.txt does not exist" in refusal(tmp_path / "none.txt")
    assert "none.npz does not exist" in refusal(str(tmp_path / "none.npz"))
    assert "holds no .npz file" in refusal(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    assert "holds no .npz file" in refusal(tmp_path / "folder.txt")


# Texts that the model cannot take


def test_one_token_is_no_sample() -> None:
    assert "at least two tokens" in refusal(["w0"], language_model(bos_token_id=None))


def test_model_without_tokenizer() -> None:
    assert "without a tokenizer (give the inputs" in refusal(["w0"], language_model(tokenizer=None))


@pytest.mark.parametrize(
    ("inputs", "words_of_message"),
    [
        ("int64[b, s] input_ids, float[b, s] past", "does not determine the graph's input 'past'"),
        ("int64[b, s] input_ids, int64[b, 1, s, s] attention_mask", "'attention_mask' has 4 dim"),
        ("int64[2, s] input_ids, int64[1, s] position_ids", "fix different sizes"),
    ],
)
def test_inputs_that_text_does_not_determine(inputs: str, words_of_message: str) -> None:
    message = refusal(["w0 w1"], language_model(inputs))
    assert words_of_message in message
    assert ".npz" in message


def test_text_for_a_graph_without_tokens() -> None:
    assert "it takes x, k, and not input_ids" in refusal(["w0"], FLOATS)


def test_longer_than_the_positions() -> None:
    with pytest.raises(ConfigError, match=r"sequence of 8 tokens is longer than the 6 that tiny"):
        load(["w0 w1"], language_model(max_length=6))
    assert load(["w0 w1"], language_model(max_length=8)).samples == 1


@pytest.mark.parametrize(
    ("source", "words_of_message"),
    [
        (None, "no calibration data"),
        ([], "the iterable is empty"),
        (["", "  "], "no document gives a sample"),
        (["w0 w1", 3], "item 1 of the calibration data is int"),
        (["\ud800"], "lone surrogate"),
        ([3], "neither a text nor a feed"),
        ([{}], "found none"),
        ({"x": np.zeros(3)}, "put it in a list"),
        ([b"w0"], "item 0 of the calibration data is bytes"),
    ],
)
def test_bad_iterables(source: Any, words_of_message: str) -> None:
    assert words_of_message in refusal(source)
