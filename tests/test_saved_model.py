"""Exported models, loaded and run as TensorFlow Serving would."""

import importlib
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cross_stitch import export_saved_model, faster_layers, stitch
from keras_cross_stitch.saved_model import _check_equal

pytestmark = [pytest.mark.xdist_group("saved_model"), pytest.mark.slow]

# Else the first export does this, which puts another module in the place of
# `tf.saved_model`, and what a test has patched there is lost.
importlib.import_module("tensorflow.saved_model")

layers = keras.layers


def tower(outputs, size=8, dtype=None):
    image = keras.Input((size, size, 3), name="image")
    x = layers.Rescaling(1 / 255, name="rescaling", dtype=dtype)(image)
    x = layers.Conv2D(4, 3, activation="relu", name="conv", dtype=dtype)(x)
    x = layers.GlobalAveragePooling2D(name="pool", dtype=dtype)(x)
    return keras.Model(image, layers.Dense(outputs, name="score", dtype=dtype)(x))


def two_tasks(size=8, dtype=None):
    keras.utils.set_random_seed(0)
    towers = {"kind": tower(5, size, dtype), "age": tower(1, size, dtype)}
    return stitch(towers, at=["conv"])


def pixels(*shape):
    return np.random.default_rng(0).integers(256, size=shape).astype("float32")


