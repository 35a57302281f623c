"""The signals that ask a program to end: Ctrl-C, and those that clusters and closing terminals send."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["STOPPING", "Stopped", "handling", "leave"]

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """One of `STOPPING` has come."""


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within, ``handler`` gets the `STOPPING` signals.

    Those that the program ignores, as under nohup or in the background of a script, stay ignored. Python lets only the
    main thread set handlers: in another one nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        # None is a handler that Python has not set and cannot restore.
        before = {number: signal.getsignal(number) for number in STOPPING}
        before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def leave(number: int, frame: FrameType | None) -> None:
    """A handler for a program that is being imported: it ends at once.

    Nothing needs to be finished then, and an exception in the middle of an import can come out as another one.
    """
    os.write(2, b"lipgan: stopped\n")
    os._exit(128 + number)
