"""What commands print to."""

from __future__ import annotations

import sys

from rich.console import Console


def stdout() -> Console:
    """Tables folded to the terminal; into a pipe or a file, wide enough to search in."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def plain(text: str) -> str:
    """`text` without markup."""
    return text.replace("[", "\\[")
