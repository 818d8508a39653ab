"""Running the command line in this process, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Exit status and output of one command."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The message of a failure, which is one line and nothing else."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("error: "), lines[0]
        assert self.stdout == ""
        assert self.status == 1
        return lines[0].removeprefix("error: ")


RunCli: TypeAlias = Callable[..., Outcome]
"""Takes the words after ``qcompile``, of any type that prints as itself."""