def close(served, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(served, expected, rtol=0, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def model():
    return two_tasks()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    return export_saved_model(
        model, tmp_path_factory.mktemp("served") / "model", from_jpeg=True
    )


@pytest.fixture(scope="module")
def signatures(exported):
    loaded = tf.saved_model.load(str(exported))
    yield loaded.signatures
    del loaded  # a signature does not keep its variables alive


def test_there_is_a_signature_per_task_and_one_for_all(model, tmp_path):
    path = export_saved_model(model, tmp_path)
    loaded = tf.saved_model.load(str(path))
    assert set(loaded.signatures) == {"serving_default", "kind", "age"}


def test_from_jpeg_adds_a_signature_per_task_and_one_for_all(signatures):
    assert set(signatures) == {
        "serving_default",
        "kind",
        "age",
        "kind_from_jpeg",
        "age_from_jpeg",
        "from_jpeg",
    }
    _, inputs = signatures["kind_from_jpeg"].structured_input_signature
    assert {name: x.shape.as_list() for name, x in inputs.items()} == {
        "image_bytes": [None]
    }


@pytest.mark.parametrize(
    ("signature", "outputs"),
    [
        ("serving_default", {"kind": [None, 5], "age": [None, 1]}),
        ("kind", {"kind": [None, 5]}),
        ("age", {"age": [None, 1]}),
    ],
)
def test_signatures_are_named_as_the_model_names(signatures, signature, outputs):
    _, inputs = signatures[signature].structured_input_signature
    assert {name: x.shape.as_list() for name, x in inputs.items()} == {
        "image": [None, 8, 8, 3]
    }
    served = signatures[signature].structured_outputs
    assert {name: x.shape.as_list() for name, x in served.items()} == outputs


@pytest.mark.parametrize("batch", [1, 3])
def test_signatures_give_what_predict_gives(model, signatures, batch):
    image = pixels(batch, 8, 8, 3)
    expected = model.predict(image, verbose=0)
    together = signatures["serving_default"](image=image)
    for task in ("kind", "age"):
        close(together[task], expected[task])
        close(signatures[task](image=image)[task], expected[task])


def test_a_signature_runs_no_layer_of_another_task_alone(signatures):
    operations = {
        signature: " ".join(op.name for op in operations_of(signatures[signature]))
        for signature in ("kind", "age", "serving_default")
    }
    assert "kind_score" in operations["kind"]
    assert "age_conv" in operations["kind"]  # its map is mixed in
    assert "age_score" not in operations["kind"]
    assert "age_score" in operations["age"]
    assert "kind_score" not in operations["age"]
    assert "kind_score" in operations["serving_default"]
    assert "age_score" in operations["serving_default"]


def operations_of(signature):
    """All operations of a signature, those of the functions it calls included."""
    graph = signature.graph.as_graph_def()
    functions = {
        function.signature.name: function for function in graph.library.function
    }
    found, to_visit = [], [list(graph.node)]
    while to_visit:
        for node in to_visit.pop():
            found.append(node)
            called = functions.pop(node.attr["f"].func.name, None)
            if called:
                to_visit.append(list(called.node_def))
    return found


def test_the_export_needs_no_keras(exported, model):
    image = pixels(2, 8, 8, 3)
    program = (
        "import sys\n"
        "sys.modules['keras'] = None  # to import it is an error\n"
        "import numpy as np, tensorflow as tf\n"
        f"model = tf.saved_model.load({str(exported)!r})\n"
        "image = np.frombuffer(sys.stdin.buffer.read(), 'float32')\n"
        "image = image.reshape(2, 8, 8, 3)\n"
        "kind = model.signatures['kind'](image=tf.constant(image))['kind']\n"
        "sys.stdout.buffer.write(kind.numpy().tobytes())\n"
    )
    served = subprocess.run(
        [sys.executable, "-c", program],
        input=image.tobytes(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    kind = np.frombuffer(served, "float32").reshape(2, 5)
    close(kind, model.predict(image, verbose=0)["kind"])


def test_nothing_is_printed(model, tmp_path, capfd, caplog):
    export_saved_model(model, tmp_path)
    assert capfd.readouterr().out == ""
    assert caplog.records == []


def test_three_tasks(tmp_path):
    towers = {task: tower(2) for task in ("a", "b", "c")}
    path = export_saved_model(stitch(towers, at=["conv"]), tmp_path)
    assert set(tf.saved_model.load(str(path)).signatures) == {
        "serving_default",
        "a",
        "b",
        "c",
    }


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(tmp_path, dtype):
    model = two_tasks(dtype=dtype)
    loaded = tf.saved_model.load(str(export_saved_model(model, tmp_path)))
    image = pixels(2, 8, 8, 3)
    served = loaded.signatures["kind"](image=image)["kind"]
    assert served.dtype == dtype.removeprefix("mixed_")
    expected = model.predict(image, verbose=0)["kind"]
    close(served.numpy().astype("float32"), expected.astype("float32"))


def test_inputs_in_a_dict_keep_their_names(tmp_path):
    # Not in alphabetical order, and of different sizes.
    towers = {"kind": tower(5, size=8), "age": tower(1, size=9)}
    model = stitch(towers, at=["pool"], shared_input=False)
    loaded = tf.saved_model.load(str(export_saved_model(model, tmp_path)))
    _, inputs = loaded.signatures["age"].structured_input_signature
    assert {name: x.shape.as_list() for name, x in inputs.items()} == {
        "kind": [None, 8, 8, 3],
        "age": [None, 9, 9, 3],
    }
    images = {"kind": pixels(2, 8, 8, 3), "age": pixels(2, 9, 9, 3)}
    expected = model.predict(images, verbose=0)
    close(loaded.signatures["age"](**images)["age"], expected["age"])


def test_inputs_in_a_list_keep_their_names(tmp_path):
    right, left = keras.Input((4,), name="right"), keras.Input((3,), name="left")
    x = layers.Concatenate()([right, left])
    model = keras.Model([right, left], {"a": layers.Dense(2)(x), "b": x})
    loaded = tf.saved_model.load(str(export_saved_model(model, tmp_path)))
    served = loaded.signatures["b"](right=tf.ones((1, 4)), left=tf.zeros((1, 3)))
    np.testing.assert_array_equal(served["b"], [[1, 1, 1, 1, 0, 0, 0]])


def test_a_model_of_indices_and_of_one_batch_size_takes_any_batch(tmp_path):
    words = keras.Input(batch_shape=(2, 6), dtype="int32", name="words")
    x = layers.Embedding(3, 4)(words)
    path = export_saved_model(keras.Model(words, {"a": x}), tmp_path)
    loaded = tf.saved_model.load(str(path))
    _, inputs = loaded.signatures["a"].structured_input_signature
    assert inputs["words"].shape.as_list() == [None, 6]
    served = loaded.signatures["a"](words=tf.zeros((5, 6), "int32"))
    assert served["a"].shape == (5, 6, 4)


def test_a_task_with_a_dict_of_outputs_has_their_names(tmp_path):
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Flatten()(image)
    detection = {"boxes": layers.Dense(4)(x), "scores": layers.Dense(2)(x)}
    outputs = {"detection": detection, "attributes": layers.Dense(3)(x)}
    model = keras.Model(image, outputs)
    loaded = tf.saved_model.load(str(export_saved_model(model, tmp_path)))
    image = pixels(2, 8, 8, 3)
    expected = model.predict(image, verbose=0)
    served = loaded.signatures["detection"](image=image)
    assert set(served) == {"boxes", "scores"}
    close(served["boxes"], expected["detection"]["boxes"])
    together = loaded.signatures["serving_default"](image=image)
    assert set(together) == {"detection_boxes", "detection_scores", "attributes"}
    close(together["detection_scores"], expected["detection"]["scores"])


@pytest.fixture(scope="module")
def of_any_size():
    return two_tasks(size=None)


def test_unknown_height_and_width_stay_unknown(of_any_size, tmp_path):
    loaded = tf.saved_model.load(str(export_saved_model(of_any_size, tmp_path)))
    _, inputs = loaded.signatures["kind"].structured_input_signature
    assert inputs["image"].shape.as_list() == [None, None, None, 3]
    image = pixels(1, 20, 31, 3)
    expected = of_any_size.predict(image, verbose=0)["kind"]
    close(loaded.signatures["kind"](image=image)["kind"], expected)


def test_png_arrives_pixel_by_pixel(model, signatures):
    images = pixels(3, 8, 8, 3)
    files = [tf.io.encode_png(image.astype("uint8")) for image in images]
    served = signatures["kind_from_jpeg"](image_bytes=tf.stack(files))
    assert set(served) == {"kind"}
    expected = model.predict(images, verbose=0)
    close(served["kind"], expected["kind"])
    together = signatures["from_jpeg"](image_bytes=tf.stack(files))
    assert set(together) == {"kind", "age"}
    for task, output in together.items():
        close(output, expected[task])


def test_jpeg_and_png_of_any_size_are_resized_to_the_model(model, signatures):
    image = pixels(40, 24, 3).astype("uint8")
    files = [tf.io.encode_jpeg(image), tf.io.encode_png(image)]
    decoded = tf.stack([tf.io.decode_jpeg(files[0]), tf.io.decode_png(files[1])])
    resized = tf.image.resize(decoded, (8, 8), antialias=True)
    served = signatures["kind_from_jpeg"](image_bytes=tf.stack(files))
    close(served["kind"], model.predict(resized.numpy(), verbose=0)["kind"])


def test_resized_images_are_rounded_for_a_model_of_bytes(tmp_path):
    image = keras.Input((8, 8, 3), dtype="uint8", name="image")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1.0)(image))
    model = keras.Model(image, {"a": keras.layers.Dense(2)(x)})
    loaded = tf.saved_model.load(
        str(export_saved_model(model, tmp_path, from_jpeg=True))
    )
    large = pixels(1, 37, 53, 3).astype("uint8")

    served = loaded.signatures["from_jpeg"](image_bytes=[tf.io.encode_png(large[0])])

    resized = tf.image.resize(large, (8, 8), antialias=True).numpy()
    expected = model.predict(np.rint(resized).astype("uint8"), verbose=0)["a"]
    close(served["a"], expected)


def test_grayscale_images_are_taken_as_rgb(model, signatures):
    gray = pixels(8, 8, 1).astype("uint8")
    served = signatures["age_from_jpeg"](image_bytes=[tf.io.encode_png(gray)])["age"]
    rgb = np.repeat(gray, 3, axis=-1).astype("float32")
    close(served, model.predict(rgb[None], verbose=0)["age"])


def test_images_keep_their_size_where_the_model_takes_any(of_any_size, tmp_path):
    path = export_saved_model(of_any_size, tmp_path, from_jpeg=True)
    loaded = tf.saved_model.load(str(path))
    images = pixels(2, 20, 31, 3)
    files = [tf.io.encode_png(image.astype("uint8")) for image in images]
    served = loaded.signatures["kind_from_jpeg"](image_bytes=tf.stack(files))
    close(served["kind"], of_any_size.predict(images, verbose=0)["kind"])


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 3), (3, 8, 8)])
def test_from_jpeg_of_a_model_without_images_is_an_error(tmp_path, shape):
    x = keras.Input(shape)
    model = keras.Model(x, {"a": layers.Flatten()(x)})
    with pytest.raises(ValueError, match=r"models with one input, \(N, H, W, 3\)"):
        export_saved_model(model, tmp_path, from_jpeg=True)


