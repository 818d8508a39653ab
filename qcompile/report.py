"""The report: everything measured and decided in one compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

from qcompile.errors import ModelError

M = TypeVar("M", bound=pydantic.BaseModel)


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class SummaryRow(_Model):
    """AbsMax, standard deviation and kurtosis of an activation."""

    absmax: float
    std: float
    kurtosis: float


class SiteRow(_Model):
    """One activation: its statistics before and after smoothing, and how it is quantised."""

    name: str
    before: SummaryRow
    after: SummaryRow
    smoothing: str
    alpha: float | None
    activations: str | None
    scale: float | None
    zero_point: int | None


class OpRow(_Model):
    """One Linear: precision, why, what really runs it, and its error at its output.

    `sqnr_db` compares the op's output with the float graph's, so it holds the errors of all ops
    before it too. `saturation_safe` says whether no input can overflow the 16-bit sums of a
    kernel without VNNI: ``always``, ``calibrated range`` or ``no``.
    """

    name: str
    precision: Literal["int8", "float"]
    reason: str
    shape: tuple[int, int]
    kernel: str | None = None
    sqnr_db: float | None = None
    saturation_safe: str | None = None


class LeftoverRow(_Model):
    """An op that multiplies matrices and is no Linear: it stays in float, for this reason."""

    name: str
    op: str
    reason: str


class Speed(_Model):
    """Time of the float graph over time of the compiled one, medians, taken in turn.

    Threads sleep between runs; spinning, those of one session hold the cores of the other.
    """

    batch: int
    sequence: int
    ratio: float
    rounds: int


class Report(_Model):
    """Written to ``report.json``."""

    model: str
    task: str
    target: str
    scheme: str
    calibration: str
    samples: int
    held_back: int
    warnings: list[str] = []
    refusals: list[str] = []
    bytes_float: int = 0
    bytes: int = 0
    accuracy: dict[str, float] = {}
    speed: list[Speed] = []
    kernels: dict[str, int] = {}
    sites: list[SiteRow] = []
    ops: list[OpRow] = []
    leftovers: list[LeftoverRow] = []
    seconds: dict[str, float] = {}

    @property
    def ops_by_precision(self) -> dict[str, int]:
        counts = {"int8": 0, "float": 0}
        for op in self.ops:
            counts[op.precision] += 1
        return counts

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            **self.model_dump(exclude={"sites", "ops", "leftovers", "kernels"}),
            "ops_by_precision": self.ops_by_precision,
        }

    @classmethod
    def read(cls, folder: Path) -> Report:
        """From the artifact `folder`.

        Raises:
            ModelError: no artifact, or one that was damaged.
        """
        return read_json(cls, folder / "report.json")


def read_json(kind: type[M], path: Path) -> M:
    """Read `path` as `kind`.

    Raises:
        ModelError: missing, unreadable or not of that form.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path.parent} is not a qcompile artifact: no {path.name}") from error
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is damaged") from error
