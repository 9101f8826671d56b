"""What one task takes from another to next to no effect: found, and left out."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from export.version.recorded import relative_difference
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


def negligible_links(model: keras.Model, epsilon: float, inputs: Any) -> list[Link]:
    """Finds links without which the outputs stay as they are within epsilon.

    Args:
        model: A stitched model, not changed.
        epsilon: Float, the most that an output may change on `inputs`, relative to
            its largest value there, with all the links left out together.
        inputs: As `model.predict` takes them.

    Raises:
        ValueError: Where there is no such link.
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
    def effect(links: Iterable[Link]) -> float:
        for unit in units:
            alpha = learned[unit.name].copy()
            for link in links:
                if link.unit == unit.name:
                    alpha[link.i, link.j] = 0
            unit.alpha.assign(alpha)
        changes = zip(_outputs(model, inputs), expected, strict=True)
        return max(relative_difference(y, before) for y, before in changes)

    dropped: list[Link] = []
    try:
        links = [
            dataclasses.replace(link, effect=effect([link]))
            for unit in units
            for link in _links(unit)
        ]
        links.sort(key=lambda link: link.effect)
        for link in links:
            if effect([*dropped, link]) <= epsilon:
                dropped.append(link)
    finally:
        effect([])  # the alphas as they were
    if not dropped:
        raise ValueError(
            f"No task can do without another within --drop-below {epsilon:g}: what "
            f"matters least changes an output by {links[0].effect:.2g} of its largest "
            "value"
        )
    return dropped


def leave_out(model: keras.Model, links: Sequence[Link]) -> keras.Model:
    """The model with units that do not take over these links.

    A tower from which a task then takes nothing more is no longer in that task's part
    of the graph. The layers are those of `model`.
    """

    def call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
        absent = [(link.i, link.j) for link in links if link.unit == layer.name]
        return layer.as_constants(*args, absent) if absent else layer(*args, **kwargs)

    return keras.models.clone_model(
        model, clone_function=lambda layer: layer, call_function=call
    )


def _links(unit: CrossStitch) -> list[Link]:
    pairs = itertools.permutations(enumerate(unit.tasks), 2)
    return [Link(unit.name, task, source, i, j) for (i, task), (j, source) in pairs]


def _outputs(model: keras.Model, inputs: Any) -> list[np.ndarray]:
    return keras.tree.flatten(model.predict(inputs, batch_size=_BATCH, verbose=0))
