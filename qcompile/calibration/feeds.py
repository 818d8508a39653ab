"""Calibration from arrays: .npz files and feeds, checked against the graph's inputs."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.calibration.samples import Sample, distinct
from qcompile.errors import CalibrationError
from qcompile.traced import Batch, InputSpec, TracedModel


def npz_files(path: Path) -> list[Path]:
    """`path` itself, or the .npz files of the folder `path` by name.

    Raises:
        CalibrationError: a folder without .npz files.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".npz")
    if not files:
        raise CalibrationError(
            f"calibration folder {path} holds no .npz file",
            hint="each file holds the graph's inputs by name",
        )
    return files


def read_npz(path: Path) -> dict[str, Any]:
    """The arrays of one file, by name.

    Raises:
        CalibrationError: not an .npz, damaged, or with arrays of Python objects.
    """
    arrays: dict[str, Any] = {}
    try:
        # Opened here and not by NumPy, which leaves the file open where it is no valid archive.
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise CalibrationError(
                    f"calibration file {path} holds a single array without a name",
                    hint="write it with numpy.savez, inputs by name",
                )
            for name in archive.files:
                arrays[name] = archive[name]
                if not isinstance(arrays[name], np.ndarray):
                    raise CalibrationError(f"{name!r} in calibration file {path} is no array")
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        MemoryError,
        RuntimeError,  # encrypted, or an unknown compression (NotImplementedError)
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if "allow_pickle" in str(error) and zipfile.is_zipfile(path):
            raise CalibrationError(
                f"calibration file {path} holds an array of Python objects, which is never loaded",
                hint="save arrays of numbers",
            ) from error
        raise CalibrationError(
            f"calibration file {path} is not a readable .npz archive",
            hint="write it with numpy.savez, inputs by name",
        ) from error
    return arrays


def read_npy(path: Path, model: TracedModel) -> dict[str, Any]:
    """The array of a .npy file as the graph's one input.

    Raises:
        CalibrationError: not an .npy, damaged, of Python objects, or for a graph of several inputs.
    """
    names = [spec.name for spec in model.inputs]
    if len(names) != 1:
        raise CalibrationError(
            f"calibration file {path} holds one array, and the graph takes {', '.join(names)}",
            hint="write an .npz with numpy.savez, inputs by name",
        )
    try:
        with path.open("rb") as stream:
            return {names[0]: np.lib.format.read_array(stream, allow_pickle=False)}
    except (OSError, EOFError, ValueError, MemoryError) as error:
        raise CalibrationError(
            f"calibration file {path} is not a readable .npy file of numbers",
            hint="write it with numpy.save",
        ) from error


def feed_samples(
    feeds: Iterable[tuple[str, Mapping[str, Any]]], model: TracedModel
) -> Iterator[Sample]:
    """Samples of feeds, each of which is a batch along axis 0. `feeds` are (where from, arrays).

    A feed is divided into its rows where axis 0 is a dynamic dimension, equally long, in every
    input; any other feed stays whole.

    Raises:
        CalibrationError: a feed does not fit the graph's inputs.
    """
    return distinct(
        sample for where, feed in feeds for sample in _rows(check_feed(feed, model, where), model)
    )


def check_feed(feed: Mapping[str, Any], model: TracedModel, where: str) -> Batch:
    """`feed` in the dtypes of the graph's inputs.

    Token inputs that follow from input_ids may be left out: the mask (all ones), token types (all
    zeros) and positions (counted over the mask), as Transformers has them.

    Raises:
        CalibrationError: wrong names, dtypes, ranks or sizes; no rows; NaN or Inf; sequences longer
            than the model's positions.
    """
    specs = model.inputs
    feed = _completed(feed, {spec.name for spec in specs})
    if set(feed) != {spec.name for spec in specs}:
        expected = ", ".join(sorted(spec.name for spec in specs)) or "none"
        found = ", ".join(sorted(map(str, feed))) or "none"
        raise CalibrationError(
            f"{where} does not hold the graph's inputs: expected {expected}; found {found}"
        )
    # `InputSpec` has no rank for an input whose shape the graph leaves open altogether.
    shapeless = {str(value.name) for value in model.ir.graph.inputs if value.shape is None}
    checked: Batch = {}
    sizes: dict[str, tuple[str, int]] = {}
    for spec in specs:
        array = _converted(feed[spec.name], spec, where)
        if spec.name not in shapeless:
            _check_shape(array, spec, where, sizes)
        if array.size == 0:
            raise CalibrationError(f"{where}: {spec.name!r} holds no samples, only zero elements")
        checked[spec.name] = array
    ids = checked.get("input_ids")
    if ids is not None and model.max_length is not None and ids.shape[-1:] > (model.max_length,):
        raise CalibrationError(
            f"{where}: sequences of {ids.shape[-1]} tokens are longer than the model's "
            f"{model.max_length} positions"
        )
    return checked


