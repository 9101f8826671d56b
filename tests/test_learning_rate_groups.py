"""LearningRateGroups against NumPy, float64: the model's gradients and the rules."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from keras_cross_stitch import CrossStitch, LearningRateGroups, stitch

# Keras's callbacks read the learning rate so that NumPy 2 warns.
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

MULTIPLIERS = {"alpha": 100, "bias": 2}
# Of kernel, bias, alpha, kernel, bias: the order of the model's weights.
MULTIPLIER = [1, 2, 100, 1, 2]
RATE = 1e-3

_random = np.random.default_rng(0)
X = _random.normal(size=(8, 3))
Y = _random.normal(size=(8, 2))
SHAPES = [(3, 4), (4,), (2, 2, 4), (4, 2), (2,)]
WEIGHTS = [_random.normal(size=shape) for shape in SHAPES]


def new_model(optimizer=None, **compile_arguments):
    x = keras.Input((3,))
    y = keras.layers.Dense(4, name="first")(x)
    # The other task's map is zero: what comes out is alpha[0, 0] * y.
    y, _ = CrossStitch(name="unit")([y, keras.ops.zeros_like(y)])
    y = keras.layers.Dense(2, name="second", dtype="float32")(y)
    model = keras.Model(x, y)
    model.set_weights(WEIGHTS)
    if optimizer is not None:
        model.compile(optimizer, loss="mse", **compile_arguments)
    return model


def fit(model, steps, callbacks=()):
    """An epoch is one step, on all the data."""
    return model.fit(
        X, Y, batch_size=8, epochs=steps, callbacks=list(callbacks), verbose=0
    )


def gradients(weights):
    """Of the mean squared error, by the chain rule."""
    w1, b1, alpha, w2, b2 = weights
    hidden = X @ w1 + b1
    scaled = hidden * alpha[0, 0]
    d_y = 2 * (scaled @ w2 + b2 - Y) / Y.size
    d_scaled = d_y @ w2.T
    d_hidden = d_scaled * alpha[0, 0]
    d_alpha = np.zeros_like(alpha)
    d_alpha[0, 0] = (d_scaled * hidden).sum(0)
    return [
        X.T @ d_hidden,
        d_hidden.sum(0),
        d_alpha,
        scaled.T @ d_y,
        d_y.sum(0),
    ]


class SGD:
    """v = 0.9 v - rate g;  w = w + v"""

    keras_optimizer = staticmethod(
        lambda rate, **arguments: keras.optimizers.SGD(rate, 0.9, **arguments)
    )

    def __init__(self):
        self.velocity = 0.0

    def step(self, gradient, rate):
        self.velocity = 0.9 * self.velocity - rate * gradient
        return self.velocity


class Adam:
    """w = w - rate m^ / (sqrt(v^) + epsilon), with bias-corrected moments"""

    keras_optimizer = staticmethod(keras.optimizers.Adam)

    def __init__(self):
        self.t, self.m, self.v = 0, 0.0, 0.0

    def step(self, gradient, rate):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m = self.m / (1 - 0.9**self.t)
        v = self.v / (1 - 0.999**self.t)
        return -rate * m / (np.sqrt(v) + 1e-7)


def expected(rates, rule=SGD, clip=np.inf, decay=(0,) * 5, multiplier=MULTIPLIER):
    """The weights after one step at each of `rates`."""
    weights = list(WEIGHTS)
    rules = [rule() for _ in weights]
    for rate in rates:
        all_gradients = gradients(weights)
        norm = np.sqrt(sum((gradient**2).sum() for gradient in all_gradients))
        for i, gradient in enumerate(all_gradients):
            own_rate = rate * multiplier[i]
            weights[i] = weights[i] * (1 - own_rate * decay[i])
            clipped = gradient * min(1, clip / norm)
            weights[i] = weights[i] + rules[i].step(clipped, own_rate)
    return weights


def assert_weights(model, weights, rtol=1e-5):
    # Of the change since the start, so that small rates count as much as large ones.
    for weight, value, start in zip(model.get_weights(), weights, WEIGHTS, strict=True):
        change = value - start
        tolerance = rtol * np.abs(change).max() + 1e-6
        np.testing.assert_allclose(weight - start, change, rtol=0, atol=tolerance)


def grouped_sgd(rate=RATE, **arguments):
    return LearningRateGroups(
        keras.optimizers.SGD(rate, momentum=0.9, **arguments), MULTIPLIERS
    )


rules = pytest.mark.parametrize("rule", [SGD, Adam])


# Whatever sets the learning rate, the ratio of the groups stays.


@pytest.mark.slow
@rules
def test_schedule(rule):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [1, 3], [1e-3, 2e-3, 5e-4]
    )
    model = new_model(LearningRateGroups(rule.keras_optimizer(schedule), MULTIPLIERS))
    fit(model, 6)
    assert_weights(model, expected([1e-3] * 2 + [2e-3] * 2 + [5e-4] * 2, rule))


@pytest.mark.slow
@rules
def test_learning_rate_scheduler_that_sets_absolute_rates(rule):
    model = new_model(LearningRateGroups(rule.keras_optimizer(1.0), MULTIPLIERS))
    rates = [1e-3, 2e-3, 5e-4, 5e-4]
    fit(model, 4, [keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch])])
    assert_weights(model, expected(rates, rule))


@pytest.mark.slow
@rules
def test_reduce_learning_rate_on_plateau(rule):
    model = new_model(LearningRateGroups(rule.keras_optimizer(4e-3), MULTIPLIERS))
    # No improvement is ever enough, so it halves the rate after all epochs but one.
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.5, patience=1, min_delta=1e9
    )
    fit(model, 4, [plateau])
    assert_weights(model, expected([4e-3, 4e-3, 2e-3, 1e-3], rule))


@pytest.mark.slow
@rules
def test_assignment(rule):
    model = new_model(LearningRateGroups(rule.keras_optimizer(1e-3), MULTIPLIERS))
    fit(model, 2)
    model.optimizer.learning_rate = 3e-3
    fit(model, 2)
    assert float(model.optimizer.learning_rate) == pytest.approx(3e-3)
    assert_weights(model, expected([1e-3, 1e-3, 3e-3, 3e-3], rule))


# What the inner optimizer does over all variables, it still does.


@pytest.mark.slow
def test_one_clip_over_all_groups():
    clip = 0.5 * np.sqrt(sum((gradient**2).sum() for gradient in gradients(WEIGHTS)))
    model = new_model(grouped_sgd(global_clipnorm=float(clip)))
    fit(model, 2)
    assert_weights(model, expected([RATE] * 2, clip=clip))


@pytest.mark.slow
def test_gradient_accumulation():
    optimizer = grouped_sgd(gradient_accumulation_steps=2)
    model = new_model(optimizer)
    fit(model, 3)
    assert int(optimizer.iterations) == 1
    assert_weights(model, expected([RATE]))
    fit(model, 1)
    assert int(optimizer.iterations) == 2
    assert_weights(model, expected([RATE] * 2))


@pytest.mark.slow
def test_moving_average_becomes_the_weights_at_the_end():
    model = new_model(grouped_sgd(use_ema=True, ema_momentum=0.75))
    fit(model, 3)
    first, second, third = (expected([RATE] * steps) for steps in (1, 2, 3))
    average = [
        0.75 * (0.75 * a + 0.25 * b) + 0.25 * c
        for a, b, c in zip(first, second, third, strict=True)
    ]
    assert_weights(model, average)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keras_optimizer", "rule"),
    [
        (lambda: keras.optimizers.AdamW(RATE, weight_decay=0.5), Adam),
        (lambda: keras.optimizers.SGD(RATE, 0.9, weight_decay=0.5), SGD),
    ],
)
def test_weight_decay_leaves_out_alpha_and_what_the_user_excludes(
    keras_optimizer, rule
):
    optimizer = LearningRateGroups(keras_optimizer(), MULTIPLIERS)
    model = new_model(optimizer)
    optimizer.exclude_from_weight_decay(var_list=[model.weights[3]])
    fit(model, 3)
    decay = [0.5, 0.5, 0, 0, 0.5]
    assert_weights(model, expected([RATE] * 3, rule, decay=decay))


@pytest.mark.slow
def test_exclusions_made_before_wrapping_are_kept():
    adamw = keras.optimizers.AdamW(RATE, weight_decay=0.5)
    adamw.exclude_from_weight_decay(var_names=["bias"])
    model = new_model(LearningRateGroups(adamw, MULTIPLIERS))
    fit(model, 3)
    assert_weights(model, expected([RATE] * 3, Adam, decay=[0.5, 0, 0, 0.5, 0]))


def test_decay_spares_the_alpha_of_units_and_no_other():
    x = keras.Input((3,))
    unit, prelu = CrossStitch(name="mixing"), keras.layers.PReLU(name="cross_stitch")
    model = keras.Model(x, prelu(unit([x, x])[0]))
    start = [np.full(weight.shape, 2.0) for weight in model.get_weights()]
    model.set_weights(start)
    sgd = keras.optimizers.SGD(0.1, weight_decay=0.5)
    optimizer = LearningRateGroups(sgd, {"cross_stitch/alpha": 4})
    assert [v.name for v in model.trainable_variables] == ["alpha", "alpha"]

    zeros = [keras.ops.zeros(weight.shape) for weight in start]
    optimizer.apply(zeros, model.trainable_variables)

    np.testing.assert_array_equal(unit.alpha, start[0])
    np.testing.assert_allclose(prelu.alpha, start[1] * (1 - 0.1 * 4 * 0.5), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner",
    [
        lambda: keras.optimizers.AdamW(RATE, weight_decay=0.5),
        lambda: keras.optimizers.Ftrl(RATE),  # which divides by the rate
    ],
)
def test_multiplier_0_freezes_whatever_the_optimizer(inner):
    model = new_model(LearningRateGroups(inner(), {"first": 0}))
    before = model.get_weights()
    fit(model, 2)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    assert not np.array_equal(model.get_weights()[3], before[3])


def test_fixed_loss_scale_cancels():
    model = new_model(grouped_sgd(loss_scale_factor=1024.0))
    assert model.optimizer.scale_loss(1.0) == 1024.0
    fit(model, 2)
    assert_weights(model, expected([RATE] * 2))


@pytest.mark.slow
def test_mixed_float16_keeps_the_ratio_under_loss_scaling():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        # Keras scales the loss itself, so a scale of the inner optimizer's goes.
        grouped = new_model(grouped_sgd(loss_scale_factor=1024.0))
        plain = new_model(keras.optimizers.SGD(RATE, momentum=0.9))
    finally:
        keras.config.set_dtype_policy("float32")
    for model in (grouped, plain):
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        # Keras skips the first steps, until the scale is small enough for float16.
        while int(model.optimizer.iterations) == 0:
            fit(model, 1)
    assert_weights(
        grouped,
        [
            start + multiplier * (once - start)
            for once, start, multiplier in zip(
                plain.get_weights(), WEIGHTS, MULTIPLIER, strict=True
            )
        ],
        rtol=0.01,
    )


# Every optimizer of Keras can be the inner one.

OPTIMIZERS = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "AdamW",
    "Ftrl",
    "Lion",
    "Muon",
    "Nadam",
    "RMSprop",
    "ScheduleFreeAdamW",
    "SGD",
]


def apply_twice(optimizer):
    """The weights of a new model after two steps on the gradients at the start."""
    model = new_model()
    constants = [keras.ops.convert_to_tensor(g, "float32") for g in gradients(WEIGHTS)]
    for _ in range(2):
        optimizer.apply(constants, model.trainable_variables)
    return model.get_weights()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_group_moves_as_under_an_optimizer_of_its_own_rate(name):
    new_optimizer = getattr(keras.optimizers, name)
    grouped = apply_twice(
        LearningRateGroups(new_optimizer(RATE), {"first": 1, "alpha": 10, "second": 2})
    )
    for multiplier, group in [(1, [0, 1]), (10, [2]), (2, [3, 4])]:
        alone = new_optimizer(RATE * multiplier)
        alone.exclude_from_weight_decay(var_names=["alpha"])
        weights = apply_twice(alone)
        for i in group:
            np.testing.assert_allclose(grouped[i], weights[i], rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_multiplier_1_is_the_inner_optimizer(name):
    new_optimizer = getattr(keras.optimizers, name)
    plain = new_optimizer(RATE)
    plain.exclude_from_weight_decay(var_names=["alpha"])
    ones = {"kernel": 1, "bias": 1, "alpha": 1}
    grouped = LearningRateGroups(new_optimizer(RATE), ones)
    for weight, value in zip(apply_twice(grouped), apply_twice(plain), strict=True):
        np.testing.assert_allclose(weight, value, rtol=1e-5)


def test_each_of_muons_two_decays_follows_the_rate():
    def muon(rate):
        return keras.optimizers.Muon(rate, weight_decay=0.5, adam_weight_decay=0.25)

    grouped = apply_twice(LearningRateGroups(muon(RATE), {"first": 20}))
    alone = apply_twice(muon(20 * RATE))
    for i in (0, 1):  # a kernel, which is Muon's, and a bias, which is AdamW's
        np.testing.assert_allclose(grouped[i], alone[i], rtol=1e-5)


def test_an_optimizer_may_be_given_by_name_or_config():
    by_name = LearningRateGroups("adam", MULTIPLIERS)
    config = keras.optimizers.serialize(keras.optimizers.SGD(RATE, momentum=0.9))
    by_config = LearningRateGroups(config, MULTIPLIERS)
    assert isinstance(by_name.inner_optimizer, keras.optimizers.Adam)
    model = new_model(by_config)
    fit(model, 2)
    assert_weights(model, expected([RATE] * 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [{"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}],
    ids=["xla", "graph", "eager"],
)
def test_execution_modes(mode):
    model = new_model(grouped_sgd(), **mode)
    fit(model, 3)
    assert_weights(model, expected([RATE] * 3))


def test_each_wrapper_and_the_optimizer_itself_have_their_own_rates():
    sgd = keras.optimizers.SGD(RATE, momentum=0.9)
    model, weights = new_model(), list(WEIGHTS)
    rules = [SGD() for _ in weights]
    first, second = (LearningRateGroups(sgd, x) for x in (MULTIPLIERS, {"first": 50}))
    for optimizer in (first, second, sgd, first):
        model.compile(optimizer, loss="mse")
        fit(model, 1)
        for i, gradient in enumerate(gradients(weights)):
            factor = {first: MULTIPLIER[i], second: 50 if i < 2 else 1, sgd: 1}
            weights[i] = weights[i] + rules[i].step(gradient, RATE * factor[optimizer])
    assert_weights(model, weights)


# The units are a group that needs no pattern.


def two_towers(at):
    """Towers with a PReLU, whose weight is an `alpha` too, of a task `alpha_helix`."""

    def tower(units):
        x = keras.Input((3,), name="x")
        y = keras.layers.PReLU(name="slope")(keras.layers.Dense(4, name="first")(x))
        return keras.Model(x, keras.layers.Dense(units, name="score")(y))

    return stitch({"alpha_helix": tower(2), "sheet": tower(1)}, at=at)


@pytest.mark.parametrize("at", [["slope"], []], ids=["one unit", "no units"])
def test_alpha_names_the_units_and_nothing_else(at):
    model = two_towers(at)
    before = model.get_weights()
    sgd = keras.optimizers.SGD(RATE)
    optimizer = LearningRateGroups(sgd, {"bias": 2}, alpha=100)
    optimizer.apply([keras.ops.ones(v.shape) for v in model.weights], model.weights)
    for variable, start in zip(model.weights, before, strict=True):
        multiplier = {"bias": 2}.get(variable.name, 1)
        if variable.path.startswith("cross_stitch"):
            multiplier = 100
        np.testing.assert_allclose(variable - start, -RATE * multiplier, rtol=1e-3)


def test_with_alpha_patterns_are_of_the_other_variables():
    optimizer = LearningRateGroups("sgd", {"alpha": 3}, alpha=10)
    with pytest.raises(ValueError, match=r"'alpha', which matches none of \['first"):
        optimizer.build(new_model().trainable_variables)


def test_frozen_units_leave_the_group_empty():
    model = new_model()
    unit = model.get_layer("unit")
    unit.trainable = False
    (before,) = unit.get_weights()
    model.compile(LearningRateGroups("sgd", alpha=100), loss="mse")
    fit(model, 1)
    np.testing.assert_array_equal(unit.alpha, before)


def unequal_towers():
    """Towers of other channels, joined with projections; one is of a task `from_x`."""

    def tower(channels, units):
        x = keras.Input((3,), name="x")
        y = keras.layers.Dense(channels, name="first")(x)
        return keras.Model(x, keras.layers.Dense(units, name="score")(y))

    towers = {"from_x": tower(4, 2), "sheet": tower(5, 1)}
    return stitch(towers, at=["first"], project=True, same_task=1.0)


@pytest.mark.parametrize("model", [unequal_towers, lambda: two_towers(["slope"])])
def test_projections_are_a_group_that_may_be_empty(model):
    model = model()
    before = model.get_weights()
    sgd = keras.optimizers.SGD(RATE)
    optimizer = LearningRateGroups(sgd, {"bias": 2}, alpha=100, projections=10)
    optimizer.apply([keras.ops.ones(v.shape) for v in model.weights], model.weights)
    for variable, start in zip(model.weights, before, strict=True):
        multiplier = {"bias": 2}.get(variable.name, 1)
        if variable.path.startswith("cross_stitch"):
            multiplier = 100 if variable.name == "alpha" else 10
        np.testing.assert_allclose(variable - start, -RATE * multiplier, rtol=1e-3)


def test_with_projections_patterns_are_of_the_other_variables():
    variables = unequal_towers().trainable_variables
    LearningRateGroups("sgd", {"sheet_from_from_x/": 3}, alpha=10).build(variables)
    optimizer = LearningRateGroups("sgd", {"sheet_from_from_x/": 3}, projections=10)
    with pytest.raises(
        ValueError, match=r"from_x/', which matches none of \['from_x_f"
    ):
        optimizer.build(variables)


def test_projections_decay_as_other_kernels_do():
    model = unequal_towers()
    unit = model.get_layer("cross_stitch_first")
    kernel = unit.projections["sheet_from_from_x"].kernel
    alpha, before = unit.alpha.numpy(), kernel.numpy()
    sgd = keras.optimizers.SGD(RATE, weight_decay=0.5)
    optimizer = LearningRateGroups(sgd, alpha=100, projections=10)
    optimizer.apply([keras.ops.zeros(v.shape) for v in model.weights], model.weights)
    np.testing.assert_array_equal(unit.alpha, alpha)
    np.testing.assert_allclose(kernel, before * (1 - 10 * RATE * 0.5), rtol=1e-5)


@pytest.mark.parametrize("group", ["alpha", "projections"])
@pytest.mark.parametrize("value", [-1, float("nan"), "100"])
def test_groups_of_units_must_have_a_finite_number(group, value):
    with pytest.raises(
        ValueError, match=f"`{group}` must be a finite number, 0 or more"
    ):
        LearningRateGroups("sgd", **{group: value})


# Whoever holds this optimizer has the inner one, too.


def public_settings(optimizer):
    """What may be read and set, of an optimizer and of all of Keras's own."""
    return sorted(optimizer.get_config().keys() - {"name", "learning_rate"})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_is_the_inner_optimizers(name):
    inner = getattr(keras.optimizers, name)(RATE, use_ema=True, weight_decay=0.25)
    optimizer = LearningRateGroups(inner, alpha=10)
    assert set(public_settings(inner)) >= {"use_ema", "clipnorm", "loss_scale_factor"}
    for setting in public_settings(inner):
        assert getattr(optimizer, setting) is getattr(inner, setting), setting
        new = object()
        setattr(optimizer, setting, new)
        assert getattr(inner, setting) is new, setting


