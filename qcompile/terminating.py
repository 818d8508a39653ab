"""A request to terminate, as an exception: what is open is closed, and the exit status tells."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

STATUS: Final = 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM. No `Exception`, so that nothing that recovers from errors takes it for one."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`.

    Only the main thread may set handlers; in another, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
