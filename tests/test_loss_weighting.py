"""weigh_losses and DynamicWeightAverage against the papers' formulas in NumPy, float64.

The model is one linear layer a task, so that every gradient is a line of algebra.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_cross_stitch import (
    DynamicWeightAverage,
    LearningRateGroups,
    MaskedLoss,
    stitch,
    weigh_losses,
)

RATE = 0.1
TASKS = {"a": 1, "b": 2, "c": 3}
random = np.random.default_rng(0)
X = random.normal(size=(8, 3))
Y = {task: random.normal(size=(8, n)) for task, n in TASKS.items()}
KERNELS = {task: random.normal(size=(3, n)) for task, n in TASKS.items()}
# The last half has no label of a, the first few none of b.
Y["a"][4:] = np.nan
Y["b"][:3] = np.nan


def new_model(by, tasks=TASKS, optimizer=None, **compile_arguments):
    x = keras.Input((3,))
    outputs = {
        task: keras.layers.Dense(tasks[task], use_bias=False, name=task)(x)
        for task in tasks
    }
    model = keras.Model(x, outputs)
    model.set_weights([KERNELS[task] for task in tasks])
    model, loss = weigh_losses(model, {task: MaskedLoss("mse") for task in tasks}, by)
    model.compile(
        optimizer or keras.optimizers.SGD(RATE), loss=loss, **compile_arguments
    )
    return model


def fit(model, epochs, tasks=TASKS, callbacks=(), y=Y):
    y = {task: y[task] for task in tasks}
    arguments = {"batch_size": 8, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(X, y, callbacks=list(callbacks), **arguments).history


def weight_of(model, name):
    (weight,) = (w for w in model.weights if w.path.split("/")[-1] == name)
    return keras.ops.convert_to_numpy(weight)


def kernels(model, tasks=TASKS):
    return {task: model.get_layer(task).get_weights()[0] for task in tasks}


def squared_error(kernel, x, y):
    """The mean over the labels that are there, and its gradient."""
    there = ~np.isnan(y[:, 0])
    if not there.any():
        return 0.0, np.zeros_like(kernel), False
    error = x[there] @ kernel - y[there]
    return (error**2).mean(), 2 * x[there].T @ error / error.size, True


def uncertainty_steps(steps, parts=1, tasks=TASKS, y=Y):
    """Kernels, log-variances and total loss after gradient descent on the formula.

    The gradient is the mean of those of the batch's parts, as of replicas.
    """
    w = {task: KERNELS[task] for task in tasks}
    v = dict.fromkeys(tasks, 0.0)
    for _ in range(steps):
        total = 0.0
        for task in tasks:
            d_w, d_v = 0.0, 0.0
            for rows in np.split(np.arange(8), parts):
                loss, gradient, any_label = squared_error(
                    w[task], X[rows], y[task][rows]
                )
                # L / (2 s^2) + log s, with s^2 = exp(v)
                if any_label:
                    total += (loss * np.exp(-v[task]) / 2 + v[task] / 2) / parts
                    d_v += (0.5 - loss * np.exp(-v[task]) / 2) / parts
                d_w = d_w + gradient * np.exp(-v[task]) / 2 / parts
            w[task] = w[task] - RATE * d_w
            v[task] = v[task] - RATE * d_v
    return w, v, total


def dynamic_epochs(epochs, temperature, tasks=TASKS):
    """Kernels and weights after epochs of one step each."""
    w = {task: KERNELS[task] for task in tasks}
    losses = []
    weights = np.ones(len(tasks))
    for _ in range(epochs):
        losses.append([squared_error(w[task], X, Y[task])[0] for task in tasks])
        for task, weight in zip(tasks, weights, strict=True):
            gradient = squared_error(w[task], X, Y[task])[1]
            w[task] = w[task] - RATE * weight * gradient
        if len(losses) > 1:
            e = np.exp(np.divide(losses[-1], losses[-2]) / temperature)
            weights = len(tasks) * e / e.sum()
    return w, weights


def assert_kernels(model, expected, tasks=TASKS):
    for task, kernel in kernels(model, tasks).items():
        np.testing.assert_allclose(kernel, expected[task], rtol=1e-4, atol=1e-6)


some_tasks = pytest.mark.parametrize("tasks", [{"a": 1, "b": 2}, TASKS])


@pytest.mark.slow
@some_tasks
def test_uncertainty_is_descent_on_kendalls_formula(tasks):
    model = new_model("uncertainty", tasks)
    history = fit(model, 5, tasks)
    w, v, total = uncertainty_steps(5, tasks=tasks)
    assert_kernels(model, w, tasks)
    np.testing.assert_allclose(
        weight_of(model, "log_variance"), list(v.values()), rtol=1e-4
    )
    np.testing.assert_allclose(history["loss"][-1], total, rtol=1e-4)


@pytest.mark.slow
@some_tasks
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_dynamic_weights_are_lius_formula(tasks, temperature):
    model = new_model("dynamic_average", tasks)
    fit(model, 6, tasks, [DynamicWeightAverage(temperature)])
    w, weights = dynamic_epochs(6, temperature, tasks)
    assert_kernels(model, w, tasks)
    np.testing.assert_allclose(weight_of(model, "weight"), weights, rtol=1e-4)
    np.testing.assert_allclose(weights.sum(), len(tasks))


@pytest.mark.slow
def test_dynamic_weights_stay_1_for_two_epochs():
    model = new_model("dynamic_average")
    fit(model, 1, callbacks=[DynamicWeightAverage()])
    np.testing.assert_array_equal(weight_of(model, "weight"), [1, 1, 1])


@pytest.mark.slow
def test_a_loss_of_zero_counts_as_one_that_stays():
    y = {**Y, "b": np.full_like(Y["b"], np.nan)}
    model = new_model("dynamic_average")
    fit(model, 3, callbacks=[DynamicWeightAverage()], y=y)
    weights = weight_of(model, "weight")
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(), 3, rtol=1e-6)

    model = new_model("dynamic_average")
    logs = fit(model, 2, callbacks=[DynamicWeightAverage()], y=y)  # of weights of 1
    a, c = (np.divide(*reversed(logs[f"{task}_loss"])) for task in "ac")
    e = np.exp(np.array([a, 1, c]) / 2)
    np.testing.assert_allclose(weight_of(model, "weight"), 3 * e / e.sum(), rtol=1e-4)


@pytest.mark.slow
def test_a_task_without_labels_keeps_its_uncertainty():
    y = {**Y, "b": np.full_like(Y["b"], np.nan)}
    model = new_model("uncertainty")
    fit(model, 2, y=y)
    a, b, c = weight_of(model, "log_variance")
    assert b == 0
    assert a != 0
    assert c != 0


def test_what_marks_a_missing_label_stays():
    x = keras.Input((3,))
    model = keras.Model(x, {task: keras.layers.Dense(1)(x) for task in "ab"})
    masked = MaskedLoss("mse", missing=-1)
    _, loss = weigh_losses(model, {"a": masked, "b": "mse"}, "dynamic_average")
    assert float(loss["a"]([[-1.0], [3.0]], [[5.0], [1.0]])) == 4


def test_single_components_may_be_missing():
    x = keras.Input((3,))
    model = keras.Model(x, {task: keras.layers.Dense(2)(x) for task in "ab"})
    loss = dict.fromkeys("ab", MaskedLoss("mse"))
    _, loss = weigh_losses(model, loss, "dynamic_average")
    y_true, y_pred = [[1, np.nan], [3, 4]], [[9.0, 9], [3, 5]]
    assert float(loss["a"](y_true, y_pred)) == pytest.approx((64 + 0 + 1) / 3)


def test_a_weighed_loss_keeps_its_dtype():
    x = keras.Input((3,))
    model = keras.Model(x, {task: keras.layers.Dense(1)(x) for task in "ab"})
    double = keras.losses.MeanSquaredError(dtype="float64")
    _, loss = weigh_losses(model, {"a": double, "b": "mse"}, "dynamic_average")
    assert loss["a"](np.array([[1.0]]), np.array([[3.0]])).dtype == "float64"


def test_a_mean_over_the_weights_stays_one():
    x = keras.Input((3,))
    model = keras.Model(x, {task: keras.layers.Dense(1)(x) for task in "ab"})
    mean = keras.losses.MeanAbsoluteError(reduction="mean_with_sample_weight")
    _, loss = weigh_losses(model, {"a": mean, "b": "mse"}, "dynamic_average")
    given = map(np.array, ([[1.0], [3.0]], [[2.0], [9.0]], [3.0, 1.0]))
    given = [*given]
    assert float(loss["a"](*given)) == float(mean(*given)) == 2.25


@pytest.mark.parametrize("by", ["uncertainty", "dynamic_average"])
def test_an_ignored_class_counts_nowhere(by):
    """In a loss's own mean as in that of `MaskedLoss`."""
    x = keras.Input((3,))
    model = keras.Model(x, {task: keras.layers.Dense(4)(x) for task in "ab"})
    entropy = keras.losses.SparseCategoricalCrossentropy
    ignoring = entropy(from_logits=True, ignore_class=255)
    masked = MaskedLoss(entropy(from_logits=True), missing=255)
    model, loss = weigh_losses(model, {"a": ignoring, "b": masked}, by)
    for weight in model.get_layer(by).weights:
        weight.assign(np.full(2, 0.7))
    logits = random.normal(size=(4, 4))
    for labels in ([1, 255, 3, 255], [0, 1, 2, 3]):
        kept = np.array(labels) != 255
        exp = np.exp(logits[kept])
        right = exp[np.arange(kept.sum()), np.array(labels)[kept]]
        mean = -np.log(right / exp.sum(1)).mean()
        expected = {
            "uncertainty": 0.5 * np.exp(-0.7) * mean + 0.35,
            "dynamic_average": 0.7 * mean,
        }[by]
        for task in "ab":
            np.testing.assert_allclose(
                loss[task](np.array(labels), logits), expected, rtol=1e-5
            )
    nothing = np.full(4, 255)
    assert float(loss["a"](nothing, logits)) == float(loss["b"](nothing, logits)) == 0


