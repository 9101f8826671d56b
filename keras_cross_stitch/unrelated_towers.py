"""Whether towers came from one start, as their weights say; warns where not."""

import warnings
from collections.abc import Mapping

import numpy as np

from keras_cross_stitch.copying import kernels
from keras_cross_stitch.opening import Tower, Value


def unrelated(
    towers: Mapping[str, Tower], tap: Mapping[str, Value]
) -> tuple[str, str] | None:
    """Two tasks whose towers have no weights in common up to a tap, if there are any.

    Channel k of one tower's map means what channel k of the other's does where both
    came from one start. Their kernels are then more like each other channel by
    channel than one channel is like the next.
    """
    found = {task: _kernels_before(towers[task], x) for task, x in tap.items()}
    tasks = list(found)
    for n, a in enumerate(tasks):
        for b in tasks[n + 1 :]:
            if (found[a] or found[b]) and not _related(found[a], found[b]):
                return a, b
    return None


def _kernels_before(tower: Tower, value: Value) -> list[np.ndarray]:
    layers = dict.fromkeys(call.layer for call in tower.needed_for([value]))
    return [kernel for layer in layers for kernel in kernels(layer)]


def _related(kernels: list[np.ndarray], others: list[np.ndarray]) -> bool:
    """Whether kernels are alike: plainly so, or by 4 standard deviations of chance."""
    scores, excesses = [], []
    for a, b in zip(kernels, others, strict=False):
        if a.shape != b.shape:
            break
        if np.array_equal(a, b):
            return True
        excess, by_chance = _likeness(a, b)
        excesses.append(excess)
        scores.append(excess / by_chance)
    return bool(scores) and (
        sum(scores) > 4 * len(scores) ** 0.5 or sum(excesses) > 0.5 * len(excesses)
    )


def _likeness(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """By how much the cosine of equal channels is above that of unequal ones.

    And the standard deviation that it would have by chance.
    """
    a, b = (x.reshape(-1, x.shape[-1]).astype("float64") for x in (a, b))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=0), 1e-12) for x in (a, b))
    cosines = a.T @ b  # (C, C)
    channels = len(cosines)
    unequal = cosines[~np.eye(channels, dtype=bool)]
    mean, deviation = (unequal.mean(), unequal.std()) if channels > 2 else (0.0, 0.0)
    by_chance = max(deviation, len(a) ** -0.5) / channels**0.5
    return float(np.diag(cosines).mean() - mean), float(by_chance)


def warn_of_unrelated_towers(
    towers: Mapping[str, Tower], tap: Mapping[str, Value], name: str
) -> None:
    """Warns where a unit starts with maps of which channel k means two things."""
    pair = unrelated(towers, tap)
    if pair is not None:
        warnings.warn(
            f"The towers of '{pair[0]}' and '{pair[1]}' have unrelated weights in "
            f"front of the first tap, '{name}', so that channel k of one has nothing "
            "to do with channel k of the other, and what a task takes from the other "
            "at the start is noise. Start all towers from the same weights, or start "
            "with nothing shared: `stitch(..., same_task=1.0)`",
            stacklevel=3,
        )
