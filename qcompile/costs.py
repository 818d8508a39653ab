"""Measured times, kept: a table per machine, runtime and thread count, as a JSON file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Final

import platformdirs
import pydantic

from qcompile.errors import ConfigError

FORMAT: Final = 1


class CostTable(pydantic.BaseModel):
    """Median seconds by what was timed, on one machine.

    Attributes:
        machine: what times depend on: processor, threads, runtime version, kernels.
        seconds: key, e.g. ``static 128x768x3072`` -> median.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    format: int = FORMAT
    machine: dict[str, str]
    seconds: dict[str, Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]] = {}

    def write(self, path: Path) -> None:
        """Write the table to `path`, at once or not at all.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.model_dump_json(indent=1) + "\n")
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def default_path(machine: dict[str, str]) -> Path:
    """Where this user's table for `machine` lies."""
    text = json.dumps(machine, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return platformdirs.user_cache_path("qcompile") / f"costs-{FORMAT}-{digest}.json"


def open_costs(path: Path | None, machine: dict[str, str]) -> CostTable:
    """The table in `path`, or this user's; an empty one for `machine` where there is none.

    Raises:
        ConfigError: `path` was given and is not such a table.
    """
    asked = path is not None
    path = path or default_path(machine)
    try:
        table = CostTable.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return CostTable(machine=machine)
    except (OSError, pydantic.ValidationError, UnicodeDecodeError) as error:
        if not asked:
            return CostTable(machine=machine)  # a cache that is no use: measured again
        if isinstance(error, OSError):
            raise ConfigError(f"costs {path} cannot be read: {error.strerror}") from error
        raise ConfigError(f"{path} is not a table of measured times") from error
    if table.format != FORMAT:
        raise ConfigError(f"{path} has format {table.format}, this qcompile reads {FORMAT}")
    return table