def test_every_public_name_of_the_inner_optimizer_is_there():
    optimizer = LearningRateGroups(keras.optimizers.SGD(RATE, use_ema=True))
    inner = optimizer.inner_optimizer
    optimizer.build(new_model().trainable_variables)
    for name in dir(inner):
        if not name.startswith("_") and not callable(getattr(inner, name)):
            ours, theirs = getattr(optimizer, name), getattr(inner, name)
            same = ours is theirs or keras.tree.flatten(ours) == keras.tree.flatten(
                theirs
            )
            assert same or name == "name", name
    with pytest.raises(AttributeError, match="temperature"):
        _ = optimizer.temperature


CALLBACKS = {
    "SwapEMAWeights": lambda path: keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
    "LearningRateScheduler": lambda path: keras.callbacks.LearningRateScheduler(
        lambda epoch: RATE / (1 + epoch)
    ),
    "ReduceLROnPlateau": lambda path: keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.5, patience=1, min_delta=1e9
    ),
    "EarlyStopping": lambda path: keras.callbacks.EarlyStopping(
        monitor="loss", mode="max", patience=1, restore_best_weights=True
    ),
    "BackupAndRestore": lambda path: keras.callbacks.BackupAndRestore(path / "backup"),
    "ModelCheckpoint": lambda path: keras.callbacks.ModelCheckpoint(
        path / "model.keras"
    ),
    "CSVLogger": lambda path: keras.callbacks.CSVLogger(path / "log.csv"),
    "TerminateOnNaN": lambda path: keras.callbacks.TerminateOnNaN(),
}


