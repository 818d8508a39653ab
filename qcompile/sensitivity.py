"""What quantising each op does to the model's output, from gradients at the ops' outputs.

With g = ∂ log p(label) / ∂y at the output y of an op (`qcompile.gradients`), its part is

    KL(op) = ½ Σ over rows of (g · δy)²,   in the mean over labels drawn from p,

with δy = x̂Ŵ − xW the error that quantising this op alone makes there, to first order (x̂ − x)W +
x(Ŵ − W). The first term is one error per input, which all outputs share: its part of g · δy is
(gWᵀ) · (x̂ − x). In the second each output has an error of its own, and with those independent, only
their squares are left: Σ over outputs of g² (x(Ŵ − W))², of which some outputs tell the sum.
Errors of different ops and rows count as independent too, so the parts add up.

The cost is a part of a matrix product per op and implementation: linear in the number of ops.
`benchmarks.sensitivity` compares it with quantising each op alone, which is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from qcompile.e4m3 import LARGEST, rounded
from qcompile.float4 import as_float4
from qcompile.gradients import Seen, kept_columns
from qcompile.linears import Linear
from qcompile.outliers import Split
from qcompile.planning import weight_of
from qcompile.precision import ActivationQuant, Label, OpPlan, PrecisionPlan
from qcompile.traced import LOGITS, Kind

Tensor: TypeAlias = torch.Tensor
Array: TypeAlias = npt.NDArray[Any]
Damage: TypeAlias = dict[str, dict[Label, float]]
"""Op -> implementation -> its part of the output's divergence."""

TOKENS: Final = 128
_BLOCK_LEVELS: Final = 127


def unit_of(kind: Kind) -> str:
    """What damage is measured in."""
    if kind in LOGITS:
        return "KL"
    return "1 − cosine" if kind == "feature-extraction" else "relative squared error"


def sampled_weight(linear: Linear, scale: Array | None = None) -> Array:
    """The outputs of a Linear that its damage is measured at, float32 [K, columns], smoothed by
    `scale` [K]."""
    weight = weight_of(linear)[:, kept_columns(linear.out_features)]
    return weight if scale is None else weight * scale[:, None].astype(np.float32)


def measure_damage(
    linear: Linear,
    plans: Mapping[Label, PrecisionPlan],
    seen: Sequence[Seen],
    rows: float,
    scale: Array | None = None,
    *,
    blockwise: bool = True,
) -> dict[Label, float]:
    """The damage of one op by each plan that quantises it.

    Args:
        linear: of the float graph, not smoothed.
        plans: label -> a plan that gives this implementation to the op, with codes for its
            `sampled_weight`.
        seen: what the op did.
        rows: of the model's output, over which the divergence is a mean.
        scale: s that its input channels are to be smoothed by, [K].
        blockwise: see `Target.blockwise`.
    """
    ops = {label: plan.op(linear.name) for label, plan in plans.items()}
    weights = {label: op.weight for label, op in ops.items() if op.weight is not None}
    if not seen:
        return dict.fromkeys(weights, 0.0)
    s = torch.ones(()) if scale is None else torch.from_numpy(scale).float()
    x = torch.cat([each.x for each in seen]) / s
    back = torch.cat([each.back for each in seen], 1).float() * s
    squares = torch.cat([each.gradients for each in seen], 1).float().square().sum(0)
    share = torch.cat([torch.full((len(each.x), 1), each.share) for each in seen])
    wanted = torch.from_numpy(sampled_weight(linear, scale))
    stride = kept_columns(linear.out_features).step
    damage = {}
    for label, weight in weights.items():
        site = plans[label].site(ops[label].site)
        split = site.activation.split if site is not None else None
        rounded = [
            quantized_activation(
                each.x / s, ops[label], plans[label], each.extremes / s, blockwise=blockwise
            )
            for each in seen
        ]
        missed = torch.cat([_folded(each, split, torch.sum) for each in rounded]) - x
        in_activation = (back * missed).sum(-1, keepdim=True).double().square().sum(0)
        codes = torch.from_numpy(weight.dequantized())
        codes = _folded(codes.T, split, torch.mean).T
        in_weight = (squares * (x @ (codes - wanted)).square()).double().sum(-1, keepdim=True)
        total = float(((in_activation + stride * in_weight) * share).sum())
        damage[label] = 0.5 * total / len(back) / rows
    return damage


def _folded(values: Tensor, split: Split | None, fold: Callable[..., Tensor]) -> Tensor:
    """`values` [..., K and copies] with the copies of each channel made one in its place."""
    if split is None:
        return values
    first = values.shape[-1] - len(split.appended)
    copies = values[..., first:].reshape([*values.shape[:-1], split.copies, -1])
    result = values[..., :first].clone()
    result[..., torch.from_numpy(split.channels)] = fold(copies, -2)
    return result


def quantized_activation(
    x: Tensor,
    op: OpPlan,
    plan: PrecisionPlan,
    extremes: Tensor | None = None,
    *,
    blockwise: bool = True,
) -> Tensor:
    """x̂: `x` [..., K] as the kernel of a planned op sees it, in float; copies are appended.

    Args:
        x: some rows or all.
        op: of `plan`.
        plan: says how its activation is quantised.
        extremes: the smallest and the largest value of all rows are among these; None: of `x`.
        blockwise: see `Target.blockwise`.
    """
    if not op.coded:
        if not blockwise or as_float4(op.precision) is not None:
            return x
        assert op.weight is not None and op.weight.block_size is not None
        return _per_block(x, op.weight.block_size)
    site = plan.site(op.site)
    assert site is not None
    activation: ActivationQuant = site.activation
    if activation.fp8:
        step = activation.scale or x.abs().amax(-1, keepdim=True).clamp_min(1e-20) / LARGEST
        return rounded(x / step) * step
    if activation.kept is not None:
        kept = torch.from_numpy(activation.kept)
        rest = x.index_fill(-1, kept, 0.0)
        scale = rest.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127.0
        codes = (rest / scale).round() * scale
        return codes.index_copy(-1, kept, x.index_select(-1, kept))
    if activation.mode == "token":
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127.0
        return (x / scale).round().clamp(-128, 127) * scale
    if activation.mode == "dynamic":
        extremes = x if extremes is None else extremes
        low, high = float(extremes.min().clamp_max(0)), float(extremes.max().clamp_min(0))
        step = max((high - low) / 255.0, 1e-30)
        zero = round(-low / step)
    else:
        assert activation.scale is not None and activation.zero_point is not None
        step, zero = activation.scale, activation.zero_point
    if activation.split is not None:
        copies = x.index_select(-1, torch.from_numpy(activation.split.appended))
        shifts = torch.from_numpy(activation.split.offsets * step).float()
        x = torch.cat((x, (copies + shifts) / activation.split.copies), -1)
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


def _per_block(x: Tensor, size: int) -> Tensor:
    """Symmetric int8 per row and block of `size` channels, as MatMulNBits does at level 4."""
    depth = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -depth % size))
    blocks = padded.reshape([*x.shape[:-1], -1, size])
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / _BLOCK_LEVELS
    rounded: Tensor = ((blocks / scale).round() * scale).flatten(-2)
    return rounded[..., :depth]
