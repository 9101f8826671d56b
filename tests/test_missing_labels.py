"""MaskedLoss and MaskedMetric: the labelled part alone, and NumPy in float64."""

import functools
import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_cross_stitch import MaskedLoss, MaskedMetric, stitch
from keras_cross_stitch.missing_labels import values_of

random = np.random.default_rng(0)


def softmax(x):
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def numbers(*shape):
    return random.uniform(0.1, 1, shape), random.uniform(0.1, 1, shape)


def classes(*shape):
    return (
        random.integers(0, 5, shape).astype("float64"),
        softmax(random.normal(size=(*shape, 5))).astype("float32"),
    )


def one_hot(*shape):
    ids, probabilities = classes(*shape)
    return np.eye(5)[ids.astype(int)], probabilities


def binary(*shape):
    return random.integers(0, 2, shape).astype("float64"), random.uniform(size=shape)


LOSSES = [
    ("MeanSquaredError", numbers),
    ("MeanAbsoluteError", numbers),
    ("MeanAbsolutePercentageError", numbers),
    ("MeanSquaredLogarithmicError", numbers),
    ("CosineSimilarity", numbers),
    ("Huber", numbers),
    ("LogCosh", numbers),
    ("Poisson", numbers),
    ("KLDivergence", one_hot),
    ("Hinge", binary),
    ("SquaredHinge", binary),
    ("CategoricalHinge", one_hot),
    ("BinaryCrossentropy", binary),
    ("BinaryFocalCrossentropy", binary),
    ("CategoricalCrossentropy", one_hot),
    ("CategoricalFocalCrossentropy", one_hot),
    ("CategoricalGeneralizedCrossEntropy", classes),
    ("SparseCategoricalCrossentropy", classes),
]
SHAPES = {numbers: [(7, 3), (3, 5, 4, 3)], binary: [(7, 1), (3, 5, 4, 3)]}


def cases(entries):
    """An example's label, and a map of them; marked by a number, and by NaN."""
    for name, data in entries:
        shapes = SHAPES.get(data, [(7,), (3, 5, 4)])
        for shape, missing in zip(shapes, (-7, np.nan), strict=True):
            yield pytest.param(name, *data(*shape), missing, id=f"{name}{missing}")


def with_gaps(y_true, y_pred, missing):
    """Labels with `missing` for a third of them, and where they are there."""
    there = random.uniform(size=y_pred.shape[:-1]) > 0.3
    there.flat[:2] = True, False
    expanded = there[..., None] if y_true.ndim == y_pred.ndim else there
    return np.where(expanded, y_true, missing), there


@pytest.mark.parametrize(("name", "y_true", "y_pred", "missing"), [*cases(LOSSES)])
def test_the_loss_is_that_of_the_labels_that_are_there(name, y_true, y_pred, missing):
    loss = getattr(keras.losses, name)()
    gaps, there = with_gaps(y_true, y_pred, missing)
    np.testing.assert_allclose(
        MaskedLoss(loss, missing=missing)(gaps, y_pred),
        loss(y_true[there], y_pred[there]),
        rtol=1e-5,
    )


METRICS = [
    ("MeanSquaredError", numbers),
    ("RootMeanSquaredError", numbers),
    ("CosineSimilarity", numbers),
    ("KLDivergence", one_hot),
    ("BinaryAccuracy", binary),
    ("CategoricalAccuracy", one_hot),
    ("SparseCategoricalAccuracy", classes),
    ("SparseTopKCategoricalAccuracy", classes),
    ("SparseCategoricalCrossentropy", classes),
]


def metric_of(name):
    arguments = {"SparseTopKCategoricalAccuracy": {"k": 2}}.get(name, {})
    return getattr(keras.metrics, name)(**arguments)