def test_an_ignored_class_is_refused_where_its_mask_is_lost(monkeypatch):
    x = keras.Input((3,))
    model = keras.Model(x, {task: keras.layers.Dense(4)(x) for task in "ab"})
    ignoring = keras.losses.SparseCategoricalCrossentropy(True, ignore_class=0)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")

    told = r"Under JAX.*MaskedLoss\(loss, missing=0\).*loss of 'b' has"
    with pytest.raises(ValueError, match=told):
        weigh_losses(model, {"a": "mse", "b": ignoring}, "uncertainty")


@pytest.mark.slow
def test_without_a_mask_the_loss_is_the_same():
    x = keras.Input((3,))
    losses = {"c": "mse", "b": keras.losses.MeanSquaredError()}
    totals = []
    for masked in (False, True):
        outputs = {task: keras.layers.Dense(TASKS[task], name=task)(x) for task in "bc"}
        model = keras.Model(x, outputs)
        model.set_weights([np.full(w.shape, 0.5) for w in model.get_weights()])
        loss = {t: MaskedLoss(x) if masked else x for t, x in losses.items()}
        model, loss = weigh_losses(model, loss, "uncertainty")
        model.compile(keras.optimizers.SGD(RATE), loss=loss)
        y = {"b": Y["c"][:, :2], "c": Y["c"]}
        totals.append(fit(model, 3, "bc", y=y)["loss"])
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-5)