def _completed(feed: Mapping[str, Any], names: set[str]) -> Mapping[str, Any]:
    missing = names - set(feed)
    if "input_ids" not in feed or not missing <= {
        "attention_mask", "token_type_ids", "position_ids"
    }:  # fmt: skip
        return feed
    ids = np.asarray(feed["input_ids"])
    if ids.ndim != 2:
        return feed
    mask = np.asarray(feed.get("attention_mask", np.ones(ids.shape, np.int64)))
    made: dict[str, Any] = {"attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    if mask.shape == ids.shape:
        made["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return {**feed, **{name: made[name] for name in missing if name in made}}


def _converted(value: Any, spec: InputSpec, where: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CalibrationError(f"{where}: {spec.name!r} is no array: {error}") from error
    if array.dtype == object:
        raise CalibrationError(
            f"{where}: {spec.name!r} is an array of Python objects", hint="give arrays of numbers"
        )
    if _kind(array.dtype) != _kind(spec.dtype):
        raise CalibrationError(
            f"{where}: {spec.name!r} is {array.dtype}, where the graph takes {spec.dtype}"
        )
    if _kind(array.dtype) == "integer" and array.size:
        limits = np.iinfo(spec.dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise CalibrationError(
                f"{where}: {spec.name!r} holds values that do not fit the graph's {spec.dtype}"
            )
    # A value too large for the graph's dtype becomes Inf here, and is refused as such below.
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=spec.dtype).reshape(array.shape)
    if _kind(spec.dtype) == "float" and not np.isfinite(array).all():
        raise CalibrationError(f"{where}: {spec.name!r} holds NaN or Inf")
    return array


def _kind(dtype: np.dtype[Any]) -> str:
    # bfloat16 and its like register with NumPy as "V".
    kinds = {"i": "integer", "u": "integer", "f": "float", "V": "float", "b": "bool"}
    return kinds.get(dtype.kind, str(dtype))


def _check_shape(
    array: np.ndarray, spec: InputSpec, where: str, sizes: dict[str, tuple[str, int]]
) -> None:
    """`sizes` remembers which input first gave each symbolic dimension its size."""
    shape = f"{where}: {spec.name!r} has shape {list(array.shape)}"
    takes = f"the graph takes [{', '.join(map(str, spec.shape))}]"
    if array.ndim != len(spec.shape):
        raise CalibrationError(f"{shape}, where {takes}")
    for size, dim in zip(array.shape, spec.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise CalibrationError(f"{shape}, where {takes}")
            continue
        first, known = sizes.setdefault(dim, (spec.name, size))
        if size != known:
            raise CalibrationError(f"{shape}, but {first!r} has {known} for {dim!r}")


def _rows(feed: Batch, model: TracedModel) -> Iterator[Sample]:
    dynamic = all(spec.shape and isinstance(spec.shape[0], str) for spec in model.inputs)
    lengths = {array.shape[0] for array in feed.values() if array.ndim}
    if dynamic and len(lengths) == 1:
        for at in range(lengths.pop()):
            yield Sample({name: array[at : at + 1] for name, array in feed.items()})
        return
    rows = next((array.shape[0] for array in feed.values() if array.ndim), 1)
    yield Sample(feed, rows=rows, mergeable=False)