@pytest.mark.parametrize(
    ("name", "y_true", "y_pred", "missing"),
    [
        *cases(METRICS),
        pytest.param("AUC", *binary(9, 1), -7, id="AUC"),
        pytest.param("Precision", *binary(9, 1), -7, id="Precision"),
        pytest.param("R2Score", *numbers(9, 3), np.nan, id="R2Score"),
        pytest.param("F1Score", *one_hot(9), np.nan, id="F1Score"),
    ],
)
def test_the_metric_is_that_of_the_labels_that_are_there(name, y_true, y_pred, missing):
    gaps, there = with_gaps(y_true, y_pred, missing)
    masked, plain = MaskedMetric(metric_of(name), missing=missing), metric_of(name)
    # Two batches, of which the second has no label.
    masked.update_state(gaps, y_pred)
    masked.update_state(np.full_like(gaps, missing), y_pred)
    plain.update_state(y_true[there], y_pred[there])
    np.testing.assert_allclose(masked.result(), plain.result(), rtol=1e-5)
    masked.reset_state()
    masked.update_state(y_true, y_pred)
    plain.reset_state()
    plain.update_state(
        y_true.reshape(-1, *y_true.shape[y_pred.ndim - 1 :]),
        y_pred.reshape(-1, y_pred.shape[-1]),
    )
    np.testing.assert_allclose(masked.result(), plain.result(), rtol=1e-5)


def test_mean_iou_of_maps_whose_predictions_are_numbers_of_classes():
    truth = np.array([[[0, 1, 255], [1, 255, 255]]], "int32")
    prediction = np.array([[[0, 1, 1], [0, 0, 1]]], "int32")
    metric = MaskedMetric(keras.metrics.MeanIoU(num_classes=2), missing=255)
    metric.update_state(truth, prediction)
    assert float(metric.result()) == 0.5


def test_sample_weights_weigh_the_mean():
    y_true, y_pred = numbers(5, 3, 4, 2)
    gaps, there = with_gaps(y_true, y_pred, np.nan)
    errors = ((y_true - y_pred) ** 2).mean(-1)
    for shape in [(5,), (5, 1), (5, 3, 4), (5, 3, 4, 1)]:
        weight = random.uniform(size=shape)
        weight[2] = 0
        full = weight.reshape(shape[:3] + (1,) * (3 - len(shape))) * there
        expected = (errors * full).sum() / full.sum()
        masked = MaskedLoss("mse")(gaps, y_pred, weight)
        np.testing.assert_allclose(masked, expected, rtol=1e-5)
        metric = MaskedMetric("mse")
        metric.update_state(gaps, y_pred, weight)
        np.testing.assert_allclose(metric.result(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("y_true", "y_pred"),
    [
        ([1.0, 2.0, np.nan], [[3.0], [5.0], [7.0]]),
        ([[1.0], [2.0], [np.nan]], [3.0, 5.0, 7.0]),
        ([1.0, 2.0, np.nan], [3.0, 5.0, 7.0]),
    ],
)
def test_one_number_an_example_with_or_without_an_axis(y_true, y_pred):
    assert float(MaskedLoss("mse")(y_true, y_pred)) == 6.5
    metric = MaskedMetric("mse")
    metric.update_state(y_true, y_pred)
    assert float(metric.result()) == 6.5


def test_classes_with_an_axis_of_length_1():
    y_true, y_pred = classes(4)
    loss = MaskedLoss("sparse_categorical_crossentropy", missing=-1)
    y_true[1] = -1
    expected = -np.log(y_pred[[0, 2, 3], y_true[[0, 2, 3]].astype(int)]).mean()
    np.testing.assert_allclose(loss(y_true, y_pred), expected, rtol=1e-5)
    np.testing.assert_allclose(loss(y_true[:, None], y_pred), expected, rtol=1e-5)


def test_a_map_without_a_last_axis_has_a_label_a_pixel():
    y_true, y_pred = numbers(3, 4, 5)
    y_true[0, 1, 2] = y_true[2, 0, 0] = np.nan
    np.testing.assert_allclose(
        MaskedLoss("mae")(y_true, y_pred[..., None]),
        np.nanmean(np.abs(y_true - y_pred)),
        rtol=1e-5,
    )


COMPONENTS = [
    ("MeanSquaredError", numbers, lambda t, p: (t - p) ** 2),
    ("MeanAbsoluteError", numbers, lambda t, p: np.abs(t - p)),
    (
        "MeanAbsolutePercentageError",
        numbers,
        lambda t, p: 100 * np.abs(t - p) / np.abs(t),
    ),
    (
        "MeanSquaredLogarithmicError",
        numbers,
        lambda t, p: (np.log1p(t) - np.log1p(p)) ** 2,
    ),
    ("LogCosh", numbers, lambda t, p: np.log(np.cosh(p - t))),
    ("Poisson", numbers, lambda t, p: p - t * np.log(p + 1e-7)),
    ("Huber", numbers, lambda t, p: (t - p) ** 2 / 2),
    ("Hinge", binary, lambda t, p: np.maximum(1 - (2 * t - 1) * p, 0)),
    ("SquaredHinge", binary, lambda t, p: np.maximum(1 - (2 * t - 1) * p, 0) ** 2),
    (
        "BinaryCrossentropy",
        binary,
        lambda t, p: -t * np.log(p) - (1 - t) * np.log(1 - p),
    ),
]


@pytest.mark.parametrize("missing", [np.nan, -7])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4)])
@pytest.mark.parametrize(
    ("name", "data", "of_one"), COMPONENTS, ids=[entry[0] for entry in COMPONENTS]
)
def test_single_components_may_be_missing(name, data, of_one, shape, missing):
    y_true, y_pred = data(*shape)
    there = random.uniform(size=shape) > 0.4
    there[0] = False  # a whole row
    there[1, ..., 0], there[1, ..., 1] = True, False
    gaps = np.where(there, y_true, missing)
    expected = of_one(y_true, y_pred)[there].mean()

    loss = getattr(keras.losses, name)()
    masked = MaskedLoss(loss, missing)(gaps, y_pred)
    assert float(masked) == pytest.approx(expected, rel=1e-4)
    function = MaskedLoss(keras.losses.get(loss.name.removesuffix("_loss")), missing)
    assert float(function(gaps, y_pred)) == pytest.approx(expected, rel=1e-4)
    metric_name = {"LogCosh": "LogCoshError"}.get(name, name)
    if hasattr(keras.metrics, metric_name):
        metric = MaskedMetric(getattr(keras.metrics, metric_name)(), missing)
        metric.update_state(gaps, y_pred)
        assert float(metric.result()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["BinaryAccuracy", "RootMeanSquaredError"])
