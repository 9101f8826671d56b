import json

import keras
import numpy as np
import pytest

from export.savedmodel import export
from keras_cross_stitch import stitch

layers = keras.layers


def tower(outputs):
    image = keras.Input((9, 7, 3), name="image")
    x = layers.Rescaling(1 / 255, name="rescaling")(image)
    x = layers.Conv2D(4, 3, activation="relu", name="conv1")(x)
    x = layers.Conv2D(4, 3, activation="relu", name="conv2")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(outputs, name="score")(x)
    return keras.Model(image, x)


@pytest.fixture(scope="session")
def model():
    """Of three tasks; at conv2, none takes anything from "age", but age itself."""
    keras.utils.set_random_seed(0)
    towers = {"kind": tower(5), "age": tower(1), "normals": tower(3)}
    model = stitch(towers, at=["conv1", "conv2"], same_task=0.8)
    unit = model.get_layer("cross_stitch_conv2")
    alpha = np.array(unit.alpha)  # by age, kind, normals
    alpha[1:, 0] = 1e-7
    unit.alpha.assign(alpha)
    return model


@pytest.fixture(scope="session")
def model_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "model.keras"
    model.save(path)
    answers = {"kind": {"kind": "classes"}, "normals": {"kind": "normals"}}
    path.with_name("answers.json").write_text(json.dumps(answers))
    return path


@pytest.fixture(scope="session")
def images():
    return np.random.default_rng(0).integers(256, size=(5, 9, 7, 3)).astype("float32")


@pytest.fixture(scope="session")
def images_file(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npy"
    np.save(path, images)
    return path


@pytest.fixture(scope="session")
def version(model_file, images_file, tmp_path_factory):
    """A version with all that travels with it."""
    directory = tmp_path_factory.mktemp("served") / "cross_stitch"
    written, _, _ = export(
        model_file, directory, from_jpeg=True, warmup=3, images=images_file
    )
    return written


@pytest.fixture(scope="session")
def cheaper(model_file, images_file, tmp_path_factory):
    """(a version in bfloat16 without some links, the links, the changes)."""
    return export(
        model_file,
        tmp_path_factory.mktemp("cheaper"),
        images=images_file,
        drop_below=1e-4,
        dtype="bfloat16",
    )