@pytest.mark.parametrize("dtype", ["int8", "bool"])
def test_from_jpeg_of_a_model_that_cannot_hold_pixels_is_an_error(tmp_path, dtype):
    x = keras.Input((8, 8, 3), dtype=dtype)
    model = keras.Model(x, {"a": layers.Flatten()(x)})
    message = f"a type that holds 0 to 255, such as uint8 .* Received: {dtype}$"
    with pytest.raises(ValueError, match=message):
        export_saved_model(model, tmp_path, from_jpeg=True)


@pytest.mark.parametrize("task", ["from_jpeg", "a_from_jpeg"])
def test_from_jpeg_of_a_task_with_a_signatures_name_is_an_error(tmp_path, task):
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, {task: layers.Flatten()(x), "a": layers.Flatten()(x)})
    with pytest.raises(ValueError, match=f"another name. Received: '{task}'"):
        export_saved_model(model, tmp_path, from_jpeg=True)
    assert not list(tmp_path.iterdir())


def test_from_jpeg_of_two_inputs_is_an_error(tmp_path):
    towers = {"kind": tower(5), "age": tower(1)}
    model = stitch(towers, at=["conv"], shared_input=False)
    with pytest.raises(ValueError, match="models with one input"):
        export_saved_model(model, tmp_path, from_jpeg=True)


@pytest.fixture
def unwritten(monkeypatch):
    """Leaves out what takes time, for tests of folders alone."""
    import keras_cross_stitch.saved_model as module

    def write(run, model, path, from_jpeg, progress):
        path.mkdir()
        (path / "saved_model.pb").touch()

    monkeypatch.setattr(module, "_write", write)
    monkeypatch.setattr(module, "_compare", lambda *args: None)


@pytest.mark.usefixtures("unwritten")
def test_the_first_version_is_1_in_a_folder_made_for_it(model, tmp_path):
    path = export_saved_model(model, tmp_path / "models" / "cross_stitch")
    assert path == tmp_path / "models" / "cross_stitch" / "1"
    assert [child.name for child in path.iterdir()] == ["saved_model.pb"]
    assert os.listdir(path.parent) == ["1"]


@pytest.mark.usefixtures("unwritten")
def test_the_next_version_is_one_above_the_highest(model, tmp_path):
    for name in ("2", "10", "notes", ".export-99"):
        (tmp_path / name).mkdir()
    assert export_saved_model(model, str(tmp_path)) == tmp_path / "11"


@pytest.mark.usefixtures("unwritten")
def test_a_version_can_be_chosen(model, tmp_path):
    export_saved_model(model, tmp_path, version=20)
    assert export_saved_model(model, tmp_path, version=7) == tmp_path / "7"


@pytest.mark.usefixtures("unwritten")
def test_other_users_may_read_the_version(model, tmp_path):
    # As TensorFlow Serving, in its container, is one.
    before = os.umask(0o022)
    path = export_saved_model(model, tmp_path)
    os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o755


