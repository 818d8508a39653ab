"""Several schemes of one model side by side: one trace and one calibration for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
from rich.console import Console

from qcompile import frontend
from qcompile.checkpoints.scheme import choose_scheme
from qcompile.config import CompileConfig
from qcompile.errors import ConfigError, QcompileError
from qcompile.limits import check_seq_len
from qcompile.pipeline import compile_shared
from qcompile.progress import Phases
from qcompile.report import Report
from qcompile.schemes import check_schemes
from qcompile.shared import Calibration, Shared, checked
from qcompile.staging import COMPARISON, staged


class Row(pydantic.BaseModel):
    """One scheme.

    Attributes:
        scheme: as it was asked for.
        folder: of its artifact, below the output; None where there is none.
        error: why there is none.
        bytes: of the graph and its weights; `bytes_float` of the float model's weights.
        accuracy: to float, on held-back data.
        speed: relative to float, by shape in words.
        seconds: of the compilation, what all share left out but for the first.
    """

    scheme: str
    folder: str | None = None
    error: str | None = None
    bytes: int = 0
    bytes_float: int = 0
    accuracy: dict[str, float] = {}
    speed: dict[str, float] = {}
    seconds: float = 0.0


def compare_schemes(
    source: frontend.Source,
    schemes: Sequence[str],
    *,
    target: str,
    calibration: Calibration,
    config: CompileConfig,
    output: Path,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Compile `source` by each of `schemes` into a folder of its own below `output`.

    Each ``output/SCHEME`` (a colon as a dash) is a whole artifact; ``qcompile-compare.json`` beside
    them holds the rows. A scheme that fails is a row with the reason.

    Raises:
        ConfigError: a name or an option is wrong, found before anything is computed.
        QcompileError: the model or the data is at fault, or no scheme can be compiled.
    """
    if config.plan_in is not None or config.plan_out is not None:
        raise ConfigError("a plan is of one scheme, so plan_in and plan_out are not for comparing")
    check_schemes(schemes)
    chosen = {name: choose_scheme(source, name) for name in schemes}
    ready = {name: checked(target, chosen[name], calibration, config) for name in schemes}
    check_seq_len(source, calibration, config)
    rows: dict[str, Row] = {}
    errors: list[QcompileError] = []
    with staged(output, overwrite=overwrite) as (folder, work):
        shared = Shared(source, calibration, work, several=True)
        # What needs real data comes first: the others take whatever there is.
        for name in sorted(schemes, key=lambda name: not chosen[name].calibrates):
            scheme, (own_target, own_config) = chosen[name], ready[name]
            own = folder / name.replace(":", "-")
            own.mkdir()
            phases = Phases(console)
            try:
                report = compile_shared(shared, own_target, target, scheme, own_config, own, phases)
            except QcompileError as error:
                if shared.data is None:
                    raise
                errors.append(error)
                for file in own.iterdir():
                    file.unlink()
                own.rmdir()
                rows[name] = Row(scheme=name, error=str(error))
            else:
                rows[name] = _row(name, own.name, report)
        if len(errors) == len(schemes):
            raise errors[0]
        found = [rows[name] for name in schemes]
        dumped: list[dict[str, Any]] = [row.model_dump() for row in found]
        (folder / COMPARISON).write_text(json.dumps(dumped, indent=1) + "\n", encoding="utf-8")
    return found


def _row(name: str, folder: str, report: Report) -> Row:
    return Row(
        scheme=name,
        folder=folder,
        bytes=report.bytes,
        bytes_float=report.bytes_float,
        accuracy=report.accuracy,
        speed={speed.shape: speed.ratio for speed in report.speed},
        seconds=round(sum(report.seconds.values()), 3),
    )
