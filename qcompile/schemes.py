"""Schemes: what `--scheme` can name."""

from __future__ import annotations

import dataclasses
from typing import Final

from qcompile.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A default for every op; a recipe overrides it per module.

    Attributes:
        name: as on the command line.
        quantizes: whether anything is calibrated and quantised.
        summary: one line for `qcompile schemes`.
    """

    name: str
    quantizes: bool
    summary: str


SCHEMES: Final = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", False, "traced and fused, nothing quantised: the baseline"),
        Scheme("w8a8", True, "int8 weights per output channel, 8-bit activations, SmoothQuant"),
    )
}


def get_scheme(name: str) -> Scheme:
    """The scheme `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SCHEMES:
        raise ConfigError(f"unknown scheme {name!r}", hint="one of " + ", ".join(SCHEMES))
    return SCHEMES[name]
