"""Models and versions of them, and one preview server, that the tests here share.

Where KCS_TF_SERVING=host:port names a TF Serving that watches KCS_TF_SERVING_DIR, the
tests that take `address` run against it, too.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from export.client import Client
from export.make.savedmodel import export
from export.preview import server as preview_server
from export.preview.loaded_version import Limits
from export.preview.served_model import ServedModel
from keras_cross_stitch import Detections, RoIAlign, export_saved_model, stitch

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


TASKS = ("segmentation", "normals")
SIZE = (24, 32)
ANSWERS = {
    "segmentation": {
        "kind": "classes",
        "names": ["wall", "floor", "lamp", "table", "door"],
        "colours": [
            [200, 30, 30],
            [30, 200, 30],
            [30, 30, 200],
            [9, 9, 9],
            [99, 0, 99],
        ],
        "description": "What each pixel shows",
    },
    "normals": {"kind": "normals", "description": "Where each surface faces"},
}


def two_tasks(seed):
    """A stitched model with random weights, those of the seed."""
    keras.utils.set_random_seed(seed)

    def tower(channels, answer):
        image = keras.Input((*SIZE, 3), name="image")
        x = keras.layers.Rescaling(1 / 255)(image)
        x = keras.layers.Conv2D(6, 5, padding="same", activation="relu", name="tap")(x)
        x = keras.layers.Conv2D(channels, 3, padding="same", name="logits")(x)
        return keras.Model(image, answer(x))

    towers = {
        "segmentation": tower(5, keras.layers.Softmax(name="answer")),
        "normals": tower(3, keras.layers.UnitNormalization(name="answer")),
    }
    return stitch(towers, at=["tap"])


class Served:
    """A folder of versions, and the models that they were made of."""

    def __init__(self, root):
        self.directory = root / "served"
        self.directory.mkdir(exist_ok=True, parents=True)
        self._staging = root / "staging"
        self.models = {}
        self.answers = ANSWERS

    @property
    def latest(self):
        return max(self.models)

    def publish(self):
        """Puts the next version where it is served."""
        return self.move_in(self.export())

    def export(self):
        """Writes the next version to where it is not served yet."""
        names = [int(p.name) for p in self.directory.iterdir() if p.name.isdecimal()]
        version = max(names, default=0) + 1
        model = two_tasks(seed=version)
        path = export_saved_model(model, self._staging, version=version, from_jpeg=True)
        extra = path / "assets.extra"
        extra.mkdir()
        (extra / "answers.json").write_text(json.dumps(ANSWERS))
        self.models[version] = model
        return path

    def move_in(self, path):
        path.rename(self.directory / path.name)
        return int(path.name)

    def publish_broken(self):
        """Puts a version with truncated variables where it is served."""
        path = self._staging / str(self.latest + 1)
        shutil.copytree(self.directory / str(self.latest), path)
        (data,) = path.glob("variables/variables.data*")
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        return self.move_in(path)

    def predict(self, images, version=None):
        """What `model.predict` says, with the weights of a version."""
        model = self.models[version or self.latest]
        return model.predict(np.asarray(images, "float32"), verbose=0)

    @staticmethod
    def pictures(count=1, seed=0, size=SIZE):
        rng = np.random.default_rng(seed)
        return rng.integers(0, 256, (count, *size, 3), dtype="uint8")

    @staticmethod
    def png(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("preview"))
    served.publish()
    return served


@pytest.fixture(scope="session")
def server(served):
    """The preview server in a thread: the ports of gRPC and REST."""
    labels = {"v1": 1, "v2": 2}
    limits = Limits(body_bytes=2**20, pixels=10**6)
    model = ServedModel("cross_stitch", served.directory, labels, limits)
    with running(model) as ports:
        yield ports


@pytest.fixture(scope="session")
def region_addresses(region_version):
    """Of a preview server of the model of regions: gRPC and REST."""
    limits = Limits(pixels=10**6)
    with running(ServedModel("cross_stitch", region_version.parent, {}, limits)) as at:
        yield f"127.0.0.1:{at[0]}", f"http://127.0.0.1:{at[1]}"


@pytest.fixture(scope="session")
def preview():
    """A function that runs a preview server of a `ServedModel` in a thread."""
    return running


@contextlib.contextmanager
def running(model, ports=(0, 0)):
    grpc_port, listening = preview_server.listen(*ports)
    with listening:
        server = preview_server.server(model, grpc_port)
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield grpc_port, listening.getsockname()[1]
        finally:  # else a test that fails never ends
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def grpc_address(server):
    return f"127.0.0.1:{server[0]}"


@pytest.fixture(scope="session")
def rest_address(server):
    return f"http://127.0.0.1:{server[1]}"


@pytest.fixture(scope="session")
def tf_serving(tmp_path_factory):
    """A real TF Serving's address and the folder that it watches, with a version."""
    address = os.environ.get("KCS_TF_SERVING")
    if not address:
        pytest.skip(
            "needs TF Serving: set KCS_TF_SERVING=host:port, and KCS_TF_SERVING_DIR to "
            "the folder that it watches for versions of 'cross_stitch'"
        )
    served = Served(tmp_path_factory.mktemp("tf_serving"))
    served.directory = Path(os.environ["KCS_TF_SERVING_DIR"])
    version = served.publish()
    with Client(address) as client:
        wait_for(lambda: state_of(client, version) == "AVAILABLE", seconds=60)
    return address, served


@pytest.fixture(params=["grpc", "rest", "tf_serving"])
def door(request):
    """(address, Served): each way in."""
    if request.param == "tf_serving":
        return request.getfixturevalue("tf_serving")
    address = request.getfixturevalue(f"{request.param}_address")
    return address, request.getfixturevalue("served")


@pytest.fixture(scope="session", name="free_port")
def free_port_():
    return free_port


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def wait_for(true, seconds=20):
    late = time.monotonic() + seconds
    while not true():
        if time.monotonic() > late:
            pytest.fail(f"not true within {seconds} seconds")
        time.sleep(0.05)


@pytest.fixture(scope="session", name="wait_for")
def wait_for_():
    return wait_for


def state_of(client, version):
    """Its state's name; None where the server knows no such version."""
    states = {x.version: x for x in client.status().model_version_status}
    found = states.get(version)
    return found and found.State.Name(found.state)
