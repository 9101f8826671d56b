"""Which tasks share at which unit: measured on data, not read off alpha.

Alpha alone misleads: its weights may be of both signs and of channels that hardly vary,
and a tower may serve another as nothing but room for more features.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from keras_cross_stitch.cross_stitch import CrossStitch


def sharing(
    model: keras.Model, data: Any, *, batch_size: int = 32
) -> list[dict[str, Any]]:
    """Measures what each task takes from each other one, unit by unit.

    Give it data that training has not seen, since what a task has learned by heart
    helps only in training. For each task and each source the alphas are set to 0 in
    turn, and the model is evaluated. Afterwards the model is as before.

    Args:
        model: Compiled `keras.Model` with `CrossStitch` layers. Its output is a dict of
            tasks, and it has a loss for each of them. The losses of a task whose output
            is a dict are summed.
        data: Tuple `(x, y)` of inputs and a dict of labels, as `model.fit` takes them,
            or `(x, y, sample_weight)`. Or batches of such tuples that end and can be
            read again, such as a `tf.data.Dataset`.
        batch_size: Integer, the batch size of the evaluations; of batches, their own.

    Returns:
        List of dicts, one for each unit and each pair of a task and another task, in
        the order of the graph:

        - `unit`, `task` (that takes) and `source` (that gives).
        - `part`: what part of the task's mixed map comes from the source. It is
            `sum_c |alpha[i, j, c]| std[j, c]`, divided by the sum of the same over all
            `j`. `std` is the standard deviation of a channel of the source's map over
            the data; of a map that is projected, after the projection. The parts of a
            task, with its own, sum to 1.
        - `part_at_start`: the same with the alpha of the start, or None if an
            `alpha_initializer` drew it.
        - `without`: by what share the task's loss grows if it takes nothing from the
            source at this unit. 0.5 means half as much again; below 0 the loss falls.
        - `shared`: the smaller of `without` and of the share by which the source's own
            loss grows without its own map, and at least 0. It is large only if both
            tasks need the map. If the source's own task learns nothing, it is 0,
            however much other tasks take.

    Raises:
        ValueError: For a model without units, for one that is not compiled, for one
            whose tasks have no losses of their own, or for data without labels.

    Example:

    >>> from keras_cross_stitch import stitch
    >>> def tower():
    ...     x = keras.Input((4,), name="x")
    ...     y = keras.layers.Dense(8, activation="relu", name="hidden")(x)
    ...     return keras.Model(x, keras.layers.Dense(1, name="out")(y))
    >>> model = stitch({"a": tower(), "b": tower()}, at=["hidden"])
    >>> model.compile("sgd", {"a": "mse", "b": "mse"})
    >>> data = np.ones((2, 4)), {"a": np.ones((2, 1)), "b": np.zeros((2, 1))}
    >>> rows = sharing(model, data)
    >>> [(row["task"], row["source"]) for row in rows]
    [('a', 'b'), ('b', 'a')]
    """
    units = [layer for layer in model.layers if isinstance(layer, CrossStitch)]
    if not units:
        raise ValueError(
            "The model has no CrossStitch layer of its own; `stitch()` makes a model "
            "with them. If it has such a model within, give that one. Received: "
            f"model={model}"
        )
    if not model.compiled:
        raise ValueError(
            "`sharing` needs the losses of the tasks: compile the model first. "
            f"Received: model={model}"
        )
    without_labels = isinstance(data, tuple) and len(data) < 2
    if without_labels or isinstance(data, list | dict) or hasattr(data, "shape"):
        raise ValueError(
            "`data` must be a tuple `(x, y)`, or batches such as a `tf.data.Dataset` "
            f"or a `keras.utils.PyDataset`. Received: {type(data).__name__}"
            f"{f' of {len(data)}' if without_labels else ''}"
        )
    parts_of_data = _by_size_of_batch(data, batch_size)

    def losses() -> dict[str, float]:
        logs: dict[str, float] = collections.defaultdict(float)
        for share, arguments in parts_of_data:
            of_part = model.evaluate(**arguments(), verbose=0, return_dict=True)
            for name, value in of_part.items():
                logs[name] += share * value
        of_tasks = {}
        for task in dict.fromkeys(task for unit in units for task in unit.tasks):
            known = [logs[name] for name in _losses(model, task) if name in logs]
            if not known:
                raise ValueError(
                    "Each task of a unit must have a loss of its own in "
                    f"`compile(loss={{task: ...}})`. Received none for '{task}': "
                    f"{sorted(logs)}"
                )
            of_tasks[task] = sum(known)
        return of_tasks

    given = losses()
    rows = []
    all_scales = _scales(model, units, data, batch_size)
    for unit, scales in zip(units, all_scales, strict=True):
        alpha = keras.ops.convert_to_numpy(unit.alpha)
        parts, parts_at_start = _parts(alpha, scales), None
        if unit.alpha_initializer is None:
            start = keras.ops.convert_to_numpy(unit._initial_alpha(alpha.shape))
            parts_at_start = _parts(start, scales)
        growth = np.zeros((len(unit.tasks), len(unit.tasks)))
        for i, task in enumerate(unit.tasks):
            for j in range(len(unit.tasks)):
                with _cut(unit, i, j):
                    loss = losses()[task]
                growth[i, j] = (loss - given[task]) / max(abs(given[task]), 1e-12)
        for i, task in enumerate(unit.tasks):
            for j, source in enumerate(unit.tasks):
                if i != j:
                    rows.append(
                        {
                            "unit": unit.name,
                            "task": task,
                            "source": source,
                            "part": float(parts[i, j]),
                            "part_at_start": None
                            if parts_at_start is None
                            else float(parts_at_start[i, j]),
                            "without": float(growth[i, j]),
                            "shared": float(max(0, min(growth[i, j], growth[j, j]))),
                        }
                    )
    return rows


def _by_size_of_batch(
    data: Any, batch_size: int
) -> list[tuple[float, Callable[[], dict]]]:
    """The data in parts whose batches are of one size.

    In a graph of TensorFlow, Keras counts the loss of a task in a last batch that is
    smaller for as much as in any other.

    Returns:
        List of `(share of the examples, what gives the arguments of evaluate)`.
    """
    parts: dict[Callable[[], dict], int] = {}  # {what gives the arguments: examples}
    if isinstance(data, tuple):
        count = _length(data)
        whole = count - count % batch_size
        for start, end in ((0, whole), (whole, count)):
            if start < end:
                of_part = functools.partial(_of_arrays, data, start, end, batch_size)
                parts[of_part] = end - start
    else:
        lengths = map(_length, _batches(data))
        for size, number in collections.Counter(lengths).items():
            parts[functools.partial(_of_batches, data, size, number)] = size * number
    total = sum(parts.values())
    return [(examples / total, of_part) for of_part, examples in parts.items()]


def _of_arrays(data: tuple, start: int, end: int, batch_size: int) -> dict:
    x, y, *weight = keras.tree.map_structure(
        lambda z: None if z is None else z[start:end], data
    )
    weight = weight[0] if weight else None
    return {"x": x, "y": y, "sample_weight": weight, "batch_size": batch_size}


def _of_batches(data: Any, size: int, number: int) -> dict:
    of_size = (batch for batch in _batches(data) if _length(batch) == size)
    return {"x": of_size, "steps": number}


def _batches(data: Any) -> Iterable[Any]:
    if isinstance(data, keras.utils.PyDataset):
        return (data[k] for k in range(data.num_batches))
    return data


def _length(batch: Any) -> int:
    return keras.tree.flatten(batch)[0].shape[0]


def _losses(model: keras.Model, task: str) -> list[str]:
    """What Keras calls a task's losses in the logs."""
    output = model.output.get(task) if isinstance(model.output, dict) else None
    if isinstance(output, dict):
        return [f"{task}/{name}_loss" for name in output]
    return [f"{task}_loss"]


