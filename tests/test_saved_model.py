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

from keras_cross_stitch import export_saved_model, stitch

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


def test_from_jpeg_adds_a_signature_per_task(signatures):
    assert set(signatures) == {
        "serving_default",
        "kind",
        "age",
        "kind_from_jpeg",
        "age_from_jpeg",
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


def test_nothing_is_printed(model, tmp_path, capfd):
    export_saved_model(model, tmp_path)
    assert capfd.readouterr().out == ""


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
    close(served["kind"], model.predict(images, verbose=0)["kind"])


def test_jpeg_and_png_of_any_size_are_resized_to_the_model(model, signatures):
    image = pixels(40, 24, 3).astype("uint8")
    files = [tf.io.encode_jpeg(image), tf.io.encode_png(image)]
    decoded = tf.stack([tf.io.decode_jpeg(files[0]), tf.io.decode_png(files[1])])
    resized = tf.image.resize(decoded, (8, 8), antialias=True)
    served = signatures["kind_from_jpeg"](image_bytes=tf.stack(files))
    close(served["kind"], model.predict(resized.numpy(), verbose=0)["kind"])


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


def test_from_jpeg_of_two_inputs_is_an_error(tmp_path):
    towers = {"kind": tower(5), "age": tower(1)}
    model = stitch(towers, at=["conv"], shared_input=False)
    with pytest.raises(ValueError, match="models with one input"):
        export_saved_model(model, tmp_path, from_jpeg=True)


@pytest.fixture
def unwritten(monkeypatch):
    """Leaves out what takes time, for tests of folders alone."""
    import keras_cross_stitch.saved_model as module

    def write(model, path, from_jpeg):
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


@pytest.mark.parametrize("signature", ["serving_default", "age", "age_from_jpeg"])
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
    with pytest.raises(RuntimeError, match=r"'age'.* differ by nan.* NaN weights"):
        export_saved_model(model, tmp_path)


def test_a_model_that_gives_zeros_is_exported(tmp_path):
    model = two_tasks()
    model.get_layer("age_score").kernel.assign(np.zeros((4, 1)))
    assert export_saved_model(model, tmp_path).name == "1"


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


def test_a_task_with_a_list_of_outputs_is_an_error(tmp_path):
    x = keras.Input((3,))
    model = keras.Model(x, {"a": [layers.Dense(1)(x), layers.Dense(1)(x)]})
    with pytest.raises(ValueError, match="task 'a' must be a tensor or a dict"):
        export_saved_model(model, tmp_path)


def test_another_backend_is_an_error(model, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    message = "load and export it with KERAS_BACKEND=tensorflow.*backend='jax'"
    with pytest.raises(RuntimeError, match=message):
        export_saved_model(model, tmp_path)


def test_the_library_imports_without_tensorflow():
    pytest.importorskip("jax")
    program = "import sys; sys.modules['tensorflow'] = None; import keras_cross_stitch"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
