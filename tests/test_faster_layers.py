"""Exchanged layers compute what Keras's do, in one or several of their passes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cross_stitch import faster_layers


def tower(dtype="float32", trainable=True, **options):
    """Normalisation of odd maps, cropped, for a task of three channels."""
    image = keras.Input((9, 7, 2))
    x = keras.layers.Conv2D(3, 3, name="conv", dtype=dtype)(image)
    x = keras.layers.BatchNormalization(name="norm", dtype=dtype, **options)(x)
    x = keras.layers.Cropping2D(((1, 2), (0, 3)), name="crop", dtype=dtype)(x)
    model = keras.Model(image, x)
    model.get_layer("norm").trainable = trainable
    rng = np.random.default_rng(0)
    # Statistics of maps that are neither of mean zero nor of variance one.
    model.set_weights([rng.uniform(0.5, 2, w.shape) for w in model.get_weights()])
    return model


def trained(model, steps=4):
    """The model's weights and what it gives, after some steps."""
    rng = np.random.default_rng(1)
    x = rng.normal(3, 2, (5, 9, 7, 2)).astype("float32")
    y = rng.normal(size=(5, *model.output.shape[1:])).astype("float32")
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=False)
    for _ in range(steps):
        model.train_on_batch(x, y)
    return [*model.get_weights(), model.predict_on_batch(x)]


CASES = {
    "by the batch": {},
    "frozen": {"trainable": False},
    "another epsilon and momentum": {"epsilon": 0.3, "momentum": 0.6},
    "without a scale": {"scale": False},
    "of rows": {"axis": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_trains_as_with_keras_own_layers(case):
    exchanged = tower(**CASES[case])
    faster_layers.exchange(exchanged.layers)
    for ours, theirs in zip(
        trained(exchanged), trained(tower(**CASES[case])), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_maps_in_bfloat16_are_normalised_in_float32():
    exchanged = tower("mixed_bfloat16")
    faster_layers.exchange(exchanged.layers)
    theirs = trained(tower("mixed_bfloat16"))
    for a, b in zip(trained(exchanged), theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.03, atol=0.03)
    assert exchanged.output.dtype == "bfloat16"


def test_the_moving_statistics_are_those_of_the_batch():
    rng = np.random.default_rng(2)
    x = rng.normal(3, 2, (3, 5, 7, 4))
    image = keras.Input(x.shape[1:])
    model = keras.Model(image, keras.layers.BatchNormalization(momentum=0.7)(image))
    faster_layers.exchange(model.layers)
    given = model(x.astype("float32"), training=True)
    *_, mean, variance = model.get_weights()
    np.testing.assert_allclose(mean, 0.3 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(variance, 0.7 + 0.3 * x.var((0, 1, 2)), rtol=1e-5)
    expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)


def test_the_faster_operations_run():
    model = tower()
    faster_layers.exchange(model.layers)
    step = tf.function(lambda x: model(x, training=True))
    graph = step.get_concrete_function(tf.TensorSpec((None, 9, 7, 2))).graph
    assert {"FusedBatchNormV3", "Slice"} <= {x.type for x in graph.get_operations()}


def test_other_layers_stay_as_they_are():
    class Own(keras.layers.BatchNormalization):
        pass

    vectors = keras.layers.BatchNormalization()
    vectors.build((None, 3))
    own, unused = Own(), keras.layers.BatchNormalization()
    own.build((None, 5, 5, 3))
    first = keras.layers.Cropping2D(1, data_format="channels_first")
    others = [
        keras.layers.BatchNormalization(**{option: True})
        for option in ("renorm", "synchronized")
    ]
    for layer in others:
        layer.build((None, 5, 5, 3))
    assert faster_layers.exchange([vectors, own, unused, first, *others]) == []


def test_a_masked_map_is_normalised_by_keras():
    x = np.random.default_rng(3).normal(size=(2, 5, 7, 4)).astype("float32")
    mask = x[..., 0] > 0
    image = keras.Input(x.shape[1:])
    layer = keras.layers.BatchNormalization()
    model = keras.Model(image, layer(image))
    expected = layer(x, training=True, mask=mask)
    faster_layers.exchange(model.layers)
    np.testing.assert_allclose(layer(x, training=True, mask=mask), expected, atol=1e-6)


def test_the_saved_file_is_keras_own(tmp_path):
    model = tower()
    faster_layers.exchange(model.layers)
    trained(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert "call" not in vars(loaded.get_layer("norm"))
    x = np.random.default_rng(4).normal(size=(2, 9, 7, 2)).astype("float32")
    np.testing.assert_allclose(model(x), loaded(x), rtol=1e-5, atol=1e-5)
