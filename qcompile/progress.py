"""How long phases tell that they are alive: a bar on a terminal, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Step: TypeAlias = Callable[[int, int], None]
"""Called with (done, total)."""


class Phases:
    """Names the phases of a compilation, times them, and shows a bar where a console is given."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Step]:
        """Time the phase `name`; yields a callback for its progress."""
        start = time.perf_counter()
        try:
            if self.console is None:
                yield _ignore
            else:
                with Progress(
                    TextColumn("{task.description:<12}"),
                    BarColumn(bar_width=30),
                    TextColumn("{task.percentage:>3.0f} %"),
                    TimeElapsedColumn(),
                    console=self.console,
                    transient=not self.console.is_terminal,
                ) as progress:
                    task = progress.add_task(name, total=1)
                    yield lambda done, total: progress.update(task, completed=done, total=total)
                    last = progress.tasks[0]
                    progress.update(task, completed=last.total)
        finally:
            spent = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.seconds[name] = round(spent, 3)


def _ignore(done: int, total: int) -> None:
    return None
