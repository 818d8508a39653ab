"""Outputs appear whole or not at all: a temporary folder beside the output, renamed at the end."""

from __future__ import annotations

import _thread
import errno
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from qcompile.errors import OutputError
from qcompile.terminating import Terminated

COMPARISON: Final = "qcompile-compare.json"
"""What tells a folder of several artifacts from somebody's own."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS: Final = 0.05
_ALMOST_NOTHING: Final = 1 << 20
_SHORT_WRITE: Final = re.compile(r"\d+ requested and \d+ written")


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
        with _interrupts() as interrupted:
            artifact, scratch = root / "artifact", root / "scratch"
            artifact.mkdir()
            scratch.mkdir()
            yield artifact, scratch
            check_output(output, overwrite=overwrite)
            number = interrupted()
            if number is not None:
                raise _asked_by(number)
            _replace(artifact, output, root)
    except OSError as error:
        if _disk_full(error, output.parent):
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
    ours = any((output / name).is_file() for name in ("qcompile.json", COMPARISON))
    if any(output.iterdir()) and not ours:
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


def _disk_full(error: OSError, folder: Path) -> bool:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # NumPy's short writes carry no errno; what it wrote may be gone by now.
    short = _SHORT_WRITE.search(str(error)) is not None
    return error.errno is None and (short or shutil.disk_usage(folder).free < _ALMOST_NOTHING)


@contextmanager
def _interrupts() -> Iterator[Callable[[], int | None]]:
    """SIGTERM cleans up as Ctrl-C does, and neither is lost. Yields which was asked for.

    Python drops an exception that a destructor or weakref callback raises, an interrupt too. One
    that is dropped is delivered again a little later.
    """
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield lambda: None
        return
    asked: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        raise _asked_by(number)

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if asked and issubclass(dropped.exc_type, (KeyboardInterrupt, Terminated)):
            threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main, asked[-1:]).start()
        else:
            hook(dropped)

    hook, sys.unraisablehook = sys.unraisablehook, again
    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield lambda: asked[-1] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _asked_by(number: int) -> BaseException:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
