"""Any Keras loss or metric where labels are missing.

Knows nothing of tasks: an example that has the labels of some tasks only writes NaN,
or a number that is no label, for the others.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

_MEANS_OVER_COMPONENTS = (
    keras.metrics.BinaryAccuracy,
    keras.metrics.BinaryCrossentropy,
    keras.metrics.Hinge,
    keras.metrics.LogCoshError,
    keras.metrics.MeanAbsoluteError,
    keras.metrics.MeanAbsolutePercentageError,
    keras.metrics.MeanSquaredError,
    keras.metrics.MeanSquaredLogarithmicError,
    keras.metrics.Poisson,
    keras.metrics.RootMeanSquaredError,
    keras.metrics.SquaredHinge,
)


@keras.saving.register_keras_serializable("keras_cross_stitch")
class MaskedLoss(keras.losses.Loss):
    """The mean of a Keras loss over the labels that are there.

        loss = sum(weight * value) / sum(weight)

    A label is missing if it is NaN (or `missing`), if its `sample_weight` is 0, or if
    Keras masks the prediction. Such a label has weight 0. Neither it nor its prediction
    reaches the loss or a gradient, whatever stands there. The other labels have their
    `sample_weight`, or 1. A batch without labels has a loss and gradients of exactly 0;
    an optimizer with momentum or weight decay may still move the weights.

    A label is what belongs to one vector of the prediction's last axis: a class, a
    number, or a vector. Some losses are a mean over the vector's components, such as
    squared and absolute errors and binary cross-entropies. There each component is a
    label of its own. (Whether a loss is such a mean is tried once, on random numbers,
    so this holds for a loss of your own, too.) For all other losses, such as a cosine
    similarity, a vector is missing if any of its components is missing.

    In an epoch without labels `<task>_loss` is exactly 0, which is no perfect score.
    `MaskedMetric` is NaN there.

    The mean is taken where Keras takes it. Each replica of a `tf.distribute` strategy,
    and each step of gradient accumulation, divides by the number of its own labels. The
    gradient is the mean of their gradients, and one without labels counts as 0. The
    `<task>_loss` in the logs is likewise a mean over batches. `MaskedMetric` gives the
    mean over all labels of an epoch.

    Args:
        loss: A `keras.losses.Loss`, a function `(y_true, y_pred)`, or the name of
            either. It gives one value for each label, from that label and its
            prediction only. It may also give one value for several labels, as
            `Dice(axis=(1, 2, 3))` does; this counts only if none of them is missing.
            Its reduction must be a mean.
        missing: Number that marks a missing label, such as -1 or 255. Defaults to
            `None`: NaN marks it. Integer classes have no NaN, so they need a number.
        name: String, the name of the loss.

    Input shape:
        `y_pred`: `(N, ..., C)`; or `(N,)`, as `(N, 1)`. Integers are numbers of
            classes, `(N, ...)`.
        `y_true`: `(N, ..., C)`, or without its last axis, or with one of length 1.
        `sample_weight`: `(N,)`, or any of the axes `(N, ...)`; and `(N, ..., C)` where
            components are labels.

    Raises:
        ValueError: If `loss` is no loss, gives a sum, compares examples with each
            other, or has an `ignore_class`; if `missing` is no number; or, when
            called, if the shapes do not fit each other.

    Example:

    Three examples, the first with both labels, the others with one each.

    >>> from numpy import array, nan
    >>> labels = {"depth": array([[2.0], [nan], [5.0]]), "kind": array([1, 0, -1])}
    >>> x = keras.Input((4,))
    >>> depth = keras.layers.Dense(1)(x)
    >>> kind = keras.layers.Dense(3, activation="softmax")(x)
    >>> model = keras.Model(x, {"depth": depth, "kind": kind})
    >>> model.compile(
    ...     loss={
    ...         "depth": MaskedLoss("mse"),
    ...         "kind": MaskedLoss("sparse_categorical_crossentropy", missing=-1),
    ...     },
    ... )
    >>> logs = model.fit(keras.ops.ones((3, 4)), labels, verbose=0).history
    >>> sorted(logs)
    ['depth_loss', 'kind_loss', 'loss']

    The mean squared error of the two numbers that are known:

    >>> loss = MaskedLoss("mse")
    >>> float(loss([[2.0], [nan], [5.0]], [[1.0], [7.0], [2.0]]))
    5.0

    The same of the one row that has them, of three columns:

    >>> float(loss([[2.0, nan, 5.0], [nan, nan, nan]], [[1.0, 7.0, 2.0], [9.0] * 3]))
    5.0
    """

    def __init__(
        self,
        loss: keras.losses.Loss | Callable | str,
        missing: float | None = None,
        name: str | None = None,
    ) -> None:
        self.loss = checked_loss(loss)
        ignored = getattr(self.loss, "ignore_class", None)
        if ignored is not None:
            raise ValueError(
                "`loss` must have no `ignore_class`: write `MaskedLoss(loss, "
                f"missing={ignored})`. Received: a loss with ignore_class={ignored}"
            )
        self.missing = _marker(missing)
        self.of_components = _is_mean_over_components(self.loss)
        super().__init__(
            name=name,
            reduction="mean_with_sample_weight",
            dtype=getattr(self.loss, "dtype", None),
        )

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        y_true, safe_pred, weight = _without_missing(
            y_true,
            y_pred,
            sample_weight,
            self.missing,
            self.dtype,
            self.of_components,
        )
        values = values_of(self.loss, y_true, safe_pred)
        extra = len(weight.shape) - len(values.shape)
        if extra > 0:
            # One value for several labels, and they must all be there.
            weight = ops.min(weight, axis=tuple(range(-extra, 0)))
        elif extra < 0:
            values = ops.mean(values, axis=tuple(range(extra, 0)))
        values = ops.where(weight != 0, values, 0)
        # Keras reduces the values, which go through `call`. Not `y_pred` beside them:
        # its mask, which is in the weight, would be taken twice.
        return super().__call__(values, values, weight)

    def call(self, values: Any, y_pred: Any) -> Any:
        return values

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "loss": keras.losses.serialize(self.loss),
            "missing": self.missing,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MaskedLoss":
        return cls(**{**config, "loss": keras.losses.deserialize(config["loss"])})


@keras.saving.register_keras_serializable("keras_cross_stitch")
class MaskedMetric(keras.metrics.Metric):
    """A Keras metric over the labels that are there.

    `MaskedLoss` says which labels are missing. In the place of a missing label the
    metric gets a label of 0, a prediction of 1 and a weight of 0. The result, over all
    batches and all replicas of a `tf.distribute` strategy, is that of the other labels.
    If there was no label, it is NaN.

    Single components of a vector can be missing if the metric is a mean over them, as
    `MeanSquaredError` and `BinaryAccuracy` are, or a function that is such a mean.

    `compile(weighted_metrics=...)` gives it the sample weights. `compile(metrics=...)`
    does not.

    Args:
        metric: A `keras.metrics.Metric` whose `update_state` takes a
            `sample_weight`, a function `(y_true, y_pred)` that gives a value for each
            label, or the name of either.
        missing: Number that marks a missing label. Defaults to `None`: NaN marks it.
        name: String, the name of the metric. Defaults to `metric` if that is a name,
            as `"mae"` is, and else to its name.

    Input shape:
        As for `MaskedLoss`.

    Raises:
        ValueError: If `metric` is no metric, or is `"accuracy"`, which is the name of
            several, or is one that counts what has no weight; if `missing` is no
            number; or, when called, if the shapes do not fit each other.

    Example:

    >>> metric = MaskedMetric("mae")
    >>> metric.update_state([[2.0], [float("nan")], [5.0]], [[1.0], [7.0], [2.0]])
    >>> float(metric.result())
    2.0
    """

    def __init__(
        self,
        metric: keras.metrics.Metric | Callable | str,
        missing: float | None = None,
        name: str | None = None,
    ) -> None:
        if metric in ("accuracy", "acc"):
            raise ValueError(
                "`metric` must say which accuracy it is: 'binary_accuracy', "
                "'categorical_accuracy' or 'sparse_categorical_accuracy'. "
                f"Received: {metric!r}"
            )
        if isinstance(metric, str):
            name = name or metric  # under which Keras logs it, too
        metric = keras.metrics.get(metric)
        if not callable(metric):
            raise ValueError(f"`metric` must be a Keras metric. Received: {metric!r}")
        if isinstance(metric, keras.metrics.PearsonCorrelation) or (
            isinstance(metric, keras.metrics.R2Score) and metric.num_regressors
        ):
            raise ValueError(
                "`metric` must leave out what has a `sample_weight` of 0, as a "
                "PearsonCorrelation and an R2Score with `num_regressors` do not. "
                f"Received: {metric!r}"
            )
        of_components = isinstance(metric, _MEANS_OVER_COMPONENTS)
        if not isinstance(metric, keras.metrics.Metric):
            of_components = _is_mean_over_components(metric)
            function = getattr(metric, "func", metric)  # of a `functools.partial`
            own_name = getattr(function, "__name__", type(function).__name__)
            metric = keras.metrics.MeanMetricWrapper(metric, name=own_name)
        super().__init__(name=name or metric.name, dtype=metric.dtype)
        self.metric = metric
        self.missing = _marker(missing)
        self.of_components = of_components
        self.labels = self.add_weight((), "zeros", name="labels")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        floatx = keras.config.floatx()
        y_true, y_pred, weight = _without_missing(
            y_true,
            y_pred,
            sample_weight,
            self.missing,
            floatx,
            self.of_components,
        )
        there = ops.cast(weight != 0, self.labels.dtype)
        self.labels.assign_add(ops.sum(there))
        if sample_weight is None:
            # Metrics that count (IoU) want whole numbers.
            weight = ops.cast(weight, self.dtype)
        self.metric.update_state(y_true, y_pred, sample_weight=weight)

    def result(self) -> Any:
        return keras.tree.map_structure(
            lambda x: ops.where(self.labels > 0, x, float("nan")), self.metric.result()
        )

    def reset_state(self) -> None:
        self.labels.assign(0)
        self.metric.reset_state()

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metric": keras.metrics.serialize(self.metric),
            "missing": self.missing,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MaskedMetric":
        return cls(**{**config, "metric": keras.metrics.deserialize(config["metric"])})


def values_of(loss: Any, y_true: Any, y_pred: Any) -> Any:
    """The values of a loss that Keras would reduce, one for each label."""
    call = loss.call if isinstance(loss, keras.losses.Loss) else loss
    y_true, y_pred = _aligned(y_true, y_pred, y_pred.dtype)
    values = call(y_true, y_pred)
    if not len(values.shape):
        raise ValueError(
            "The loss must give a value for each label, not one for the whole batch: "
            f"take the mean over the last axis alone. Received: {loss!r}, which gives "
            f"a scalar for labels of shape {tuple(y_true.shape)} and predictions of "
            f"shape {tuple(y_pred.shape)}"
        )
    return values


def checked_loss(loss: Any) -> Any:
    """The loss of an identifier, if its values can be taken one by one."""
    loss = keras.losses.get(loss)
    if not callable(loss):
        raise ValueError(f"`loss` must be a Keras loss. Received: {loss!r}")
    if isinstance(loss, MaskedLoss):
        raise ValueError(f"`loss` must not be masked already. Received: {loss!r}")
    if isinstance(loss, keras.losses.Circle):
        raise ValueError(
            "`loss` must take each value from one label and its prediction. Received: "
            f"{loss!r}, which compares the examples of a batch with each other"
        )
    if isinstance(loss, keras.losses.Loss) and loss.reduction in ("sum", "none", None):
        raise ValueError(
            "`loss` must be a mean over the batch. Received: a loss with "
            f"reduction={loss.reduction!r}"
        )
    return loss


def _is_mean_over_components(loss: Any) -> bool:
    """Whether the loss of a vector is the mean of the losses of its components."""
    if isinstance(loss, keras.losses.Loss):
        # Of a weighed one (`WeightedLoss`), the one within.
        loss = getattr(loss, "weighed_loss", loss)
    y_true, y_pred = np.random.default_rng(0).uniform(0.1, 0.9, (2, 3, 4))
    whole, parts = (
        tried(loss, y_true.reshape(shape), y_pred.reshape(shape))
        for shape in [(3, 4), (3, 4, 1)]
    )
    if whole is None or parts is None or whole.size not in (3, 12) or parts.size != 12:
        return False
    mean, mean_of_parts = (x.reshape(3, -1).mean(axis=1) for x in (whole, parts))
    return np.allclose(mean, mean_of_parts, rtol=1e-3)


def tried(loss: Any, y_true: Any, y_pred: Any) -> np.ndarray | None:
    """The values of a loss for arrays, None where it takes none like them."""
    call = loss.call if isinstance(loss, keras.losses.Loss) else loss
    y_true, y_pred = (ops.convert_to_tensor(y, "float32") for y in (y_true, y_pred))
    try:
        values = ops.cast(call(y_true, y_pred), "float32")
    except Exception:  # of whatever kind: a loss of one's own may raise any
        return None
    try:
        return ops.convert_to_numpy(values)
    except Exception as error:  # each backend has its own
        raise ValueError(
            "A loss is tried on numbers when it is made: make it outside of the "
            f"function that is traced (`tf.function`, `jax.jit`). Received: {loss!r}"
        ) from error


def _marker(missing: float | None) -> float | None:
    """The number that marks a missing label, `None` for NaN."""
    if missing is None:
        return None
    if isinstance(missing, np.number):
        missing = missing.item()  # which a config can hold
    if not isinstance(missing, int | float):
        raise ValueError(f"`missing` must be a number. Received: {missing!r}")
    return None if math.isnan(missing) else missing


def _aligned(y_true: Any, y_pred: Any, dtype: Any) -> tuple[Any, Any]:
    """Labels (N, ...) or (N, ..., C) and predictions (N, ..., C)."""
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
    if len(y_pred.shape) == 1 or "int" in keras.backend.standardize_dtype(y_pred.dtype):
        y_pred = ops.expand_dims(y_pred, -1)
    y_true, y_pred = ops.cast(y_true, dtype), ops.cast(y_pred, dtype)
    if len(y_true.shape) == len(y_pred.shape) - 1 and y_pred.shape[-1] == 1:
        y_true = ops.expand_dims(y_true, -1)
    of_labels, of_vectors = tuple(y_true.shape), tuple(y_pred.shape)
    positions = of_vectors[:-1]
    if len(of_labels) - len(positions) not in (0, 1) or any(
        a != b and None not in (a, b)
        for a, b in zip(of_labels, positions, strict=False)
    ):
        raise ValueError(
            "The labels must have the shape of the predictions, with or without its "
            f"last axis. Received: y_true of shape {of_labels}, y_pred of shape "
            f"{of_vectors}"
        )
    return y_true, y_pred


class _MaskOf(keras.losses.Loss):
    """1 where a layer has not masked the prediction: Keras hands a loss the mask."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return ops.ones_like(y_pred if len(y_pred.shape) == 1 else y_pred[..., 0])