@pytest.mark.parametrize(
    ("callback", "policy"),
    [
        *((x, policy) for x in CALLBACKS for policy in ("float32", "mixed_float16")),
        # Of the callbacks, the one that changes weights.
        ("SwapEMAWeights", "mixed_bfloat16"),
        ("SwapEMAWeights", "bfloat16"),
    ],
)
def test_without_groups_it_is_the_inner_optimizer(callback, policy, tmp_path):
    weights = []
    keras.config.set_dtype_policy(policy)
    try:
        for wrap in (lambda inner: inner, LearningRateGroups):
            inner = keras.optimizers.SGD(RATE, 0.9, use_ema=True, ema_momentum=0.5)
            model = new_model(wrap(inner), run_eagerly=True)  # quicker, of few steps
            fit(model, 1)  # builds the averages, which one callback asks for at once
            fit(model, 3, [CALLBACKS[callback](tmp_path)])
            weights.append(model.get_weights())
    finally:
        keras.config.set_dtype_policy("float32")
    rtol = {"float32": 1e-5, "mixed_float16": 1e-3}.get(policy, 2e-2)
    for plain, wrapped in zip(*weights, strict=True):
        plain, wrapped = plain.astype("float32"), wrapped.astype("float32")
        np.testing.assert_allclose(wrapped, plain, rtol, atol=rtol / 10)


