"""What a cheaper version costs, and how its answers change, signature by signature."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from export.meanings import Meaning, Meanings
from export.version.recorded import Arrays, relative_difference, run, takes
from export.version.signatures import Signature, described
from export.version.timing import batch_of, interleaved

_ROUNDS = 20
BATCH = 16  # of a call that is timed


@dataclasses.dataclass(frozen=True)
class Change:
    """A signature of the model as it was trained, and of its cheaper version."""

    before: Signature
    after: Signature
    seconds_before: float  # median of a call of `BATCH` examples
    seconds_after: float
    largest: float  # change of an output, relative to its largest value
    metrics: dict[str, str]  # {output: "1.2 % of the classes"}, by answers.json


def changes(
    before: pathlib.Path, after: pathlib.Path, inputs: Arrays, answers: Meanings
) -> dict[str, Change]:
    """Compares two versions of a model on `inputs`, {name: array}.

    Args:
        before, after: Paths of the versions.
        inputs: {input name: array with a batch axis}.
        answers: What the tasks' answers mean.
    """
    loaded = tf.saved_model.load(str(before)), tf.saved_model.load(str(after))
    batch = batch_of(inputs, BATCH)
    found = {}
    for name in sorted(loaded[0].signatures):
        old, new = (model.signatures[name] for model in loaded)
        if not takes(old, inputs):
            continue  # takes files, and runs the same after them
        calls = {
            "before": functools.partial(run, old, batch),
            "after": functools.partial(run, new, batch),
        }
        seconds = interleaved(calls, _ROUNDS)
        pairs = _answers(old, new, inputs)
        found[name] = Change(
            described(old),
            described(new),
            float(np.median(seconds["before"])),
            float(np.median(seconds["after"])),
            max(relative_difference(y, x) for x, y in pairs.values()),
            {
                task: metric
                for task, (x, y) in pairs.items()
                if (metric := changed_answers(x, y, answers.get(task, {})))
            },
        )
    return found


def changed_answers(before: np.ndarray, after: np.ndarray, meaning: Meaning) -> str:
    """How many classes are others, how far normals have turned, or depth moved."""
    if meaning.get("kind") == "classes":
        other = _classes(before) != _classes(after)
        return f"{100 * other.mean():.2g} % other classes"
    if meaning.get("kind") == "normals":
        return f"{_degrees(before, after).mean():.2g} degrees"
    if meaning.get("kind") == "depth":
        change = np.abs(before - after).mean()
        return f"{change:.2g} {meaning.get('units', '')}".strip()
    return ""


def _classes(answers: np.ndarray) -> np.ndarray:
    """The classes: what is given in numbers or words, or that with the best score."""
    return answers if answers.dtype.kind in "biuOSU" else answers.argmax(axis=-1)


def _degrees(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The angles between vectors of any length; a right one from or to none."""
    before, after = before.astype("float64"), after.astype("float64")
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    cosine = (before * after).sum(axis=-1) / np.where(lengths > 0, lengths, 1)
    cosine[(before == after).all(axis=-1)] = 1
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def _answers(
    old: Callable[..., Any], new: Callable[..., Any], inputs: Arrays
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{output: (before, after)} of all examples."""
    batches = [
        {name: array[i : i + BATCH] for name, array in inputs.items()}
        for i in range(0, len(next(iter(inputs.values()))), BATCH)
    ]
    both = [[run(function, batch) for batch in batches] for function in (old, new)]
    before, after = both
    return {
        name: (
            np.concatenate([np.atleast_1d(batch[name]) for batch in before]),
            np.concatenate([np.atleast_1d(batch[name]) for batch in after]),
        )
        for name in before[0]
    }
