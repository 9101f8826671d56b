import collections
import shutil

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from export.version import recorded

pytestmark = pytest.mark.xdist_group("export")

ARRAYS = {"serving_default", "kind", "age", "normals"}
FILES = {"kind_from_jpeg", "age_from_jpeg", "normals_from_jpeg", "from_jpeg"}


def test_warmup_has_requests_of_one_example_for_every_signature(version, images):
    requests = recorded.read(version / recorded.WARMUP)
    counts = collections.Counter(signature for signature, _, _ in requests)
    assert counts == dict.fromkeys(ARRAYS | FILES, 3)
    for number, (signature, inputs, outputs) in enumerate(requests):
        assert outputs == {}
        image = images[[number % 3]]
        if signature in FILES:
            assert set(inputs) == {"image_bytes"}
            (file,) = inputs["image_bytes"]
            np.testing.assert_array_equal(tf.io.decode_png(file), image[0])
        else:
            assert set(inputs) == {"image"}
            np.testing.assert_array_equal(inputs["image"], image)


def test_warmup_is_in_tf_servings_format(version):
    path = version / "assets.extra" / "tf_serving_warmup_requests"
    for record in tf.data.TFRecordDataset(str(path)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        assert log.WhichOneof("log_type") == "predict_log"
        assert log.predict_log.request.model_spec.signature_name in ARRAYS | FILES


def test_recorded_outputs_are_the_models(version, model, images):
    predictions = recorded.read(version / recorded.RECORDED)
    assert {signature for signature, _, _ in predictions} == ARRAYS | FILES
    expected = model.predict(images[: recorded.EXAMPLES], verbose=0)
    for _, _, outputs in predictions:
        for task, output in outputs.items():
            np.testing.assert_allclose(output, expected[task], rtol=1e-4, atol=1e-6)


def test_nothing_differs_in_what_was_just_written(version):
    differences, failed = recorded.repeat(version, "tensorflow")
    assert failed == []
    assert set(differences) == ARRAYS | FILES
    assert all(x <= 1e-6 for outputs in differences.values() for x in outputs.values())


def test_openvino_runs_serving_default(version):
    pytest.importorskip("openvino")
    differences, failed = recorded.repeat(version, "openvino")
    (signature, outputs), *others = differences.items()
    assert failed == []
    assert signature == "serving_default"
    assert not others
    assert set(outputs) == {"kind", "age", "normals"}
    assert max(outputs.values()) < 1e-4


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("output", "expected", "difference"),
    [
        (np.float32([1, -4]), np.float32([1, -3]), 1 / 3),
        (np.float32([0, 5]), np.float32([0, 0]), 5),
        (np.float32([1, NAN]), np.float32([1, 2]), INFINITE),
        (np.float32([1, 2]), np.float32([1, NAN]), INFINITE),
        (np.float32([1, NAN]), np.float32([1, NAN]), INFINITE),
        (np.float32([2, INFINITE]), np.float32([1, INFINITE]), 1),
        (np.float32([2, INFINITE]), np.float32([1, -INFINITE]), INFINITE),
        (np.float32([1]), np.float32([1, 1]), INFINITE),
        (np.float32([[]]), np.float32([[]]), 0),
        (np.int64([2**62]), np.int64([2**61]), 1),
        (np.int64([200000, 7]), np.int64([200001, 7]), 1 / 2),
        (np.int64([2**60 + 1]), np.int64([2**60 + 1]), 0),
        (np.array([True, False]), np.array([True, True]), 1 / 2),
        (np.int64([]), np.int64([]), 0),
        (tf.constant([1.5], "bfloat16").numpy(), np.float32([1]), 0.5),
        (np.array([b"a"], object), np.array([b"a"], object), 0),
        (np.array([b"a"], object), np.array([b"b"], object), 1),
    ],
)
def test_a_difference_is_relative_and_no_nan_hides_it(output, expected, difference):
    found = recorded.relative_difference(output, expected)
    assert found == pytest.approx(difference)
    assert max([0.0, found]) == max([found, 0.0]) == found


