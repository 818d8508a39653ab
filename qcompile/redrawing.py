"""`qcompile report`: pages of artifacts that are there already."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from qcompile.artifact import PAGE, RECORD, REPORT, read_record, sha256, write_record
from qcompile.errors import ConfigError, ModelError, OutputError
from qcompile.page import comparison, incomparable, page
from qcompile.ranges import RANGES, Ranges
from qcompile.report import Report, read_json
from qcompile.svg import COLORS


def draw_again(folder: Path) -> Path:
    """Write the page of the artifact `folder` again, and its hash into the record.

    Raises:
        ModelError: no artifact, or one that is damaged.
        OutputError: the page cannot be written.
    """
    record = read_record(folder)
    path = folder / PAGE
    _write_whole(path, page(*_read(folder)))
    record["sha256"][PAGE] = sha256(path)
    write_record(folder, record)
    return path


def draw_to(output: Path, folders: Sequence[Path]) -> list[str]:
    """Write the page of one artifact, or the comparison of several, to `output`.

    Returns:
        What has to be known before they are compared, in sentences.

    Raises:
        ModelError: no artifact, or one that is damaged.
        OutputError: `output` is no HTML file, or lies in an artifact, whose files are recorded, or
            cannot be written.
        ConfigError: more artifacts than there are colours.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{output} does not end in .html, and is not written")
    if (output.parent / RECORD).exists():
        raise OutputError(
            f"{output.parent} is an artifact, and {output.name} is not written into it",
            hint="leave -o out to draw an artifact's own page again",
        )
    if len(folders) > COLORS:
        raise ConfigError(f"{len(folders)} artifacts are too many to compare: {COLORS} at most")
    kept = [_read(folder) for folder in folders]
    if len(kept) == 1:
        text = page(*kept[0])
    else:
        names = [folder.resolve().name for folder in folders]
        if len({*names}) < len(names):
            names = [str(folder) for folder in folders]
        text = comparison([(n, report) for n, (report, _) in zip(names, kept, strict=True)])
    _write_whole(output, text)
    return incomparable([report for report, _ in kept])


def _write_whole(path: Path, text: str) -> None:
    """Write `path` whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _read(folder: Path) -> tuple[Report, Ranges]:
    """What a page shows, as it was when the artifact was made."""
    hashes = read_record(folder)["sha256"]
    report = Report.read(folder)
    ranges = read_json(Ranges, folder / RANGES) if RANGES in hashes else Ranges()
    for name in (REPORT, RANGES):
        if name in hashes and sha256(folder / name) != hashes[name]:
            raise ModelError(f"{folder / name} was changed since the artifact was made")
    return report, ranges