@pytest.mark.slow
def test_a_stitched_model_with_a_rate_for_the_uncertainties():
    towers = {}
    for task, n in TASKS.items():
        x = keras.Input((3,))
        y = keras.layers.Dense(4, name="hidden")(x)
        towers[task] = keras.Model(x, keras.layers.Dense(n, name="head")(y))
    stitched = stitch(towers, at=["hidden"])
    before = stitched.predict(X, verbose=0)
    model, loss = weigh_losses(
        stitched, dict.fromkeys(TASKS, MaskedLoss("mse")), "uncertainty"
    )
    for task, output in model.predict(X, verbose=0).items():
        np.testing.assert_array_equal(output, before[task])
    sgd = keras.optimizers.SGD(1e-3)
    multipliers = {"alpha": 100, "log_variance": 10}
    model.compile(LearningRateGroups(sgd, multipliers), loss=loss)
    expected = model.evaluate(X, Y, verbose=0, return_dict=True)
    fit(model, 1)
    d_v = [0.5 - expected[f"{task}_loss"] for task in TASKS]
    np.testing.assert_allclose(
        weight_of(model, "log_variance"), -1e-2 * np.array(d_v), rtol=1e-4
    )


@pytest.mark.slow
def test_mixed_float16_keeps_the_weights_in_float32():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = new_model("uncertainty")
    finally:
        keras.config.set_dtype_policy("float32")
    # Keras skips the first steps, until the scale is small enough for float16.
    while int(model.optimizer.iterations) < 5:
        fit(model, 1)
    w, v, _ = uncertainty_steps(5)
    for task in TASKS:
        np.testing.assert_allclose(kernels(model)[task], w[task], atol=0.03)
    log_variance = weight_of(model, "log_variance")
    np.testing.assert_allclose(log_variance, list(v.values()), atol=0.03)
    assert log_variance.dtype == "float32"


