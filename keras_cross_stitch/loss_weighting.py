"""How much the loss of each task counts, where that changes while a model trains.

Fixed weights need nothing from here: `compile(loss_weights={task: 0.5, ...})`.
"""

import uuid
import warnings
import weakref
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_cross_stitch.missing_labels import (
    MaskedLoss,
    checked_loss,
    tried,
    values_of,
)


def weigh_losses(
    model: keras.Model,
    loss: Mapping[str, Any],
    by: Literal["uncertainty", "dynamic_average"],
) -> tuple[keras.Model, dict[str, Any]]:
    """Weights the losses of a model's tasks, and changes the weights in training.

    By `"uncertainty"` (Kendall et al.), each task has a trained `s_i`. The total loss
    is

        sum_i L_i / (2 s_i^2) + log s_i

    The variable `uncertainty/log_variance` holds log s_i^2, which starts at 0. If the
    optimizer has a `weight_decay`, exclude it:
    `optimizer.exclude_from_weight_decay(var_names=["log_variance"])`.

    By `"dynamic_average"` (Liu et al.), the total loss is `sum_i w_i L_i`. The weights
    sum to the number of tasks and start at 1. The callback `DynamicWeightAverage` sets
    them after each epoch: give it to `fit`.

    The new model computes what the given one does, and shares its layers. (It is a
    plain functional model: a `train_step` of a subclass is not its own.) It has one
    layer more, named as `by`, which holds the weights. So they are trained, saved,
    loaded and copied as other weights are. The losses take the weights of the copy
    that was called last: in a loop of your own, take the losses of one copy before you
    call another. The losses in the logs (`<task>_loss`) are the weighted ones. They can
    fall below 0 and say little, so monitor a metric.

    Both formulas are for losses of 0 or more. A cosine similarity, which is at least
    -1, counts as `1 + L_i`. Sample weights count as if an example stood so many times
    in the batch: they multiply log s_i, and the 1 of `1 + L_i`, too. (In a `MaskedLoss`
    the mean is divided by them.)

    Args:
        model: Functional `keras.Model` whose output is a dict with a tensor a task.
        loss: Dict of every task to a loss that `MaskedLoss` would take, or to a
            `MaskedLoss`. An `ignore_class` is respected, but refused under JAX: write
            `MaskedLoss(loss, missing=...)` there. A batch without labels of a task
            leaves the task's weight as it is.
        by: `"uncertainty"` or `"dynamic_average"`.

    Returns:
        The new model and the dict of losses to compile it with.

    Raises:
        ValueError: If `by` is neither; if the model's output is no dict of two tensors
            or more; if its tasks are not those of `loss`; if the model's losses are
            weighted already; if `MaskedLoss` would not take a loss, or JAX its
            `ignore_class`; or if a loss goes
            below 0, as far as a trial shows. (`DynamicWeightAverage` looks again after
            each epoch.)

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
    given = [
        sorted(x) if isinstance(x, Mapping) else f"no dict but {x}"
        for x in (outputs, loss)
    ]
    if isinstance(given[0], str) or given[0] != given[1] or len(given[0]) < 2:
        raise ValueError(
            "`model` must give a dict of two outputs or more, and `loss` be a dict "
            f"with a loss for each of them. Received: outputs {given[0]}, losses "
            f"{given[1]}"
        )
    tasks = given[0]
    for task, output in outputs.items():
        if not isinstance(output, keras.KerasTensor):
            parts = (x for of_task in outputs.items() for x in _as_code(*of_task))
            raise ValueError(
                "Each task of `model` must have one tensor for its output. Make a task "
                "of each, with a loss of its own: model = keras.Model(model.input, "
                f"{{{', '.join(parts)}}}). Received: the output of '{task}' is {output}"
            )
    for layer in model.layers:
        if isinstance(layer, TaskWeights):
            raise ValueError(
                "The losses of `model` are weighed already, by its layer "
                f"'{layer.name}'"
            )
    for task, of_task in loss.items():
        ignored = getattr(of_task, "ignore_class", None)
        # Its mask cannot be taken over there: what JAX traces takes no attributes.
        if ignored is not None and keras.backend.backend() == "jax":
            raise ValueError(
                "Under JAX a weighed loss must have no `ignore_class`: write "
                f"`MaskedLoss(loss, missing={ignored})`. Received: the loss of "
                f"'{task}' has ignore_class={ignored}"
            )
    if by == "uncertainty":  # the callback of the other looks after each epoch
        for task, of_task in loss.items():
            is_masked = isinstance(of_task, MaskedLoss)
            _check_not_poisson(task, of_task.loss if is_masked else of_task)
    weights = _WEIGHTS[by](tasks, name=by)
    losses = {task: _weighted(loss[task], task, weights.key) for task in loss}
    return keras.Model(model.input, weights(outputs), name=model.name), losses


class DynamicWeightAverage(keras.callbacks.Callback):
    """Sets the weights of a model's losses after each epoch, by how fast they fall.

    With L_i(t) the mean loss of task i in epoch t, as the logs have it (on TensorFlow
    Keras counts a smaller last batch there for as much as any other),

        r_i = L_i(t - 1) / L_i(t - 2)
        w_i = T exp(r_i / temperature) / sum_j exp(r_j / temperature)

    In the first two epochs w_i = 1. If a loss is 0 and a ratio is therefore no number,
    the ratio counts as 1. The model holds the weights and the losses. Put this callback
    before `BackupAndRestore`, and a resumed run goes on where it stopped.

    Args:
        temperature: Positive number. The larger it is, the more equal are the weights.

    Raises:
        ValueError: If `temperature` is not positive; when training begins, if the
            model is not from `weigh_losses(..., by="dynamic_average")`; or, at the end
            of an epoch, if a loss is below 0.

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
        weights = [x for x in self.model.layers if isinstance(x, DynamicWeights)]
        if not weights:
            raise ValueError(
                "DynamicWeightAverage needs a model from "
                '`weigh_losses(model, loss, by="dynamic_average")`. Received: '
                f"{self.model.name}"
            )
        self.weights = weights[0]
        self.weights.has_callback = True

    def on_train_end(self, logs: Any = None) -> None:
        self.weights.has_callback = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        weight = ops.convert_to_numpy(self.weights.weight).astype("float64")
        before = ops.convert_to_numpy(self.weights.last_loss).astype("float64")
        weighted = np.array([logs[f"{task}_loss"] for task in self.weights.tasks])
        with np.errstate(divide="ignore", invalid="ignore"):
            now = weighted / weight
            for task, value in zip(self.weights.tasks, now, strict=True):
                if value < 0:
                    raise ValueError(_below_zero(task, value))
            ratio = now / before
        ratio = np.where(np.isfinite(ratio), ratio, 1.0) / self.temperature
        share = np.exp(ratio - ratio.max())
        self.weights.weight.assign(len(share) * share / share.sum())
        self.weights.last_loss.assign(now)


