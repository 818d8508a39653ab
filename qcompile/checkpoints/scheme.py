"""Which scheme is for a source: one that is quantised already says so itself."""

from __future__ import annotations

from qcompile.checkpoints import quantized_by
from qcompile.errors import ConfigError
from qcompile.schemes import DEFAULT, KEPT, Scheme, get_scheme
from qcompile.traced import TracedModel


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
    if by is None and scheme.keeps and not _is_code(source):
        raise ConfigError(f"scheme {asked} is for a source that is quantised already: not {source}")
    if by is not None and scheme.quantizes and not scheme.keeps:
        raise ConfigError(
            f"{source} is quantised already, by {by}, and {asked} would round it a second time",
            hint="leave the scheme out; fp32 gives the dequantised model",
        )
    return scheme


def check_traced(scheme: Scheme, model: TracedModel) -> None:
    """What `choose_scheme` could not know of Python code: whether `model` has scales of its own.

    Raises:
        ConfigError: it has, and `scheme` would round it again; or `scheme` is to keep what is not
            there.
    """
    if scheme.keeps and model.checkpoint is None:
        raise ConfigError(
            f"scheme {scheme.name} is for a source that is quantised already: {model.name} is not"
        )
    if scheme.quantizes and not scheme.keeps and model.checkpoint is not None:
        raise ConfigError(
            f"{model.name} is quantised already ({model.checkpoint.description}), and "
            f"{scheme.name} would round it a second time",
            hint=f"--scheme {KEPT}; fp32 gives the dequantised model",
        )


def _is_code(source: object) -> bool:
    """Whether it has to be traced to know."""
    return isinstance(source, tuple) or ".py:" in str(source)
