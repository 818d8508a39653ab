"""Which scheme is for a source: one that is quantised already says so itself."""

from __future__ import annotations

from qcompile.checkpoints import quantized_by
from qcompile.errors import ConfigError
from qcompile.schemes import DEFAULT, KEPT, Scheme, get_scheme


def choose_scheme(source: object, asked: str | None) -> Scheme:
    """The scheme for `source`, which is opened: what was asked for, or what fits it.

    Args:
        source: as `qcompile.frontend.load` takes it.
        asked: a name, or None.

    Raises:
        ConfigError: there is none of that name, it would round codes a second time, or there are no
            codes to keep.
    """
    by = quantized_by(source)
    if asked is None:
        return get_scheme(DEFAULT if by is None else KEPT)
    scheme = get_scheme(asked)
    if by is None and scheme.keeps:
        raise ConfigError(f"scheme {asked} is for a source that is quantised already: not {source}")
    if by is not None and scheme.quantizes and not scheme.keeps:
        raise ConfigError(
            f"{source} is quantised already, by {by}, and {asked} would round it a second time",
            hint="leave the scheme out; fp32 gives the dequantised model",
        )
    return scheme
