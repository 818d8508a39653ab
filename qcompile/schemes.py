"""Schemes: what `--scheme` can name."""

from __future__ import annotations

import dataclasses
from typing import Final

from qcompile.config import Activations
from qcompile.errors import ConfigError
from qcompile.precision import FP8, MODES, Choice, Floats, Label

DEFAULT: Final = "w8a8"
KEPT: Final = "checkpoint"
"""The scheme of a source that is quantised already."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A default for every op; a recipe overrides it per module.

    Attributes:
        name: as on the command line.
        summary: one line for `qcompile schemes`.
        labels: the implementations that it names; of several modes, the target says which first.
        floats: the type of what stays floating point; None: the one that the target is fastest in.
        cache_bits: of the codes that keys and values are kept in; None: they are kept in float.
    """

    name: str
    summary: str
    labels: tuple[Label, ...] = ()
    floats: Floats | None = None
    cache_bits: int | None = None

    @property
    def base(self) -> str:
        """The name without the cache."""
        return self.name.removesuffix(f"kv{self.cache_bits}")

    @property
    def keeps(self) -> bool:
        """Whether codes and scales are those of the source."""
        return self.base == KEPT

    @property
    def calibrates(self) -> bool:
        """Whether anything is measured on calibration data."""
        return self.quantizes or self.cache_bits is not None

    @property
    def quantizes(self) -> bool:
        """Whether any op is."""
        return bool(self.labels)

    @property
    def modes(self) -> tuple[Activations, ...]:
        """How it lets activations be quantised; none where only weights are."""
        named = {Choice(label, "").mode for label in self.labels}
        return tuple(mode for mode in MODES if mode in named)

    @property
    def fp8(self) -> bool:
        """Whether codes are e4m3."""
        return bool(set(self.labels) & set(FP8))


SCHEMES: Final = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", "traced and fused, nothing quantised: the baseline", floats="float32"),
        Scheme("fp16", "as fp32, in float16: the baseline on a GPU", floats="float16"),
        Scheme("w8a8", "int8 weights per output channel, 8-bit activations, SmoothQuant", MODES),
        Scheme("fp8", "e4m3 weights per output channel, e4m3 activations, SmoothQuant", FP8),
        Scheme("w8a16", "int8 weights per block of 32, rounded to nearest", ("weight8",)),
        Scheme("w4a16", "int4 weights per block of 32, rounded to nearest", ("weight4",)),
        Scheme(KEPT, "a source that is quantised already, bit for bit", ("weight4", "weight8")),
    )
}


CACHES: Final = {"kv8": 8, "kv4": 4}
"""What may follow a name: the bits that keys and values are kept in."""


def get_scheme(name: str) -> Scheme:
    """The scheme `name`, which may end in one of `CACHES`: ``w8a8kv8``.

    Raises:
        ConfigError: there is none of that name.
    """
    suffix = next((suffix for suffix in CACHES if name.endswith(suffix)), "")
    scheme = SCHEMES.get(name.removesuffix(suffix))
    if scheme is None:
        hint = f"one of {', '.join(SCHEMES)}; {' or '.join(CACHES)} may follow"
        raise ConfigError(f"unknown scheme {name!r}", hint=hint)
    return dataclasses.replace(scheme, name=name, cache_bits=CACHES.get(suffix))
