"""What one tower takes from another whose maps have other channels or other sizes."""

import math
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.projections: dict[str, Any] = {}
        self._quantized: dict[str, Any] = {}  # {key: config}, of a unit that is loaded

    def build(self, input_shape: Any) -> None:
        tasks = sorted(input_shape)
        self._check(input_shape)
        self.tasks = tuple(map(str, tasks))
        self._add_alpha([input_shape[task][self._channel_axis] for task in tasks])
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
        key = f"{task}_from_{source}"
        name = f"{self.name}_{key}"
        if config := self._quantized.get(key):
            return keras.layers.Dense.from_config({**config, "name": name})
        arguments: dict[str, Any] = {"name": name, "dtype": self.dtype_policy}
        channels = shape[self._channel_axis]
        if len(shape) == 2:
            return keras.layers.Dense(channels, **arguments)
        convolution = getattr(keras.layers, f"Conv{len(shape) - 2}D")
        return convolution(channels, 1, data_format=self.data_format, **arguments)

    def get_config(self) -> dict[str, Any]:
        # `model.quantize` goes past the unit, to its `Dense` layers.
        quantized = {
            key: projection.get_config()
            for key, projection in self.projections.items()
            if projection.quantization_mode
        }
        return {**super().get_config(), "quantized": quantized}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ProjectedCrossStitch":
        config = dict(config)
        quantized = config.pop("quantized", {})
        unit = cls(**config)
        unit._quantized = quantized
        return unit

    def _checked(self, maps: dict[Any, Any]) -> list[Any]:
        return list(maps.values())

    def _given(self, maps: list[Any], i: int, j: int) -> Any:
        x, own = maps[j], maps[i]
        if i == j:
            return own
        task, source = self.tasks[i], self.tasks[j]
        projection = self.projections[f"{task}_from_{source}"]
        from_size, to_size = self._size(x), self._size(own)
        # The convolution where there are fewer pixels: it commutes with the resize.
        if _pixels(from_size) > _pixels(to_size):
            return projection(self._resized(x, to_size))
        return self._resized(projection(x), to_size)

    def _size(self, x: Any) -> tuple:
        shape = tuple(ops.shape(x))
        return shape[2:] if self._channel_axis == 1 else shape[1:-1]

    def _resized(self, x: Any, size: tuple) -> Any:
        """Linearly, one axis after the other."""
        # Weights in half precision would shift what is resized.
        dtype = keras.backend.result_type(self.compute_dtype, "float32")
        for axis, to in enumerate(size, 2 if self._channel_axis == 1 else 1):
            given = ops.shape(x)[axis]
            if given is None or to is None:
                raise ValueError(
                    f"'{self.name}' resizes to sizes that are not known before it is "
                    "run, and cannot be written with alpha as constants: give the "
                    "model's inputs a size"
                )
            if not (isinstance(given, int) and isinstance(to, int) and given == to):
                x = ops.swapaxes(ops.cast(x, dtype), axis, -2)
                x = ops.matmul(_linear(given, to, dtype), x)
                x = ops.cast(ops.swapaxes(x, axis, -2), self.compute_dtype)
        return x


def _linear(given: Any, to: Any, dtype: str) -> Any:
    """The weights of a linear resize with antialiasing: (to, given), rows sum to 1.

    Not `ops.image.resize`, whose sizes must be known when the graph is made.
    """
    step = ops.cast(given, dtype) / ops.cast(to, dtype)
    centers = (ops.arange(to, dtype=dtype) + 0.5) * step - 0.5
    away = ops.abs(ops.arange(given, dtype=dtype) - centers[:, None])
    weights = ops.maximum(0, 1 - away / ops.maximum(step, 1))
    return weights / ops.sum(weights, axis=1, keepdims=True)


def _pixels(size: tuple) -> int:
    """How many pixels there are, none where that is not known yet."""
    return math.prod(n if isinstance(n, int) else 0 for n in size)