# Saving.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "steps"), [(SGD, 2), (Adam, 3)], ids=["updated", "accumulating"]
)
def test_loaded_model_takes_the_same_next_steps(rule, steps, tmp_path):
    model = new_model(
        LearningRateGroups(
            rule.keras_optimizer(RATE, gradient_accumulation_steps=2, use_ema=True),
            MULTIPLIERS,
        )
    )
    fit(model, steps)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for variable, restored in zip(
        model.optimizer.variables, loaded.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(restored.numpy(), variable.numpy())
    fit(model, 3)
    fit(loaded, 3)
    assert_weights(loaded, model.get_weights())


def test_state_is_saved_once(tmp_path):
    model = new_model(grouped_sgd())
    fit(model, 1)
    model.save(tmp_path / "model.keras")
    zipfile.ZipFile(tmp_path / "model.keras").extract("model.weights.h5", tmp_path)
    saved = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file["optimizer"].visititems(
            lambda name, item: (
                saved.append(name) if isinstance(item, h5py.Dataset) else None
            )
        )
    # The iteration, the learning rate and five momentums.
    assert len(saved) == 7


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_backup_and_restore_resumes_where_it_stopped(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(new_model(grouped_sgd()), 4, [backup, Interrupt()])
    resumed = new_model(grouped_sgd())
    fit(resumed, 4, [backup])
    assert int(resumed.optimizer.iterations) == 4
    assert_weights(resumed, expected([RATE] * 4))


def test_serialize_and_deserialize():
    adamw = keras.optimizers.AdamW(RATE, weight_decay=0.5)
    optimizer = LearningRateGroups(
        adamw, {"bias": 2}, alpha=100, projections=10, name="groups"
    )
    config = keras.optimizers.serialize(optimizer)
    copy = keras.optimizers.deserialize(config)
    assert copy.get_config() == optimizer.get_config()
    assert copy.inner_optimizer.weight_decay == 0.5
    assert copy.multipliers == {"bias": 2}
    assert (copy.alpha, copy.projections) == (100, 10)
    assert copy.name == "groups"


@pytest.mark.slow
def test_set_weights_sets_the_state():
    model = new_model(grouped_sgd())
    fit(model, 2)
    copy = new_model(grouped_sgd())
    copy.set_weights(model.get_weights())
    copy.optimizer.build(copy.trainable_variables)
    copy.optimizer.set_weights([v.numpy() for v in model.optimizer.variables])
    fit(copy, 1)
    assert_weights(copy, expected([RATE] * 3))


def test_apply_gradients_returns_the_iteration():
    model = new_model()
    grads_and_vars = zip(model.get_weights(), model.trainable_variables, strict=True)
    assert int(grouped_sgd().apply_gradients(grads_and_vars)) == 1


# Other processes: a distribution strategy, another backend.

ROOT = Path(__file__).parents[1]


def fit_in_subprocess(tmp_path, setup, scope, backend):
    """The weights after three steps of `fit`, the model made inside `scope`."""
    script = f"""
import contextlib
{setup}
import numpy as np
from test_learning_rate_groups import fit, grouped_sgd, new_model
with {scope}:
    model = new_model(grouped_sgd(weight_decay=0.5))
model.optimizer.exclude_from_weight_decay(var_names=["bias"])
fit(model, 3)
np.savez("weights.npz", *model.get_weights())
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
    return list(np.load(tmp_path / "weights.npz").values())


class Weights:
    """Weights from elsewhere, as `assert_weights` takes them from a model."""

    def __init__(self, weights):
        self.get_weights = lambda: weights


@pytest.mark.slow
def test_two_replicas_are_one_device(tmp_path):
    weights = fit_in_subprocess(
        tmp_path,
        """
import tensorflow as tf
cpu, half = tf.config.list_physical_devices("CPU"), tf.config.LogicalDeviceConfiguration
tf.config.set_logical_device_configuration(cpu[0], [half(), half()])
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
""",
        "strategy.scope()",
        "tensorflow",
    )
    assert_weights(Weights(weights), expected([RATE] * 3, decay=[0.5, 0, 0, 0.5, 0]))


# PyTorch has optimizers of its own, so all are tried there.
ALL_OPTIMIZERS = """
import test_learning_rate_groups as tests
for name in tests.OPTIMIZERS:
    tests.test_each_group_moves_as_under_an_optimizer_of_its_own_rate(name)
tests.test_each_of_muons_two_decays_follows_the_rate()
tests.test_decay_spares_the_alpha_of_units_and_no_other()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "setup"), [("jax", ""), ("torch", ALL_OPTIMIZERS)])
def test_other_backends(backend, setup, tmp_path):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"needs {backend}, which is not installed")
    weights = fit_in_subprocess(tmp_path, setup, "contextlib.nullcontext()", backend)
    assert_weights(Weights(weights), expected([RATE] * 3, decay=[0.5, 0, 0, 0.5, 0]))


