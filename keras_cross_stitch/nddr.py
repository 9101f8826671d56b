"""NDDR's unit: each task's map is made of all tasks' channels by a 1x1 convolution."""

from typing import Any, Literal

import keras
from keras import ops

from keras_cross_stitch.cross_stitch import checked_data_format, checked_same_task


@keras.saving.register_keras_serializable("keras_cross_stitch")
class NDDR(keras.layers.Layer):
    """Mixes the maps of T tasks by 1x1 convolutions over all their channels.

    A unit for `stitch(..., unit=NDDR)`, instead of `CrossStitch`. For each channel of a
    task `CrossStitch` has T numbers. NDDR has a matrix W[i] for each task, over the
    channels of all tasks:

        x~i = relu(batch_norm(W[i] concat(x[1], ..., x[T])))

    At the start, channel k is made of channel k of each task, as in a cross-stitch
    unit. The result is then normalised over the batch. So whatever `same_task` is, a
    joined model does not begin with what its towers give.

    The paper gives W 100 times the learning rate of the towers, and weight decay:
    `LearningRateGroups(optimizer, {"^nddr_": 100})`.

    Args:
        same_task: Float, the initial weight of a task's own channels. The other tasks
            share `1 - same_task` evenly.
        kernel_regularizer: Regularizer of each W, or `None`.
        data_format: `"channels_last"` or `"channels_first"`; defaults to
            `keras.config.image_data_format()`.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: Dict of task name to tensor, of T >= 2 tasks.
        training: Whether maps are normalised by the statistics of their batch, or by
            the moving ones.

    Input shape:
        T tensors of one shape, `(N, C)`, `(N, L, C)`, `(N, H, W, C)` or
        `(N, D, H, W, C)`; with `"channels_first"`, C stands second. C must be known.

    Output shape:
        The same as the input, in a dict.

    Weights:
        `<task>_kernel`: W, `(T C, C)`, its rows in the order of the sorted tasks. The
            variable is `kernels[task]`. `model.quantize` leaves it as it is.
        `<unit>_<task>_norm`: the weights of the batch normalisation.

    Raises:
        ValueError: If an argument is of another kind; or, when called, if the inputs
            are no dict of at least two tensors, if their shapes are unequal, if their
            rank is below 2 or above 5, or if their channels are unknown.

    Example:

    >>> maps = {"a": keras.ops.ones((2, 8, 8, 4)), "b": keras.ops.zeros((2, 8, 8, 4))}
    >>> unit = NDDR(same_task=0.75)
    >>> float(keras.ops.convert_to_numpy(unit(maps)["b"]).max().round(2))
    0.25
    >>> tuple(unit.kernels["a"].shape)
    (8, 4)

    Reference:

    - [Gao et al., 2019](https://arxiv.org/abs/1801.08297), NDDR-CNN
    """

    def __init__(
        self,
        same_task: float = 0.9,
        kernel_regularizer: keras.regularizers.Regularizer | str | None = None,
        data_format: Literal["channels_last", "channels_first"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.same_task = checked_same_task(same_task)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.data_format = checked_data_format(data_format)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        shape = self._common_shape(input_shape)
        channels = shape[self._channel_axis]
        self.tasks = tuple(map(str, sorted(input_shape)))
        self.kernels: dict[str, Any] = {}
        self.norms: dict[str, Any] = {}
        for task in self.tasks:
            # Not of a convolution's or a `Dense` layer, which may be quantized.
            self.kernels[task] = self.add_weight(
                name=f"{task}_kernel",
                shape=(len(self.tasks) * channels, channels),
                initializer=self._start(task),
                regularizer=self.kernel_regularizer,
            )
            self.norms[task] = keras.layers.BatchNormalization(
                self._channel_axis,
                name=f"{self.name}_{task}_norm",
                dtype=self.dtype_policy,
            )
            self.norms[task].build(shape)

    @property
    def _channel_axis(self) -> int:
        return 1 if self.data_format == "channels_first" else -1

    def _start(self, task: str) -> Any:
        """What W of a task begins with: channel k of channel k of each task."""
        rest = (1.0 - self.same_task) / (len(self.tasks) - 1)

        def kernel(shape: tuple[int, ...], dtype: Any = None) -> Any:
            same = ops.eye(shape[-1], dtype=dtype)
            parts = [self.same_task if x == task else rest for x in self.tasks]
            return ops.concatenate([x * same for x in parts])

        return kernel

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        maps = [inputs[task] for task in sorted(inputs)]
        # Channels last, so that what each pixel becomes is a product with W.
        together = ops.concatenate(
            [ops.moveaxis(x, self._channel_axis, -1) for x in maps], axis=-1
        )
        mixed = {}
        for task in inputs:
            x = ops.tensordot(together, self.kernels[task], 1)
            x = ops.moveaxis(x, -1, self._channel_axis)
            mixed[task] = ops.relu(self.norms[task](x, training=training))
        return mixed

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "same_task": self.same_task,
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "data_format": self.data_format,
        }

    def _common_shape(self, shapes: Any) -> tuple[Any, ...]:
        if not isinstance(shapes, dict) or len(shapes) < 2:
            raise ValueError(
                "NDDR takes a dict of at least two tensors: task name to map. Received "
                f"shapes: {shapes}"
            )
        first = tuple(next(iter(shapes.values())))
        if any(tuple(shape) != first for shape in shapes.values()):
            raise ValueError(
                f"NDDR '{self.name}' mixes tensors of one shape; resize or project "
                f"them first. Received shapes by task: {shapes}"
            )
        if not 2 <= len(first) <= 5 or first[self._channel_axis] is None:
            raise ValueError(
                f"NDDR '{self.name}' takes tensors of rank 2, (N, C), to 5, (N, D, H, "
                f"W, C), with known channels. Received shapes by task: {shapes}"
            )
        return first
