"""What one task takes from another to next to no effect: found, and left out."""

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
    i: int
    j: int
    effect: float = 0.0  # of leaving out this link alone


def negligible_links(model, epsilon, inputs) -> list[Link]:
    """Finds links without which the outputs stay as they are within epsilon.

    Args:
        model: A stitched model, not changed.
        epsilon: Float, the most that an output may change on `inputs`, relative to
            its largest value there, with all the links left out together.
        inputs: As `model.predict` takes them.
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

    # Without the links Z, task i's map at a unit is
    #     x~_i = sum_{j: (i, j) not in Z} alpha[i, j] x_j,
    # and over the model's outputs y, on the inputs given,
    #     effect(Z) = max_y  max|y_Z - y| / max|y|.
    # Links join Z in the order of effect({link}), while effect(Z) <= epsilon.
    def effect(links):
        for unit in units:
            alpha = learned[unit.name].copy()
            for link in links:
                if link.unit == unit.name:
                    alpha[link.i, link.j] = 0
            unit.alpha.assign(alpha)
        changes = zip(_outputs(model, inputs), expected, strict=True)
        return max(_relative_change(y, before) for y, before in changes)

    dropped: list[Link] = []
    try:
        links = [
            dataclasses.replace(link, effect=effect([link]))
            for unit in units
            for link in _links(unit)
        ]
        for link in sorted(links, key=lambda link: link.effect):
            if effect([*dropped, link]) <= epsilon:
                dropped.append(link)
    finally:
        effect([])  # the alphas as they were
    return dropped


def leave_out(model, links) -> keras.Model:
    """The model with units that do not take over these links.

    A tower from which a task then takes nothing more is no longer in that task's part
    of the graph. The layers are those of `model`.
    """

    def call(layer, *args, **kwargs):
        absent = {(link.i, link.j) for link in links if link.unit == layer.name}
        return _mix(layer, absent, *args) if absent else layer(*args, **kwargs)

    return keras.models.clone_model(
        model, clone_function=lambda layer: layer, call_function=call
    )


def _links(unit):
    tasks = list(enumerate(unit.tasks))
    return [
        Link(unit.name, task, source, i, j)
        for i, task in tasks
        for j, source in tasks
        if i != j
    ]


def _mix(unit, absent, maps):
    """The unit's forward (Eq. 1), without the absent terms."""
    alpha = ops.convert_to_numpy(unit.alpha)  # (T, T, C) or (T, T)
    keys = sorted(maps) if isinstance(maps, dict) else range(len(maps))
    xs = [ops.cast(maps[key], unit.compute_dtype) for key in keys]
    if unit.per == "channel" and unit.data_format == "channels_first":
        alpha = alpha.reshape(*alpha.shape, *(1,) * (len(xs[0].shape) - 2))

    def taken(i, j):
        return ops.cast(alpha[i, j], xs[j].dtype) * xs[j]

    mixed = {}
    for i, key in enumerate(keys):
        sources = [j for j in range(len(xs)) if j != i and (i, j) not in absent]
        mixed[key] = sum((taken(i, j) for j in sources), start=taken(i, i))
    return mixed if isinstance(maps, dict) else type(maps)(mixed.values())


def _outputs(model, inputs):
    return keras.tree.flatten(model.predict(inputs, batch_size=_BATCH, verbose=0))


def _relative_change(output, before):
    scale = np.abs(before).max()
    change = np.abs(output.astype("float64") - before).max()
    return float(change / scale if scale else change)
