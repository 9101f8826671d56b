import keras
import numpy as np
import pytest
import tensorflow as tf

from export.make.inputs import load_images, load_model

pytestmark = pytest.mark.xdist_group("export")


def takes(*shapes):
    inputs = [keras.Input(shape, name=f"x{i}") for i, shape in enumerate(shapes)]
    outputs = {
        x.name: keras.layers.Flatten()(x) for x in inputs if None not in x.shape[1:]
    }
    return keras.Model(inputs, outputs or {"a": inputs[0]})


def write(path, *size):
    image = np.random.default_rng(0).integers(256, size=(*size, 3)).astype("uint8")
    tf.io.write_file(str(path), tf.io.encode_png(image))
    return image


def test_a_folder_of_images_is_resized_to_the_model_in_the_order_of_names(tmp_path):
    second = write(tmp_path / "b.png", 9, 7)
    first = write(tmp_path / "a.PNG", 20, 30)
    left = (".DS_Store", "Thumbs.db", "desktop.ini", "._a.jpg", ".c.png", "notes.txt")
    for name in left:
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "more.png").mkdir()
    (images,) = load_images(tmp_path, takes((9, 7, 3)))
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images[1], second)
    resized = tf.image.resize(first, (9, 7), antialias=True)
    np.testing.assert_allclose(images[0], resized, atol=1e-4)


def test_images_keep_their_size_where_the_model_takes_any(tmp_path):
    image = write(tmp_path / "a.png", 20, 30)
    model = takes((None, None, 3))
    np.testing.assert_array_equal(load_images(tmp_path, model), [[image]])
    write(tmp_path / "b.png", 20, 31)
    with pytest.raises(ValueError, match="needs images of one size"):
        load_images(tmp_path, model)


def test_an_array_is_taken_as_it_is(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4, 5))
    np.save(tmp_path / "x.npy", array)
    (loaded,) = load_images(tmp_path / "x.npy", takes((4, 5)))
    np.testing.assert_array_equal(loaded, array.astype("float32"))


def test_text_is_bytes_and_numbers_are_only_cast_where_they_stay_the_same(tmp_path):
    def loaded(values, dtype):
        np.save(tmp_path / "x.npy", np.array(values))
        x = keras.Input((1,), dtype=dtype, name="x")
        (array,) = load_images(tmp_path / "x.npy", keras.Model(x, {"a": x}))
        return array

    words = loaded([["a"], ["ü"]], "string")
    assert words.tolist() == [[b"a"], ["ü".encode()]]
    assert loaded([[b"a"]], "string").tolist() == [[b"a"]]
    assert loaded([[5], [2]], "int32").dtype == np.int32
    assert loaded([[5]], "float32").dtype == np.float32
    for values, dtype, message in (
        ([[5.7]], "int32", r"takes int32 as 'x'\. Received: .*x\.npy, of float64"),
        ([[3], [2**33 + 1]], "int32", r"'x' has values that int32 cannot .*x\.npy"),
        ([[1e300]], "float32", r"'x' has values that float32 cannot hold: 1e\+300"),
        ([["a"]], "float32", r"takes float32 as 'x'\. Received: .*x\.npy, of <U1"),
        ([[5.0]], "string", r"takes string as 'x'\. Received: .*x\.npy, of float64"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(values, dtype)


def test_a_folder_of_images_is_rounded_for_a_model_of_whole_numbers(tmp_path):
    image = write(tmp_path / "a.png", 20, 30)
    x = keras.Input((9, 7, 3), dtype="uint8")
    (images,) = load_images(tmp_path, keras.Model(x, {"a": x}))
    resized = tf.image.resize(image, (9, 7), antialias=True).numpy()
    np.testing.assert_array_equal(images[0], np.round(resized).astype("uint8"))


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 4), (0, 4, 5)])
def test_an_array_of_another_shape_is_an_error(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape))
    with pytest.raises(
        ValueError, match=r"takes 'x0' of shape \(None, 4, 5\). Received: .*x\.npy"
    ):
        load_images(tmp_path / "x.npy", takes((4, 5)))


def no_bytes(file):
    pass


def several(file):
    np.savez(file, x=np.zeros((3, 4, 5)))


def half(file):
    np.save(file, np.zeros((3, 4, 5)))
    file.truncate(200)


def objects(file):
    np.save(file, np.array([None]), allow_pickle=True)


@pytest.mark.parametrize("write", [no_bytes, several, half, objects])
def test_a_file_that_is_no_array_is_an_error_that_names_it(tmp_path, write):
    with open(tmp_path / "x.npy", "wb") as file:
        write(file)
    message = r"--images must be an array .* `numpy\.save` .* Received: .*x\.npy \("
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "x.npy", takes((4, 5)))


