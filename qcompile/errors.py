"""Every error that qcompile raises on purpose.

Each carries one sentence that says what is wrong and, where something can be done, one that says
what. The command line prints the message alone; a traceback means a bug in qcompile.
"""

from __future__ import annotations

from pathlib import Path


class QcompileError(Exception):
    """Base of every deliberate error. `hint` says what the user can do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message


class ConfigError(QcompileError):
    """An option, a scheme, a target or a recipe that does not exist or cannot be combined."""


class ModelError(QcompileError):
    """The model is missing, corrupt, unsupported or unsafe to load."""


class CalibrationError(QcompileError):
    """The calibration data is missing, empty, or does not fit the model."""


class VerificationError(QcompileError):
    """The compiled graph does not do what the plan says."""


class PlanningError(QcompileError):
    """No plan was found in the time that the solver has."""


class OutputError(QcompileError):
    """The output folder exists, or cannot be written."""


class StandInWarning(UserWarning):
    """An artifact is opened without the kernels it was made for: right, and slow."""


def check_reachable(path: Path, error: type[QcompileError]) -> None:
    """Refuse a path that cannot even be asked about: `Path.exists` raises for those.

    Raises:
        QcompileError: of the type `error`, where the system says anything but "not there".
    """
    try:
        path.exists()
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}") from reason