# What is used of Keras that is not public: where a name goes, the numbers above do.


def test_keras_still_has_what_is_not_public():
    methods = ["_apply_weight_decay", "_backend_update_step"]
    methods += ["_use_weight_decay", "_var_key"]
    assert all(hasattr(keras.optimizers.Optimizer, name) for name in methods)
    assert hasattr(keras.optimizers.Muon, "_should_use_adamw")
    sgd = keras.optimizers.SGD()
    assert all(hasattr(sgd, name) for name in ["_iterations", "_trainable_variables"])


def test_pytorchs_optimizers_still_have_what_is_not_public():
    # Read, since Keras imports them only where PyTorch is installed.
    folder = Path(keras.__file__).parent / "src/backend/torch/optimizers"
    names = {"_backend_update_step", "_parallel_update_step"}
    parallel = (folder / "torch_parallel_optimizer.py").read_text()
    assert names <= set(re.findall(r"\w+", parallel))
    assert "def _parallel_update_step(" in (folder / "torch_sgd.py").read_text()


# Errors.


def test_a_pattern_that_matches_nothing_is_an_error():
    model = new_model(
        LearningRateGroups(keras.optimizers.SGD(RATE), {"alpha": 100, "beta": 2})
    )
    with pytest.raises(ValueError, match=r"'beta', which matches none of .*alpha"):
        fit(model, 1)