def test_a_metric_of_components_leaves_out_those_that_are_missing(name):
    y_true, y_pred = binary(6, 5)
    there = random.uniform(size=(6, 5)) > 0.4
    masked, plain = MaskedMetric(metric_of(name)), metric_of(name)
    masked.update_state(np.where(there, y_true, np.nan), y_pred)
    plain.update_state(y_true[there][:, None], y_pred[there][:, None])
    np.testing.assert_allclose(masked.result(), plain.result(), rtol=1e-5)


def test_a_loss_keeps_its_dtype():
    loss = MaskedLoss(keras.losses.MeanSquaredError(dtype="float64"))
    assert loss([[1.0]], [[3.0]]).dtype == "float64"


def test_the_weight_of_a_missing_label_may_be_no_number():
    loss = MaskedLoss("mse")([[2.0], [np.nan]], [[1.0], [7.0]], [1.0, np.nan])
    assert float(loss) == 1


def test_weights_of_examples_and_of_components():
    y_true, y_pred = numbers(4, 3)
    y_true[0, 1] = y_true[2] = np.nan
    there = ~np.isnan(y_true)
    for shape in [(4,), (4, 1), (4, 3)]:
        weight = random.uniform(0.5, 2, size=shape)
        full = np.broadcast_to(weight if len(shape) > 1 else weight[:, None], (4, 3))
        expected = np.average(np.abs(y_true - y_pred)[there], weights=full[there])
        loss = MaskedLoss("mae")(y_true, y_pred, weight)
        assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_a_component_that_is_missing_has_no_gradient():
    x = keras.Input((2,))
    model = keras.Model(x, keras.layers.Dense(3, name="columns")(x))
    model.compile(keras.optimizers.SGD(0.1), MaskedLoss("mse"))
    before = model.get_weights()
    labels = np.array([[1.0, np.nan, 2.0], [np.inf, np.nan, 3.0]])
    weight = np.array([[1.0, 1, 1], [0, 1, 1]])
    model.fit(np.ones((2, 2)), labels, sample_weight=weight, verbose=0)
    for new, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(new[..., 1], old[..., 1])
        assert np.isfinite(new).all()
        assert (new[..., 0] != old[..., 0]).all()


def test_a_vector_of_another_loss_is_missing_if_a_component_is():
    y_true, y_pred = np.array([[3.0, np.nan], [0, 4]]), np.array([[9.0, 9], [3, 0]])
    for loss in ["cosine_similarity", distance]:
        expected = keras.ops.convert_to_numpy(
            values_of(keras.losses.get(loss), y_true[1:], y_pred[1:])
        )
        assert float(MaskedLoss(loss)(y_true, y_pred)) == expected
    metric = MaskedMetric("cosine_similarity")
    metric.update_state(y_true, y_pred)
    assert float(metric.result()) == 0


