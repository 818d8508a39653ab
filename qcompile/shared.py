"""What is settled before a compilation begins, and what several of one model share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from qcompile import frontend
from qcompile.calibration.data import CalibrationData, check_calibration_path
from qcompile.calibration.stats import Stats
from qcompile.config import CompileConfig
from qcompile.errors import CalibrationError, ConfigError
from qcompile.limits import check_edge, check_plan_files, check_target
from qcompile.schemes import Scheme
from qcompile.targets import Target, get_target
from qcompile.traced import TracedModel

Calibration: TypeAlias = str | Path | Iterable[str] | Iterable[Mapping[str, Any]] | None


@dataclasses.dataclass
class Shared:
    """What compilations of one model, by several schemes, have in common: made once, when it is
    first asked for.

    Attributes:
        source: the model.
        calibration: as the user gave it.
        work: folder for graphs.
        model: traced, in its canonical form.
        data: what calibrates, and what is held back.
        stats: of every site; kept where there are several schemes.
        several: whether there are.
    """

    source: frontend.Source
    calibration: Calibration
    work: Path
    model: TracedModel | None = None
    data: CalibrationData | None = None
    stats: Mapping[str, Stats] | None = None
    several: bool = False


def checked(
    target: str,
    scheme: Scheme,
    calibration: Calibration,
    config: CompileConfig,
) -> tuple[Target, CompileConfig]:
    """What `target` stands for, and `config` as `scheme` completes it.

    Raises:
        ConfigError: what can be known to be wrong before anything is computed.
        CalibrationError: there is no such file.
    """
    chosen_target = get_target(target)
    if config.recipe.rules and not scheme.quantizes:
        raise ConfigError(
            f"scheme {scheme.name} quantises nothing, so a recipe has no effect",
            hint="leave the recipe out",
        )
    if not scheme.quantizes and config.plans:
        raise ConfigError(f"scheme {scheme.name} plans nothing, so {config.plans[0]} has no effect")
    check_edge(chosen_target, config)
    check_target(chosen_target, scheme, config)
    if scheme.method is not None:
        config = config.model_copy(update={"method": scheme.method})
    if scheme.cache_bits is not None:
        config = config.model_copy(update={"cache": True})
    check_plan_files(scheme, config)
    if isinstance(calibration, str) and not calibration.strip():
        raise CalibrationError(
            "calibration is an empty name", hint="leave it out to have data generated"
        )
    if isinstance(calibration, str | Path):
        check_calibration_path(Path(calibration))
    return chosen_target, config
