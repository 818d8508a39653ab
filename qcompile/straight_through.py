"""A weight in blocks that is learned while it is rounded: a straight-through estimator."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from qcompile.precision import QuantizedWeight
from qcompile.weight_blocks import as_grid, in_blocks

Array = npt.NDArray[Any]
Tensor = torch.Tensor

INNER: Final = 0.49
"""Half the width, in codes, of what surely rounds to a code."""


class LearnedWeight:
    """A weight [K, N] whose codes and scales have gradients.

    Attributes:
        codes: float32 [blocks, block_size, N], before they are rounded: as near to the exact weight
            as rounds to the codes that were given.
        growth: float32 [blocks, 1, N], the logarithm of what scales are multiplied by.
    """

    def __init__(self, weight: Array, started: QuantizedWeight) -> None:
        self.depth = len(weight)
        self._grid, codes = as_grid(started)
        exact = in_blocks(weight, self._grid.block_size) / self._grid.scale[:, None]
        exact += self._grid.zero_point[:, None]
        near = np.clip(exact, codes - INNER, codes + INNER).astype(np.float32)
        self.codes = torch.from_numpy(near).requires_grad_()
        self._scale = torch.from_numpy(self._grid.scale)[:, None]
        self._zero = torch.from_numpy(self._grid.zero_point)[:, None]
        self.growth = torch.zeros_like(self._scale).requires_grad_()

    def soft(self) -> Tensor:
        """What the rounded weight is, [K, N], with the gradient of one that is not rounded."""
        inside = self.codes.clamp(self._grid.lowest, self._grid.highest)
        codes = inside + (inside.round() - inside).detach()
        values = (codes - self._zero) * self._scale * self.growth.exp()
        return values.reshape(-1, values.shape[-1])[: self.depth]

    def quantized(self) -> QuantizedWeight:
        """The codes and scales as they are now."""
        inside = self.codes.detach().clamp(self._grid.lowest, self._grid.highest)
        scale = (self._scale * self.growth.detach().exp())[:, 0].numpy()
        grid = dataclasses.replace(self._grid, scale=scale)
        return grid.weight(inside.round().numpy(), self.depth)
