"""The report: everything measured and decided in one compilation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

from qcompile.errors import ModelError
from qcompile.methods import Method
from qcompile.precision import Floats, Label, Precision

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


class CandidateRow(_Model):
    """One implementation that an op could have had.

    Attributes:
        label: ``float``, an INT8 mode (``static``, ``dynamic``, ``token``) or a weight-only form.
        microseconds: of the kernel alone, at each shape of `Planning.shapes`.
        conversion: microseconds to quantise the activation, shared by all ops that read it.
        saved: microseconds less where all of them do: what makes the activation quantises it.
        damage: its part of the output's divergence, estimated.
        bytes: of the weight.
        chosen: whether it is in the plan.
    """

    label: Label
    microseconds: list[float]
    conversion: list[float] | None
    saved: list[float] | None = None
    damage: float
    bytes: int
    chosen: bool


class FrontRow(_Model):
    """A plan that no other beats in both predicted time and predicted damage.

    Attributes:
        speed: predicted, relative to float, at each shape.
        damage: predicted.
        bytes: of all weights.
        ops: number of ops by label.
        changes: ops whose label differs from the chosen plan's, with the label here.
    """

    speed: list[float]
    damage: float
    bytes: int
    ops: dict[str, int]
    changes: dict[str, Label]


class Planning(_Model):
    """How the precision of every op was chosen.

    Attributes:
        objective: what was minimised, and the limits that were set.
        shapes: (batch, sequence) that were timed.
        unit: of damage.
        speed: predicted for the chosen plan, relative to float, at each shape.
        damage: predicted for the chosen plan.
        bytes: of all weights of the chosen plan.
        method: ``cut``, ``groups`` (both exact) or ``milp``.
        gap: how far from the optimum the plan may be, relative.
        measured: times taken for this compilation; the others were in the table.
        machine: where times were taken.
        sensitivity: how damage was found.
        whole: whether `speed` is of the whole model, or of its Linears alone.
        front: the Pareto front, fastest first.
    """

    objective: str
    limits: dict[str, float]
    shapes: list[tuple[int, int]]
    unit: str
    speed: list[float]
    damage: float
    bytes: int
    method: str
    gap: float
    measured: int
    machine: dict[str, str]
    sensitivity: str
    whole: bool = True
    front: list[FrontRow]


class OpRow(_Model):
    """One Linear: precision, why, what really runs it, and its error at its output.

    `sqnr_db` compares the op's output with the float graph's, so it holds the errors of all ops
    before it too. `saturation_safe` says whether no input can overflow the 16-bit sums of a
    kernel without VNNI: ``always``, ``calibrated range`` or ``no``. `label` is what was chosen,
    `bytes` are those of the weight as it is stored, `kept` of its input channels stay in float.
    `method` rounded its weights; None: as is usual without one. On
    `onnx-edge` `precision` is ``int4`` where weights have four bits, ``int16`` where activations
    have sixteen.
    """

    name: str
    precision: Precision | Literal["int4", "int16"]
    reason: str
    shape: tuple[int, int]
    label: Label | None = None
    method: Method | None = None
    bytes: int | None = None
    kept: int | None = None
    candidates: list[CandidateRow] = []
    kernel: str | None = None
    sqnr_db: float | None = None
    saturation_safe: str | None = None


class UnitRow(_Model):
    """One op of a graph whose tensors have codes, and the output that it leaves.

    Attributes:
        name: by its module.
        op: its type.
        codes: type of the codes in and out; None: it stays in float.
        reason: why.
        scale, zero_point: of its output.
        range: that the scale was drawn from.
        predicted_db: SQNR of rounding its output alone, from calibration.
        sqnr_db: of its output against the float graph's, with the errors of all ops before it.
        weights: type of the weight's codes, how many scales it has and, where one was asked for, by
            which method they were found; None: it has no weight.
        equalized: what cross-layer equalisation did before it, or why nothing; None: nothing asked.
        corrected: what bias correction did to its bias, likewise.
    """

    name: str
    op: str
    codes: str | None
    reason: str
    scale: float | None = None
    zero_point: int | None = None
    range: tuple[float, float] | None = None
    predicted_db: float | None = None
    sqnr_db: float | None = None
    weights: str | None = None
    equalized: str | None = None
    corrected: str | None = None


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
    past: int = 0
    """Tokens in the cache."""
    ratio: float
    rounds: int

    @property
    def shape(self) -> str:
        """In words."""
        behind = f" after {self.past}" if self.past else ""
        return f"{self.batch}×{self.sequence}{behind}"


class CacheEffect(_Model):
    """What a cache of codes does to the divergence at the positions `first` to `last`.

    Attributes:
        kl: mean KL to the traced float model, nats per row, where keys and values are kept in
            ``float``, only the ``keys`` or only the ``values`` are codes, or ``both`` are.
    """

    first: int
    last: int
    kl: dict[str, float]


class Cache(_Model):
    """How keys and values are kept, in codes.

    Attributes:
        bits: of a code.
        granularity: of the scales.
        bytes_per_token: of all layers, for one sequence; `bytes_per_token_float` in float32.
        samples: how many held-back samples `effect` is of.
        effect: by position.
    """

    bits: int
    granularity: str
    bytes_per_token: int
    bytes_per_token_float: int
    samples: int
    effect: list[CacheEffect]


class Report(_Model):
    """Written to ``report.json``."""

    model: str
    task: str
    target: str
    scheme: str
    calibration: str
    samples: int
    held_back: int
    seen: bool = False
    """Whether what accuracy was measured on calibrated, too: there was a single sample."""
    warnings: list[str] = []
    refusals: list[str] = []
    bytes_float: int = 0
    bytes: int = 0
    accuracy: dict[str, float] = {}
    decoded: dict[str, float] = {}
    """The same of a few tokens with a cache: half of them as a prompt, the others one at a time."""
    cache: Cache | None = None
    """Of keys and values in codes; None where there is no cache, or one in float."""
    apart: list[str] = []
    """Attention with a cache whose queries, keys and values are not one product, and why."""
    speed: list[Speed] = []
    floats: Floats = "float32"
    kernels: dict[str, int] = {}
    sites: list[SiteRow] = []
    ops: list[OpRow] = []
    leftovers: list[LeftoverRow] = []
    units: list[UnitRow] = []
    """Ops of any kind, where all tensors between them may have codes."""
    planning: Planning | None = None
    seconds: dict[str, float] = {}

    @property
    def ops_by_precision(self) -> dict[str, int]:
        counts = Counter({"int8": 0, "float": 0})
        counts.update(op.precision for op in self.ops)
        return dict(counts)

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            **self.model_dump(
                exclude={"sites", "ops", "units", "leftovers", "kernels", "planning"}
            ),
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
