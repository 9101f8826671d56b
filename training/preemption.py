"""SIGTERM asks the program to end; what is begun goes on when it is started again."""

import contextlib
import signal
from collections.abc import Callable, Iterator


class Preempted(BaseException):
    """The program was asked to end (SIGTERM): what is begun can go on later.

    Of `BaseException`, since it comes at any moment, and no `except Exception` that
    means something else is to swallow it.
    """

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


@contextlib.contextmanager
def at_sigterm(call: Callable[[], object]) -> Iterator[None]:
    """Calls a function of no arguments when SIGTERM comes, until the block ends."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
