"""Cross-task alphas that do next to nothing: found, and left out of the graph."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_cross_stitch import CrossStitch

_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Link:
    """What one task takes from another at one unit: `alpha[i, j]`, i != j."""

    unit: str
    task: str
    source: str
    effect: float  # of leaving out this link alone


def drop_below(model, epsilon, inputs):
    """Zeroes the links without which the outputs stay as they are within epsilon.

    Args:
        model: A stitched model; its alphas are changed.
        epsilon: Float, the most that an output may change on `inputs`, relative to
            its largest value there, with all the links left out together.
        inputs: {input name: array with a batch axis}.

    Returns:
        `(links, change)`: the links left out, and how much the outputs change.
    """
    units = [layer for layer in model.layers if isinstance(layer, CrossStitch)]
    if not units:
        raise ValueError(
            "--drop-below is for a model with CrossStitch layers of its own. Its "
            f"layers: {[layer.name for layer in model.layers]}"
        )
    if not epsilon > 0:
        raise ValueError(f"--drop-below must be above 0. Received: {epsilon}")
    learned = {unit.name: ops.convert_to_numpy(unit.alpha) for unit in units}
    expected = _outputs(model, inputs)

    # With the links Z left out, task i's map at a unit is
    #     x~_i = sum_{j: (i, j) not in Z} alpha[i, j] x_j,
    # and over the model's outputs y, on the images given,
    #     effect(Z) = max_y  max|y_Z - y| / max|y|.
    # Links join Z in the order of effect({link}) for as long as effect(Z) <= epsilon.
    def effect(links):
        for unit in units:
            alpha = learned[unit.name].copy()
            for i, j in (link[1:] for link in links if link[0] == unit.name):
                alpha[i, j] = 0
            unit.alpha.assign(alpha)
        changes = zip(_outputs(model, inputs), expected, strict=True)
        return max(_relative_change(y, y_before) for y, y_before in changes)

    tasks = {unit.name: unit.tasks for unit in units}
    alone = {
        (unit, i, j): effect([(unit, i, j)])
        for unit in learned
        for i in range(len(tasks[unit]))
        for j in range(len(tasks[unit]))
        if i != j
    }
    dropped = []
    for link in sorted(alone, key=alone.__getitem__):
        if effect([*dropped, link]) <= epsilon:
            dropped.append(link)
    change = effect(dropped)
    return [
        Link(unit, tasks[unit][i], tasks[unit][j], alone[unit, i, j])
        for unit, i, j in dropped
    ], change


def without_zeros(model):
    """The model with units that leave out what they take with an alpha of zero.

    A tower from which a task then takes nothing more is no longer in that task's part
    of the graph. The layers are shared with `model`.
    """

    def call(layer, *args, **kwargs):
        if isinstance(layer, CrossStitch) and _links_without(layer):
            return _mix(layer, *args)
        return layer(*args, **kwargs)

    return keras.models.clone_model(
        model, clone_function=lambda layer: layer, call_function=call
    )


def _links_without(unit):
    """[(i, j)] whose alpha is zero in all channels."""
    alpha = ops.convert_to_numpy(unit.alpha)
    used = alpha.reshape(*alpha.shape[:2], -1).any(axis=-1)
    return np.argwhere(~used).tolist()


def _mix(unit, maps):
    """The unit's forward, Eq. 1, as a sum over the sources that have an alpha."""
    alpha = ops.convert_to_numpy(unit.alpha)
    absent = _links_without(unit)
    keys = sorted(maps) if isinstance(maps, dict) else range(len(maps))
    xs = [ops.cast(maps[key], unit.compute_dtype) for key in keys]
    if unit.per == "channel" and unit.data_format == "channels_first":
        alpha = alpha.reshape(*alpha.shape, *(1,) * (len(xs[0].shape) - 2))
    mixed = {}
    for i, key in enumerate(keys):
        terms = [
            ops.cast(alpha[i, j], x.dtype) * x
            for j, x in enumerate(xs)
            if [i, j] not in absent
        ]
        mixed[key] = sum(terms[1:], terms[0]) if terms else ops.zeros_like(xs[i])
    return mixed if isinstance(maps, dict) else type(maps)(mixed.values())


def _outputs(model, inputs):
    return keras.tree.flatten(model.predict(inputs, batch_size=_BATCH, verbose=0))


def _relative_change(output, expected):
    scale = np.abs(expected).max()
    change = np.abs(output.astype("float64") - expected).max()
    return float(change / scale if scale else change)