def cosine(y, prediction):
    dot = (y * prediction).sum(-1)
    norms = np.linalg.norm(y, axis=-1) * np.linalg.norm(prediction, axis=-1)
    return -(dot / norms).mean()


@pytest.mark.parametrize("by", ["uncertainty", "dynamic_average"])
@pytest.mark.parametrize(
    "similarity", ["cosine_similarity", keras.losses.CosineSimilarity()]
)
def test_a_similarity_counts_from_its_lowest_value(by, similarity):
    x = keras.Input((3,))
    model = keras.Model(x, {task: keras.layers.Dense(2, name=task)(x) for task in "bc"})
    y = {"b": random.normal(size=(8, 2)), "c": random.normal(size=(8, 2))}
    expected = 1 + cosine(y["b"], model.predict(X, verbose=0)["b"])
    losses = {"b": MaskedLoss(similarity), "c": similarity}
    model, loss = weigh_losses(model, losses, by)
    model.compile(keras.optimizers.Adam(0.1), loss)
    logs = model.evaluate(X, y, verbose=0, return_dict=True)
    factor = 0.5 if by == "uncertainty" else 1
    assert logs["b_loss"] == pytest.approx(factor * expected, rel=1e-4)
    callbacks = [DynamicWeightAverage()] if by == "dynamic_average" else []
    history = fit(model, 60, "bc", callbacks, y=y)
    assert np.isfinite(history["loss"]).all()
    # log s^2 goes to the logarithm of the loss, which is small but above 0.
    assert np.abs(model.get_layer(by).get_weights()[0]).max() < 20