# {key: the layer of that key that was called last}. A copy of a model, made by whatever
# way Keras copies, has a layer of the same key, and its losses follow its call.
_called: MutableMapping[str, "TaskWeights"] = weakref.WeakValueDictionary()


def _as_code(task: str, output: Any) -> list[str]:
    """The entries of a flat dict of outputs that hold a task's."""
    if isinstance(output, keras.KerasTensor):
        return [f'"{task}": model.output["{task}"]']
    keys = output if isinstance(output, Mapping) else range(len(output))
    return [f'"{task}_{key}": model.output["{task}"][{key!r}]' for key in keys]


class TaskWeights(keras.layers.Layer):
    """Hands the outputs of all tasks on, and holds the weights of their losses."""

    def __init__(
        self, tasks: Iterable[str], key: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.tasks = list(tasks)
        self.key = key or uuid.uuid4().hex
        self.supports_masking = True
        self.built = True

    def call(self, outputs: Any) -> Any:
        _called[self.key] = self
        return dict(outputs)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "tasks": self.tasks, "key": self.key}


@keras.saving.register_keras_serializable("keras_cross_stitch")
class UncertaintyWeights(TaskWeights):
    """Holds a trained log-variance a task: `v = log s^2`."""

    def __init__(self, tasks: Iterable[str], **kwargs: Any) -> None:
        super().__init__(tasks, **kwargs)
        self.log_variance = self.add_weight(
            (len(self.tasks),), "zeros", dtype="float32", name="log_variance"
        )

    def weigh(self, values: Any, task: str) -> Any:
        v = ops.cast(self.log_variance[self.tasks.index(task)], values.dtype)
        return 0.5 * ops.exp(-v) * values + 0.5 * v


