"""Files that others wrote: which of a folder count, and what is said of bad ones."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# What file managers leave beside the files, as hidden ones do.
_LEFT = ("thumbs.db", "desktop.ini")


def files_in(folder: str | os.PathLike) -> list[Path]:
    """The files of a folder and of those in it, but hidden ones and what is left."""
    folder = Path(folder)
    return sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower() not in _LEFT
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


@contextlib.contextmanager
def read_as(what: str, path: str | os.PathLike, remedy: str) -> Iterator[None]:
    """Turns whatever a library raises over a file into a ValueError of one line.

    Args:
        what: What the file should be, as in "Expected <what> in <path>".
        path: The file.
        remedy: What to do, a sentence.
    """
    try:
        yield
    except Exception as error:
        # Libraries raise what they like, of a file that is cut off: struct.error, say.
        if isinstance(error, FileNotFoundError):
            found = "There is no such file"
        elif Path(path).is_file() and not Path(path).stat().st_size:
            found = "The file is empty"
        else:
            found = f"{type(error).__name__}: {error}"
        raise ValueError(f"Expected {what} in {path}. {found}. {remedy}") from error


def read_lines(path: str | os.PathLike, remedy: str) -> list[str]:
    """The lines of a UTF-8 text file, with a byte order mark or without."""
    with read_as("text in UTF-8", path, remedy):
        return Path(path).read_text("utf-8-sig").splitlines()
