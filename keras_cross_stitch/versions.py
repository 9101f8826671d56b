"""What a version of a served model is, and how a new one gets its number."""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator


def versions(directory: str | os.PathLike) -> dict[int, pathlib.Path]:
    """What TensorFlow Serving takes for versions: {number: path}, ascending.

    These are the folders whose names are numbers, empty where there is no such
    directory. One that is not complete yet is among them.
    """
    try:
        paths = [path for path in pathlib.Path(directory).iterdir() if path.is_dir()]
    except OSError:
        return {}
    return dict(sorted((int(path.name), path) for path in paths if is_number(path)))


def is_complete(version: str | os.PathLike) -> bool:
    """Whether the folder holds a SavedModel."""
    return (pathlib.Path(version) / "saved_model.pb").is_file()


def next_number(directory: str | os.PathLike) -> int:
    """One above the highest number that anything in the directory has for a name."""
    names = filter(is_number, pathlib.Path(directory).iterdir())
    return max((int(path.name) for path in names), default=0) + 1


def check_free(directory: str | os.PathLike, number: int) -> None:
    """Raises a ValueError where the number is none, or is taken."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(
            f"`version` must be a positive integer. Received: version={number!r}"
        )
    if (pathlib.Path(directory) / str(number)).exists() or number in versions(
        directory
    ):
        raise ValueError(
            f"'{directory}' already has version {number}: remove it, or leave out "
            f"`version` for the next one, {next_number(directory)}"
        )


def local(directory: str | os.PathLike) -> pathlib.Path:
    """The path of a served model's folder, where versions can be written and read."""
    # A remote store has no rename in one step, and pathlib would make a folder "gs:".
    if re.match(r"[A-Za-z][\w+.-]+:/", os.fspath(directory)):
        raise ValueError(
            "`directory` must be a local folder. Export to one, and copy the version "
            "that was written to where it is served (`gcloud storage cp -r`, `aws s3 "
            f"cp --recursive`). Received: directory='{directory}'"
        )
    try:
        path = pathlib.Path(directory).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{error} Received: directory='{directory}'") from error
    if set(path.as_posix()) & set("*?[]\\"):
        raise ValueError(
            "`directory` must not contain any of * ? [ ] \\, since TensorFlow reads "
            f"them as a pattern when it loads. Received: directory='{directory}'"
        )
    return path


@contextlib.contextmanager
def unfinished(directory: pathlib.Path, version: int | None) -> Iterator[pathlib.Path]:
    """Gives a path to write to, in the directory; where that fails, nothing is left."""
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if version is not None:
                check_free(directory, version)
            # TensorFlow Serving passes over names that are not numbers.
            folder = tempfile.TemporaryDirectory(prefix=".export-", dir=directory)
        except OSError as error:
            raise ValueError(
                "`directory` must be a folder that can be written to. Received: "
                f"directory='{directory}' ({error.strerror})"
            ) from error
        with folder:
            # One deeper, since only its owner may enter a temporary directory.
            yield pathlib.Path(folder.name) / "model"
    except BaseException:
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def publish(
    finished: pathlib.Path, directory: pathlib.Path, number: int | None = None
) -> pathlib.Path:
    """Renames a finished folder to its version, in one step, and returns that.

    Without `number` it is the next one, and the one after it where another export
    takes that at the same time. A `number` that is taken is a ValueError.
    """
    while True:
        if number is not None:
            check_free(directory, number)
        path = directory / str(number or next_number(directory))
        try:
            return finished.rename(path)
        except OSError:
            if not path.exists():
                raise


def is_number(path: pathlib.Path) -> bool:
    # Other scripts' digits are decimal too, but no numbers to TensorFlow Serving.
    # Nor are those of more than 64 bits.
    return path.name.isascii() and path.name.isdecimal() and int(path.name) < 2**63
