"""The library on the backend of the run, which `KERAS_BACKEND` chooses.

`KERAS_BACKEND=jax python -m pytest tests/test_backends.py`; no TensorFlow is needed. In
a run with TensorFlow the whole file is also run with JAX, and with PyTorch where it is
installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_cross_stitch import (
    NDDR,
    AlphaHistory,
    Detections,
    DynamicWeightAverage,
    LearningRateGroups,
    MaskedLoss,
    MaskedMetric,
    alpha_table,
    network_table,
    plot_alpha,
    plot_network,
    sharing,
    split,
    stitch,
    weigh_losses,
)

random = np.random.default_rng(0)
X = random.normal(size=(8, 6, 6, 3)).astype("float32")
Y = {"kind": np.arange(8) % 3, "age": random.normal(size=(8, 2)).astype("float32")}
LOSS = {"kind": "sparse_categorical_crossentropy", "age": "mse"}


def tower(units, activation=None):
    x = keras.Input((6, 6, 3), name="image")
    y = keras.layers.Conv2D(4, 3, padding="same", name="stem")(x)
    y = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(y)
    y = keras.layers.BatchNormalization(name="norm")(y)
    y = keras.layers.GlobalAveragePooling2D(name="pool")(y)
    model = keras.Model(x, keras.layers.Dense(units, activation, name="score")(y))
    model.set_weights([random.uniform(0.2, 1, w.shape) for w in model.get_weights()])
    model.get_layer("stem").trainable = False
    return model


def towers():
    return {"kind": tower(3, "softmax"), "age": tower(2)}


def stitched(at=("conv", "pool"), **unit):
    model = stitch(towers(), at=list(at), **unit)
    optimizer = LearningRateGroups(keras.optimizers.SGD(1e-2), alpha=10)
    model.compile(optimizer, LOSS)
    return model


def assert_close(answers, others):
    for task in others:
        np.testing.assert_allclose(answers[task], others[task], rtol=1e-4, atol=1e-5)


def test_at_the_identity_a_stitched_model_is_its_towers():
    given = towers()
    model = stitch(given, at=["conv", "pool"], same_task=1.0)
    alone = {task: given[task].predict(X, verbose=0) for task in given}
    assert_close(model.predict(X, verbose=0), alone)


def test_at_the_last_layer_a_split_model_is_its_first_tower():
    given = towers()
    given["age"].set_weights(
        [*given["kind"].get_weights()[:-2], *given["age"].get_weights()[-2:]]
    )
    model = split(given, at="score")
    alone = {task: given[task].predict(X, verbose=0) for task in given}
    assert_close(model.predict(X, verbose=0), alone)


def test_projections_join_other_maps_and_are_saved(tmp_path):
    def tower(channels, stride, units):
        image = keras.Input((6, 6, 3), name="image")
        x = keras.layers.Conv2D(channels, 3, stride, padding="same", name="conv")(image)
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
        return keras.Model(image, keras.layers.Dense(units, name="score")(x))

    given = {"kind": tower(4, 1, 3), "age": tower(6, 2, 2)}
    model = stitch(given, ["conv", "pool"], project=True, same_task=1.0)
    for task, one in given.items():
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(model(X)[task]),
            keras.ops.convert_to_numpy(one(X)),
        )
    model.compile("sgd", "mse")
    labels = {"kind": np.ones((8, 3)), "age": np.ones((8, 2))}
    assert np.isfinite(model.fit(X, labels, verbose=0).history["loss"]).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


@pytest.mark.parametrize("at", [("conv", "pool"), ()])
def test_it_trains_is_saved_and_goes_on(at, tmp_path, capsys):
    model = stitched(at)
    start = [row["mean"] for row in alpha_table(model)]
    history = model.fit(X, Y, epochs=2, callbacks=[AlphaHistory()], verbose=2).history
    assert history["loss"][-1] < history["loss"][0]
    now = [row["mean"] for row in alpha_table(model)]
    assert len(now) == 4 * len(at) == len([k for k in history if "alpha/" in k])
    assert all(a != b for a, b in zip(start, now, strict=True))
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.count("alpha/") == len(at)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    for one in (model, loaded):
        one.fit(X, Y, verbose=0, shuffle=False)
    assert_close(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_nddr_trains_and_is_saved(tmp_path):
    model = stitch(towers(), at=["conv", "pool"], unit=NDDR)
    model.compile(LearningRateGroups("sgd", {"^nddr_": 10}), LOSS)
    losses = model.fit(X, Y, epochs=2, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_what_is_learned_is_read_and_drawn():
    model = stitched()
    assert len(plot_alpha(model).axes) == 4
    assert len(plot_network(model).axes) == 1
    assert "kind takes 0.10 from age" in network_table(model)
    rows = sharing(model, (X, Y), batch_size=8)
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["part"] < 1
        assert row["part"] == pytest.approx(row["part_at_start"], rel=1e-5)
        assert np.isfinite(row["without"])


@pytest.mark.parametrize("jit", [True, False])
def test_what_a_layer_masks_is_missing(jit):
    words = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]])
    labels = random.normal(size=(2, 5, 1))
    x = keras.Input((None,), dtype="int32")
    y = keras.layers.Embedding(6, 4, mask_zero=True)(x)
    model = keras.Model(x, keras.layers.Dense(1)(y))
    jit = jit and keras.backend.backend() != "torch"  # which compiles for minutes
    metrics = [MaskedMetric("mse")]
    model.compile("sgd", MaskedLoss("mse"), metrics=metrics, jit_compile=jit)

    values = model.evaluate(words, labels, verbose=0)

    error = (model.predict(words, verbose=0) - labels) ** 2
    np.testing.assert_allclose(values, error[words != 0].mean(), rtol=1e-5)


def test_missing_components_and_masks():
    labels = np.array([[1.0, np.nan], [np.nan, np.nan], [4.0, 6.0]])
    predicted = np.array([[2.0, 9.0], [9.0, 9.0], [4.0, 3.0]])
    loss = MaskedLoss("mae")(labels, predicted)
    assert float(keras.ops.convert_to_numpy(loss)) == pytest.approx(4 / 3)
    metric = MaskedMetric("mse")
    metric.update_state(labels, predicted)
    value = keras.ops.convert_to_numpy(metric.result())
    assert float(value) == pytest.approx(10 / 3)


@pytest.mark.parametrize("by", ["uncertainty", "dynamic_average"])
def test_a_copy_trains_its_own_weights_of_losses(by):
    model, loss = weigh_losses(stitched(), LOSS, by)
    copy = keras.models.clone_model(model)
    copy.compile(keras.optimizers.SGD(1e-2), loss)
    callbacks = [DynamicWeightAverage()] if by == "dynamic_average" else []
    copy.fit(X, Y, epochs=3, callbacks=callbacks, verbose=0)
    moved, unmoved = (x.get_layer(by).get_weights()[0] for x in (copy, model))
    assert np.ptp(unmoved) == 0
    assert np.ptp(moved) > 0


def test_detections_without_duplicates():
    boxes = np.repeat([[2.0, 2, 22, 22], [40, 2, 60, 22]], 120, axis=0)[None]
    scores = np.linspace(0.9, 0.1, 240)[None]
    inputs = [np.stack([1 - scores, scores], -1), np.zeros((1, 240, 4)), boxes]
    found = Detections((64, 64))([x.astype("float32") for x in inputs])
    assert int(keras.ops.convert_to_numpy(found["num_detections"])[0]) == 2


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="runs the others")
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_all_of_this_on_another_backend(backend):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"needs {backend}, which is not installed")
    process = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-q"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
