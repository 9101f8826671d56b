"""The files of runs and results: tidy rows, and writing whole or not at all.

Text is UTF-8 whatever the locale; what is read may begin with a byte order mark.
"""

import contextlib
import csv
import json
import os
import secrets
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One raw value, as a line of a tidy CSV file."""

    method: str
    seed: int
    task: str
    metric: str
    value: float


def kept_with(data: str | os.PathLike, name: str, split: str) -> Path:
    """The file of what is derived from a split of prepared data, such as proposals."""
    quoted = urllib.parse.quote(split, safe="")  # "train[:80%]", say
    return Path(data) / f"{name}-{quoted}.npy"


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A name to write the file under; it gets its own when the block has ended.

    Each writer has a name of its own, so that two do not write into one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays: by it libraries know the format.
    temporary = path.with_name(f"unfinished-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # as of a full disk, while it is written
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what writers left in a folder that were killed; none must be writing."""
    for left in folder.glob("unfinished-*"):
        left.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    return path.read_text("utf-8-sig")


def write_text(path: Path, text: str) -> None:
    with unfinished(path) as temporary:
        temporary.write_text(text, "utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(
            f"Expected JSON in {path}. Received: {error}. Remove {path.parent}, and "
            "make anew what was in it"
        ) from error


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2))


def read_csv(path: Path, missing_ok: bool = False) -> list[dict[str, str]]:
    """The lines of a CSV file, as dicts of its header's names.

    Args:
        path: The file.
        missing_ok: Whether there may be no such file, which then has no lines.
    """
    if missing_ok and not path.exists():
        return []
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, header: Iterable[str], body: Iterable[Sequence[Any]]) -> None:
    with (
        unfinished(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([tuple(header), *body])
