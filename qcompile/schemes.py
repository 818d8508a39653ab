"""Schemes: what `--scheme` can name."""

from __future__ import annotations

import dataclasses
from typing import Final

from qcompile.errors import ConfigError
from qcompile.precision import Floats


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A default for every op; a recipe overrides it per module.

    Attributes:
        name: as on the command line.
        quantizes: whether anything is calibrated and quantised.
        summary: one line for `qcompile schemes`.
        floats: the type of what stays floating point; None: the one that the target is fastest in.
    """

    name: str
    quantizes: bool
    summary: str
    floats: Floats | None = None


SCHEMES: Final = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", False, "traced and fused, nothing quantised: the baseline", "float32"),
        Scheme("fp16", False, "as fp32, in float16: the baseline on a GPU", "float16"),
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