def _without_missing(
    y_true: Any,
    y_pred: Any,
    sample_weight: Any,
    missing: float | None,
    dtype: Any,
    of_components: bool,
) -> tuple[Any, Any, Any]:
    """Labels, 0 where missing; predictions, 1 there; and weights (N, ...)."""
    if not hasattr(y_pred, "shape"):
        y_pred = ops.convert_to_tensor(y_pred)
    mask = _MaskOf(reduction="none", name="mask")(y_pred, y_pred)
    y_true, y_pred = _aligned(y_true, y_pred, dtype)
    same_rank = len(y_true.shape) == len(y_pred.shape)
    # The labels' sizes may be unknown, where the pipeline does not say them.
    if of_components and same_rank and y_true.shape[-1] in (None, y_pred.shape[-1]):
        # Each component is a label of its own: (N, ..., C, 1).
        y_true, y_pred = ops.expand_dims(y_true, -1), ops.expand_dims(y_pred, -1)
    vectors = len(y_true.shape) == len(y_pred.shape)

    absent = ops.isnan(y_true) if missing is None else ops.equal(y_true, missing)
    if vectors:
        absent = ops.any(absent, axis=-1)
    weight = ops.where(absent, 0, ops.ones_like(y_pred[..., 0]))
    for factor in (sample_weight, mask):
        if factor is not None:
            weight = ops.where(absent, 0, weight * _to_positions(factor, weight, dtype))

    # Predictions, too: a gradient that is NaN stops here, where 0 times it would not.
    # By 1, since some metrics divide by the sum of a prediction, or take its logarithm.
    there = ops.expand_dims(weight != 0, -1)
    y_pred = ops.where(there, y_pred, 1)
    y_true = ops.where(there if vectors else weight != 0, y_true, 0)
    return y_true, y_pred, weight


def _to_positions(factor: Any, weight: Any, dtype: Any) -> Any:
    """A sample weight or mask with axes of length 1 until it has those of `weight`."""
    factor = ops.convert_to_tensor(factor, dtype=dtype)
    if len(factor.shape) == len(weight.shape) + 1:
        factor = ops.squeeze(factor, -1)
    while len(factor.shape) < len(weight.shape):
        factor = ops.expand_dims(factor, -1)
    return factor