def test_a_frozen_layer_is_no_match():
    model = new_model()
    model.get_layer("unit").trainable = False
    model.compile(grouped_sgd(), loss="mse")
    with pytest.raises(ValueError, match="must match a trainable variable"):
        fit(model, 1)


def test_two_patterns_that_match_one_variable_are_an_error():
    optimizer = LearningRateGroups(keras.optimizers.SGD(RATE), {"first": 3, "bias": 2})
    with pytest.raises(ValueError, match=r"\['first', 'bias'\].*'first/bias'"):
        optimizer.build(new_model().trainable_variables)


@pytest.mark.parametrize("multiplier", [-1, float("nan"), float("inf"), "100", None])
def test_a_multiplier_must_be_a_finite_number(multiplier):
    with pytest.raises(ValueError, match="must be finite numbers, 0 or more"):
        LearningRateGroups(keras.optimizers.SGD(RATE), {"alpha": multiplier})


@pytest.mark.parametrize(
    ("pattern", "received"),
    [
        ("alpha(", r"'alpha\(' \(missing"),
        (re.compile("alpha"), r"re.compile\('alpha'\) \(a Pattern"),
        (1, r"1 \(a int"),
    ],
)
def test_an_invalid_regular_expression_is_an_error(pattern, received):
    with pytest.raises(ValueError, match=f"as strings. Received: {received}"):
        LearningRateGroups(keras.optimizers.SGD(RATE), {pattern: 100})