class Off:
    """A metric that is an object to call."""

    def __init__(self, by):
        self.by = by

    def __call__(self, y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred) > self.by, axis=-1)


@pytest.mark.parametrize(
    ("metric", "name", "expected"),
    [
        (
            functools.partial(keras.metrics.binary_accuracy, threshold=3.0),
            "binary_accuracy",
            0.5,
        ),
        (Off(by=2.5), "Off", 0.5),
    ],
    ids=["a partial", "an object"],
)
def test_a_function_without_a_name_is_a_metric(metric, name, expected):
    masked = MaskedMetric(metric)
    masked.update_state([[1.0], [float("nan")], [1.0]], [[4.0], [1.0], [2.0]])

    assert masked.name == name
    assert float(masked.result()) == expected


def test_of_a_loss_of_ones_own_it_is_found_out():
    def mean(t, p):
        return keras.ops.mean(keras.ops.abs(t - p), axis=-1)

    def weighed(t, p):  # takes vectors of 2 alone
        return keras.ops.sum(keras.ops.abs(t - p) * [0.5, 0.5], axis=-1)

    y_true, y_pred = [[1, np.nan], [3, 4]], [[9.0, 9], [4, 6]]
    assert float(MaskedLoss(mean)(y_true, y_pred)) == pytest.approx(11 / 3)
    assert float(MaskedLoss(lambda t, p: keras.ops.abs(t - p))(y_true, y_pred)) == (
        pytest.approx(11 / 3)
    )
    assert float(MaskedLoss(weighed)(y_true, y_pred)) == 1.5


@pytest.mark.parametrize("name", ["mae", "R2Score"])
def test_a_metric_that_has_seen_no_label_is_nan(name):
    metric = MaskedMetric(keras.metrics.R2Score() if name == "R2Score" else name)
    metric.update_state(np.full((3, 2), np.nan), np.ones((3, 2)))
    assert np.isnan(metric.result())
    metric.update_state([[1.0, 5.0], [2.0, 3.0]], [[1.0, 4.0], [1.0, 1.0]])
    assert np.isfinite(metric.result())
    metric.reset_state()
    assert np.isnan(metric.result())


def test_a_loss_of_several_labels_counts_if_all_are_there():
    y_true, y_pred = one_hot(4, 3, 5)
    loss = keras.losses.Dice(axis=(1, 2, 3))
    expected = loss(y_true[[0, 3]], y_pred[[0, 3]])
    y_true[1] = np.nan
    y_true[2, 1, 2] = np.nan
    np.testing.assert_allclose(MaskedLoss(loss)(y_true, y_pred), expected, rtol=1e-5)


def test_a_function_may_give_a_value_a_component():
    y_true, y_pred = numbers(4, 3)
    y_true[2] = np.nan
    np.testing.assert_allclose(
        MaskedLoss(lambda t, p: keras.ops.abs(t - p))(y_true, y_pred),
        np.nanmean(np.abs(y_true - y_pred)),
        rtol=1e-5,
    )


def distance(y_true, y_pred):
    """Its gradient is NaN where the two are equal."""
    return keras.ops.sqrt(keras.ops.sum((y_true - y_pred) ** 2, axis=-1))


def two_heads(**compile_arguments):
    """Towers of known weights, with a unit between them and a head each."""
    towers = {}
    weights = np.random.default_rng(1)
    for task, outputs in [("depth", 1), ("kind", 3)]:
        x = keras.Input((4,))
        y = keras.layers.Dense(5, activation="tanh", name="hidden")(x)
        activation = "softmax" if task == "kind" else None
        y = keras.layers.Dense(outputs, activation=activation, name="head")(y)
        towers[task] = keras.Model(x, y)
        towers[task].set_weights(
            [weights.normal(size=w.shape) for w in towers[task].get_weights()]
        )
    model = stitch(towers, at=["hidden"])
    arguments = {
        "optimizer": "sgd",
        "loss": {
            "depth": MaskedLoss("mse"),
            "kind": MaskedLoss("sparse_categorical_crossentropy", missing=-1),
        },
        "metrics": {
            "depth": [MaskedMetric("mae")],
            "kind": [MaskedMetric("sparse_categorical_accuracy", missing=-1)],
        },
    }
    model.compile(**{**arguments, **compile_arguments})
    return model


