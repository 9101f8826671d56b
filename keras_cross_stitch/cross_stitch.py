"""The cross-stitch unit as a Keras layer; knows nothing of towers or training."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("keras_cross_stitch")
class OwnMapsOnly(keras.constraints.Constraint):
    """Constrains alpha to a task's own maps: nothing is taken from other tasks.

    A control, as single-task networks are. Units also scale a task's own maps, which
    by itself can change how fast its tower learns. This constraint leaves the scaling
    and takes the sharing away: what a cross-stitch network gains beyond it comes from
    the other tasks.

    Keras constrains after each step. So begin with `same_task=1.0`, or the first step
    shares.

    Example:

    >>> unit = CrossStitch(same_task=1.0, alpha_constraint=OwnMapsOnly())
    >>> alpha = unit.alpha_constraint(keras.ops.ones((2, 2, 16)))
    >>> keras.ops.convert_to_numpy(alpha)[:, :, 0].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    def __call__(self, w: Any) -> Any:
        tasks = w.shape[0]
        same = ops.eye(tasks, dtype=w.dtype)
        return w * ops.reshape(same, (tasks, tasks) + (1,) * (len(w.shape) - 2))


@keras.saving.register_keras_serializable("keras_cross_stitch")
class CrossStitch(keras.layers.Layer):
    """Mixes the activation maps of T tasks linearly, with learned weights.

    The output for task i is `sum_j alpha[i, j] * x[j]`: `alpha[i, j]` is how
    much task i takes from task j. With two tasks this is Eq. 1 of the paper:

        x~A = alpha_AA * xA + alpha_AB * xB
        x~B = alpha_BA * xA + alpha_BB * xB

    Args:
        per: `"channel"` (one unit per channel, the paper's choice for
            segmentation and normals) or `"layer"` (one unit for the whole map,
            the paper's choice for detection and attributes).
        same_task: Float, the initial weight of a task's own map (alpha_S). The
            other tasks share `1 - same_task` evenly, so that rows sum to 1. Keep
            0.9 for towers that start alike; take 1.0 for towers of unrelated
            weights. Ignored if `alpha_initializer` is given.
        alpha_initializer: Initializer of `alpha`, or `None` for `same_task`.
            `"identity"` starts every channel at the identity: nothing is shared.
        alpha_regularizer: Regularizer of `alpha`, or `None`.
        alpha_constraint: Constraint on `alpha`, or `None`. The paper has none:
            the rows sum to 1 only at the start. `OwnMapsOnly()` is the control that
            shares nothing.
        data_format: `"channels_last"` or `"channels_first"`; defaults to
            `keras.config.image_data_format()`.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: List, tuple or dict of T >= 2 tensors of one shape, one a task.

    Input shape:
        T tensors of shape `(N, C)`, `(N, L, C)`, `(N, H, W, C)` or
        `(N, D, H, W, C)`; with `"channels_first"`, C stands second. All axes
        but C may be unknown, if they are unknown in all tensors. Whether the sizes
        are equal is then checked when the layer runs.

    Output shape:
        The same as the input, in the same structure.

    Weights:
        alpha: `(T, T, C)` per channel, `(T, T)` per layer, indexed by (task
            that takes, task that gives, channel). Tasks are in the order of the
            list, or of the *sorted* keys of the dict. Under every dtype policy it is
            float32 (float64 in a float64 layer), and its gradient is summed in that
            dtype. Its attribute `is_cross_stitch_alpha` is `True`. By it optimizers
            find alpha, also in loaded and cloned models.

    Attributes:
        alpha: The weight, once the layer is built.
        tasks: Tuple of strings, once the layer is built: the tasks in the order of
            alpha's axes. These are the sorted keys of the dict, or `"0"`, `"1"` and so
            on for a list.

    Raises:
        ValueError: If an argument is of another kind; if there is a single input; if
            the inputs have unequal shapes, a rank below 2 or above 5, or a size that
            is known in some of them only; or if the channels are unknown, with one
            unit per channel.

    Example:

    >>> segmentation = keras.ops.ones((2, 8, 8, 16))
    >>> normals = keras.ops.zeros((2, 8, 8, 16))
    >>> stitch = CrossStitch(same_task=0.75)
    >>> segmentation, normals = stitch([segmentation, normals])
    >>> [float(keras.ops.convert_to_numpy(x).max()) for x in (segmentation, normals)]
    [0.75, 0.25]
    >>> tuple(stitch.alpha.shape)
    (2, 2, 16)

    A dict gives the tasks their names:

    >>> stitch = CrossStitch(per="layer")
    >>> maps = stitch({"segmentation": segmentation, "normals": normals})
    >>> list(maps), stitch.tasks, tuple(stitch.alpha.shape)
    (['normals', 'segmentation'], ('normals', 'segmentation'), (2, 2))

    Reference:

    - [Misra et al., 2016](https://arxiv.org/abs/1604.03539), Eq. 1 and 2. The
      gradient of alpha is the true derivative of Eq. 1 (the printed Eq. 3
      swaps the indices).
    """

    def __init__(
        self,
        per: Literal["channel", "layer"] = "channel",
        same_task: float = 0.9,
        alpha_initializer: keras.initializers.Initializer | str | None = None,
        alpha_regularizer: keras.regularizers.Regularizer | str | None = None,
        alpha_constraint: keras.constraints.Constraint | str | None = None,
        data_format: Literal["channels_last", "channels_first"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if per not in ("channel", "layer"):
            raise ValueError(
                f"`per` must be 'channel' or 'layer'. Received: per={per!r}"
            )
        self.per = per
        self.same_task = checked_same_task(same_task)
        self.alpha_initializer = keras.initializers.get(alpha_initializer)
        self.alpha_regularizer = keras.regularizers.get(alpha_regularizer)
        self.alpha_constraint = keras.constraints.get(alpha_constraint)
        self.data_format = checked_data_format(data_format)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        shapes = _by_task(input_shape)
        shape = self._common_shape(shapes)
        _check_sizes_are_known_alike(self.name, shapes)
        axis = self._channel_axis
        channels = shape[axis]
        if self.per == "channel" and channels is None:
            raise ValueError(
                "One unit per channel needs a known number of channels: define "
                f"it, or use per='layer'. Received: shapes={shapes}, "
                f"data_format={self.data_format!r}"
            )
        # Other numbers of tasks or channels could broadcast against alpha.
        axes = {axis: channels} if self.per == "channel" else None
        self.input_spec = [keras.layers.InputSpec(axes=axes) for _ in shapes]
        self.tasks = tuple(str(task) for task in shapes)
        self._add_alpha([channels] * len(shapes))

    def _add_alpha(self, channels: list[int | None]) -> None:
        """Adds alpha, of tasks with the channels given; per layer where they differ."""
        tasks = len(channels)
        per_channel = self.per == "channel" and len(set(channels)) == 1
        self.alpha = self.add_weight(
            name="alpha",
            shape=(tasks, tasks, channels[0]) if per_channel else (tasks, tasks),
            initializer=self._initial_alpha,
            regularizer=self.alpha_regularizer,
            constraint=self.alpha_constraint,
            # Not in half precision: steps of a thousandth would be lost in it.
            dtype=keras.backend.result_type(self.variable_dtype, "float32"),
            autocast=False,
        )
        # LearningRateGroups spares it from weight decay, whatever its layer's name.
        self.alpha.is_cross_stitch_alpha = True

    @property
    def _channel_axis(self) -> int:
        return 1 if self.data_format == "channels_first" else -1

    def _initial_alpha(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        tasks, _, *channels = shape
        if self.alpha_initializer is None:
            same = ops.eye(tasks, dtype=dtype)
            different_task = (1.0 - self.same_task) / (tasks - 1)
            alpha = self.same_task * same + different_task * (1.0 - same)
        elif isinstance(self.alpha_initializer, keras.initializers.Identity):
            # Keras's makes a matrix: here, that of each channel.
            alpha = self.alpha_initializer((tasks, tasks), dtype)
        else:
            return self.alpha_initializer(shape, dtype)
        alpha = ops.reshape(alpha, (tasks, tasks) + (1,) * len(channels))
        # Not broadcast_to, which in PyTorch gives a view that cannot be assigned.
        return alpha * ops.ones(shape, dtype=dtype)

    def call(self, inputs: Any) -> Any:
        given = _by_task(inputs)
        _check_floats(self.name, given)
        maps = self._checked(given)
        tasks = range(len(maps))
        # A copy, not the variable: a custom gradient may capture no variable.
        weights = self._weights(ops.copy(self.alpha), len(maps), len(maps[0].shape))
        rows = [[self._given(maps, i, j) for j in tasks] for i in tasks]
        return _like(inputs, [_mix(weights[i], *rows[i]) for i in tasks])

    def compute_output_spec(self, inputs: Any) -> Any:
        _check_floats(self.name, _by_task(inputs))  # when joined, not when first run
        return super().compute_output_spec(inputs)

    def _checked(self, maps: dict[Any, Any]) -> list[Any]:
        # Again, since later calls may come with shapes that would broadcast.
        self._common_shape({task: x.shape for task, x in maps.items()})
        return _checked_when_run(list(maps.values()))

    def _given(self, maps: list[Any], i: int, j: int) -> Any:
        """What task j gives to task i."""
        return maps[j]

    def as_constants(
        self, inputs: Any, leave_out: Collection[tuple[int, int]] = ()
    ) -> Any:
        """The same mix by today's `alpha` as constants, an operation for each term.

        In a functional model, what task i gets then depends on those maps alone from
        which it takes something, and not on the layer as a whole.

        Args:
            inputs: As the layer, which must be built, is called with.
            leave_out: Pairs `(i, j)`, i not j, of places in `alpha`: task i takes
                nothing from task j.

        Returns:
            As the layer gives it.
        """
        maps = [ops.cast(x, self.compute_dtype) for x in _by_task(inputs).values()]
        alpha = ops.convert_to_numpy(self.alpha)
        weights = self._weights(alpha, len(maps), len(maps[0].shape))
        mixed = []
        for i in range(len(maps)):
            sources = [j for j in range(len(maps)) if (i, j) not in leave_out or i == j]
            row = [ops.cast(weights[i][j], maps[j].dtype) for j in sources]
            mixed.append(
                _sum_of_products(row, [self._given(maps, i, j) for j in sources])
            )
        return _like(inputs, mixed)

    def _weights(self, alpha: Any, tasks: int, rank: int) -> Any:
        """alpha, where each alpha[i, j] has a shape that multiplies a map."""
        # (C,), or (C, 1, 1) where channels stand first.
        trailing: tuple[int, ...] = (1,)
        if len(self.alpha.shape) == 3:
            first = self.data_format == "channels_first"
            trailing = (-1,) + (1,) * (rank - 2 if first else 0)
        return ops.reshape(alpha, (tasks, tasks, *trailing))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "per": self.per,
            "same_task": self.same_task,
            "alpha_initializer": keras.initializers.serialize(self.alpha_initializer),
            "alpha_regularizer": keras.regularizers.serialize(self.alpha_regularizer),
            "alpha_constraint": keras.constraints.serialize(self.alpha_constraint),
            "data_format": self.data_format,
        }

    def _common_shape(self, shapes: dict[Any, Any]) -> tuple[int | None, ...]:
        """The one shape that all inputs have; unknown axes agree with any."""
        if len(shapes) < 2:
            raise ValueError(
                "CrossStitch takes at least two tensors, one a task. Received one, of "
                f"shape: {shapes}"
            )
        ranks = {len(shape) for shape in shapes.values()}
        axes = list(zip(*shapes.values(), strict=False))
        if len(ranks) > 1 or any(len({*sizes} - {None}) > 1 for sizes in axes):
            raise ValueError(
                f"CrossStitch '{self.name}' mixes tensors of one shape; resize or "
                f"project them first. Received shapes by task: {shapes}"
            )
        if not 2 <= len(axes) <= 5:
            raise ValueError(
                "CrossStitch takes tensors of rank 2, (N, C), to 5, (N, D, H, W, C). "
                f"Received shapes by task: {shapes}"
            )
        return tuple(next((n for n in sizes if n is not None), None) for sizes in axes)


def checked_same_task(same_task: Any) -> float:
    if isinstance(same_task, np.number):
        same_task = same_task.item()  # which a config can hold
    if isinstance(same_task, bool) or not isinstance(same_task, int | float):
        raise ValueError(
            f"`same_task` must be a number. Received: same_task={same_task!r}"
        )
    return same_task


def checked_data_format(data_format: str | None) -> str:
    """Keras's own for `None`."""
    checked = data_format or keras.config.image_data_format()
    if checked not in ("channels_last", "channels_first"):
        raise ValueError(
            "`data_format` must be 'channels_last' or 'channels_first'. "
            f"Received: data_format={data_format!r}"
        )
    return checked


@ops.custom_gradient
def _mix(weights: Any, *maps: Any) -> Any:
    """One row of Eq. 1: `sum_j weights[j] * maps[j]`, for one receiving task."""
    row = [ops.cast(weights[j], maps[0].dtype) for j in range(len(maps))]
    mixed = _sum_of_products(row, maps)

    # PyTorch hands `upstream` by name, the others as the only argument.
    def gradient(*args: Any, upstream: Any = None) -> tuple[Any, ...]:
        if upstream is None:
            (upstream,) = args
        d_maps = [weight * upstream for weight in row]  # Eq. 2
        d_weights = ops.stack([_d_weight(upstream, x, weights[0]) for x in maps])
        return (d_weights, *d_maps)

    return mixed, gradient


def _sum_of_products(row: Sequence[Any], maps: Sequence[Any]) -> Any:
    # Stack and einsum are 4 to 8 times slower on a CPU.
    mixed = row[0] * maps[0]
    for weight, x in zip(row[1:], maps[1:], strict=True):
        mixed = mixed + weight * x
    return mixed


def _d_weight(upstream: Any, x: Any, weight: Any) -> Any:
    """dL/dalpha[i, j]: the sum of `upstream * x` wherever the weight is one."""
    dtype = keras.backend.result_type(weight.dtype, "float32")
    product = ops.cast(upstream, dtype) * ops.cast(x, dtype)
    shape = (1,) * (len(x.shape) - len(weight.shape)) + tuple(weight.shape)
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return ops.cast(ops.reshape(ops.sum(product, axes), weight.shape), weight.dtype)


def _check_floats(name: str, maps: Mapping[Any, Any]) -> None:
    dtypes = {
        task: keras.backend.standardize_dtype(x.dtype) for task, x in maps.items()
    }
    # A weight of 0.9 is 0 among integers.
    if not all("float" in dtype for dtype in dtypes.values()):
        raise ValueError(
            f"CrossStitch '{name}' mixes maps of floats: tap a layer behind it, or "
            f"cast. Received dtypes by task: {dtypes}"
        )


def _by_task(inputs: Any) -> dict[Any, Any]:
    """The inputs (or their shapes) as a dict in the order of alpha's axes."""
    if isinstance(inputs, dict):
        return {task: inputs[task] for task in sorted(inputs)}
    if isinstance(inputs, list | tuple) and not isinstance(inputs[0], int | None):
        return dict(enumerate(inputs))
    raise ValueError(
        "CrossStitch takes a list, tuple or dict of at least two tensors, one a "
        f"task. Received: {inputs}"
    )


def _like(inputs: Any, mixed: list[Any]) -> Any:
    """The mixed maps, one a task, in the structure of the inputs."""
    if isinstance(inputs, dict):
        return dict(zip(_by_task(inputs), mixed, strict=True))
    return keras.tree.pack_sequence_as(inputs, mixed)


def _check_sizes_are_known_alike(name: str, shapes: dict[Any, Any]) -> None:
    """Raises where a size is known of one tensor alone: they may differ when run."""
    for axis, sizes in enumerate(zip(*shapes.values(), strict=True)):
        if axis and len(set(sizes)) > 1:
            raise ValueError(
                f"CrossStitch '{name}' mixes tensors of one shape, and one that is "
                "unknown may differ from one that is known: give the inputs of all "
                "the size, or of none, or resize what is mixed. Received shapes by "
                f"task, which differ on axis {axis}: {shapes}"
            )


def _checked_when_run(maps: list[Any]) -> list[Any]:
    """The maps; unequal sizes that are known only in the running graph raise there.

    A reshape to the smallest size of all, which is each map's own or fails, copies
    nothing, and the error names it, within the layer.
    """
    sizes = list(zip(*map(ops.shape, maps), strict=True))  # by axis
    if all(isinstance(size, int) for axis in sizes for size in axis):
        return maps
    with keras.name_scope("all_tasks_must_give_maps_of_one_size"):
        shape = [
            axis[0]
            if all(isinstance(size, int) for size in axis)
            else functools.reduce(ops.minimum, axis)
            for axis in sizes
        ]
        return [ops.reshape(x, shape) for x in maps]