@keras.saving.register_keras_serializable("keras_cross_stitch")
class DynamicWeights(TaskWeights):
    """Holds a weight a task, and the last epoch's loss, for `DynamicWeightAverage`."""

    def __init__(self, tasks: Iterable[str], **kwargs: Any) -> None:
        super().__init__(tasks, **kwargs)
        shape = (len(self.tasks),)
        self.weight = self.add_weight(
            shape, "ones", dtype="float32", trainable=False, name="weight"
        )
        # 0, none yet, makes a ratio that is no number.
        self.last_loss = self.add_weight(
            shape, "zeros", dtype="float32", trainable=False, name="last_loss"
        )
        self.has_callback = False

    def call(self, outputs: Any, training: bool | None = None) -> Any:
        if training and not self.has_callback:
            warnings.warn(
                "The weights of the losses stay as they are: give "
                "`fit(..., callbacks=[DynamicWeightAverage()])`, which sets them after "
                "each epoch.",
                stacklevel=2,
            )
        return super().call(outputs)

    def weigh(self, values: Any, task: str) -> Any:
        weight = self.weight[self.tasks.index(task)]
        return ops.cast(weight, values.dtype) * values


_WEIGHTS: dict[str, Any] = {
    "uncertainty": UncertaintyWeights,
    "dynamic_average": DynamicWeights,
}


@keras.saving.register_keras_serializable("keras_cross_stitch")
class WeightedLoss(keras.losses.Loss):
    """A task's loss, weighed value by value: so its mean is, and a mask still fits."""

    def __init__(
        self, loss: Any, task: str, weights_key: str, name: str | None = None
    ) -> None:
        self.weighed_loss = checked_loss(loss)
        self.task = task
        self.weights_key = weights_key
        is_similarity = (
            isinstance(self.weighed_loss, keras.losses.CosineSimilarity)
            or self.weighed_loss is keras.losses.cosine_similarity
        )
        self.shift = 1.0 if is_similarity else 0.0
        probabilities = np.random.default_rng(0).dirichlet(np.ones(4), (2, 3))
        values = tried(self.weighed_loss, *probabilities)
        if values is not None and values.size and values.min() + self.shift < -1e-3:
            raise ValueError(_below_zero(task, values.min()))
        super().__init__(
            name=name,
            reduction=getattr(self.weighed_loss, "reduction", "sum_over_batch_size"),
            dtype=getattr(self.weighed_loss, "dtype", None),
        )

    def call(self, y_true: Any, y_pred: Any) -> Any:
        values = values_of(self.weighed_loss, y_true, y_pred)
        layer = _called.get(self.weights_key)
        if layer is None:
            raise ValueError(
                f"The loss of '{self.task}' takes its weight from the model that "
                "`weigh_losses` gave: load that, or call it, first"
            )
        weighed = layer.weigh(values + self.shift, self.task)
        # Private: where a loss says which labels count, as `ignore_class` does.
        mask = getattr(values, "_keras_mask", None)
        if mask is not None:
            weighed._keras_mask = mask
        return weighed

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "loss": keras.losses.serialize(self.weighed_loss),
            "task": self.task,
            "weights_key": self.weights_key,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WeightedLoss":
        return cls(**{**config, "loss": keras.losses.deserialize(config["loss"])})


def _weighted(loss: Any, task: str, weights_key: str) -> keras.losses.Loss:
    if isinstance(loss, MaskedLoss):
        # Inside, so that a batch without labels has no log s either.
        return MaskedLoss(WeightedLoss(loss.loss, task, weights_key), loss.missing)
    return WeightedLoss(loss, task, weights_key)


def _check_not_poisson(task: str, loss: Any) -> None:
    # A trial with probabilities does not show it.
    loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Poisson) or loss is keras.losses.poisson:
        raise ValueError(
            f"The loss of '{task}' is Poisson's, which goes below 0 where counts are "
            "large. Subtract what a perfect prediction has: `lambda y, p: "
            "keras.losses.poisson(y, p) - keras.losses.poisson(y, y)`"
        )


def _below_zero(task: str, value: float) -> str:
    return (
        f"The loss of '{task}' goes below 0, where weights by the size of losses have "
        "no end or turn round. Add its bound: where that is -1, give "
        f"`lambda y, p: loss(y, p) + 1`. Received: a loss of {value:.3g}"
    )