X = random.normal(size=(6, 4))
DEPTH = random.normal(size=(6, 1))
KIND = random.integers(0, 3, 6)
NO_DEPTH, NO_KIND = np.full_like(DEPTH, np.nan), np.full_like(KIND, -1)


def head(model, task):
    return [w.numpy() for w in model.weights if w.path.startswith(f"{task}_head")]


def fit(model, depth, kind, **arguments):
    arguments = {"batch_size": 6, "shuffle": False, "verbose": 0, **arguments}
    return model.fit(X, {"depth": depth, "kind": kind}, **arguments).history


def assert_equal(weights, others):
    for weight, other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(weight, other)


def assert_close(weights, others, rtol=1e-5):
    for weight, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(weight, other, rtol=rtol, atol=rtol)


@pytest.mark.slow
def test_a_step_without_a_tasks_labels_leaves_its_head_and_trains_the_other():
    model, alone = two_heads(), two_heads(loss_weights={"depth": 1, "kind": 0})
    before = head(model, "kind")
    assert before
    history = fit(model, DEPTH, NO_KIND)
    fit(alone, DEPTH, KIND)
    assert history["kind_loss"] == [0]
    assert_equal(head(model, "kind"), before)
    assert_close(model.get_weights(), alone.get_weights())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_batch_without_any_label_changes_nothing(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = two_heads()
    finally:
        keras.config.set_dtype_policy("float32")
    before = model.get_weights()
    history = fit(model, NO_DEPTH, NO_KIND)
    assert history["loss"] == [0]
    assert_equal(model.get_weights(), before)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_on_what_is_labelled(policy):
    depth, kind = DEPTH.copy(), KIND.copy()
    depth[:3], kind[2:] = np.nan, -1
    plain = two_heads(optimizer=keras.optimizers.SGD(0.1))
    fit(plain, depth, kind)
    keras.config.set_dtype_policy(policy)
    try:
        model = two_heads(optimizer=keras.optimizers.SGD(0.1))
    finally:
        keras.config.set_dtype_policy("float32")
    # Keras skips the first steps, until the scale is small enough for float16.
    while int(model.optimizer.iterations) == 0:
        fit(model, depth, kind)
    assert_close(model.get_weights(), plain.get_weights(), rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [distance, "mse", "msle"])
def test_nothing_of_a_row_of_weight_0_reaches_the_gradients(loss):
    # Predictions are 0, where the gradient of `distance` to a label of 0 is NaN.
    def new_model():
        x = keras.Input((4,))
        y = keras.layers.Dense(2, kernel_initializer="zeros")(x)
        model = keras.Model(x, y)
        model.compile("sgd", loss=MaskedLoss(loss), weighted_metrics=[masked_mae()])
        return model

    def masked_mae():
        return MaskedMetric("mae", name="mae")

    y = random.normal(size=(6, 2))
    garbage = y.copy()
    garbage[1], garbage[2], garbage[3, 1] = np.nan, np.inf, -np.inf
    weight = np.array([1.0, 0, 0, 0, 1, 1])
    model, alone = new_model(), new_model()
    arguments = {"verbose": 0, "shuffle": False}
    history = model.fit(X, garbage, sample_weight=weight, **arguments).history
    kept = weight > 0
    expected = alone.fit(
        X[kept], y[kept], sample_weight=weight[kept], **arguments
    ).history
    assert_close(model.get_weights(), alone.get_weights())
    assert np.isfinite(model.get_weights()[0]).all()
    assert_close(list(history.values()), list(expected.values()))


def test_a_prediction_that_is_no_number_does_not_reach_the_loss():
    loss = MaskedLoss(lambda t, p: keras.ops.log(p[..., 0]) - keras.ops.log(t[..., 0]))
    values = float(loss([[np.nan], [1.0]], [[np.nan], [np.e]]))
    np.testing.assert_allclose(values, 1, rtol=1e-6)


@pytest.mark.slow
def test_accumulated_gradients_are_the_mean_of_the_steps():
    def new_model(**arguments):
        return two_heads(optimizer=keras.optimizers.SGD(0.1, **arguments))

    depth = DEPTH.copy()
    depth[3:] = np.nan
    accumulating = new_model(gradient_accumulation_steps=2)
    before = accumulating.get_weights()
    fit(accumulating, depth, NO_KIND, batch_size=3)
    once = new_model()
    once.fit(X[:3], {"depth": DEPTH[:3], "kind": NO_KIND[:3]}, verbose=0)
    assert_close(
        [w - b for w, b in zip(accumulating.get_weights(), before, strict=True)],
        [(w - b) / 2 for w, b in zip(once.get_weights(), before, strict=True)],
    )


@pytest.mark.slow
def test_the_masked_metrics_of_an_epoch_are_over_its_labels():
    depth = DEPTH.copy()
    depth[2:] = np.nan
    model = two_heads(optimizer=keras.optimizers.SGD(0.0))
    history = fit(model, depth, KIND, batch_size=2)
    predictions = model.predict(X, verbose=0)
    error = np.abs(DEPTH - predictions["depth"])[:2].mean()
    right = (predictions["kind"].argmax(-1) == KIND).mean()
    np.testing.assert_allclose(history["depth_mae"], [error], rtol=1e-5)
    np.testing.assert_allclose(
        history["kind_sparse_categorical_accuracy"], [right], rtol=1e-5
    )


def test_what_keras_masks_is_missing():
    # The `_keras_mask` of a layer's output.
    x = keras.Input((3, 1))
    y = keras.layers.Masking()(x)
    y = keras.layers.Dense(1, kernel_initializer="ones")(y)
    model = keras.Model(x, y)
    model.compile("sgd", loss=MaskedLoss("mae"), metrics=[MaskedMetric("mae")])
    steps = np.array([[[2.0], [0.0], [3.0]]])
    labels = np.array([[[1.0], [9.0], [np.nan]]])
    history = model.evaluate(steps, labels, verbose=0, return_dict=True)
    assert history == {"loss": 1.0, "mae": 1.0}


@pytest.mark.parametrize("components", [2, 3, 5])
@pytest.mark.parametrize("weighed", [False, True])
def test_a_mask_counts_once_where_components_are_labels(components, weighed):
    """Masked are 3 of 5 steps; components of the others are missing here and there."""
    steps = random.normal(size=(4, 5, 2))
    steps[:, 2:] = 0
    y_true = random.normal(size=(4, 5, components))
    y_true[random.random(y_true.shape) < 0.3] = np.nan
    x = keras.Input((5, 2))
    y = keras.layers.Dense(components)(keras.layers.Masking()(x))
    model = keras.Model(x, y)
    model.compile("sgd", MaskedLoss("mse"), weighted_metrics=[MaskedMetric("mse")])
    weight = random.uniform(size=(4, 5)) if weighed else np.ones((4, 5))
    given = {"sample_weight": weight} if weighed else {}

    logs = model.evaluate(steps, y_true, verbose=0, return_dict=True, **given)

    there = ~np.isnan(y_true) & (steps != 0).any(axis=-1)[..., None]
    error = (model.predict(steps, verbose=0) - y_true) ** 2
    full = np.broadcast_to(weight[..., None], error.shape)[there]
    expected = (error[there] * full).sum() / full.sum()
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)
    assert logs["mse"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.function")
@pytest.mark.parametrize("sizes", [(None, None, 3), (None, None, None)])
def test_what_is_missing_does_not_hang_on_what_shapes_are_known(sizes):
    import tensorflow as tf

    y_pred = random.normal(size=(2, 3, 4, 3)).astype("float32")
    y_true = random.normal(size=(2, 3, 4, 3)).astype("float32")
    y_true[random.random(y_true.shape) < 0.4] = np.nan
    expected = np.nanmean((y_pred - y_true) ** 2)
    loss = MaskedLoss("mse")

    @tf.function(
        input_signature=(tf.TensorSpec((None, *sizes)), tf.TensorSpec((None, 3, 4, 3)))
    )
    def value(y_true, y_pred):
        return loss(y_true, y_pred)

    assert float(value(y_true, y_pred)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.function")
def test_a_loss_that_is_made_in_a_graph_is_refused():
    import tensorflow as tf

    @tf.function
    def value(y_true, y_pred):
        return MaskedLoss("mse")(y_true, y_pred)

    with pytest.raises(ValueError, match="make it outside of the function"):
        value(tf.zeros((2, 3)), tf.zeros((2, 3)))


# Serialization.


@pytest.mark.slow
def test_a_loaded_model_takes_the_same_next_step(tmp_path):
    depth, kind = DEPTH.copy(), KIND.copy()
    depth[:3], kind[2:] = np.nan, -1
    model = two_heads(optimizer="adam")
    fit(model, depth, kind)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    first, second = fit(model, depth, kind), fit(loaded, depth, kind)
    assert_close(loaded.get_weights(), model.get_weights())
    assert_close(list(second.values()), list(first.values()))
    assert list(second) == list(first)


def test_serialize_and_deserialize():
    for loss in [keras.losses.Huber(delta=2.0), "mae", keras.losses.mean_squared_error]:
        masked = MaskedLoss(loss, missing=-1, name="masked")
        copy = keras.losses.deserialize(keras.losses.serialize(masked))
        assert copy.get_config() == masked.get_config()
    assert MaskedLoss("mse", missing=np.nan).get_config()["missing"] is None
    for metric in [keras.metrics.MeanIoU(3), "mae", keras.losses.mean_squared_error]:
        masked = MaskedMetric(metric, missing=255)
        copy = keras.metrics.deserialize(keras.metrics.serialize(masked))
        assert copy.get_config() == masked.get_config()


# Errors.


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("sparse_crossentropy", "Could not interpret loss"),
        (None, "must be a Keras loss. Received: None"),
        (keras.losses.Circle(), "compares the examples"),
        (keras.losses.MeanSquaredError(reduction="sum"), "reduction='sum'"),
        (keras.losses.MeanSquaredError(reduction=None), "reduction=None"),
        (
            keras.losses.SparseCategoricalCrossentropy(ignore_class=255),
            "missing=255",
        ),
        (MaskedLoss("mse"), "masked already"),
    ],
)
def test_a_loss_that_cannot_be_masked(loss, message):
    with pytest.raises(ValueError, match=message):
        MaskedLoss(loss)