def test_finish_adds_files_before_the_version_has_its_name(model, tmp_path):
    def finish(path, inputs):
        assert not (tmp_path / "1").exists()
        answer = tf.saved_model.load(str(path)).signatures["age"](**inputs)["age"]
        assert answer.shape == (len(inputs["image"]), 1)
        (path / "assets.extra").mkdir()
        (path / "assets.extra" / "answers.json").write_text("{}")

    path = export_saved_model(model, tmp_path, finish=finish)
    assert path == tmp_path / "1"
    assert (path / "assets.extra" / "answers.json").read_text() == "{}"


@pytest.mark.usefixtures("unwritten")
def test_nothing_is_left_when_finish_fails(model, tmp_path):
    def finish(path, inputs):
        raise KeyError("a file is missing")

    with pytest.raises(KeyError, match="a file is missing"):
        export_saved_model(model, tmp_path / "new", finish=finish)
    assert os.listdir(tmp_path) == []


def test_an_existing_version_is_an_error_and_stays(model, tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "saved_model.pb").write_text("kept")
    message = r"already has version 3: remove it, or .* for the next one, 4"
    with pytest.raises(ValueError, match=message):
        export_saved_model(model, tmp_path, version=3)
    assert (tmp_path / "3" / "saved_model.pb").read_text() == "kept"
    assert os.listdir(tmp_path) == ["3"]


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", True])
def test_a_version_is_a_positive_integer(model, tmp_path, version):
    with pytest.raises(ValueError, match=re.escape(f"version={version!r}")):
        export_saved_model(model, tmp_path / "new", version=version)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("below", ["", "model", "models/model"])
