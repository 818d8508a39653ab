"""Decisions for steps of one token: which products become one, and which are scaled behind."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from qcompile.precision import OpPlan, PrecisionPlan
from qcompile.targets.base import Target
from qcompile.weight_blocks import BITS

_SMALL: Final = 2 << 20
"""Bytes of INT8 codes. To start a product takes as long as reading some 150 KB of them."""
_SHALLOW: Final = 1024
"""Input channels, up to which scaling an output channel weighs beside reading its codes."""
_WIDE: Final = 16384
"""Output channels: of a prompt of 1024 tokens 64 MiB."""


def plan_joins(plan: PrecisionPlan, target: Target) -> frozenset[str]:
    """Names of the products that share their activation and precision, to become one and a split.

    For a graph with a cache: a step of one token is mostly weights to read and kernels to start.
    Those of weights alone are joined. Those of INT8 are where they are small; where they are not, a
    prompt loses more, with as many outputs to copy, than a step gains. In float nothing is gained.
    docs/generation.md has the measurements.
    """
    if not target.joins:
        return frozenset()
    groups: dict[tuple[str, str], list[OpPlan]] = defaultdict(list)
    for op in plan.quantized:
        groups[op.site, op.precision].append(op)
    return frozenset(
        op.name
        for (_, precision), ops in groups.items()
        if len(ops) > 1 and (precision in BITS or (precision == "int8" and _bytes(ops) <= _SMALL))
        for op in ops
    )


def plan_columns(plan: PrecisionPlan, target: Target, *, last: bool) -> frozenset[str]:
    """Names of the INT8 products whose output channels are scaled behind the kernel.

    For a graph with a cache, where inputs are few: what the kernel does for each output channel
    takes as long as reading some 80 to 130 codes. A prompt loses a pass over the output, and where
    that leaves the graph, memory for it twice: so a large vocabulary stays, but for the `last`
    token's logits alone. ``benchmarks/columns.py`` measures both.
    """
    if not target.scales_columns:
        return frozenset()
    return frozenset(
        op.name
        for op in plan.quantized
        if op.precision == "int8"
        and op.in_features <= _SHALLOW
        and (last or op.out_features <= _WIDE)
    )


def _bytes(ops: list[OpPlan]) -> int:
    return sum(op.in_features * op.out_features for op in ops)
