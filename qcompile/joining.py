"""The decision which products become one: those of one activation, where steps are of one token."""

from __future__ import annotations

from collections import Counter

from qcompile.precision import PrecisionPlan
from qcompile.targets.base import Target
from qcompile.weight_blocks import BITS


def plan_joins(plan: PrecisionPlan, target: Target) -> frozenset[str]:
    """Names of the products that share their activation, of weights that alone are quantised.

    For a graph with a cache: a step of one token is mostly weights to read and kernels to start. In
    float nothing is gained, and of INT8 a prompt loses more than a step gains; docs/generation.md
    has the measurements.
    """
    if not target.joins:
        return frozenset()
    alone = [op for op in plan.quantized if op.precision in BITS]
    shared = Counter((op.site, op.precision) for op in alone)
    return frozenset(op.name for op in alone if shared[op.site, op.precision] > 1)