class PlusOne(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec(None, name="x")])
    def __call__(self, x):
        return {"y": x + 1}


@pytest.fixture(scope="module")
def plus_one(tmp_path_factory):
    path = tmp_path_factory.mktemp("plus_one")
    module = PlusOne()
    tf.saved_model.save(module, path, {"serving_default": module.__call__})
    return path


def replace(value):
    def change(outputs):
        outputs["y"].CopyFrom(tf.make_tensor_proto(value, "float32"))

    return change


@pytest.mark.parametrize(
    ("change", "output", "difference"),
    [
        (replace([[4.0], [4.0]]), "y", 2 / 4),
        (replace([[4.0, 4.0]]), "y", float("inf")),
        (replace([[np.nan], [1.0]]), "y", float("inf")),
        (lambda outputs: outputs.pop("y"), "y", float("inf")),
        (lambda outputs: outputs["z"].CopyFrom(outputs["y"]), "z", float("inf")),
    ],
)
def test_what_differs_is_measured(plus_one, change, output, difference):
    recorded.record(plus_one, {"x": np.array([[1.0], [2.0]], "float32")})
    path = plus_one / recorded.RECORDED
    (record,) = tf.data.TFRecordDataset(str(path))
    log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
    change(log.predict_log.response.outputs)
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(log.SerializeToString())
    outputs = recorded.repeat(plus_one, "tensorflow")[0]["serving_default"]
    assert outputs[output] == pytest.approx(difference)


def test_warmup_that_fails_is_told(plus_one, tmp_path):
    copy = shutil.copytree(plus_one, tmp_path / "1")
    x = {"x": np.array([[1.0], [2.0]], "float32")}
    recorded.record(copy, x, warmup=1)
    assert recorded.repeat(copy, "tensorflow")[1] == []
    requests = [("", x), ("gone", x), ("serving_default", {"z": x["x"]})]
    logs = [recorded._log(*request) for request in requests]
    recorded._write(copy / recorded.WARMUP, logs)
    gone, other = recorded.repeat(copy, "tensorflow")[1]
    assert gone == "Warm-up request 2, of signature 'gone', fails: it is not there"
    assert other.startswith("Warm-up request 3, of signature 'serving_default', fails")
    (copy / recorded.WARMUP).write_bytes(bytes(range(100)))
    (told,) = recorded.repeat(copy, "tensorflow")[1]
    assert told.startswith("The warm-up requests cannot be read: ")


def test_a_signature_that_is_not_there_differs(plus_one):
    recorded.record(plus_one, {"x": np.array([[1.0], [2.0]], "float32")})
    path = plus_one / recorded.RECORDED
    (record,) = tf.data.TFRecordDataset(str(path))
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(record.numpy().replace(b"serving_default", b"serving_defaulx"))
    differences, _ = recorded.repeat(plus_one, "tensorflow")
    assert differences == {"serving_defaulx": {"y": float("inf")}}


def test_a_large_output_is_sampled_all_over(plus_one):
    x = np.random.default_rng(0).normal(size=(2, 60, 64, 10)).astype("float32")
    recorded.record(plus_one, {"x": x})
    assert recorded.repeat(plus_one, "tensorflow")[0]["serving_default"]["y"] == 0
    ((_, _, outputs),) = recorded.read(plus_one / recorded.RECORDED)
    assert outputs["y"].shape == (4096,)
    # Every channel, column and example is seen: values differ, so they tell where.
    places = np.argwhere(np.isin(x + 1, outputs["y"]))
    assert [len(set(axis)) for axis in places.T] == [2, 60, 64, 10]


def test_a_version_without_recorded_predictions_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is missing: export the model anew"):
        recorded.read(tmp_path / recorded.RECORDED)
