"""Calibration from text: documents out of files, token sequences out of documents."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from qcompile.calibration.samples import Sample, distinct, grouped
from qcompile.calibration.tokens import TokenInputs
from qcompile.errors import CalibrationError
from qcompile.traced import TracedModel

JSON_KEYS: Final = ("text", "prompt", "content")
"""Where a JSON object holds its text; the first of these that it has counts."""

_SEPARATOR = re.compile(r"^<\|endoftext\|>(?:[ \t]*\n)?", re.MULTILINE)
# No tokenizer needs more characters than this for a token on average. The bound keeps a file of
# gigabytes in one document from being tokenised for a few windows of its beginning.
_CHARACTERS_PER_TOKEN: Final = 32


def read_documents(path: Path, *, whole: bool) -> Iterator[str]:
    """The documents of a .txt or .jsonl file, in order, blank ones left out.

    A .txt is divided at the lines that start with ``<|endoftext|>``; what follows on such a line
    belongs to the next document. Without such lines it is one document if `whole`, and otherwise
    one document a line.

    Raises:
        CalibrationError: the file cannot be read, is not UTF-8, holds no text, or has a bad line.
    """
    text = _read(path)
    if path.suffix.lower() == ".jsonl":
        documents = _json_documents(path, text)
    elif _SEPARATOR.search(text):
        documents = iter(_SEPARATOR.split(text))
    else:
        documents = iter([text] if whole else text.split("\n"))
    return (document for document in documents if document.strip())


def check_text(text: str, where: str) -> str:
    """`text`, if it can be tokenised.

    Raises:
        CalibrationError: it holds half of a surrogate pair, which no encoding has a form for.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where} holds a lone surrogate at character {error.start}, which is not text"
        ) from error
    return text


def text_samples(
    documents: Iterable[str], model: TracedModel, inputs: TokenInputs, length: int, wanted: int
) -> Iterator[Sample]:
    """Samples from documents, as the model's task takes them, without padding anywhere.

    Produced lazily: documents after the `wanted` samples are not even read.

    Raises:
        CalibrationError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise CalibrationError(
            "text cannot calibrate a model without a tokenizer",
            hint="give the inputs by name in .npz files",
        )
    if model.kind == "text-generation":
        rows = _windows(documents, model, length, wanted, exact=inputs.length is not None)
    else:
        rows = _truncated(documents, model.tokenizer, length, exact=inputs.length is not None)
    samples = (Sample(inputs.feed(np.asarray([row], dtype=np.int64))) for row in rows)
    return grouped(distinct(samples), inputs.batch)


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration file {path} is not UTF-8: byte {error.start} cannot be decoded",
            hint="save it as UTF-8",
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"calibration file {path} cannot be read: {error.strerror}"
        ) from error
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text:
        raise CalibrationError(f"calibration file {path} is empty")
    if not text.strip():
        raise CalibrationError(f"calibration file {path} holds only white space")
    return text


def _json_documents(path: Path, text: str) -> Iterator[str]:
    # Not splitlines: a JSON string may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of calibration file {path}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(
                f"{where} is not valid JSON: {error}", hint="write one JSON value a line"
            ) from error
        if isinstance(value, dict):
            value = next((value[key] for key in JSON_KEYS if key in value), None)
        if not isinstance(value, str):
            raise CalibrationError(
                f"{where} holds no text",
                hint=f"a line is a string, or an object with one of {', '.join(JSON_KEYS)}",
            )
        yield check_text(value, where)


def _windows(
    documents: Iterable[str], model: TracedModel, length: int, wanted: int, *, exact: bool
) -> Iterator[list[int]]:
    """Token sequences for a language model: the beginnings of long documents, then their further
    windows (the second of each, then the third…), then short documents at their own length.

    Each begins with the model's BOS, also a window from the middle: a model trained with BOS
    behaves differently at the first position without it.
    """
    bos = model.bos_token_id
    longest = length * wanted * _CHARACTERS_PER_TOKEN
    rest: list[list[int]] = []
    short: list[list[int]] = []
    for document in documents:
        ids = _tokenise(model.tokenizer, document[:longest])
        if bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        if len(ids) >= length:
            rest.append(ids[length : length * wanted])
            yield ids[:length]
        elif not exact and len(ids) >= 2 and len(short) < wanted:
            short.append(ids)
    start = [] if bos is None or length < 2 else [bos]
    step = length - len(start)
    for at in itertools.count(0, step):
        reaching = [ids for ids in rest if at + step <= len(ids)]
        if not reaching:
            break
        yield from (start + ids[at : at + step] for ids in reaching)
    yield from short


def _truncated(
    documents: Iterable[str], tokenizer: Any, length: int, *, exact: bool
) -> Iterator[list[int]]:
    longest = length * _CHARACTERS_PER_TOKEN
    for document in documents:
        # The tokenizer truncates, because it keeps its special tokens at the end in place.
        ids = _tokenise(tokenizer, document[:longest], truncation=True, max_length=length)
        if len(ids) == length or (ids and not exact):
            yield ids


def _tokenise(tokenizer: Any, text: str, **options: Any) -> list[int]:
    # Not verbose: a document longer than the model's positions is cut here, and no problem.
    return [int(token) for token in tokenizer(text, verbose=False, **options)["input_ids"]]
