"""One process at a time: a lock that ends with the process that holds it."""

import contextlib
import fcntl
import os
import socket


@contextlib.contextmanager
def lock(path, *, wait):
    """Holds a file's lock, which the system lets go when the process is killed.

    Args:
        path: Path of the file. It says who holds the lock, and stays.
        wait: Boolean, whether to wait for another process that holds it.

    Raises:
        ValueError: If another process holds the lock, and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{path.parent} is being written by {file.read()}. Wait until it is "
                "done, or give another folder with --runs"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
