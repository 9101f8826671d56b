"""How long calls take, measured in turns."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np

Name = TypeVar("Name", bound=Hashable)


def interleaved(
    calls: Mapping[Name, Callable[[], Any]], rounds: int
) -> dict[Name, np.ndarray]:
    """{name: seconds of each round}, of functions without arguments, {name: function}.

    They take turns, so that whatever else the machine does slows all of them alike.
    """
    for call in calls.values():  # the first call builds
        call()
        call()
    seconds = {name: np.zeros(rounds) for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name][i] = time.perf_counter() - start
    return seconds


def batch_of(inputs: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """{name: array} with its examples repeated, or left out, to a batch of `size`."""
    return {
        name: np.resize(array, (size, *array.shape[1:]))
        for name, array in inputs.items()
    }
