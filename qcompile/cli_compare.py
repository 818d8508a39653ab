"""``qcompile MODEL --compare SCHEMES``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from qcompile import default_output
from qcompile.checkpoints.scheme import choose_scheme
from qcompile.config import CompileConfig
from qcompile.schemes import parse_schemes
from qcompile.staging import check_output
from qcompile.targets import get_target


def compare_command(
    model: str,
    names: str,
    out: Console,
    *,
    target: str,
    calibration: str | None,
    config: CompileConfig,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile `model` by each of the schemes `names`, and print one table to `out`."""
    schemes = parse_schemes(names)
    # What can be known to be wrong without the model is said before torch is imported.
    get_target(target)
    for name in schemes:
        choose_scheme(model, name)
    folder = output or default_output(model, target, "compare")
    check_output(folder, overwrite=overwrite)

    from qcompile.comparing import compare_schemes
    from qcompile.summary import comparison_table

    console = Console(stderr=True)
    rows = compare_schemes(
        model,
        schemes,
        target=target,
        calibration=calibration,
        config=config,
        output=folder,
        overwrite=overwrite,
        console=console if console.is_terminal and not quiet else None,
    )
    if as_json:
        click.echo(
            json.dumps({"path": str(folder), "rows": [r.model_dump() for r in rows]}, indent=1)
        )
    elif not quiet:
        out.print(comparison_table(rows, f"{model} → {folder}"))
