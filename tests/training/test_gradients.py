"""PCGrad: its algorithm in NumPy, and a step of `fit` against gradients by hand."""

import inspect
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_cross_stitch import LearningRateGroups, stitch, weigh_losses
from training.gradients import PCGrad, _projected, pcgrad_weights


def by_hand(gradients, orders):
    """Algorithm 1, in float64: (T, P) to (P,)."""
    total = 0.0
    for i, order in enumerate(orders):
        projected = gradients[i].copy()
        for j in order:
            other = gradients[j]
            if j != i and projected @ other < 0:
                projected -= (projected @ other) / (other @ other) * other
        total = total + projected
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_the_weights_give_the_algorithms_gradient(tasks, seed):
    rng = np.random.default_rng([tasks, seed])
    gradients = rng.normal(size=(tasks, 7))
    gradients[0] = -gradients[1] + 0.1 * gradients[0]  # these two are at odds
    orders = np.array([rng.permutation(tasks) for _ in range(tasks)])

    products = tf.constant(gradients @ gradients.T)
    weights = np.array(pcgrad_weights(products, tf.constant(orders)))

    assert np.abs(weights - 1).max() > 0.1
    expected = by_hand(gradients, orders)
    np.testing.assert_allclose(weights @ gradients, expected, rtol=1e-9)


def test_a_task_without_a_gradient_changes_nothing():
    gradients = np.array([[1.0, 2], [0, 0]])

    weights = pcgrad_weights(tf.constant(gradients @ gradients.T), np.eye(2, dtype=int))

    np.testing.assert_array_equal(weights, [1, 1])


RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(6, 4)).astype("float32")
# Of heads that are alike, at odds with each other.
Y = {
    "a": RANDOM.normal(3, 1, (6, 1)).astype("float32"),
    "b": RANDOM.normal(-3, 1, (6, 1)).astype("float32"),
}


def shared(regularizer=None):
    """A layer of both tasks, and one of each."""
    keras.utils.set_random_seed(1)
    x = keras.Input((4,), name="x")
    trunk = layers.Dense(3, kernel_regularizer=regularizer, name="trunk")(x)
    heads = {task: layers.Dense(1, name=task)(trunk) for task in "ab"}
    model = keras.Model(x, heads)
    model.get_layer("b").set_weights(model.get_layer("a").get_weights())
    return model


def gradients_of(model, weights):
    with tf.GradientTape(persistent=True) as tape:
        answers = model(X)
        losses = {
            task: weights[task] * tf.reduce_mean((Y[task] - answers[task]) ** 2)
            for task in "ab"
        }
    return {
        task: tape.gradient(loss, model.trainable_variables)
        for task, loss in losses.items()
    }


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.3}])
def test_a_step_projects_what_is_shared_and_leaves_the_rest(weights):
    plain = shared(keras.regularizers.L2(0.05))
    a, b = gradients_of(plain, weights).values()
    before = [v.numpy() for v in plain.trainable_variables]
    model = PCGrad(plain.input, plain.output)
    losses = {task: keras.losses.MeanSquaredError() for task in "ab"}
    model.compile(keras.optimizers.SGD(0.1), losses, loss_weights=weights)

    logs = model.fit(X, Y, batch_size=6, verbose=0).history

    of_trunk = [[g.numpy().ravel() for g in x[:2]] for x in (a, b)]
    both = np.array([np.concatenate(x) for x in of_trunk])
    assert both[0] @ both[1] < 0
    projected = by_hand(both.astype("float64"), [[1], [0]])
    after = [v.numpy() for v in model.trainable_variables]
    step = [(x - y) / 0.1 for x, y in zip(before, after, strict=True)]
    found = np.concatenate([(step[0] - 2 * 0.05 * before[0]).ravel(), step[1]])
    np.testing.assert_allclose(found, projected, rtol=1e-3, atol=1e-4)
    for k, of_task in ((2, a), (3, a), (4, b), (5, b)):
        np.testing.assert_allclose(step[k], of_task[k], rtol=1e-3, atol=1e-4)
    penalty = 0.05 * np.sum(np.square(before[0]))
    of_tasks = sum(weights[task] * logs[f"{task}_loss"][0] for task in "ab")
    assert logs["loss"][0] == pytest.approx(of_tasks + penalty, rel=1e-4)


