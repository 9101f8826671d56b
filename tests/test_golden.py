"""What earlier versions saved still loads, and gives the same (tests/golden)."""

import importlib.util
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_cross_stitch
from keras_cross_stitch import LearningRateGroups

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if (path / "served").is_dir())
MODELS = ("per_channel", "per_layer", "uncertainty", "dynamic_average")

spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.fixture(params=VERSIONS)
def folder(request):
    return GOLDEN / request.param


@pytest.fixture
def answers(folder):
    with np.load(folder / "answers.npz") as file:
        return dict(file)


def same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_last_release_or_this_version_is_there():
    """A version that saves what none did before comes with a folder of its own."""
    assert VERSIONS
    assert all(path.stat().st_size < 500_000 for path in GOLDEN.rglob("*"))
    assert VERSIONS[0] <= keras_cross_stitch.__version__


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_gives_the_same_and_trains_on(folder, answers, name):
    model = keras.saving.load_model(folder / f"{name}.keras")

    for task, x in model.predict(answers["image"], verbose=0).items():
        same(x, answers[f"{name}/{task}"])
    loss = model.evaluate(make.images(12), make.labels(12), verbose=0)[0]
    same(loss, answers[f"{name}/loss"])
    assert isinstance(model.optimizer, LearningRateGroups)
    assert int(model.optimizer.iterations) == 3
    assert np.isfinite(make.train(model).history["loss"]).all()


def test_regions_are_found_as_before(folder, answers):
    model = keras.saving.load_model(folder / "regions.keras")
    given = {name: answers[f"regions_given/{name}"] for name in ("image", "rois")}

    found = make.named(model.predict(given, verbose=0))

    assert found["detection/num_detections"].any()
    for name, x in found.items():
        same(x, answers[f"regions/{name}"])


def test_a_served_version_gives_the_same(folder, answers):
    signatures = tf.saved_model.load(folder / "served" / "1").signatures
    images = answers["image"]
    files = tf.stack([tf.io.encode_png(x) for x in images.astype("uint8")])

    for task in ("kind", "depth"):
        expected = answers[f"per_channel/{task}"]
        same(signatures[task](image=tf.constant(images))[task], expected)
        same(signatures[f"{task}_from_jpeg"](image_bytes=files)[task], expected)
    both = signatures["serving_default"](image=tf.constant(images))
    assert both.keys() >= {"kind", "depth"}