def test_what_is_no_image_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "a.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"a\.jpg is no JPEG or PNG image"):
        load_images(tmp_path, takes((9, 7, 3)))


def test_images_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no JPEG or PNG files in"):
        load_images(tmp_path, takes((9, 7, 3)))
    with pytest.raises(
        ValueError, match=r"a folder of JPEG or PNG files, .* a .npy file"
    ):
        load_images(tmp_path / "none.npy", takes((9, 7, 3)))


def test_a_folder_for_a_model_of_no_images_is_an_error(tmp_path):
    write(tmp_path / "a.png", 9, 7)
    with pytest.raises(
        ValueError, match=r"that take \(N, H, W, 3\).* give a .npy file"
    ):
        load_images(tmp_path, takes((9, 7, 1)))


def test_several_inputs_are_arrays_of_a_file_by_their_names(tmp_path):
    text = keras.Input((1,), dtype="string", name="text")
    model = takes((4,), (5,))
    model = keras.Model([*model.inputs, text], {"a": model.inputs[0]})
    arrays = {"text": [["a"], ["ü"]], "x1": np.ones((2, 5)), "x0": np.zeros((2, 4))}
    np.savez(tmp_path / "x.npz", **arrays)
    loaded = load_images(tmp_path / "x.npz", model)
    assert [x.shape for x in loaded] == [(2, 4), (2, 5), (2, 1)]
    assert [x.dtype for x in loaded] == ["float32", "float32", object]
    assert loaded[2].tolist() == [[b"a"], ["ü".encode()]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"x0": 4}, r"array for each of \['x0', 'x1'\].*x\.npz, with \['x0'\]"),
        ({"x0": 4, "x1": 5, "y": 5}, r"Received: .*x\.npz, with \['x0', 'x1', 'y'\]"),
        ({"x0": 4, "x1": 6}, r"'x1' of shape \(None, 5\). Received: .* \(2, 6\)"),
    ],
)
def test_other_arrays_than_the_inputs_are_an_error(tmp_path, sizes, message):
    arrays = {name: np.zeros((2, size)) for name, size in sizes.items()}
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "x.npz", takes((4,), (5,)))


def test_arrays_of_unequal_lengths_are_an_error(tmp_path):
    np.savez(tmp_path / "x.npz", x0=np.zeros((2, 4)), x1=np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"one length. Received: .* \[2, 3\]"):
        load_images(tmp_path / "x.npz", takes((4,), (5,)))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and no more"])
def test_a_file_of_several_arrays_that_is_none_is_an_error(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    message = r"--images must be arrays .* `numpy\.savez` .* Received: .*x\.npz \("
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "x.npz", takes((4,), (5,)))


def test_one_array_or_a_folder_for_a_model_of_two_inputs_is_an_error(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 4)))
    write(tmp_path / "a.png", 9, 7)
    for path in (tmp_path / "x.npy", tmp_path):
        message = r"\.npz file with an array for each of \['x0', 'x1'\]"
        with pytest.raises(ValueError, match=message):
            load_images(path, takes((4,), (5,)))


@keras.saving.register_keras_serializable()
class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x


def test_a_layer_of_ones_own_is_named_with_what_to_do(tmp_path, monkeypatch):
    x = keras.Input((4,))
    y = {"a": keras.layers.Dense(1)(Twice()(x)), "b": keras.layers.Dense(2)(x)}
    keras.Model(x, y).save(tmp_path / "own.keras")
    name = keras.saving.get_registered_name(Twice)
    monkeypatch.delitem(keras.saving.get_custom_objects(), name)
    monkeypatch.setattr(Twice, "__module__", "gone")
    message = r"call `export_saved_model` in .*Could not locate class 'Twice'"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "own.keras")


def test_a_model_that_is_none_is_told_in_one_line(tmp_path):
    text = tmp_path / "text.keras"
    text.write_text("not a model")
    one_output = tmp_path / "one_output.keras"
    x = keras.Input((4,))
    keras.Model(x, keras.layers.Dense(2)(x)).save(one_output)
    for path, received in (
        (text, r"Received: .*text\.keras \("),
        (tmp_path / "none.keras", "There is no file .*none.keras"),
        (one_output, r"dict of task name to output, .*Received: .*one_output\.keras"),
    ):
        with pytest.raises(ValueError, match=received) as error:
            load_model(path)
        assert "Expected a multi-task model" in str(error.value)
        assert "\n" not in str(error.value)
