"""Torch modules that were trained with fake quantisation: what their observers found, fixed.

``torch.ao.quantization.FakeQuantize`` asks at run time whether it observes and whether it rounds,
which cannot be traced. In its place stands what it does in evaluation; the exporter writes that as
QuantizeLinear and DequantizeLinear, which `qcompile.frontend.qdq` takes for the plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.ao.quantization.fx._decomposed  # registers the two ops that are used below
from torch.ao.quantization import FakeQuantize

from qcompile.errors import ModelError

_RANGES = ((0, 255), (-128, 127), (0, 127))
"""Of codes that ONNX's exporter writes; the last are activations of ``reduce_range``."""


def has_fake_quantise(module: object) -> bool:
    """Whether `module` is a torch module, and a part of it a FakeQuantize that rounds."""
    if not isinstance(module, torch.nn.Module):
        return False  # the frontend will say
    return any(_rounds(part) for part in module.modules() if isinstance(part, FakeQuantize))


@contextlib.contextmanager
def fixed_scales(module: torch.nn.Module) -> Iterator[None]:
    """While it lasts, every FakeQuantize of `module` has its scales as constants.

    Raises:
        ModelError: one of a range of codes that is not read.
    """
    found = [
        (parent, name, part)
        for parent in module.modules()
        for name, part in parent.named_children()
        if isinstance(part, FakeQuantize)
    ]
    all_fixed = [_Fixed(part) if _rounds(part) else torch.nn.Identity() for *_, part in found]
    weights = []
    for (parent, name, _), fixed in zip(found, all_fixed, strict=True):
        setattr(parent, name, fixed)
        if name == "weight_fake_quant":
            # On the grid already: QuantizeLinear divides by the scale where torch multiplies by its
            # inverse, and the largest magnitude of a channel lies half between two codes.
            weights.append((parent.weight, parent.weight.data))
            parent.weight.data = fixed(parent.weight.data)
    try:
        yield
    finally:
        for parent, name, part in found:
            setattr(parent, name, part)
        for weight, trained in reversed(weights):  # one that is tied was replaced twice
            weight.data = trained


def _rounds(part: FakeQuantize) -> bool:
    return bool(part.fake_quant_enabled[0] == 1)


class _Fixed(torch.nn.Module):
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, part: FakeQuantize) -> None:
        super().__init__()
        observer = part.activation_post_process
        self.range = int(observer.quant_min), int(observer.quant_max)
        if self.range not in _RANGES:
            low, high = self.range
            raise ModelError(
                f"a fake-quantise module has codes from {low} to {high}, which are not read",
                hint="0 to 255, 0 to 127 and −128 to 127 are",
            )
        self.axis = int(part.ch_axis) if part.is_per_channel else None
        # QuantizeLinear takes scales of float32 and zero points that are codes.
        self.register_buffer("scale", part.scale.detach().float())
        self.register_buffer("zero_point", part.zero_point.detach().to(torch.int32))
        if self.axis is None:
            self.one = float(self.scale.item()), int(self.zero_point.item())
            self.all = _RANGES[0] if self.range[0] == 0 else _RANGES[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.axis is None:
            # Not as one op: torch.export cannot trace that for x of any batch.
            ops = torch.ops.quantized_decomposed
            kind = torch.uint8 if self.range[0] == 0 else torch.int8
            codes = ops.quantize_per_tensor(x, *self.one, *self.all, kind)
            if self.range != self.all:
                codes = codes.clamp(*self.range)
            result: torch.Tensor = ops.dequantize_per_tensor(codes, *self.one, *self.all, kind)
            return result
        return torch.fake_quantize_per_channel_affine(
            x, self.scale, self.zero_point, self.axis, *self.range
        )