def test_the_weights_of_the_losses_are_no_layer_that_tasks_share():
    """Each task has its own element of log_variance, in one variable."""
    plain = shared()
    losses = {task: keras.losses.MeanSquaredError() for task in "ab"}
    weighed, losses = weigh_losses(plain, losses, by="uncertainty")
    log_variance = weighed.get_layer("uncertainty").log_variance
    start = np.array([0.3, -0.2])
    log_variance.assign(start)
    # L / (2 s^2) + log s, with v = log s^2: of the layers L / (2 e^v)
    halves = dict(zip("ab", np.exp(-start) / 2, strict=True))
    of_tasks = gradients_of(plain, halves).values()
    both = np.array(
        [np.concatenate([g.numpy().ravel() for g in x[:2]]) for x in of_tasks]
    )
    assert both[0] @ both[1] < 0
    answers = plain(X)
    values = [np.mean((Y[task] - answers[task].numpy()) ** 2) for task in "ab"]
    model = PCGrad(weighed.input, weighed.output)
    model.compile(keras.optimizers.SGD(0.01), losses)
    before = [v.numpy() for v in model.trainable_variables]

    model.fit(X, Y, batch_size=6, verbose=0)

    steps = {
        v.path: (x - v.numpy()) / 0.01
        for x, v in zip(before, model.trainable_variables, strict=True)
    }
    of_trunk = [x.ravel() for path, x in steps.items() if path.startswith("trunk/")]
    projected = by_hand(both.astype("float64"), [[1], [0]])
    np.testing.assert_allclose(
        np.concatenate(of_trunk), projected, rtol=1e-3, atol=1e-3
    )
    expected = 0.5 - np.array(values) * np.exp(-start) / 2
    found = steps["uncertainty/log_variance"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_where_no_gradient_is_against_another_it_is_a_step_of_their_sum():
    labels = {"a": Y["a"], "b": Y["a"]}
    weights = []
    for kind in (keras.Model, PCGrad):
        plain = shared()
        model = kind(plain.input, plain.output)
        model.compile("sgd", {task: keras.losses.MeanSquaredError() for task in "ab"})
        model.fit(X, labels, verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_layers_act_as_in_training():
    x = keras.Input((4,), name="x")
    y = layers.BatchNormalization(name="norm")(x)
    model = PCGrad(x, {task: layers.Dense(1, name=task)(y) for task in "ab"})
    model.compile("sgd", {task: keras.losses.MeanSquaredError() for task in "ab"})

    model.fit(X, Y, batch_size=6, verbose=0)

    moved = model.get_layer("norm").moving_mean
    np.testing.assert_allclose(moved, 0.01 * X.mean(axis=0), rtol=1e-3, atol=1e-6)


def test_the_order_is_drawn_anew_in_each_step_and_again_when_resumed():
    rng = np.random.default_rng(0)
    gradients = [[tf.constant(g)] for g in rng.normal(size=(5, 3))]

    found = [_projected(gradients, k, set())[0].numpy() for k in (*range(8), 0)]

    assert len({x.tobytes() for x in found}) > 1
    np.testing.assert_array_equal(found[0], found[-1])


def test_a_scale_of_the_loss_cancels():
    weights = []
    for scale in (None, 1024.0):
        plain = shared(keras.regularizers.L2(0.05))
        model = PCGrad(plain.input, plain.output)
        sgd = keras.optimizers.SGD(0.1, loss_scale_factor=scale)
        model.compile(sgd, {task: keras.losses.MeanSquaredError() for task in "ab"})
        model.fit(X, Y, batch_size=6, verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_units_in_a_group_and_scaled_losses_train_and_are_saved(dtype, tmp_path):
    def tower():
        keras.utils.set_random_seed(0)
        x = keras.Input((4,), name="x")
        y = layers.Dense(3, name="hidden", dtype=dtype)(x)
        return keras.Model(x, layers.Dense(1, name="score", dtype="float32")(y))

    plain = stitch({task: tower() for task in "abc"}, at=["hidden"])
    model = PCGrad(plain.input, plain.output)
    optimizer = LearningRateGroups(keras.optimizers.SGD(0.05), alpha=0)
    if dtype == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, {task: keras.losses.MeanSquaredError() for task in "abc"})
    alpha = model.get_layer("cross_stitch_hidden").alpha.numpy()

    losses = model.fit(X, {**Y, "c": Y["a"]}, epochs=8, verbose=0).history["loss"]

    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(model.get_layer("cross_stitch_hidden").alpha, alpha)
    plain.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(X)["a"], model(X)["a"])


def stepped(strategy):
    """The weights after a step with the whole batch: a strategy has its process."""
    with strategy.scope():
        plain = shared(keras.regularizers.L2(0.05))
        model = PCGrad(plain.input, plain.output)
        losses = {task: keras.losses.MeanSquaredError() for task in "ab"}
        model.compile(keras.optimizers.SGD(0.1), losses)
    history = model.fit(X, Y, batch_size=6, verbose=0).history
    return [*model.get_weights(), np.array(history["loss"])]


PROGRAM = f"""
import sys
import keras
import numpy as np
from keras import layers
from training import distribution
from training.gradients import PCGrad

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(6, 4)).astype("float32")
Y = {{"a": RANDOM.normal(3, 1, (6, 1)), "b": RANDOM.normal(-3, 1, (6, 1))}}

{inspect.getsource(shared)}
{inspect.getsource(stepped)}
np.savez(sys.argv[1], *stepped(distribution.strategy(2)))
"""


@pytest.mark.slow
def test_two_replicas_take_the_step_of_one_device(tmp_path):
    path = tmp_path / "weights.npz"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", PROGRAM, path], cwd=root, check=True)
    expected = stepped(tf.distribute.get_strategy())

    with np.load(path) as of_two:
        assert len(of_two) == len(expected)
        for one, two in zip(expected, of_two.values(), strict=True):
            np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
