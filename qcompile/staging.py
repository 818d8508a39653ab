"""Outputs appear whole or not at all: a temporary folder beside the output, renamed at the end."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qcompile.errors import OutputError


@contextmanager
def staged(output: Path, *, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """Yield (folder to fill, scratch folder); the first becomes `output` if all goes well.

    Both lie in one hidden folder beside `output`, on the same file system, and are removed whatever
    happens: an error, Ctrl-C, or a request to terminate.

    Raises:
        OutputError: `output` exists and `overwrite` is false, its parent cannot be written, or the
            disk is full.
    """
    output = Path(os.path.abspath(output))
    check_output(output, overwrite=overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise OutputError(f"cannot write below {output.parent}: {error.strerror}") from error
    try:
        with _terminate_as_interrupt():
            artifact, scratch = root / "artifact", root / "scratch"
            artifact.mkdir()
            scratch.mkdir()
            yield artifact, scratch
            check_output(output, overwrite=overwrite)
            _replace(artifact, output, root)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk below {output.parent} is full",
                hint="the float model is staged there: about three times its size is needed",
            ) from error
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, before any work is done.

    Raises:
        OutputError: it exists and `overwrite` is false, or it is something `overwrite` must not
            delete.
    """
    try:
        if not output.exists() and not output.is_symlink():
            return
    except OSError as error:
        raise OutputError(f"{output} cannot be a folder: {error.strerror}") from error
    if output.exists() and output.samefile(Path.cwd()):
        raise OutputError(f"{output} is the current folder, and is not replaced")
    if not overwrite:
        raise OutputError(f"{output} exists", hint="pass --overwrite to replace it")
    if not output.is_dir() or output.is_symlink():
        raise OutputError(f"{output} is not a folder, and is not replaced")
    if any(output.iterdir()) and not (output / "qcompile.json").is_file():
        # --overwrite replaces an artifact; it must not delete somebody's home folder.
        raise OutputError(f"{output} is not a qcompile artifact, and is not replaced")


def _replace(artifact: Path, output: Path, root: Path) -> None:
    replaced = root / "replaced"
    try:
        if output.exists():
            output.rename(replaced)
        try:
            artifact.rename(output)
        except BaseException:
            if replaced.exists():
                replaced.rename(output)
            raise
    except OSError as error:
        raise OutputError(f"{output} cannot be replaced: {error.strerror}") from error


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does. Only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
