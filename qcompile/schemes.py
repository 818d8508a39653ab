"""Schemes: what `--scheme` can name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Final

from qcompile.config import Activations
from qcompile.errors import ConfigError
from qcompile.methods import METHODS, OTHERWISE, PER_CHANNEL, UNAVAILABLE, Method
from qcompile.precision import FP8, INT8, MODES, Choice, Floats, Label

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
        method: how weights are rounded; None: the configuration says.
    """

    name: str
    summary: str
    labels: tuple[Label, ...] = ()
    floats: Floats | None = None
    cache_bits: int | None = None
    method: Method | None = None

    @property
    def base(self) -> str:
        """The name without cache and method."""
        return self.name.partition(":")[0].removesuffix(f"kv{self.cache_bits}")

    def by(self, method: Method | None) -> str:
        """The name, with the `method` that a configuration gave beside it."""
        return self.name if method in (None, self.method) else f"{self.name}:{method}"

    @property
    def in_blocks(self) -> bool:
        """Whether it rounds weights alone, in blocks of integers."""
        in_blocks = bool(self.labels) and set(self.labels) <= {"weight8", "weight4"}
        return in_blocks and not self.keeps

    @property
    def methods(self) -> tuple[Method, ...]:
        """How its weights may be rounded, where its name leaves that open."""
        if SCHEMES[self.base].method is not None:
            return ()
        if self.in_blocks:
            return METHODS
        return PER_CHANNEL if set(self.labels) & set(INT8) else ()

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
        Scheme("llm-int8", "as w8a8 per token, outlier channels in float beside it", ("llm-int8",)),
        Scheme("fp8", "e4m3 weights per output channel, e4m3 activations, SmoothQuant", FP8),
        Scheme("w8a16", "int8 weights in blocks, activations in float", ("weight8",)),
        Scheme("w4a16", "int4 weights in blocks, activations in float", ("weight4",)),
        Scheme("w4a8", "as w4a16 where the kernel rounds activations to int8", ("weight4",)),
        Scheme("mixed", "int4 or int8 weights in blocks, for --max-size", ("weight4", "weight8")),
        Scheme(
            "zeroquant", "w8a16:lkd where the kernel rounds activations", ("weight8",), method="lkd"
        ),
        Scheme("zeroquant4", "as zeroquant, int4 weights", ("weight4",), method="lkd"),
        Scheme("nf4", "NormalFloat4 weights in blocks of 64, activations in float", ("nf4",)),
        Scheme("fp4", "as nf4, with 4-bit floats", ("fp4",)),
        Scheme(KEPT, "a source that is quantised already, bit for bit", ("weight4", "weight8")),
    )
}


CACHES: Final = {"kv8": 8, "kv4": 4}
"""What may follow a name: the bits that keys and values are kept in."""


def get_scheme(name: str) -> Scheme:
    """The scheme `name`, which may end in one of `CACHES`, ``w8a8kv8``, and in a method after a
    colon, ``w4a16:gptq``.

    Raises:
        ConfigError: there is none of that name, or it has no such method.
    """
    whole, colon, method = name.partition(":")
    suffix = next((suffix for suffix in CACHES if whole.endswith(suffix)), "")
    scheme = SCHEMES.get(whole.removesuffix(suffix))
    if scheme is None:
        hint = f"one of {', '.join(SCHEMES)}; {' or '.join(CACHES)} may follow"
        if name in METHODS:
            hint = f"a method follows a scheme: w4a16:{name}"
        raise ConfigError(f"unknown scheme {name!r}", hint=hint)
    if colon and not method:
        raise ConfigError(
            f"scheme {name!r} names no method after its colon",
            hint=f"{whole} alone, or one of {', '.join(scheme.methods)} after it"
            if scheme.methods
            else f"{whole} alone",
        )
    if method == "dq" and scheme.labels in (("nf4",), ("fp4",)):
        raise ConfigError(
            "double quantisation of the scales: ONNX Runtime's MatMulBnb4 takes them as floats",
            hint=f"{scheme.name} has 4.5 bits a weight in blocks of 64; --block-size 128 has 4.25",
        )
    if scheme.in_blocks and scheme.methods and method in UNAVAILABLE:
        raise ConfigError(
            f"{method}: {UNAVAILABLE[method]}", hint=f"{whole}:spqr keeps whole input channels"
        )
    known = next((each for each in METHODS if each == method), None)
    if colon and not scheme.methods:
        raise ConfigError(f"scheme {scheme.name} has no methods, so {method!r} has no effect")
    if colon and known is None:
        raise ConfigError(f"unknown method {method!r}", hint=f"one of {', '.join(scheme.methods)}")
    if known is not None:
        check_method(scheme, known)
    method_ = known or scheme.method
    return dataclasses.replace(scheme, name=name, cache_bits=CACHES.get(suffix), method=method_)


def rounds_alike(one: str, other: str) -> bool:
    """Whether two names differ by the type of a cache at most."""
    parts = [name.partition(":") for name in (one, other)]
    bare = [re.sub(f"({'|'.join(CACHES)})$", "", whole) for whole, _, _ in parts]
    return bare[0] == bare[1] and parts[0][2] == parts[1][2]


def check_method(scheme: Scheme, method: Method) -> None:
    """Refuse a `method` that is not for the weights of `scheme`.

    Raises:
        ConfigError: says why.
    """
    if scheme.methods and method not in scheme.methods:
        raise ConfigError(
            f"scheme {scheme.base} has no method {method}: {OTHERWISE[method]}",
            hint=f"one of {', '.join(scheme.methods)}",
        )


def parse_schemes(text: str) -> list[str]:
    """``w8a8,w4a16:gptq`` as a list.

    Raises:
        ConfigError: a name is missing, or there twice.
    """
    names = [name.strip() for name in text.split(",")]
    if any(names) and not all(names):
        raise ConfigError(f"compare: a scheme is missing beside a comma of {text!r}")
    check_schemes([name for name in names if name])
    return names


def check_schemes(names: Sequence[str]) -> None:
    """Refuse to compare what is none or the same.

    Raises:
        ConfigError: there is no name, or one is there twice.
    """
    if not names:
        raise ConfigError("compare names no scheme")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"compare names {twice} twice")
