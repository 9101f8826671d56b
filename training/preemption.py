"""SIGTERM asks the program to end; what is begun goes on when it is started again."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Preempted(BaseException):
    """The program was asked to end (SIGTERM): what is begun can go on later.

    Of `BaseException`, since it comes at any moment, and no `except Exception` that
    means something else is to swallow it.
    """

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


AGAIN = 2.0  # seconds after which a program that goes on is asked once more


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Raises a `Preempted`, wherever the program is, when SIGTERM comes.

    Again and again while the block goes on: what is raised while the garbage collector
    calls, Python reports and drops.
    """
    timers: list[threading.Timer] = []

    def stop() -> None:
        timer = threading.Timer(AGAIN, signal.raise_signal, [signal.SIGTERM])
        timer.daemon = True
        timer.start()
        timers.append(timer)
        raise Preempted(said)

    said = "Stopped, as asked. What is done is kept"
    with at_sigterm(stop):
        try:
            yield
        except Exception as error:
            # Matplotlib's C++ that calls Python makes a ValueError of what is raised.
            if timers:
                raise Preempted(said) from error
            raise
        finally:
            for timer in timers:
                timer.cancel()


@contextlib.contextmanager
def at_sigterm(call: Callable[[], object]) -> Iterator[None]:
    """Calls a function of no arguments when SIGTERM comes, until the block ends."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