def test_multipliers_of_numpy_are_saved():
    numbers = {"alpha": np.float32(10), "projections": np.int64(3)}
    optimizer = LearningRateGroups("sgd", {"bias": np.float16(2)}, **numbers)

    config = json.loads(json.dumps(optimizer.get_config()))

    assert config["multipliers"] == {"bias": 2}
    assert (config["alpha"], config["projections"]) == (10, 3)


def test_variables_may_be_given_by_an_iterator():
    kernel = keras.Variable([1.0, 2.0])
    optimizer = LearningRateGroups(keras.optimizers.SGD(0.1))

    for _ in range(2):
        optimizer.apply([keras.ops.ones(2)], (x for x in [kernel]))

    np.testing.assert_allclose(kernel, [0.8, 1.8], rtol=1e-6)


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Lion"])
def test_weight_decay_may_change_after_the_build(kind):
    """As of Keras's optimizers; a loaded one is built, and has lost its exclusions."""

    def updated(wrap):
        shapes = {"kernel": (3, 2), "bias": (2,), "scale": (2,)}
        of_name = {
            name: keras.Variable(np.ones(x), name=name) for name, x in shapes.items()
        }
        optimizer = getattr(keras.optimizers, kind)(0.1, weight_decay=0.5)
        if wrap:
            optimizer = LearningRateGroups(optimizer)
        variables = list(of_name.values())
        zeros = [keras.ops.zeros(x.shape) for x in variables]
        optimizer.apply(zeros, variables)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        optimizer.apply(zeros, variables)
        optimizer.weight_decay = 0.25
        optimizer.apply(zeros, variables)
        return [keras.ops.convert_to_numpy(x) for x in variables]

    for ours, keras_own in zip(updated(True), updated(False), strict=True):
        np.testing.assert_allclose(ours, keras_own, rtol=1e-6)


@pytest.mark.parametrize(
    "inner_optimizer",
    [
        lambda: 0.001,
        lambda: None,
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE)),
        grouped_sgd,
    ],
    ids=["number", "none", "loss_scale", "groups"],
)
def test_the_inner_optimizer_must_update_variables_itself(inner_optimizer):
    with pytest.raises(ValueError, match="updates variables itself"):
        LearningRateGroups(inner_optimizer(), MULTIPLIERS)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="adamm"):
        LearningRateGroups("adamm", MULTIPLIERS)


def test_applying_without_variables_names_what_is_missing():
    with pytest.raises(ValueError, match=r"'alpha', which matches none of \[\]"):
        grouped_sgd().apply([1.0])
