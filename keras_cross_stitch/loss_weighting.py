"""How much the loss of each task counts, where that changes while a model trains.

Fixed weights need nothing from here: `compile(loss_weights={task: 0.5, ...})`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_cross_stitch.missing_labels import MaskedLoss, checked_loss, values_of


def weigh_losses(
    model: keras.Model,
    loss: Mapping[str, Any],
    by: Literal["uncertainty", "dynamic_average"],
) -> tuple[keras.Model, dict[str, Any]]:
    """Weighs the losses of a model's tasks, by weights that change in training.

    By `"uncertainty"` (Kendall et al.), the total loss is, with a trained `s_i`,

        sum_i L_i / (2 s_i^2) + log s_i

    `uncertainty/log_variance` holds the log s_i^2, which start at 0. Keep an
    optimizer's `weight_decay` off them:
    `optimizer.exclude_from_weight_decay(var_names=["log_variance"])`.

    By `"dynamic_average"` (Liu et al.), it is `sum_i w_i L_i`, with weights that sum
    to the number of tasks. They start at 1, and the callback `DynamicWeightAverage`,
    which `fit` must be given, sets them after each epoch.

    The new model computes what the given one does, and shares its layers. It holds
    the weights, so that they are trained, saved and loaded as others are. The losses
    in the logs (`<task>_loss`) are the weighted ones.

    Args:
        model: Functional `keras.Model` whose output is a dict with a tensor a task.
        loss: Dict of task to loss, as `MaskedLoss` takes it, for every task. A
            `MaskedLoss` stays one, and an `ignore_class` counts: a batch without
            labels leaves the task's weight alone.
        by: `"uncertainty"` or `"dynamic_average"`.

    Returns:
        The new model and the dict of losses to compile it with.

    Raises:
        ValueError: If `by` is neither, if the model's output is no dict of two tasks
            or more, if they are not those of `loss`, or if `MaskedLoss` would not take
            a loss.

    Example:

    >>> x = keras.Input((4,))
    >>> model = keras.Model(
    ...     x, {"depth": keras.layers.Dense(1)(x), "normals": keras.layers.Dense(3)(x)}
    ... )
    >>> loss = {"depth": "mae", "normals": MaskedLoss("cosine_similarity")}
    >>> model, loss = weigh_losses(model, loss, by="uncertainty")
    >>> model.compile("sgd", loss=loss)
    >>> model.trainable_variables[-1].path
    'uncertainty/log_variance'

    References:

    - [Kendall et al., 2018](https://arxiv.org/abs/1705.07115)
    - [Liu et al., 2019](https://arxiv.org/abs/1803.10704)
    """
    if by not in _WEIGHTS:
        raise ValueError(f"`by` must be one of {list(_WEIGHTS)}. Received: {by!r}")
    outputs = model.output
    tasks = sorted(loss)
    if not isinstance(outputs, dict) or sorted(outputs) != tasks or len(tasks) < 2:
        received = sorted(outputs) if isinstance(outputs, dict) else outputs
        raise ValueError(
            "`model` must give a dict of two outputs or more, and `loss` have a loss "
            f"for each of them. Received: outputs {received}, losses {tasks}"
        )
    weights = _WEIGHTS[by](tasks, name=by)
    outputs = {
        task: WeightedTask(weights, name=f"{task}_{by}")(output)
        for task, output in outputs.items()
    }
    return (
        keras.Model(model.input, outputs, name=model.name),
        {task: _weighted(loss[task], weights, task) for task in loss},
    )


class DynamicWeightAverage(keras.callbacks.Callback):
    """Sets the weights of a model's losses after each epoch, by how fast they fall.

    With L_i(t) the mean loss of task i in epoch t, as the logs have it,

        r_i = L_i(t - 1) / L_i(t - 2)
        w_i = T exp(r_i / temperature) / sum_j exp(r_j / temperature)

    In the first two epochs w_i = 1. A ratio that is no number, since a loss is 0,
    counts as 1. The model holds weights and losses; put this callback before
    `BackupAndRestore`, and a resumed run goes on where it was.

    Args:
        temperature: Positive number: the larger, the more even are the weights.

    Raises:
        ValueError: If `temperature` is not positive; or, when training begins, if
            the model is none of `weigh_losses(..., by="dynamic_average")`.

    Example:

    ```python
    model, loss = weigh_losses(model, loss, by="dynamic_average")
    model.compile("adam", loss=loss)
    model.fit(dataset, epochs=10, callbacks=[DynamicWeightAverage()])
    ```

    Reference:

    - [Liu et al., 2019](https://arxiv.org/abs/1803.10704), Eq. 7
    """

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive. Received: {temperature}")
        self.temperature = temperature

    def on_train_begin(self, logs: Any = None) -> None:
        weights = [
            layer.weights_of_tasks
            for layer in self.model.layers
            if isinstance(layer, WeightedTask)
        ]
        if not weights or not isinstance(weights[0], DynamicWeights):
            raise ValueError(
                "DynamicWeightAverage needs a model from "
                '`weigh_losses(model, loss, by="dynamic_average")`. Received: '
                f"{self.model.name}"
            )
        self.weights = weights[0]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        weight = ops.convert_to_numpy(self.weights.weight).astype("float64")
        before = ops.convert_to_numpy(self.weights.last_loss).astype("float64")
        weighted = np.array([logs[f"{task}_loss"] for task in self.weights.tasks])
        with np.errstate(divide="ignore", invalid="ignore"):
            now = weighted / weight
            ratio = now / before
        ratio = np.where(np.isfinite(ratio), ratio, 1.0) / self.temperature
        share = np.exp(ratio - ratio.max())
        self.weights.weight.assign(len(share) * share / share.sum())
        self.weights.last_loss.assign(now)


@keras.saving.register_keras_serializable("keras_cross_stitch")
class UncertaintyWeights(keras.layers.Layer):
    """Holds a trained log-variance a task: `v = log s^2`."""

    def __init__(self, tasks: Iterable[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tasks = list(tasks)
        self.log_variance = self.add_weight(
            (len(self.tasks),), "zeros", name="log_variance"
        )
        self.built = True

    def weigh(self, values: Any, task: str) -> Any:
        v = ops.cast(self.log_variance[self.tasks.index(task)], values.dtype)
        return 0.5 * ops.exp(-v) * values + 0.5 * v

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "tasks": self.tasks}


@keras.saving.register_keras_serializable("keras_cross_stitch")
class DynamicWeights(keras.layers.Layer):
    """Holds a weight a task, and the last epoch's loss, for `DynamicWeightAverage`."""

    def __init__(self, tasks: Iterable[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tasks = list(tasks)
        shape = (len(self.tasks),)
        self.weight = self.add_weight(shape, "ones", trainable=False, name="weight")
        # 0, none yet, makes a ratio that is no number.
        self.last_loss = self.add_weight(
            shape, "zeros", trainable=False, name="last_loss"
        )
        self.built = True

    def weigh(self, values: Any, task: str) -> Any:
        weight = self.weight[self.tasks.index(task)]
        return ops.cast(weight, values.dtype) * values

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "tasks": self.tasks}


_WEIGHTS: dict[str, Any] = {
    "uncertainty": UncertaintyWeights,
    "dynamic_average": DynamicWeights,
}


@keras.saving.register_keras_serializable("keras_cross_stitch")
class WeightedTask(keras.layers.Layer):
    """Hands a task's output on, and makes the weights of the losses the model's."""

    def __init__(
        self, weights_of_tasks: UncertaintyWeights | DynamicWeights, **kwargs: Any
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.weights_of_tasks = weights_of_tasks
        self.supports_masking = True

    def call(self, output: Any) -> Any:
        return output

    def get_config(self) -> dict[str, Any]:
        weights = _shared(self.weights_of_tasks)
        return {**super().get_config(), "weights_of_tasks": weights}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WeightedTask":
        weights = keras.saving.deserialize_keras_object(config["weights_of_tasks"])
        return cls(**{**config, "weights_of_tasks": weights})


@keras.saving.register_keras_serializable("keras_cross_stitch")
class WeightedLoss(keras.losses.Loss):
    """A task's loss, weighed value by value: so its mean is, and a mask still fits."""

    def __init__(
        self,
        loss: Any,
        weights_of_tasks: UncertaintyWeights | DynamicWeights,
        task: str,
        name: str | None = None,
    ) -> None:
        self.loss = checked_loss(loss)
        self.weights_of_tasks = weights_of_tasks
        self.task = task
        super().__init__(
            name=name,
            reduction=getattr(self.loss, "reduction", "sum_over_batch_size"),
            dtype=getattr(self.loss, "dtype", None),
        )

    def call(self, y_true: Any, y_pred: Any) -> Any:
        values = values_of(self.loss, y_true, y_pred)
        weighed = self.weights_of_tasks.weigh(values, self.task)
        # Private: where a loss says which labels count, as `ignore_class` does.
        mask = getattr(values, "_keras_mask", None)
        if mask is not None:
            weighed._keras_mask = mask
        return weighed

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "loss": keras.losses.serialize(self.loss),
            "weights_of_tasks": _shared(self.weights_of_tasks),
            "task": self.task,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WeightedLoss":
        weights = keras.saving.deserialize_keras_object(config["weights_of_tasks"])
        loss = keras.losses.deserialize(config["loss"])
        return cls(**{**config, "loss": loss, "weights_of_tasks": weights})


def _weighted(
    loss: Any, weights: UncertaintyWeights | DynamicWeights, task: str
) -> keras.losses.Loss:
    if isinstance(loss, MaskedLoss):
        # Inside, so that a batch without labels has no log s either.
        return MaskedLoss(WeightedLoss(loss.loss, weights, task), loss.missing)
    return WeightedLoss(loss, weights, task)


def _shared(weights: keras.layers.Layer) -> dict[str, Any]:
    """The config from which Keras makes one object, wherever in a file it stands."""
    # Keras marks as shared what it serializes for the second time.
    keras.saving.serialize_keras_object(weights)
    return keras.saving.serialize_keras_object(weights)
