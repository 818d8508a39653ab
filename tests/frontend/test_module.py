"""Modules that the user builds: what their axes are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qcompile.config import CompileConfig
from qcompile.frontend.module import trace_module


class _Pooled(torch.nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weighted = x * mask.unsqueeze(-1)
        return weighted.mean(1), torch.cat([weighted, weighted], 1)


class _Apart(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y.T


X = torch.randn(2, 5, 4)


@pytest.mark.parametrize(
    ("module", "example", "inputs", "outputs"),
    [
        (
            _Pooled(),
            {"x": X, "mask": X[..., 0] > 0.0},
            {"x": ["batch", "x_1", 4], "mask": ["batch", "x_1"]},
            [["batch", 4], ["batch", "2*x_1", 4]],
        ),
        (
            _Apart(),
            {"x": X[0], "y": torch.randn(3, 4)},
            {"x": ["x_0", 4], "y": ["y_0", 4]},
            [["x_0", "y_0"]],
        ),
        (torch.nn.ReLU(), X, {"input": ["batch", "input_1", 4]}, [["batch", "input_1", 4]]),
    ],
)
def test_axes_are_named_by_the_inputs_that_have_them(
    module: torch.nn.Module,
    example: dict[str, torch.Tensor] | torch.Tensor,
    inputs: dict[str, list[str | int]],
    outputs: list[list[str | int]],
    tmp_path: Path,
) -> None:
    graph = trace_module(module, example, "made", CompileConfig(), tmp_path).ir.graph

    def sizes(shape: object) -> list[str | int]:
        assert shape is not None
        return [size if isinstance(size, int) else str(size) for size in shape]  # type: ignore[attr-defined]

    assert {v.name: sizes(v.shape) for v in graph.inputs} == inputs
    assert [sizes(v.shape) for v in graph.outputs] == outputs
    inner = {s for n in graph for v in n.outputs for s in sizes(v.shape) if isinstance(s, str)}
    assert not any(name.startswith("s") for name in inner)