def test_a_directory_that_is_a_file_is_an_error_before_any_work(
    model, tmp_path, monkeypatch, below
):
    monkeypatch.setattr(keras.export, "ExportArchive", None)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(
        ValueError, match="must be a folder that can be written to"
    ) as e:
        export_saved_model(model, tmp_path / "file" / below)
    assert str(tmp_path / "file" / below) in str(e.value)
    assert "\n" not in str(e.value)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("gs://bucket/model", "must be a local folder.*copy.*'gs://bucket/model'"),
        ("s3://bucket/model", "must be a local folder"),
        ("gs:/bucket", "must be a local folder"),  # of a pathlib.Path
        ("models/a[1]", r"must not contain any of .*'models/a\[1\]'"),
        ("models/*", "must not contain any of"),
        ("~nobody_of_this_name/model", "home directory.*'~nobody_of_this_name/model'"),
    ],
)
def test_a_directory_that_cannot_be_served_from_is_an_error_before_any_work(
    model, tmp_path, monkeypatch, directory, message
):
    monkeypatch.setattr(keras.export, "ExportArchive", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        export_saved_model(model, directory)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("unwritten")
def test_the_home_folder_may_be_a_tilde(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export_saved_model(model, "~/model") == tmp_path / "model" / "1"


def test_a_read_only_directory_is_an_error_before_any_work(
    model, tmp_path, monkeypatch
):
    def read_only(*args, **kwargs):  # permissions do not bind root
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(keras.export, "ExportArchive", None)
    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(ValueError, match=r"written to.*\(Read-only file system\)"):
        export_saved_model(model, tmp_path / "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_when_writing_fails(model, tmp_path, monkeypatch, error):
    def fail(trackable, path, **kwargs):
        os.makedirs(path)  # half of it is there
        raise error

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(type(error)):
        export_saved_model(model, tmp_path / "models" / "new")
    assert os.listdir(tmp_path) == []


def test_no_version_is_there_until_it_is_compared(model, tmp_path, monkeypatch):
    seen = []

    def fail(path):
        seen.extend(os.listdir(tmp_path))
        seen.append(os.path.exists(os.path.join(path, "saved_model.pb")))
        raise RuntimeError("in the middle")

    (tmp_path / "1").mkdir()
    monkeypatch.setattr(tf.saved_model, "load", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        export_saved_model(model, tmp_path)
    *names, written = seen
    assert written
    assert [name for name in names if name.isdecimal()] == ["1"]
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.parametrize(
    "signature", ["serving_default", "from_jpeg", "age", "age_from_jpeg"]
)
def test_a_signature_that_differs_is_an_error(model, tmp_path, monkeypatch, signature):
    load = tf.saved_model.load

    class Different:
        def __init__(self, path):
            self.loaded = load(path)
            self.signatures = dict(self.loaded.signatures)
            right = self.signatures[signature]
            self.signatures[signature] = lambda **inputs: {
                name: 1.0001 * value for name, value in right(**inputs).items()
            }

    monkeypatch.setattr(tf.saved_model, "load", Different)
    message = f"'{signature}' .* differ by .* Nothing was written"
    with pytest.raises(RuntimeError, match=message):
        export_saved_model(model, tmp_path, from_jpeg=True)
    assert os.listdir(tmp_path) == []


def test_a_model_that_gives_nan_is_an_error(tmp_path):
    model = two_tasks()
    model.get_layer("age_score").bias.assign([np.nan])
    message = r"'age'.* differ by nan.* NaN weights; or give .* `sample=` \(`--images`"
    with pytest.raises(RuntimeError, match=message):
        export_saved_model(model, tmp_path)


def test_a_model_that_gives_zeros_is_exported(tmp_path):
    model = two_tasks()
    model.get_layer("age_score").kernel.assign(np.zeros((4, 1)))
    assert export_saved_model(model, tmp_path).name == "1"


def read_by(*read, shape=(2,), dtype="int64", **kwargs):
    """A model of one task whose layers read the input `x` one after the other."""
    x = y = keras.Input(shape, dtype=dtype, name="x", **kwargs)
    for layer in read:
        y = layer(y)
    return keras.Model(x, {"a": y})


def adapted(layer, data):
    layer.adapt(data)
    return layer


class WordsAndPositions(layers.Layer):
    """Layers and a table within a layer, as in Keras's examples."""

    def __init__(self, words, positions, **kwargs):
        super().__init__(**kwargs)
        self.words = layers.Embedding(words, 3)
        self.positions = layers.Embedding(positions, 3)
        pairs = tf.lookup.KeyValueTensorInitializer([7], [1], "int64", "int64")
        self.same = tf.lookup.StaticHashTable(pairs, default_value=0)

    def build(self, input_shape):
        self.words.build(input_shape)
        self.positions.build(input_shape)

    def call(self, x):
        steps = keras.ops.arange(keras.ops.shape(x)[1])
        same = self.same.lookup(keras.ops.cast(x, "int64"))
        scale = keras.ops.cast(same[..., None] + 1, "float32")
        return scale * self.words(x) + self.positions(steps)

    def compute_output_shape(self, input_shape):
        return (*input_shape, 3)


class ByATable(keras.Model):
    """A nested model with a table and a layer of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        pairs = tf.lookup.KeyValueTensorInitializer([7], [1.5], "int64", "float32")
        self.table = tf.lookup.StaticHashTable(pairs, default_value=0.5)
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(self.table.lookup(keras.ops.cast(x, "int64")))


class AboveAThousand(layers.Layer):
    def call(self, x):
        with tf.control_dependencies([tf.debugging.assert_greater(x, 1000.0)]):
            return x + 1


@pytest.mark.parametrize("size", [8, None])
def test_a_model_that_overflows_on_large_numbers_is_exported(tmp_path, size):
    """Drawn input is of any size; a given sample is compared on as it is."""
    x = keras.Input((size, 3), name="x")
    exponential = layers.Activation("exponential")(x)
    outputs = {"a": layers.UnitNormalization()(exponential)}
    outputs["kind"] = keras.ops.argmax(x, axis=-1)
    model = keras.Model(x, outputs)
    loaded = tf.saved_model.load(str(export_saved_model(model, tmp_path)))
    given = tf.random.uniform((4, 8, 3))
    expected = model(given)["a"]
    np.testing.assert_allclose(loaded.signatures["a"](x=given)["a"], expected, 1e-3)
    sample = np.full((1, 8, 3), 200, "float32")
    with pytest.raises(RuntimeError, match="differ by nan"):
        export_saved_model(model, tmp_path, sample=sample)


def vectorization():
    return layers.TextVectorization(vocabulary=["x", "y"], output_sequence_length=4)


def lookup(kind, **kwargs):
    vocabulary = ["x", "y"] if kind is layers.StringLookup else [700, 900]
    return kind(vocabulary=vocabulary, **kwargs)


@pytest.mark.parametrize(
    ("read", "model", "inputs"),
    [
        (
            lambda: [lookup(layers.StringLookup, num_oov_indices=0)],
            {"dtype": "string"},
            [["y", "x"]],
        ),
        (
            lambda: [adapted(layers.StringLookup(output_mode="one_hot"), ["p", "q"])],
            {"dtype": "string", "shape": (1,)},
            [["p"], ["q"], ["other"]],
        ),
        (lambda: [lookup(layers.StringLookup, invert=True)], {}, [[0, 2]]),
        (
            lambda: [
                lookup(layers.IntegerLookup, num_oov_indices=0),
                layers.Embedding(2, 3),
            ],
            {},
            [[900, 700]],
        ),
        (
            lambda: [vectorization(), layers.Embedding(4, 3)],
            {"dtype": "string", "shape": ()},
            ["y x other", ""],
        ),
        (
            lambda: [layers.Hashing(9), layers.Embedding(9, 3)],
            {"dtype": "string"},
            [["x", "other"]],
        ),
        (lambda: [layers.CategoryEncoding(7)], {}, [[6, 0]]),
        (lambda: [layers.Embedding(50, 3)], {"dtype": "float32"}, [[49, 7]]),
        (
            lambda: [WordsAndPositions(30, 10)],
            {"dtype": "float32", "shape": (None,)},
            [[29, 7, 0]],
        ),
        (lambda: [ByATable()], {"dtype": "float32"}, [[7, 1]]),
        (
            lambda: [keras.Sequential([layers.Identity(), ByATable()])],
            {"dtype": "float32"},
            [[7, 1]],
        ),
    ],
)
def test_layers_that_look_up_are_exported(tmp_path, read, model, inputs):
    model = read_by(*read(), **model)
    sample = model.inputs[0].dtype == "string" or "lookup" in model.layers[1].name
    inputs = tf.constant(inputs, model.inputs[0].dtype)
    path = export_saved_model(model, tmp_path, sample=inputs if sample else None)
    loaded = tf.saved_model.load(str(path))
    served = loaded.signatures["a"](x=inputs)["a"].numpy()
    expected = model(inputs)["a"].numpy()
    assert served.dtype == expected.dtype
    if expected.dtype == "float32":
        close(served, expected)
    else:
        np.testing.assert_array_equal(served, expected)


def test_an_input_of_text_needs_a_sample(tmp_path):
    model = read_by(lookup(layers.StringLookup), dtype="string")
    with pytest.raises(ValueError, match=r"^Input 'x' takes text.*`sample=`$"):
        export_saved_model(model, tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_numbers_that_a_lookup_refuses_need_a_sample(tmp_path):
    numbers = lookup(layers.IntegerLookup, num_oov_indices=0, name="numbers")
    with pytest.raises(ValueError, match=r"'numbers' does not accept.*`sample=`"):
        export_saved_model(read_by(numbers), tmp_path)


class Silent(layers.Layer):
    def call(self, x):
        raise NotImplementedError

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


def test_an_error_without_a_message_names_the_layer(tmp_path):
    model = read_by(Silent(name="silent"), dtype="float32")
    with pytest.raises(
        ValueError, match=r"'silent' cannot be exported.*NotImplementedError: no mess"
    ):
        export_saved_model(model, tmp_path)


def test_two_exports_are_compared_on_the_same_input(tmp_path):
    compared_on = []
    model = read_by(layers.Dense(3), shape=(None, 4), dtype="float32")
    for _ in range(2):
        export_saved_model(
            model, tmp_path, finish=lambda _, inputs: compared_on.append(inputs["x"])
        )
    np.testing.assert_array_equal(*compared_on)
    assert compared_on[0].shape == (2, 64, 4)
    assert len(np.unique(compared_on[0])) > 50


def test_input_that_a_layer_refuses_is_an_error_that_names_both(tmp_path):
    model = read_by(AboveAThousand(name="above"), dtype="float32")
    message = r"^Layer 'above' does not accept .* `sample=`. It raised Invalid.*$"
    with pytest.raises(ValueError, match=message):
        export_saved_model(model, tmp_path / "new")
    assert os.listdir(tmp_path) == []
    sample = np.full((3, 2), 1001)  # not of the input's dtype, as with `predict`
    assert export_saved_model(model, tmp_path, sample=sample).name == "1"


def two_inputs():
    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    return keras.Model([left, right], {"a": layers.Concatenate()([left, right])})


def test_a_sample_has_the_structure_of_the_inputs(tmp_path):
    sample = (np.ones((4, 3)), tf.ones((4, 2)))  # of a data set, which has no lists
    assert export_saved_model(two_inputs(), tmp_path, sample=sample).name == "1"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (np.ones((4, 3)), r"one array for each input .*\['left', 'right'\]"),
        ([np.ones((4, 3))], "one array for each input"),
        ({"left": np.ones((4, 3)), "right": np.ones((4, 2))}, "one array for each"),
        (["x", "y"], "one array for each input"),
        ([np.ones((4, 3))] * 2, r"\(None, 2\) for input 'right'.*\(4, 3\)"),
        ([np.ones((0, 3)), np.ones((0, 2))], "a row at least"),
        ([1, 2], r"\(None, 3\) for input 'left'"),
    ],
)
def test_a_sample_that_is_not_of_the_inputs_is_an_error(tmp_path, sample, message):
    with pytest.raises(ValueError, match=message):
        export_saved_model(two_inputs(), tmp_path / "new", sample=sample)
    assert os.listdir(tmp_path) == []


def test_a_sample_of_images_may_hold_fractions(tmp_path):
    model = read_by(layers.Flatten(), shape=(4, 4, 3), dtype="float32")
    sample = pixels(2, 4, 4, 3) + 0.4
    assert export_saved_model(model, tmp_path, from_jpeg=True, sample=sample)


def test_masked_logits_are_exported(tmp_path):
    mask = layers.Lambda(lambda x: keras.ops.where(x < 3, -np.inf, x))
    model = read_by(mask, dtype="float32")
    sample = np.array([[1.0, 5.0]])
    assert export_saved_model(model, tmp_path, sample=sample).name == "1"


@pytest.mark.parametrize(
    ("served", "expected", "message"),
    [
        ([1, 2], [1, 3], "1 of 2 values differ"),
        (["x", "y"], ["x", "z"], "1 of 2 values differ"),
        ([True], [False], "1 of 1 values differ"),
        ([np.inf, 1.0], [-np.inf, 1.0], "differ by inf where the largest is 1"),
        ([np.inf], [1.0], "differ by inf"),
        ([1.0], [np.inf], "differ by inf"),
        ([np.nan, 1.0], [np.nan, 1.0], "differ by nan"),
        ([1.0, 0.0], [1.0, 1e-4], "differ by 0.0001"),
        ([[1.0], [1.0]], [1.0, 1.0], r"shape is \(2, 1\) where \(2,\) is expected"),
    ],
)
def test_outputs_that_differ_are_an_error(served, expected, message):
    with pytest.raises(RuntimeError, match=f"Signature 'a' .*{message}"):
        _check_equal("a", {"a": tf.constant(served)}, {"a": tf.constant(expected)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.LSTM(2, stateful=True, name="recurrent"),
        lambda: layers.Bidirectional(layers.GRU(2, stateful=True), name="recurrent"),
        lambda: keras.Sequential(
            [
                keras.Input(batch_shape=(2, 3, 4)),
                layers.SimpleRNN(2, stateful=True, name="recurrent"),
            ]
        ),
    ],
)
def test_a_stateful_layer_is_an_error(tmp_path, make):
    x = keras.Input(batch_shape=(2, 3, 4))
    model = keras.Model(x, {"a": make()(x)})
    with pytest.raises(ValueError, match=r"'recurrent' is stateful: .*stateful=False"):
        export_saved_model(model, tmp_path)


def test_outputs_of_one_name_are_an_error(tmp_path):
    x = keras.Input((3,))
    outputs = {"a": {"b": layers.Dense(1)(x)}, "a_b": layers.Dense(1)(x)}
    with pytest.raises(ValueError, match=r"'serving_default' .*\['a_b', 'a_b'\]"):
        export_saved_model(keras.Model(x, outputs), tmp_path)


def test_inputs_of_one_served_name_are_an_error(tmp_path):
    x, y = keras.Input((3,), name="a-b"), keras.Input((3,), name="a_b")
    model = keras.Model([x, y], {"a": layers.Add()([x, y])})
    with pytest.raises(ValueError, match=r"inputs in the signatures must differ"):
        export_saved_model(model, tmp_path)


def test_inputs_of_any_name_are_served(tmp_path):
    # The last are names that Python has for itself.
    names = ("my-image", "x[0]", "_x", "1x", "in", "None", "self")
    inputs = [keras.Input((3,), name=name) for name in names]
    model = keras.Model(inputs, {"a": layers.Add()(inputs)})
    loaded = tf.saved_model.load(str(export_saved_model(model, tmp_path)))
    _, served = loaded.signatures["a"].structured_input_signature
    of_python = {"arg_in", "arg_None", "arg_self"}
    assert set(served) == {"my_image", "x_0_", "arg__x", "arg_1x"} | of_python


class OptionalSum(layers.Layer):
    def call(self, x, y=None):
        return x if y is None else x + y


def test_optional_inputs_are_served_and_must_be_given(tmp_path):
    x, y = keras.Input((3,), name="x"), keras.Input((3,), name="y", optional=True)
    model = keras.Model({"x": x, "y": y}, {"a": OptionalSum()(x, y)})
    loaded = tf.saved_model.load(str(export_saved_model(model, tmp_path)))
    served = loaded.signatures["a"](x=tf.ones((1, 3)), y=tf.ones((1, 3)))["a"]
    np.testing.assert_array_equal(served, [[2, 2, 2]])


@pytest.mark.parametrize(
    "kwargs", [{"sparse": True, "shape": (3,)}, {"ragged": True, "shape": (None, 3)}]
)
def test_sparse_and_ragged_inputs_are_served_as_dense(tmp_path, kwargs):
    model = read_by(layers.Dense(2), dtype="float32", **kwargs)
    loaded = tf.saved_model.load(str(export_saved_model(model, tmp_path)))
    x = tf.ones((1, *(size or 2 for size in kwargs["shape"])))
    close(loaded.signatures["a"](x=x)["a"], model(x)["a"])


def test_a_sparse_output_is_an_error(tmp_path):
    one_hot = lookup(layers.StringLookup, output_mode="multi_hot", sparse=True)
    with pytest.raises(ValueError, match=r"'a' must be dense.*SparseTensor"):
        export_saved_model(
            read_by(one_hot, dtype="string"), tmp_path, sample=np.array([["x", "y"]])
        )
    assert os.listdir(tmp_path) == []


def test_a_layer_that_keras_cannot_export_is_named(tmp_path):
    upsampling = layers.UpSampling2D(3, interpolation="bilinear", name="enlarge")
    model = read_by(upsampling, shape=(None, None, 3), dtype="float32")
    with pytest.raises(ValueError, match=r"^Layer 'enlarge' cannot be exported.*$"):
        export_saved_model(model, tmp_path)
    assert os.listdir(tmp_path) == []


class Counted(layers.Layer):
    calls = gradients = 0

    def call(self, x):
        Counted.calls += 1

        @tf.custom_gradient
        def identity(x):
            def gradient(upstream):
                Counted.gradients += 1
                return upstream

            return tf.identity(x), gradient

        return identity(x)

    def compute_output_shape(self, input_shape):
        return input_shape


def test_each_signature_is_traced_once_and_no_gradient(tmp_path):
    x = keras.Input((3,), name="x")
    y = Counted()(x)
    model = keras.Model(x, {"a": layers.Dense(1)(y), "b": layers.Dense(1)(y)})
    Counted.calls = Counted.gradients = 0
    export_saved_model(model, tmp_path)
    assert Counted.calls == 3  # a, b, serving_default
    assert Counted.gradients == 0


def test_the_variables_are_written_once(model, exported):
    written = tf.train.list_variables(str(exported / "variables" / "variables"))
    shapes = [shape for name, shape in written if "VARIABLE_VALUE" in name]
    assert len(shapes) == len(model.weights)


def test_progress_is_told_a_line_a_signature(tmp_path):
    lines = []
    model = read_by(layers.Flatten(), shape=(4, 4, 3), dtype="float32")
    export_saved_model(model, tmp_path, from_jpeg=True, progress=lines.append)
    assert lines == [
        "serving_default: x -> a",
        "from_jpeg: image_bytes -> a",
        "a: x -> a",
        "a_from_jpeg: image_bytes -> a",
    ]


def not_functional():
    class Subclassed(keras.Model):
        def call(self, x):
            return {"a": x}

    return Subclassed()


@pytest.mark.parametrize("make", [not_functional, lambda: tower(1), lambda: "model"])
def test_a_model_without_a_dict_of_outputs_is_an_error(tmp_path, make):
    message = r"a dict of task name to output: join towers with `stitch\(\)`"
    with pytest.raises(ValueError, match=message):
        export_saved_model(make(), tmp_path / "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("task", ["surface normals", "serving_default", "a/b", "_a"])
def test_an_output_that_cannot_name_a_signature_is_an_error(tmp_path, task):
    x = keras.Input((3,))
    model = keras.Model(x, {task: layers.Dense(1)(x)})
    with pytest.raises(ValueError, match=task):
        export_saved_model(model, tmp_path)


@pytest.mark.parametrize("names", [[0, 1], {0: 0, 1: 1}])
def test_a_task_with_a_list_of_outputs_is_an_error(tmp_path, names):
    x = keras.Input((3,))
    outputs = keras.tree.map_structure(lambda name: layers.Dense(1)(x), names)
    model = keras.Model(x, {"a": outputs})
    with pytest.raises(ValueError, match="task 'a' must be a tensor or a dict"):
        export_saved_model(model, tmp_path)


def test_another_backend_is_an_error(model, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    # Keras cannot load the optimizer of the PyTorch backend under TensorFlow.
    message = (
        r"keras_cross_stitch\[tensorflow\].*KERAS_BACKEND=tensorflow"
        r".*compile=False\).*backend='jax'"
    )
    with pytest.raises(RuntimeError, match=message):
        export_saved_model(model, tmp_path)


def test_the_library_imports_without_tensorflow():
    pytest.importorskip("jax")
    program = "import sys; sys.modules['tensorflow'] = None; import keras_cross_stitch"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def normalized(dtype=None):
    """Two towers with batch norm, as after training, and a cropped output."""
    keras.utils.set_random_seed(0)
    towers = {}
    for task, outputs in {"kind": 5, "depth": 1}.items():
        image = keras.Input((9, 7, 3), name="image")
        x = layers.Rescaling(1 / 255, dtype=dtype)(image)
        x = layers.Conv2D(4, 3, name="conv", dtype=dtype)(x)
        x = layers.BatchNormalization(name="norm", dtype=dtype)(x)
        x = layers.ReLU(name="relu", dtype=dtype)(x)
        x = layers.Conv2D(outputs, 1, name="score", dtype=dtype)(x)
        x = layers.Cropping2D(((0, 1), (2, 0)), dtype=dtype)(x)
        towers[task] = keras.Model(image, x)
    model = stitch(towers, at=["relu"])
    rng = np.random.default_rng(0)
    weights = [w + rng.uniform(0, 0.5, w.shape) for w in model.get_weights()]
    model.set_weights(weights)
    return model


def normalizations(path):
    """How many signatures of a version run batch norm by its own operation."""
    loaded = tf.saved_model.load(str(path))
    graphs = [x.graph.as_graph_def() for x in loaded.signatures.values()]
    return sum("FusedBatchNormV3" in str(graph) for graph in graphs)


def test_batch_norm_is_served_by_one_operation_and_stays_keras_own(tmp_path):
    model = normalized()
    x = pixels(3, 9, 7, 3)
    expected = model.predict(x, verbose=0)

    path = export_saved_model(model, tmp_path)

    assert normalizations(path) == 3
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    for task, served in signature(image=x).items():
        close(served, expected[task])
    assert not [layer for layer in model.layers if "call" in vars(layer)]


def test_batch_norm_stays_as_it_is_where_answers_would_change(tmp_path, monkeypatch):
    own = faster_layers._normalized
    monkeypatch.setattr(
        faster_layers,
        "_normalized",
        lambda *args, **kwargs: 1.001 * own(*args, **kwargs),
    )
    model = normalized()
    x = pixels(3, 9, 7, 3)
    path = export_saved_model(model, tmp_path)

    assert normalizations(path) == 0
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    for task, served in signature(image=x).items():
        close(served, model.predict(x, verbose=0)[task])


def test_batch_norm_in_a_smaller_dtype_stays_as_it_is(tmp_path):
    path = export_saved_model(normalized("mixed_bfloat16"), tmp_path)
    assert normalizations(path) == 0


def test_batch_norm_of_whole_numbers_is_exported(tmp_path):
    """Keras's own takes them, and TensorFlow's operation does not."""
    image = keras.Input((6, 5, 3), name="image", dtype="uint8")
    x = layers.BatchNormalization()(image)
    model = keras.Model(image, {"kind": layers.Conv2D(2, 3)(x)})
    path = export_saved_model(model, tmp_path)
    x = pixels(2, 6, 5, 3).astype("uint8")
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    close(signature(image=x)["kind"], model.predict(x, verbose=0)["kind"])
