import io
import json

import keras
import numpy as np
import pytest
from PIL import Image

from export.savedmodel import export
from keras_cross_stitch import Detections, RoIAlign, stitch

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


REGION_ANSWERS = {
    "detection": {
        "kind": "detection",
        "names": ["red", "green"],
        "colours": [],
        "drawn_from": 0.3,
        "description": "What is red or green",
    },
    "attributes": {"kind": "attributes", "names": ["colourful", "dark"]},
}


@pytest.fixture(scope="session")
def region_model():
    """Finds what is red or green by the mean colour of a region; nothing is trained."""
    image = keras.Input((48, 64, 3), name="image")
    rois = keras.Input((None, 4), name="rois")
    colour = layers.Reshape((-1, 3))(RoIAlign(size=1, stride=1)([image, rois]))
    scores = layers.Dense(3, "softmax", name="scores")(colour)
    deltas = layers.Dense(8, kernel_initializer="zeros", name="deltas")(colour)
    found = Detections((48, 64), iou_threshold=0.1, name="found")(
        [scores, deltas, rois]
    )
    attributes = layers.Dense(2, "sigmoid", name="attributes")(colour)
    outputs = {"detection": found, "attributes": attributes}
    model = keras.Model({"image": image, "rois": rois}, outputs)
    # Of the background, red and green: the share of each colour, less the others'.
    contrast = np.array([[0, 2, -1], [0, -1, 2], [0, -1, -1]]) * 8 / 255
    model.get_layer("scores").set_weights([contrast, np.array([8.0, 0, 0])])
    sums = np.array([[1, -1]] * 3) * 20 / 255
    model.get_layer("attributes").set_weights([sums, np.array([-10.0, 10])])
    return model


@pytest.fixture(scope="session")
def region_model_file(region_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("region_model") / "model.keras"
    region_model.save(path)
    path.with_name("answers.json").write_text(json.dumps(REGION_ANSWERS))
    return path


class Shapes:
    """A picture of a red and a green rectangle, of another form than the model's."""

    red, green = (20, 30, 70, 90), (75, 120, 110, 175)  # left, top, right, bottom
    size = (120, 200)  # width, height

    def __init__(self):
        self.pixels = np.full((*self.size[::-1], 3), 90, "uint8")
        for box, colour in ((self.red, (250, 10, 10)), (self.green, (10, 180, 10))):
            left, top, right, bottom = box
            self.pixels[top:bottom, left:right] = colour

    @property
    def jpeg(self):
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "JPEG", quality=95)
        return file.getvalue()


@pytest.fixture(scope="session")
def shapes():
    return Shapes()


@pytest.fixture(scope="session")
def shapes_folder(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "shapes.jpg").write_bytes(shapes.jpeg)
    Image.new("RGB", (80, 50), (90, 90, 90)).save(folder / "plain.png")
    return folder


@pytest.fixture(scope="session")
def region_version(region_model_file, shapes_folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "regions"
    written, _, _ = export(region_model_file, directory, warmup=1, images=shapes_folder)
    return written
