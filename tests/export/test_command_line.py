import keras
import pytest
import tensorflow as tf
from typer.testing import CliRunner

from export.__main__ import app


@pytest.fixture
def model(tmp_path):
    image = keras.Input((8, 8, 3), name="image")
    features = keras.layers.GlobalAveragePooling2D()(image)
    outputs = {name: keras.layers.Dense(2)(features) for name in ("kind", "age")}
    path = tmp_path / "model.keras"
    keras.Model(image, outputs).save(path)
    return path


def savedmodel(*arguments):
    return CliRunner().invoke(app, ["savedmodel", *map(str, arguments)])


def test_savedmodel_writes_versions_with_a_signature_per_task(model, tmp_path):
    for version in ("1", "2"):
        assert savedmodel(model, tmp_path / "serving").exit_code == 0
        served = tf.saved_model.load(tmp_path / "serving" / version)
        assert set(served.signatures) == {"serving_default", "kind", "age"}


def test_from_jpeg_adds_signatures_for_encoded_images(model, tmp_path):
    assert savedmodel(model, tmp_path / "serving", "--from-jpeg").exit_code == 0
    served = tf.saved_model.load(tmp_path / "serving" / "1")
    assert {"kind_from_jpeg", "age_from_jpeg"} < set(served.signatures)


def test_bad_input_ends_in_one_line(model, tmp_path):
    one_task = tmp_path / "one_task.keras"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(one_task)
    text = tmp_path / "text.keras"
    text.write_text("not a model")
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        ((tmp_path / "none.keras", tmp_path / "out"), "There is no file"),
        ((one_task, tmp_path / "out"), "dict of task name to output"),
        ((text, tmp_path / "out"), "text.keras"),
        ((model, file), "must be a folder that can be written to"),
    ):
        result = savedmodel(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
        assert message in result.stderr
        assert result.stderr.strip().count("\n") == 0