@pytest.mark.parametrize("by", ["uncertainty", "dynamic_average"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_loss_that_goes_below_0_is_refused_at_once(by, masked):
    def similarity(y, p):
        return -keras.ops.sum(y * p, axis=-1)

    x = keras.Input((3,))
    model = keras.Model(x, {task: keras.layers.Dense(2)(x) for task in "bc"})
    loss = {"b": "mse", "c": MaskedLoss(similarity) if masked else similarity}
    with pytest.raises(ValueError, match=r"The loss of 'c' goes below 0.*Add its bou"):
        weigh_losses(model, loss, by)
    loss["c"] = lambda y, p: similarity(y, p) + 1
    weigh_losses(model, loss, by)


@pytest.mark.parametrize(
    "loss", ["poisson", keras.losses.Poisson(), MaskedLoss("poisson")]
)
def test_poissons_loss_has_no_uncertainty(loss):
    x = keras.Input((3,))
    outputs = {t: keras.layers.Dense(2, activation="exponential")(x) for t in "bc"}
    model = keras.Model(x, outputs)
    with pytest.raises(ValueError, match=r"loss of 'c' is Poisson's.* Subtract"):
        weigh_losses(model, {"b": "mse", "c": loss}, "uncertainty")
    poisson = keras.losses.poisson
    deviance = lambda y, p: poisson(y, p) - poisson(y, y)  # noqa: E731
    weigh_losses(model, {"b": "mse", "c": deviance}, "uncertainty")


def test_a_loss_without_its_model_says_so():
    _, loss = weigh_losses(
        stitch(
            {
                t: keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
                for t in "bc"
            },
            [],
        ),
        dict.fromkeys("bc", "mse"),
        "uncertainty",
    )
    alone = keras.losses.deserialize(keras.losses.serialize(loss["b"]))
    alone.weights_key = "of no model"
    with pytest.raises(ValueError, match="The loss of 'b' takes its weight from the"):
        alone(np.zeros((2, 1)), np.zeros((2, 1)))


def test_losses_that_are_no_dict_are_refused():
    x = keras.Input((3,))
    model = keras.Model(x, {task: keras.layers.Dense(2)(x) for task in "bc"})
    with pytest.raises(ValueError, match=r"`loss` be a dict .* losses no dict but \["):
        weigh_losses(model, [keras.losses.MeanSquaredError()] * 2, "uncertainty")


def test_a_sample_weight_counts_as_so_many_examples():
    """Trained alone, s^2 becomes the weighted mean of the losses, whatever the scale.

    A loss of its own that is no `MaskedLoss`, whose mean is divided by the weights.
    """
    x = keras.Input((3,))
    layers = {t: keras.layers.Dense(2, name=t, trainable=False)(x) for t in "bc"}
    y = {task: random.normal(size=(8, 2)) for task in "bc"}
    weight = {"b": np.arange(1.0, 9.0), "c": np.full(8, 10.0)}
    model, loss = weigh_losses(
        keras.Model(x, layers), dict.fromkeys("bc", "mse"), "uncertainty"
    )
    model.compile(keras.optimizers.Adam(0.1), loss)
    # One long epoch: 300 short ones take ten times as long.
    long = keras.tree.map_structure(lambda x: np.concatenate([x] * 300), (X, y, weight))
    model.fit(*long[:2], 8, sample_weight=long[2], shuffle=False, verbose=0)
    answers = model.predict(X, verbose=0)
    for k, task in enumerate("bc"):
        losses = ((answers[task] - y[task]) ** 2).mean(axis=1)
        expected = np.average(losses, weights=weight[task])
        variance = np.exp(weight_of(model, "log_variance")[k])
        assert variance == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_is_below_0_in_training_is_named():
    x = keras.Input((3,))
    outputs = {t: keras.layers.Dense(2, activation="exponential")(x) for t in "bc"}
    model, loss = weigh_losses(
        keras.Model(x, outputs), {"b": "mse", "c": "poisson"}, "dynamic_average"
    )
    model.compile(keras.optimizers.SGD(1e-6), loss)
    y = {"b": np.ones((8, 2)), "c": np.full((8, 2), np.exp(6.0))}
    for layer in model.layers:
        if layer.name.startswith("dense"):
            layer.set_weights([np.zeros((3, 2)), np.full(2, 6.0)])
    with pytest.raises(ValueError, match="The loss of 'c' goes below 0"):
        fit(model, 1, "bc", [DynamicWeightAverage()], y=y)


def test_a_forgotten_callback_is_said():
    with pytest.warns(UserWarning, match=r"callbacks=\[DynamicWeightAverage\(\)\]"):
        fit(new_model("dynamic_average"), 1)
    model = new_model("dynamic_average")
    model.evaluate(X, Y, verbose=0)
    fit(model, 1, callbacks=[DynamicWeightAverage()])


def test_several_outputs_of_a_task_are_refused_at_once():
    x = keras.Input((3,))
    two = [keras.layers.Dense(1)(x), keras.layers.Dense(1)(x)]
    model = keras.Model(x, {"a": keras.layers.Dense(1)(x), "b": two})
    with pytest.raises(ValueError, match=r"one tensor .* the output of 'b' is \["):
        weigh_losses(model, {"a": "mse", "b": ["mse", "mse"]}, "uncertainty")


@pytest.mark.parametrize("kind", [list, lambda x: dict(zip("mn", x, strict=True))])
def test_the_error_gives_the_line_that_makes_tasks_of_a_task_s_outputs(kind):
    x = keras.Input((3,))
    a, *two = (keras.layers.Dense(1)(x) for _ in range(3))
    model = keras.Model(x, {"a": a, "b": kind(two)})
    with pytest.raises(ValueError, match="one tensor") as caught:
        weigh_losses(model, {"a": "mse", "b": "mse"}, "uncertainty")
    line = re.search(r"model = .*\}\)", str(caught.value))[0]
    scope = {"keras": keras, "model": model}
    exec(line, scope)

    flat = scope["model"]
    given = keras.tree.flatten(model(X))
    for one, other in zip(keras.tree.flatten(flat(X)), given, strict=True):
        np.testing.assert_array_equal(one, other)
    losses = dict.fromkeys(flat.output, "mse")
    assert len(losses) == 3
    weigh_losses(flat, losses, "uncertainty")


# Copies.


def reloaded(model, path):
    model.save(path / "model.keras")
    return keras.saving.load_model(path / "model.keras")


COPIES = {
    "clone_model": lambda model, path: keras.models.clone_model(model),
    "from_config": lambda model, path: type(model).from_config(model.get_config()),
    "load_model": reloaded,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_trains_the_uncertainties_that_it_has(copied, tmp_path):
    model = new_model("uncertainty")
    copy = copied(model, tmp_path)
    copy.set_weights(model.get_weights())
    assert [w.path for w in copy.weights].count("uncertainty/log_variance") == 1
    # By the losses of the original, and by those of its configuration.
    loss_of_model = model.get_compile_config()["loss"]
    copy.compile(
        keras.optimizers.SGD(RATE), keras.saving.deserialize_keras_object(loss_of_model)
    )
    before = model.get_weights()
    fit(copy, 4)
    w, v, _ = uncertainty_steps(4)
    assert_kernels(copy, w)
    np.testing.assert_allclose(
        weight_of(copy, "log_variance"), list(v.values()), rtol=1e-4
    )
    for weight, unmoved in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, unmoved)
    fit(model, 4)
    assert_kernels(model, w)
    np.testing.assert_allclose(
        weight_of(model, "log_variance"), list(v.values()), rtol=1e-4
    )


def test_the_losses_of_a_model_serve_its_copy():
    x = keras.Input((3,))
    outputs = {t: keras.layers.Dense(n, name=t)(x) for t, n in TASKS.items()}
    model, loss = weigh_losses(
        keras.Model(x, outputs), dict.fromkeys(TASKS, MaskedLoss("mse")), "uncertainty"
    )
    copy = keras.models.clone_model(model)
    for one in (copy, model):
        one.compile(keras.optimizers.SGD(RATE), loss)
        fit(one, 1)
        assert (weight_of(one, "log_variance") != 0).all()


# Saving.


@pytest.mark.slow
@pytest.mark.parametrize("by", ["uncertainty", "dynamic_average"])
def test_a_loaded_model_goes_on_as_the_saved_one(by, tmp_path):
    def callbacks():
        return [DynamicWeightAverage()] if by == "dynamic_average" else []

    model = new_model(by, optimizer=keras.optimizers.Adam(RATE))
    fit(model, 3, callbacks=callbacks())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    first = fit(model, 3, callbacks=callbacks())
    second = fit(loaded, 3, callbacks=callbacks())
    # The loss reads the very weights that are the model's.
    for weight, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-5)
    for key, values in first.items():
        np.testing.assert_allclose(values, second[key], rtol=1e-5)


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_dynamic_weights_are_resumed(tmp_path):
    callbacks = [
        DynamicWeightAverage(),
        keras.callbacks.BackupAndRestore(tmp_path),
    ]
    with pytest.raises(KeyboardInterrupt):
        fit(new_model("dynamic_average"), 6, callbacks=[*callbacks, Interrupt()])
    resumed = new_model("dynamic_average")
    fit(resumed, 6, callbacks=callbacks)
    w, weights = dynamic_epochs(6, 2.0)
    assert_kernels(resumed, w)
    np.testing.assert_allclose(weight_of(resumed, "weight"), weights, rtol=1e-4)


# Other processes: a distribution strategy, another backend. With MaskedLoss inside.

ROOT = Path(__file__).parents[1]


def fit_in_subprocess(tmp_path, backend, bys, setup="", scope="nullcontext()"):
    """For each of `bys`, after five steps of `fit`: the weights, and a's last error."""
    script = f"""
from contextlib import nullcontext
{setup}
import numpy as np
from keras_cross_stitch import DynamicWeightAverage, MaskedMetric
from test_loss_weighting import fit, new_model
for by in {bys}:
    with {scope}:
        model = new_model(by, metrics={{"a": MaskedMetric("mse", name="error")}})
    callbacks = [DynamicWeightAverage()] if by == "dynamic_average" else []
    history = fit(model, 5, callbacks=callbacks)
    np.savez(by + ".npz", *model.get_weights()[:4], history["a_error"][-1])
"""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [list(np.load(tmp_path / f"{by}.npz").values()) for by in bys]


def assert_result(result, w, weights, error):
    expected = [*w.values(), weights, error]
    for value, of_numpy in zip(result, expected, strict=True):
        np.testing.assert_allclose(value, of_numpy, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_each_of_two_replicas_takes_the_mean_over_its_own_labels(tmp_path):
    (result,) = fit_in_subprocess(
        tmp_path,
        "tensorflow",
        ["uncertainty"],
        """
import tensorflow as tf
cpu, half = tf.config.list_physical_devices("CPU"), tf.config.LogicalDeviceConfiguration
tf.config.set_logical_device_configuration(cpu[0], [half(), half()])
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
""",
        "strategy.scope()",
    )
    # The second replica has no label of task a at all; the metric is over both.
    before, _, _ = uncertainty_steps(4, parts=2)
    w, v, _ = uncertainty_steps(5, parts=2)
    error, _, _ = squared_error(before["a"], X, Y["a"])
    assert_result(result, w, list(v.values()), error)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends(backend, tmp_path):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"needs {backend}, which is not installed")
    uncertainty, dynamic = fit_in_subprocess(
        tmp_path, backend, ["uncertainty", "dynamic_average"]
    )
    (before, _, _), (w, v, _) = uncertainty_steps(4), uncertainty_steps(5)
    error, _, _ = squared_error(before["a"], X, Y["a"])
    assert_result(uncertainty, w, list(v.values()), error)
    (before, _), (w, weights) = dynamic_epochs(4, 2.0), dynamic_epochs(5, 2.0)
    error, _, _ = squared_error(before["a"], X, Y["a"])
    assert_result(dynamic, w, weights, error)


# Errors.


def test_by_must_be_known():
    with pytest.raises(ValueError, match=r"'uncertainty', 'dynamic_average'.*'fixed'"):
        new_model("fixed")


def test_every_output_needs_a_loss():
    x = keras.Input((3,))
    one = keras.layers.Dense(1)(x)
    for outputs in ({"a": one}, {"a": one, "c": one}, [one, one]):
        with pytest.raises(ValueError, match=r"a loss for each of them. Received: out"):
            weigh_losses(
                keras.Model(x, outputs), {"a": "mse", "b": "mse"}, "uncertainty"
            )
    with pytest.raises(ValueError, match="a dict of two outputs or more"):
        weigh_losses(keras.Model(x, {"a": one}), {"a": "mse"}, "uncertainty")


def test_a_model_is_weighed_once():
    with pytest.raises(ValueError, match="weighed already, by its layer 'uncertainty'"):
        weigh_losses(
            new_model("uncertainty"), dict.fromkeys(TASKS, "mse"), "dynamic_average"
        )


def test_the_callback_needs_its_model():
    with pytest.raises(ValueError, match='by="dynamic_average"'):
        fit(new_model("uncertainty"), 1, callbacks=[DynamicWeightAverage()])


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        DynamicWeightAverage(temperature)
