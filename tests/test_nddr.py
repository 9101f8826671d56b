"""NDDR's unit against NumPy in float64, and in models that `stitch` makes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_cross_stitch import (
    NDDR,
    LearningRateGroups,
    export_saved_model,
    network_table,
    plot_network,
    stitch,
)


def maps_of(tasks, shape, seed=0):
    rng = np.random.default_rng(seed)
    names = [f"t{k}" for k in reversed(range(tasks))]  # not as they are sorted
    return {name: rng.normal(size=shape).astype("float32") for name in names}


def distinct(layer, seed=1):
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        weight.assign(rng.uniform(0.1, 1, weight.shape))
    return layer


def expected(unit, maps, training):
    """relu(batch_norm(W concat)), written out; channels stand last."""
    together = np.concatenate([maps[t] for t in sorted(maps)], -1).astype("float64")
    mixed = {}
    for task in maps:
        x = together @ np.asarray(unit.kernels[task], "float64")
        gamma, beta, mean, variance = unit.norms[task].get_weights()
        if training:
            axes = tuple(range(x.ndim - 1))
            mean, variance = x.mean(axes), x.var(axes)
        x = gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta
        mixed[task] = np.maximum(x, 0)
    return mixed


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("tasks", "shape"),
    [(2, (5, 4)), (3, (2, 5, 3)), (5, (3, 5, 7, 2)), (2, (2, 3, 4, 5, 2))],
)
def test_it_is_the_formula(tasks, shape, training):
    maps = maps_of(tasks, shape)
    unit = NDDR()
    unit(maps)
    distinct(unit)
    by_hand = expected(unit, maps, training)

    mixed = unit(maps, training=training)

    assert list(mixed) == list(maps)
    for task in maps:
        np.testing.assert_allclose(mixed[task], by_hand[task], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_it_begins_with_channel_k_of_channel_k(tasks):
    maps = maps_of(tasks, (2, 3, 5, 4))
    unit = NDDR(same_task=0.7)
    mixed = unit(maps)

    for task in maps:
        rest = [maps[other] for other in maps if other != task]
        mean = 0.7 * maps[task] + 0.3 * np.mean(rest, axis=0)
        by_hand = np.maximum(mean / np.sqrt(1 + 1e-3), 0)
        np.testing.assert_allclose(mixed[task], by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (4, 3), (2, 6, 3)])
def test_channels_may_stand_first(shape):
    last = maps_of(2, shape)
    first = {task: np.moveaxis(x, -1, 1) for task, x in last.items()}
    one, other = NDDR(), NDDR(data_format="channels_first")
    one(last)
    other(first)
    other.set_weights(distinct(one).get_weights())

    for task, mixed in other(first).items():
        there = np.moveaxis(one(last)[task], -1, 1)
        np.testing.assert_allclose(mixed, there, rtol=1e-5, atol=1e-6)


def tower(outputs):
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 6, 3), name="image")
    x = layers.Conv2D(4, 3, 2, activation="relu", name="conv")(image)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, layers.Dense(outputs, name="score")(x))


IMAGES = np.random.default_rng(0).uniform(size=(3, 8, 6, 3)).astype("float32")


def joined(tasks=2, **options):
    towers = {f"t{k}": tower(k + 1) for k in range(tasks)}
    return stitch(towers, ["conv", "pool"], unit=NDDR, **options)


@pytest.mark.parametrize("tasks", [2, 3])
def test_a_joined_model_trains_its_units_in_a_group_and_is_saved(tasks, tmp_path):
    model = joined(tasks, kernel_regularizer="l2")
    optimizer = LearningRateGroups(keras.optimizers.SGD(0.1), {"^nddr_": 0})
    model.compile(optimizer, "mse")
    units = [layer for layer in model.layers if isinstance(layer, NDDR)]
    assert [unit.name for unit in units] == ["nddr_conv", "nddr_pool"]
    assert len(model.losses) == 2 * tasks
    before = [unit.kernels["t0"].numpy() for unit in units]
    score = model.get_layer("t0_score").kernel.numpy()
    labels = {f"t{k}": np.ones((3, k + 1)) for k in range(tasks)}

    model.fit(IMAGES, labels, verbose=0)

    # With a multiplier of 0 the units alone stand still.
    for unit, kernel in zip(units, before, strict=True):
        np.testing.assert_array_equal(unit.kernels["t0"], kernel)
    assert np.abs(model.get_layer("t0_score").kernel.numpy() - score).max() > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for copy in (loaded, _cloned(model)):
        for task, output in model(IMAGES).items():
            np.testing.assert_array_equal(copy(IMAGES)[task], output)


def _cloned(model):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def test_a_step_moves_what_a_task_takes_of_itself_and_of_the_other():
    model = joined()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    kernel = model.get_layer("nddr_conv").kernels["t0"]
    before = kernel.numpy().reshape(2, 4, 4)
    model.fit(IMAGES, {"t0": np.ones((3, 1)), "t1": np.ones((3, 2))}, verbose=0)

    moved = np.abs(kernel.numpy().reshape(2, 4, 4) - before).max(axis=(1, 2))
    assert np.all(moved > 0)


def test_it_is_served(tmp_path):
    model = distinct(joined())

    path = export_saved_model(model, tmp_path)

    served = tf.saved_model.load(str(path)).signatures["t1"](image=IMAGES)["t1"]
    np.testing.assert_allclose(served, model(IMAGES)["t1"], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_a_quantized_model_is_loaded_as_it_was(tmp_path):
    model = distinct(joined())
    model.quantize("int8")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")

    for task, output in model(IMAGES).items():
        np.testing.assert_array_equal(loaded(IMAGES)[task], output)


def test_half_precision_keeps_its_weights_in_float32():
    unit = NDDR(dtype="mixed_bfloat16")

    mixed = unit(maps_of(2, (2, 5, 7, 4)))

    assert mixed["t0"].dtype == "bfloat16"
    assert {w.dtype for w in unit.weights} == {"float32"}


def test_a_joined_model_is_drawn_and_told_with_its_units():
    model = joined(same_task=0.75)

    assert "unit nddr_conv: t0 takes 0.75 from t0, 0.25 from t1" in network_table(model)
    texts = [text.get_text() for text in plot_network(model).axes[0].texts]
    assert "nddr_pool" in texts


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 4)], "at least two tensors"),
        ([(2, 4), (2, 5)], r"'unit' mixes tensors of one shape.*\(2, 5\)"),
        ([(2, 3, None)] * 2, "with known channels"),
        ([(2,)] * 2, r"rank 2, \(N, C\), to 5"),
    ],
)
def test_maps_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        NDDR(name="unit").build({f"t{k}": shape for k, shape in enumerate(shapes)})


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"`same_task` must be a number.*'much'"):
        NDDR(same_task="much")
    with pytest.raises(ValueError, match="`data_format` must be"):
        NDDR(data_format="last")
    with pytest.raises(ValueError, match="leave `project` or `unit`"):
        joined(project=True)
