"""What a model's answers mean: answers.json, beside a model and within its versions.

`training` writes it, and so may anyone. It is read and checked here alone.
"""

import json
import pathlib
from typing import Any, TypedDict


class Meaning(TypedDict, total=False):
    """Of one task's answers. Whatever is not said is left out."""

    kind: str  # "classes", "normals", "depth", "detection" or "attributes"
    names: list[str]  # of the classes or attributes, by index
    colours: list[list[int]]  # red, green, blue of each, to 255
    range: list[float]  # of numbers: what the first and the last colour stand for
    units: str
    description: str
    drawn_from: float  # the least score or probability that is drawn


Meanings = dict[str, Meaning]  # by task


def beside(model: pathlib.Path) -> pathlib.Path:
    """Where the meanings of a `.keras` file's answers are."""
    return model.with_name("answers.json")


def of_version(version: pathlib.Path) -> Meanings:
    """The meanings that were exported with a version."""
    return read(version / "assets.extra" / "answers.json")


def read(path: pathlib.Path) -> Meanings:
    """The content of an answers.json; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        # Editors on Windows begin a file with a byte order mark.
        answers = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' must be JSON in UTF-8: {error}") from error
    if not isinstance(answers, dict):
        raise ValueError(
            f"'{path}' must hold {{task: {{'kind': ...}}}}. Received: {answers!r:.80}"
        )
    for task, meaning in answers.items():
        if not isinstance(meaning, dict):
            raise ValueError(
                f"'{path}' must say what '{task}' means as {{'kind': ...}}. "
                f"Received: {meaning!r:.80}"
            )
        for key, (expected, right) in _KEYS.items():
            if key in meaning and not right(meaning[key]):
                raise ValueError(
                    f"'{key}' of '{task}' in '{path}' must be {expected}; leave it out "
                    f"where there is nothing to say. Received: {meaning[key]!r:.80}"
                )
    return answers


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_colours(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(colour, list)
        and len(colour) == 3
        and all(type(x) is int and 0 <= x <= 255 for x in colour)
        for colour in value
    )


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(x) in (int, float) for x in value)
        and value[0] < value[1]
    )


_KEYS = {
    "kind": ("a string", _is_text),
    "names": ("a list of strings", _are_texts),
    "colours": ("a list of [red, green, blue], whole numbers to 255", _are_colours),
    "range": ("two numbers, the smaller first", _is_range),
    "units": ("a string", _is_text),
    "description": ("a string", _is_text),
    "drawn_from": ("a number from 0 to 1", _is_share),
}
