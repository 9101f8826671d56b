"""Files that others wrote: which of a folder count, and what is said of bad ones.

And the folder of files that is made of them.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

# What file managers leave beside the files, as hidden ones do.
_LEFT = ("thumbs.db", "desktop.ini")


def files_in(folder: str | os.PathLike) -> list[Path]:
    """The files of a folder and of those in it, but hidden ones and what is left."""
    found: list[Path] = []
    for inside, folders, names in os.walk(os.fspath(folder), followlinks=True):
        folders[:] = [x for x in folders if not x.startswith(".")]
        found += [
            Path(inside, name)
            for name in names
            if not name.startswith(".") and name.lower() not in _LEFT
        ]
    for path in found:
        if not path.exists():
            raise ValueError(
                f"Expected a file behind the link {path}. There is none. Remove the "
                "link, or bring back what it names"
            )
    return sorted(found)


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


def check_names(
    path: str | os.PathLike, expected: Sequence[str], what: str, remedy: str
) -> None:
    """Raises a ValueError for a text file that does not list these names in order.

    Args:
        path: The file.
        expected: The names.
        what: What they are, as in "Expected <path> to list the 40 <what>".
        remedy: What to do, a sentence.
    """
    names = read_lines(path, remedy)
    if names != list(expected):
        differing = sorted(set(names) ^ set(expected)) or "their order"
        raise ValueError(
            f"Expected {path} to list the {len(expected)} {what}. Received "
            f"{len(names)} names, differing in: {differing}. {remedy}"
        )


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write, which is at its path when the block has ended, and not before.

    Args:
        path: Where it will be; must not exist, or be empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"Expected a new or empty folder. Received: {path}, which has content. "
            "Remove it or choose another."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        folder.replace(path)