def _scales(
    model: keras.Model, units: list[CrossStitch], data: Any, batch_size: int
) -> list[list[list[Any]]]:
    """The standard deviations of what task i is given by task j: (C,) each, by unit."""
    # One pass for all units, of which no maps are kept: they may be as large as the
    # data.
    moments = {unit.name: _Moments(unit)(unit.input) for unit in units}
    arguments = {"x": data}
    if isinstance(data, tuple):
        arguments = {"x": data[0], "batch_size": batch_size}
    found = keras.Model(model.input, moments).predict(**arguments, verbose=0)

    def scale(of_examples: Any) -> Any:
        mean, variance = np.moveaxis(of_examples.astype("float64"), 1, 0)
        return np.sqrt(mean.var(axis=0) + variance.mean(axis=0))

    return [
        [[scale(given) for given in of_task] for of_task in found[unit.name]]
        for unit in units
    ]


class _Moments(keras.layers.Layer):
    """Each example's mean and variance, (N, 2, C), of what task i is given by task j.

    A layer, since a unit that resizes to unknown sizes gives nothing symbolic.
    """

    def __init__(self, unit: CrossStitch) -> None:
        super().__init__(dtype=unit.dtype_policy)
        self.unit = unit

    def call(self, inputs: Any) -> list[list[Any]]:
        unit = self.unit
        maps = inputs
        if isinstance(inputs, dict):
            maps = [inputs[task] for task in unit.tasks]
        tasks = range(len(maps))
        return [[self._moments(unit._given(maps, i, j)) for j in tasks] for i in tasks]

    def _moments(self, given: Any) -> Any:
        given = keras.ops.cast(given, "float32")
        if self.unit.data_format == "channels_first":
            given = keras.ops.moveaxis(given, 1, -1)
        positions = tuple(range(1, len(given.shape) - 1))
        if not positions:
            return keras.ops.stack([given, keras.ops.zeros_like(given)], axis=1)
        return keras.ops.stack(keras.ops.moments(given, positions), axis=1)


def _parts(alpha: Any, scales: list[list[Any]]) -> Any:
    """What part of each task's map comes from which: (T, T), rows that sum to 1."""
    amounts = np.array(
        [
            [np.sum(np.abs(a) * scale) for a, scale in zip(*of_task, strict=True)]
            for of_task in zip(alpha, scales, strict=True)
        ]
    )
    return amounts / np.maximum(amounts.sum(axis=1, keepdims=True), 1e-12)


@contextmanager
def _cut(unit: CrossStitch, i: int, j: int) -> Iterator[None]:
    """While it lasts, task i takes nothing from task j."""
    alpha = keras.ops.convert_to_numpy(unit.alpha)
    cut = alpha.copy()
    cut[i, j] = 0
    unit.alpha.assign(cut)
    try:
        yield
    finally:
        unit.alpha.assign(alpha)
