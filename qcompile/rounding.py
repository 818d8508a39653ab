"""How the weights of an op whose activation stays in float are rounded: by method and blocks."""

from __future__ import annotations

import dataclasses

from qcompile.config import CompileConfig
from qcompile.methods import Method, is_symmetric
from qcompile.precision import Precision
from qcompile.weight_blocks import BITS, BLOCK_SIZE


@dataclasses.dataclass(frozen=True)
class Rounding:
    """One op's.

    Attributes:
        method: finds the codes.
        bits: of a code.
        block_size: input channels that share a scale.
        symmetric: whether blocks have no zero point.
    """

    method: Method
    bits: int
    block_size: int
    symmetric: bool


def rounding_of(name: str, precision: Precision, config: CompileConfig) -> Rounding | None:
    """Of the op `name`, or None where its weights are no integers in blocks."""
    if precision not in BITS:
        return None
    method = config.recipe.rule_for(name).method or config.method
    symmetric = is_symmetric(method, config.symmetric)
    return Rounding(method, BITS[precision], config.block_size or BLOCK_SIZE, symmetric)
