"""`load_calibration` of feeds and .npz files; what is refused, and in which words."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibration.feeds import check_feed
from qcompile.config import CompileConfig
from qcompile.errors import CalibrationError
from qcompile.traced import TracedModel
from tests.calibration.models import float_model, load, refusal, written
from tests.support import from_text

FLOATS = float_model()


def feed(n: int = 2, **change: Any) -> dict[str, Any]:
    x = np.arange(3 * n, dtype=np.float32).reshape(n, 3)
    return {"x": x, "k": np.arange(n, dtype=np.int32)} | change


def test_feeds_are_divided_into_rows_and_batched() -> None:
    data = load([feed(2), feed(9, x=np.ones((9, 3), np.float64))], FLOATS)
    assert data.samples == 4
    assert [b["k"].tolist() for b in data.calibration] == [[0, 1, 0, 1]]
    assert [b["k"].tolist() for b in data.held_back] == [[2]]
    assert data.calibration[0]["x"].dtype == np.float32
    assert data.origin == "the feeds given"


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 12))
def test_feeds_keep_rows_together(sizes: list[int], samples: int) -> None:
    feeds = []
    for at, n in enumerate(sizes):
        keys = np.arange(n, dtype=np.int32) + 100 * at
        feeds.append({"k": keys, "x": np.repeat(keys[:, None], 3, axis=1).astype(np.float32)})
    data = load(feeds, FLOATS, CompileConfig(samples=samples))
    used: list[int] = []
    for batch in data.calibration + data.held_back:
        assert (batch["x"] == batch["k"][:, None]).all()
        used += batch["k"].tolist()
    if sum(sizes) > 1:
        assert len(set(used)) == len(used) <= sum(sizes)


def test_feeds_with_a_fixed_batch_stay_whole() -> None:
    model = float_model("float[2, 3] x, int32[b] k")
    data = load([feed(2, x=np.full((2, 3), i, np.float32)) for i in range(3)], model)
    assert [b["x"].shape for b in data.calibration + data.held_back] == [(2, 3)] * 3
    assert data.samples == 4


def test_feeds_may_be_lists_and_scalars() -> None:
    model = float_model("float x, int64 k")
    data = load([{"x": 1.5, "k": 3}, {"x": 2.5, "k": 3}], model)
    assert data.calibration[0]["x"].shape == ()
    unknown = float_model("float x, int64[b] k")
    unknown.ir.graph.inputs[0].shape = None
    assert load([{"x": np.ones((1, 2, 3)), "k": [7]}], unknown).samples == 1


def test_npz_and_folder_of_npz(tmp_path: Path) -> None:
    for name in ("b", "a"):
        np.savez(tmp_path / f"{name}.npz", **feed(2, k=np.full(2, ord(name))))
    written(tmp_path / "readme.md", "not data")
    data = load(tmp_path, FLOATS)
    assert data.calibration[0]["k"].tolist() == [ord("a")] * 2 + [ord("b")]
    np.savez_compressed(tmp_path / "c.npz", **feed(9))
    assert load(tmp_path / "c.npz", FLOATS).samples == 4


@pytest.mark.parametrize(
    ("change", "words_of_message"),
    [
        ({"z": np.ones(2)}, "expected k, x; found k, x, z"),
        ({"x": np.ones((2, 3), np.int64)}, "'x' is int64, where the graph takes float32"),
        ({"k": np.ones(2)}, "'k' is float64, where the graph takes int32"),
        ({"k": np.ones(2, bool)}, "'k' is bool"),
        ({"k": np.array(["a", "b"])}, "'k' is <U1"),
        ({"k": np.array([1, 2**40])}, "do not fit the graph's int32"),
        ({"x": np.ones((2, 3, 1), np.float32)}, "shape [2, 3, 1], where the graph takes [b, 3]"),
        ({"x": np.ones((2, 4), np.float32)}, "shape [2, 4], where the graph takes [b, 3]"),
        ({"k": np.ones(3, np.int32)}, "shape [3], but 'x' has 2 for 'b'"),
        ({"x": np.full((2, 3), np.nan)}, "'x' holds NaN or Inf"),
        ({"x": np.full((2, 3), -np.inf, np.float32)}, "'x' holds NaN or Inf"),
        ({"x": np.full((2, 3), 1e300)}, "'x' holds NaN or Inf"),
        ({"x": np.ones((0, 3)), "k": np.ones(0, np.int32)}, "holds no samples"),
    ],
)
def test_arrays_that_do_not_fit(
    tmp_path: Path, change: dict[str, np.ndarray], words_of_message: str
) -> None:
    message = refusal([feed(1), feed(2, **change)], FLOATS)
    assert "feed 1" in message and words_of_message in message
    np.savez(tmp_path / "t.npz", **feed(2, **change))
    message = refusal(tmp_path, FLOATS)
    assert "t.npz" in message and words_of_message in message


def test_missing_array() -> None:
    assert "expected k, x; found x" in refusal([{"x": np.ones((1, 3))}], FLOATS)


def test_object_arrays_and_ragged_lists(tmp_path: Path) -> None:
    objects = np.array([{}, {}])
    np.savez(tmp_path / "t.npz", **feed(2, k=objects))
    assert "Python objects, which is never loaded" in refusal(tmp_path / "t.npz", FLOATS)
    assert "Python objects" in refusal([feed(2, k=objects)], FLOATS)
    assert "is no array" in refusal([feed(2, k=[[1], [1, 2]])], FLOATS)


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, **feed(2))
    whole = path.read_bytes()
    at = whole.index(feed(2)["x"].tobytes())
    written(path, whole[:at] + b"\x01" + whole[at + 1 :])
    assert "not a readable .npz" in refusal(path, FLOATS)
    written(path, whole[: len(whole) // 2])
    assert "not a readable .npz" in refusal(path, FLOATS)
    np.save(tmp_path / "one.npy", np.ones(3))
    written(path, (tmp_path / "one.npy").read_bytes())
    assert "single array" in refusal(path, FLOATS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", json.dumps([1]))
    assert "'x' in calibration file" in refusal(path, FLOATS)


def test_token_inputs_that_follow_from_the_ids_may_be_left_out() -> None:
    inputs = "int64[B,S] input_ids, int64[B,S] attention_mask, int64[B,S] position_ids"
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    g ({inputs}) => (float[B,S] y) {{ y = Cast <to = 1> (input_ids) }}"""
    model = TracedModel(ir=from_text(text), name="m", task="x", kind="other", max_length=4)
    ids = np.array([[5, 6, 7]])
    found = check_feed({"input_ids": ids}, model, "it")
    assert found["attention_mask"].tolist() == [[1, 1, 1]]
    assert found["position_ids"].tolist() == [[0, 1, 2]]
    padded = check_feed({"input_ids": ids, "attention_mask": np.array([[0, 1, 1]])}, model, "it")
    assert padded["position_ids"].tolist() == [[0, 0, 1]]
    with pytest.raises(CalibrationError, match="expected attention_mask, input_ids"):
        check_feed({"position_ids": ids}, model, "it")
    with pytest.raises(CalibrationError, match="6 tokens are longer than the model's 4"):
        check_feed({"input_ids": np.tile(ids, 2)}, model, "it")
    assert (
        load([{"input_ids": ids[:, :2]}], model)
        .warnings[0]
        .endswith("every token is taken for real")
    )
    whole = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    assert not any("for real" in warning for warning in load([whole], model).warnings)
