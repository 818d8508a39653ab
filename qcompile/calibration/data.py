"""Calibration data: from what the user gave to the batches that calibrate and those held back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qcompile.calibration.feeds import feed_samples, npz_files, read_npy, read_npz
from qcompile.calibration.images import image_feeds, image_files
from qcompile.calibration.samples import Sample, batches, count, held_back_size, split, take
from qcompile.calibration.text import check_text, read_documents, text_samples
from qcompile.calibration.tokens import TokenInputs, fixed_length_warnings, sequence_length
from qcompile.config import CompileConfig
from qcompile.errors import CalibrationError, check_reachable
from qcompile.traced import Batch, Kind, TracedModel

TOKEN_SAMPLES: Final = 4
"""To estimate damage on, where each gives many rows of output."""

ROW_SAMPLES: Final = 16
"""Where each gives one."""


@dataclass(frozen=True)
class CalibrationData:
    """Feeds for a graph.

    Attributes:
        calibration: what ranges are taken from.
        held_back: what verification measures on; calibration never saw it, unless `seen`.
        origin: where the data came from, for the report.
        warnings: sentences for the user.
        samples: how many samples `calibration` holds.
        estimated: what damage is estimated on, seen by neither: static ranges clip on new data.
            The same as `calibration` where there is too little data.
        seen: whether there was a single sample, which calibrates and is measured on.
    """

    calibration: tuple[Batch, ...]
    held_back: tuple[Batch, ...]
    origin: str
    warnings: tuple[str, ...]
    samples: int
    estimated: tuple[Batch, ...]
    seen: bool = False


def load_calibration(
    source: Path | str | Iterable[str] | Iterable[Mapping[str, Any]] | None,
    model: TracedModel,
    config: CompileConfig,
) -> CalibrationData:
    """Read, tokenise, check and split what the user gave.

    Args:
        source: a path (.txt or .jsonl of text, .npz, .npy, a folder of .npz or of images), or an
            iterable of texts or of feeds (graph input name -> array). Read only as far as samples
            are needed.

    Raises:
        CalibrationError: the data is missing, unreadable, empty, or does not fit the model.
        ConfigError: samples would be longer than the model's positions.
    """
    if source is None:
        raise CalibrationError("no calibration data was given")
    if isinstance(source, (str, Path)):
        return _from_path(Path(source), model, config)
    if isinstance(source, Mapping):
        raise CalibrationError(
            "calibration data is a single feed, where an iterable of feeds is needed",
            hint="put it in a list",
        )
    items = iter(source)
    first = next(items, None)
    if first is None:
        raise CalibrationError("the calibration data holds no samples: the iterable is empty")
    everything = itertools.chain([first], items)
    if isinstance(first, str):
        return _from_texts(_only_texts(everything), "the texts given", model, config)
    return _from_feeds(_only_feeds(everything), "the feeds given", model, config)


def samples_wanted(kind: Kind, config: CompileConfig) -> int:
    """How many samples are worth reading: to calibrate, to hold back, to estimate damage on."""
    return config.samples + held_back_size(config.samples) + _estimated(kind)


def _estimated(kind: Kind) -> int:
    # Whatever the objective: a plan must be replayed on the same calibration data.
    return TOKEN_SAMPLES if kind == "text-generation" else ROW_SAMPLES


def assemble(
    samples: Sequence[Sample],
    origin: str,
    warnings: Sequence[str],
    kind: Kind,
    config: CompileConfig,
) -> CalibrationData:
    """Split and batch. `samples` hold at least one."""
    notes = list(warnings)
    # What is left over, but an eighth of what there is at least.
    total = count(samples)
    left = total - config.samples - held_back_size(config.samples)
    few = min(_estimated(kind), max(left, total // 8))
    first = len(samples)
    while first > 2 and count(samples[first - 1 :]) <= few:
        first -= 1
    samples, estimated = samples[:first], samples[first:]
    calibration, held_back = split(samples, config.samples)
    got = count(calibration)
    if len(samples) == 1:
        notes.append(
            f"{origin}: there is a single sample (repeats count once), so accuracy is measured on "
            "what calibrated"
        )
    if got < config.samples:
        notes.append(
            f"{origin}: {got} samples calibrate, fewer than the {config.samples} asked for"
        )
    notes += [
        f"{origin}: {name} is {value:g} everywhere, which tells no range of it"
        for name, value in _constant(calibration)
    ]
    if not estimated and len(samples) > 1 and config.objective != "scheme":
        notes.append(f"{origin}: too few samples to estimate damage on others than calibrate")
    return CalibrationData(
        calibration=batches(calibration),
        held_back=batches(held_back),
        origin=origin,
        warnings=tuple(notes),
        samples=got,
        estimated=batches(estimated or calibration),
        seen=len(samples) == 1,
    )


def _constant(samples: Sequence[Sample]) -> Iterator[tuple[str, float]]:
    """Inputs of floats that are one number in all of the data, and that number."""
    for name, array in samples[0].feed.items():
        if array.dtype.kind == "f" and array.size:
            value = array.flat[0]
            if all(bool((sample.feed[name] == value).all()) for sample in samples):
                yield name, float(value)


def check_calibration_path(path: Path) -> None:
    """Refuse a path that is not there, or no data: known before a model is traced for minutes.

    Raises:
        CalibrationError: it does not exist, cannot be read, or its first document or file is none.
    """
    check_reachable(path, CalibrationError)
    if not path.exists():
        raise CalibrationError(f"calibration file {path} does not exist")
    suffix = path.suffix.lower()
    if path.is_dir():
        if not image_files(path):
            read_npz(npz_files(path)[0])
    elif suffix == ".npz":
        read_npz(path)
    elif suffix in (".txt", ".jsonl"):
        next(read_documents(path, whole=True), None)
    elif suffix != ".npy":
        raise CalibrationError(
            f"calibration file {path} is of an unknown kind",
            hint="give .txt, .jsonl, .npy, .npz, a folder of .npz or one of images",
        )


def _from_path(path: Path, model: TracedModel, config: CompileConfig) -> CalibrationData:
    check_calibration_path(path)
    suffix = path.suffix.lower()
    images = image_files(path) if path.is_dir() else []
    if images:
        if any(path.glob("*.npz")):
            raise CalibrationError(
                f"calibration folder {path} holds images and .npz files",
                hint="give a folder of one kind",
            )
        return _from_feeds(image_feeds(images, path, model), str(path), model, config)
    if suffix == ".npy" and path.is_file():
        feed = (f"calibration file {path}", read_npy(path, model))
        return _from_feeds([feed], str(path), model, config)
    if path.is_dir() or suffix == ".npz":
        feeds = ((f"calibration file {file}", read_npz(file)) for file in npz_files(path))
        return _from_feeds(feeds, str(path), model, config)
    documents = read_documents(path, whole=model.kind == "text-generation")
    return _from_texts(documents, str(path), model, config)


def _from_texts(
    documents: Iterable[str], origin: str, model: TracedModel, config: CompileConfig
) -> CalibrationData:
    inputs = TokenInputs.of(model)
    length = sequence_length(model, inputs, config)
    wanted = samples_wanted(model.kind, config)
    samples = take(text_samples(documents, model, inputs, length, wanted), wanted)
    if not samples:
        raise CalibrationError(_no_text(origin, inputs, length))
    warnings = fixed_length_warnings(inputs, config)
    short = count(s for s in samples if s.feed["input_ids"].shape[1] < length)
    if short and model.kind == "text-generation":
        warnings.append(
            f"{origin}: {short} of {count(samples)} samples are shorter than {length} tokens, "
            "because the text has too few long documents"
        )
    return assemble(samples, origin, warnings, model.kind, config)


def _no_text(origin: str, inputs: TokenInputs, length: int) -> str:
    if inputs.length is None and inputs.batch is None:
        return f"{origin}: no document gives a sample, which takes at least two tokens"
    size = f"{length} tokens" if inputs.length else "the same number of tokens"
    return (
        f"{origin}: the graph takes batches of exactly {inputs.batch or 'any number of'} samples "
        f"of {size}, and the text does not fill one"
    )


def _from_feeds(
    feeds: Iterable[tuple[str, Mapping[str, Any]]],
    origin: str,
    model: TracedModel,
    config: CompileConfig,
) -> CalibrationData:
    wanted = samples_wanted(model.kind, config)
    masked = any(spec.name == "attention_mask" for spec in model.inputs)
    unmasked = False

    def noted() -> Iterator[tuple[str, Mapping[str, Any]]]:
        nonlocal unmasked
        for where, feed in feeds:
            unmasked |= masked and "attention_mask" not in feed
            yield where, feed

    samples = take(feed_samples(noted(), model), wanted)
    notes = [f"{origin}: without attention_mask, every token is taken for real"] if unmasked else []
    return assemble(samples, origin, notes, model.kind, config)


def _only_texts(items: Iterable[object]) -> Iterator[str]:
    for at, item in enumerate(items):
        if not isinstance(item, str):
            raise CalibrationError(
                f"item {at} of the calibration data is {type(item).__name__}, after texts"
            )
        if item.strip():
            yield check_text(item, f"text {at}")


def _only_feeds(items: Iterable[object]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for at, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise CalibrationError(
                f"item {at} of the calibration data is {type(item).__name__}, "
                "neither a text nor a feed (input name to array)"
            )
        yield f"feed {at}", item
