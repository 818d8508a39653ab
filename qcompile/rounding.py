"""How the weights of an op are rounded: by which method, and in which blocks."""

from __future__ import annotations

import dataclasses

from qcompile.config import CompileConfig
from qcompile.methods import PER_CHANNEL, SEQUENTIAL, Method, is_symmetric
from qcompile.precision import Choice, Precision
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
    method = config.recipe.rule_for(name).method or config.method or "rtn"
    symmetric = is_symmetric(method, config.symmetric)
    return Rounding(method, BITS[precision], config.block_size or BLOCK_SIZE, symmetric)


def channel_method(name: str, choice: Choice, config: CompileConfig) -> Method | None:
    """By which method the weights of the op `name` get int8 codes with a scale per output channel.

    None: they do not, or nobody asked for one of those methods, so that scales are searched and
    errors made up for within blocks of channels, by what calibration saw (`qcompile.weights`).
    """
    method = config.recipe.rule_for(name).method or config.method
    return method if choice.precision == "int8" and method in PER_CHANNEL else None


def method_of(name: str, choice: Choice, config: CompileConfig) -> Method | None:
    """By which method the weights of the op `name` are rounded, in blocks or per channel; None: by
    none, or as is usual where activations have codes, too."""
    rounding = rounding_of(name, choice.precision, config)
    if rounding is not None:
        return rounding.method
    method = channel_method(name, choice, config)
    split = choice.label == "split" and method in SEQUENTIAL  # see `in_sequence`
    return None if split else method


def in_sequence(name: str, choice: Choice, config: CompileConfig) -> bool:
    """Whether that method wants all of the input's second moments, and the layers before rounded.

    Channels that are split are copies of each other, which no second moments of the graph show.
    """
    return choice.label != "split" and channel_method(name, choice, config) in SEQUENTIAL
