"""What is compiled ahead of time, as data: every kernel, for every architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final, Literal, get_args

from qcompile.targets.cuda.schema import SUFFIX, Codes
from qcompile.targets.cuda.tiles import CHOICES, Tile

RowFamily = Literal["activation_rows", "norm_rows"]
Family = RowFamily | Literal["gemm", "gemm_hopper"]

ARCHITECTURES: Final = (80, 89, 90)
"""Compute capabilities, major and minor digit. A GPU runs the cubin of its own major number with
the largest minor number that is not above its own: 8.6 runs that of 8.0, 9.0 only its own."""

DTYPES: Final = ("fp16", "bf16")
"""Of activations, by Triton's names; what a kernel over rows is compiled for."""

BLOCKS: Final = (1024, 2048, 4096, 8192, 16384, 32768)
"""Columns that a program of a kernel over rows holds; the last is the widest row there is."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    Attributes:
        family: the kernel's name, in the module that ``aot.py`` finds it in.
        architecture: one of ARCHITECTURES.
        dtype: of activations, for kernels over rows.
        block: for kernels over rows.
        tile: for GEMMs.
        codes: what GEMMs multiply; kernels over rows write codes of any type.
    """

    family: Family
    architecture: int
    dtype: str = ""
    block: int = 0
    tile: Tile | None = None
    codes: Codes = "int8"

    @property
    def name(self) -> str:
        """Unique, and fit for a file and a symbol."""
        if self.tile is None:
            return f"{self.family}_{self.dtype}_{self.block}_sm{self.architecture}"
        numbers = map(str, map(int, dataclasses.astuple(self.tile)))
        return "_".join(
            [self.family, SUFFIX[self.codes].lower(), *numbers, f"sm{self.architecture}"]
        )

    @property
    def warps(self) -> int:
        """Warps that the kernel is compiled for: of one partition in ``gemm_hopper``."""
        if self.tile is not None:
            return self.tile.warps
        return max(1, self.block // 1024)

    @property
    def registers(self) -> int | None:
        """The most that a thread may have, where wide rows would else leave room for one block."""
        return 64 if self.block >= 16384 else None


def all_variants() -> Iterator[Variant]:
    """Everything that the library carries."""
    for architecture in ARCHITECTURES:
        for family in get_args(RowFamily):
            for dtype in DTYPES:
                for block in BLOCKS:
                    yield Variant(family, architecture, dtype=dtype, block=block)
        for codes, choices in CHOICES[architecture].items():
            for choice in choices:
                yield gemm_variant(choice.tile, architecture, codes)


def gemm_variant(tile: Tile, architecture: int, codes: Codes = "int8") -> Variant:
    """The GEMM with that tile: a tile with consumers is one of ``gemm_hopper``."""
    family: Family = "gemm_hopper" if tile.consumers else "gemm"
    return Variant(family, architecture, tile=tile, codes=codes)
