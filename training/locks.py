"""One process at a time: a lock that ends with the process that holds it."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock
from rich.console import Console

from training.files import read_text


@contextlib.contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds a file's lock, which the system lets go when the process is killed.

    Args:
        path: The file. It says who holds the lock, and stays.
        wait: Whether to wait for another process that holds it.

    Raises:
        ValueError: If another process holds the lock, and `wait` is false.
    """

    def say_who(file: int) -> None:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())

    path.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(path, preserve_lock_file=True, on_acquired=say_who)
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        written = f"{path.parent} is being written by {read_text(path)}"
        if not wait:
            raise ValueError(
                f"{written}. Wait until it is done, or give another folder with --runs"
            ) from None
        Console(stderr=True).print(f"{written}: waiting", soft_wrap=True)
        held.acquire(poll_interval=0.5)
    try:
        yield
    finally:
        held.release()