def test_a_loss_of_the_whole_batch():
    with pytest.raises(ValueError, match=r"gives a scalar for labels of shape \(2, 1"):
        MaskedLoss(lambda t, p: keras.ops.mean(t - p))([[1.0], [2.0]], [[1.0], [2.0]])


@pytest.mark.parametrize("missing", ["nan", [-1]])
def test_missing_must_be_a_number(missing):
    for masked in (MaskedLoss, MaskedMetric):
        with pytest.raises(ValueError, match="`missing` must be a number"):
            masked("mse", missing=missing)


def test_what_a_loss_calls_its_loss_says_nothing_of_it():
    class Cosine(keras.losses.Loss):
        def __init__(self):
            super().__init__(name="cosine")
            self.loss = keras.losses.MeanSquaredError()

        def call(self, y_true, y_pred):
            return 1 + keras.losses.cosine_similarity(y_true, y_pred)

    y_true, y_pred = [[3.0, 4.0], [3.0, np.nan]], [[4.0, 3.0], [1.0, 1.0]]
    assert float(MaskedLoss(Cosine())(y_true, y_pred)) == pytest.approx(0.04, abs=1e-6)


def test_missing_may_be_a_number_of_numpys():
    for masked in (MaskedLoss, MaskedMetric):
        config = masked("mse", missing=np.array([-1, 3]).min()).get_config()
        assert json.loads(json.dumps(config["missing"])) == -1


@pytest.mark.parametrize(
    "metric", ["PearsonCorrelation", keras.metrics.R2Score(num_regressors=2)]
)
def test_metrics_that_count_what_has_no_weight_are_refused(metric):
    with pytest.raises(ValueError, match=r"must leave out what has .* Received: <"):
        MaskedMetric(metric)


@pytest.mark.parametrize("name", ["accuracy", "acc"])
def test_accuracy_must_say_which(name):
    with pytest.raises(ValueError, match="which accuracy it is: 'binary_accuracy'"):
        MaskedMetric(name)


def test_shapes_that_do_not_fit():
    for y_true in [np.ones((2, 6)), np.ones((2, 3, 4, 1)), np.ones(2)]:
        with pytest.raises(ValueError, match=r"y_pred of shape \(2, 3, 5\)"):
            MaskedLoss("mse")(y_true, np.ones((2, 3, 5)))
