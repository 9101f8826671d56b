"""What one tower takes from another whose maps have other channels or other sizes."""

from typing import Any

import keras
from keras import ops

from keras_cross_stitch.cross_stitch import CrossStitch


@keras.saving.register_keras_serializable("keras_cross_stitch")
class ProjectedCrossStitch(CrossStitch):
    """A cross-stitch unit of maps with other channels or sizes a task.

    Task i takes from task j what a learned 1x1 convolution (a `Dense` layer for
    vectors) makes of j's map in i's channels, resized to i's size where that differs:

        x~i = alpha[i, i] * x[i] + sum over j of alpha[i, j] * resize(P[i, j](x[j]))

    With alpha = identity, task i has its own map, bit for bit. Mixing by learned 1x1
    convolutions is NDDR-CNN's; that alpha weighs what is taken, as between equal maps,
    and the resize are ours. Where channels differ there is no channel k of both, and
    alpha is per layer, as between the subspaces of sluice networks.

    Args:
        per: As in `CrossStitch`; `"channel"` where all tasks have the same channels,
            `"layer"` otherwise.
        **kwargs: The other arguments of `CrossStitch`.

    Call arguments:
        inputs: Dict of task name to tensor, of T >= 2 tasks.

    Input shape:
        T tensors of one rank, as `CrossStitch` takes them, with known channels.

    Output shape:
        The same as the input, each task its own.

    Weights:
        alpha: `(T, T, C)` or `(T, T)`, as in `CrossStitch`.
        <unit>_<task>_from_<source>/kernel and bias: of the 1x1 convolution of each
            pair; the layers are in `projections["<task>_from_<source>"]`. The
            variables have an attribute `is_cross_stitch_projection`, `True`.

    Example:

    >>> maps = {"a": keras.ops.ones((2, 8, 8, 4)), "b": keras.ops.ones((2, 5, 5, 6))}
    >>> mixed = ProjectedCrossStitch(per="layer", same_task=0.5)(maps)
    >>> tuple(mixed["a"].shape), tuple(mixed["b"].shape)
    ((2, 8, 8, 4), (2, 5, 5, 6))

    Reference:

    - [Gao et al., 2019](https://arxiv.org/abs/1801.08297), NDDR-CNN
    - [Ruder et al., 2019](https://arxiv.org/abs/1705.08142), sluice networks
    """

    def build(self, input_shape: Any) -> None:
        tasks = sorted(input_shape)
        self._check(input_shape)
        self.tasks = tuple(map(str, tasks))
        self._add_alpha([input_shape[task][self._channel_axis] for task in tasks])
        self.projections: dict[str, Any] = {}
        for task in tasks:
            for source in tasks:
                if source != task:
                    projection = self._projection(task, source, input_shape[task])
                    projection.build(tuple(input_shape[source]))
                    for weight in projection.weights:
                        weight.is_cross_stitch_projection = True
                    self.projections[f"{task}_from_{source}"] = projection

    def _check(self, shapes: dict[str, Any]) -> None:
        ranks = {len(shape) for shape in shapes.values()}
        if len(ranks) > 1 or not 2 <= min(ranks) <= 5:
            raise ValueError(
                f"'{self.name}' cannot project maps of other ranks to each other, and "
                "takes (N, C) to (N, D, H, W, C): tap layers of one rank. Received "
                f"shapes by task: {shapes}"
            )
        if any(shape[self._channel_axis] is None for shape in shapes.values()):
            raise ValueError(
                f"'{self.name}' cannot project to or from an unknown number of "
                "channels: define it where the tower's input is. Received shapes by "
                f"task: {shapes}"
            )

    def _projection(self, task: str, source: str, shape: Any) -> Any:
        channels = shape[self._channel_axis]
        arguments: dict[str, Any] = {
            "name": f"{self.name}_{task}_from_{source}",
            "dtype": self.dtype_policy,
        }
        if len(shape) == 2:
            return keras.layers.Dense(channels, **arguments)
        convolution = getattr(keras.layers, f"Conv{len(shape) - 2}D")
        return convolution(channels, 1, data_format=self.data_format, **arguments)

    def _checked(self, maps: dict[Any, Any]) -> list[Any]:
        return list(maps.values())

    def _given(self, maps: list[Any], i: int, j: int) -> Any:
        x, own = maps[j], maps[i]
        if i == j:
            return own
        task, source = self.tasks[i], self.tasks[j]
        projection = self.projections[f"{task}_from_{source}"]
        from_size, to_size = self._size(x), self._size(own)
        if from_size == to_size and all(isinstance(n, int) for n in to_size):
            return projection(x)
        # The convolution where there are fewer pixels: it commutes with the resize.
        if _pixels(from_size) > _pixels(to_size):
            return projection(self._resized(x, to_size))
        return self._resized(projection(x), to_size)

    def _size(self, x: Any) -> tuple:
        shape = tuple(ops.shape(x))
        return shape[2:] if self._channel_axis == 1 else shape[1:-1]

    def _resized(self, x: Any, size: tuple) -> Any:
        """Linearly, of any number of axes: two at a time, as images."""
        if not size:
            return x
        first = self._channel_axis == 1
        if first:
            x = ops.moveaxis(x, 1, -1)
        dtype, channels = x.dtype, x.shape[-1]
        x = ops.cast(x, "float32")
        if len(size) == 1:
            x = _resize_images(ops.expand_dims(x, 2), size[0], 1)[:, :, 0]
        elif len(size) == 2:
            x = _resize_images(x, *size)
        else:
            depth, height, width = tuple(ops.shape(x))[1:-1]
            x = ops.reshape(x, (-1, height, width, channels))
            x = _resize_images(x, *size[1:])
            x = ops.reshape(x, (-1, depth, size[1] * size[2], channels))
            x = _resize_images(x, size[0], size[1] * size[2])
            x = ops.reshape(x, (-1, *size, channels))
        x = ops.cast(x, dtype)
        return ops.moveaxis(x, -1, 1) if first else x


def _resize_images(x: Any, height: Any, width: Any) -> Any:
    return ops.image.resize(
        x, (height, width), antialias=True, data_format="channels_last"
    )


def _pixels(size: tuple) -> int:
    """How many pixels there are, none where that is not known yet."""
    pixels = 1
    for n in size:
        pixels *= n if isinstance(n, int) else 0
    return pixels
