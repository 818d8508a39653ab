"""Calibration runs over whole texts: what decoding with a filled cache would see is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from qcompile.passes.kv_cache import KvCache

from qcompile import frontend
from qcompile.cache import fed, is_past, present_of
from qcompile.calibration.run import calibrate
from qcompile.config import CompileConfig
from qcompile.linears import find_sites
from qcompile.pipeline import canonicalize, run
from qcompile.session import open_session
from qcompile.traced import Batch
from tests.test_generation import PROMPTS, save

TOKENS = np.array([PROMPTS[0] + PROMPTS[1]])


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_observers_over_steps_see_what_those_over_the_text_see(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "source")
    model = frontend.load(str(tmp_path / "source"), CompileConfig(), tmp_path).ir
    run(model, canonicalize())
    whole = calibrate(model, find_sites(model.graph), [_feed(0, TOKENS.shape[1])], tmp_path)
    run(model, [KvCache()])
    steps = calibrate(model, find_sites(model.graph), _steps(model, tmp_path), tmp_path)
    assert list(steps) == list(whole)
    for name, stats in whole.items():
        size = max(abs(stats.minimum.min()), stats.maximum.max())
        assert steps[name].count == stats.count == TOKENS.size
        for part in ("minimum", "maximum"):
            found, wanted = getattr(steps[name], part), getattr(stats, part)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * size, err_msg=name)
        np.testing.assert_allclose(
            steps[name].second_moment, stats.second_moment, rtol=1e-3, atol=1e-6 * size**2
        )


def _feed(start: int, end: int) -> Batch:
    return {
        "input_ids": TOKENS[:, start:end],
        "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(start, end)[None],
    }


def _steps(model: ir.Model, folder: Path) -> list[Batch]:
    """A feed for each token, with the keys and values of those before it."""
    path = folder / "cached.onnx"
    ir.save(model, path)
    session = open_session(path)
    names = [o.name for o in session.get_outputs()]
    kept: Batch = {}
    feeds: list[Batch] = []
    for at in range(TOKENS.shape[1]):
        feeds.append(fed(session, _feed(at, at + 1) | kept))
        results = dict(zip(names, session.run(None, feeds[-1]), strict=True))
        kept = {name: results[present_of(name)] for name in feeds[-1] if is_past(name)}
    return feeds
