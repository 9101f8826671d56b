import pytest
import tensorflow as tf

from export.version.signatures import (
    complete_versions,
    signatures,
    version_path,
)

pytestmark = pytest.mark.xdist_group("export")


class TwoSignatures(tf.Module):
    def __init__(self):
        self.w = tf.Variable(tf.ones((3, 5)))
        self.v = tf.Variable(tf.ones(5, "bfloat16"))

    @tf.function(input_signature=[tf.TensorSpec((None, 3))])
    def product(self, x):
        return tf.matmul(x, self.w)

    @tf.function(input_signature=[tf.TensorSpec((None, 3), name="x")])
    def short(self, x):
        return {"y": self.product(x)}

    @tf.function(input_signature=[tf.TensorSpec((None, 3), name="x")])
    def long(self, x):
        y = tf.nn.relu(tf.nn.relu(self.product(x))) + tf.cast(self.v, "float32")
        return {"y": tf.exp(y)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "7"
    module = TwoSignatures()
    tf.saved_model.save(module, path, {"short": module.short, "long": module.long})
    return path


def test_a_signature_is_counted_without_what_only_others_need(saved):
    found = signatures(saved)
    assert set(found) == {"short", "long"}
    assert found["short"].ops == {"MatMul": 1}
    assert found["long"].ops == {
        "MatMul": 1,
        "Relu": 2,
        "Cast": 1,
        "AddV2": 1,
        "Exp": 1,
    }
    assert found["short"].variable_bytes == 3 * 5 * 4
    assert found["long"].variable_bytes == 3 * 5 * 4 + 5 * 2


def test_shapes_and_dtypes_are_told(saved):
    short = signatures(saved)["short"]
    assert short.inputs == {"x": "float32 (N, 3)"}
    assert short.outputs == {"y": "float32 (N, 5)"}


def test_the_latest_version_is_taken_and_a_version_is_itself(saved):
    (saved.parent / "10").mkdir()  # not a model
    assert complete_versions(saved.parent) == {7: saved}
    assert version_path(saved.parent) == saved
    assert version_path(saved) == saved


def test_a_version_with_zeros_before_its_number_is_found_by_its_name(saved, tmp_path):
    (tmp_path / "12").symlink_to(saved)
    (tmp_path / "0031").symlink_to(saved)
    assert list(complete_versions(tmp_path)) == [12, 31]
    assert version_path(tmp_path) == tmp_path / "0031"


def test_a_folder_without_versions_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="Expected a folder of versions"):
            version_path(path)


def test_a_file_that_is_no_saved_model_is_an_error(tmp_path):
    (tmp_path / "saved_model.pb").write_text("not a model")
    with pytest.raises(ValueError, match="is no SavedModel that TensorFlow can load"):
        signatures(tmp_path)


def test_an_unknown_rank_is_any_shape(tmp_path):
    module = tf.Module()
    spec = tf.TensorSpec(None, name="x")
    module.call = tf.function(lambda x: {"y": x}, input_signature=[spec])
    tf.saved_model.save(module, tmp_path, {"same": module.call})
    same = signatures(tmp_path)["same"]
    assert same.inputs == {"x": "float32 of any shape"}
    assert same.outputs == {"y": "float32 of any shape"}
