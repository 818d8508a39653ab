"""Transformers models: what loading one leaves behind."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from qcompile.config import CompileConfig
from qcompile.frontend.huggingface import load_huggingface


def _held() -> int:
    """Bytes of all parameters that are alive, each storage once."""
    alive = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter and x.numel()]
    storages = (p.untyped_storage() for p in alive)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_the_weights_leave_memory(tiny_opt: Path, tmp_path: Path) -> None:
    """The exporter's caches keep the module; its weights must not stay with it."""
    before = _held()
    model = load_huggingface(str(tiny_opt), CompileConfig(), tmp_path)
    assert (tmp_path / "traced.onnx.data").stat().st_size > 1_000_000
    assert model.ir.graph.initializers
    assert _held() <= before
