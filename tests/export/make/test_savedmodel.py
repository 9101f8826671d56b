import json
import os
import re
from importlib import metadata
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from export.inspect.bench import bench
from export.make.changes import changed_answers
from export.make.savedmodel import export
from export.version import recorded
from export.version.signatures import signatures

pytestmark = pytest.mark.xdist_group("export")


def test_what_answers_mean_goes_with_the_version(version, model_file):
    answers = (version / "assets.extra" / "answers.json").read_text()
    assert answers == model_file.with_name("answers.json").read_text()


def test_a_model_of_two_inputs_without_answers(tmp_path):
    inputs = [keras.Input((4,), name="right"), keras.Input((3,), name="left")]
    outputs = {x.name: keras.layers.Dense(2)(x) for x in inputs}
    keras.Model(inputs, outputs).save(tmp_path / "model.keras")
    written, links, changes = export(
        tmp_path / "model.keras", tmp_path / "served", warmup=1
    )
    assert (links, changes) == ([], {})
    assert sorted(os.listdir(written / "assets.extra")) == [
        "export.json",
        "recorded_predictions",
        "tf_serving_warmup_requests",
    ]
    for _, given, _ in recorded.read(written / recorded.WARMUP):
        assert {name: x.shape for name, x in given.items()} == {
            "right": (1, 4),
            "left": (1, 3),
        }


def test_a_model_that_takes_text_is_exported_on_text_that_is_given(tmp_path):
    words = keras.Input((1,), dtype="string", name="words")
    numbers = keras.layers.TextVectorization(
        output_sequence_length=4, vocabulary=["a", "b"]
    )(words)
    x = keras.layers.Flatten()(keras.layers.Embedding(5, 3)(numbers))
    outputs = {name: keras.layers.Dense(2, name=name)(x) for name in ("one", "two")}
    keras.Model(words, outputs).save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", np.array([["a b"], ["ü b"], ["b"]]))
    where = tmp_path / "model.keras", tmp_path / "served"

    with pytest.raises(ValueError, match=r"text, 'words', .* --images FILE\.npy, an"):
        export(*where)
    version, *_ = export(*where, images=tmp_path / "x.npy", warmup=3)

    for _, given, _ in recorded.read(version / recorded.RECORDED):
        assert given["words"].tolist() == [[b"a b"], ["ü b".encode()]]
    differences, failed = recorded.repeat(version, "tensorflow")
    assert differences["one"] == {"one": 0}
    assert failed == []


def test_text_beside_another_input_is_given_in_a_file_of_both(tmp_path):
    words = keras.Input((1,), dtype="string", name="words")
    size = keras.Input((2,), name="size")
    hashed = keras.layers.Hashing(5, output_mode="one_hot")(words)
    x = keras.layers.Concatenate()([hashed, size])
    outputs = {name: keras.layers.Dense(2, name=name)(x) for name in ("one", "two")}
    keras.Model([words, size], outputs).save(tmp_path / "model.keras")
    np.savez(tmp_path / "x.npz", size=np.ones((2, 2)), words=[["a"], ["b"]])
    where = tmp_path / "model.keras", tmp_path / "served"

    message = r"--images FILE\.npz, .* each of \['words', 'size'\]"
    with pytest.raises(ValueError, match=message):
        export(*where)
    version, *_ = export(*where, images=tmp_path / "x.npz")

    for _, given, _ in recorded.read(version / recorded.RECORDED):
        assert given["words"].tolist() == [[b"a"], [b"b"]]


def test_a_type_without_json_is_told(tmp_path):
    x = keras.Input((4,), name="x")
    half = keras.layers.Dense(2, dtype="float16", name="half")(x)
    outputs = {"half": half, "whole": keras.layers.Dense(2, name="whole")(x)}
    keras.Model(x, outputs).save(tmp_path / "model.keras")
    lines = []
    export(tmp_path / "model.keras", tmp_path / "served", progress=lines.append)
    (note,) = [line for line in lines if line.startswith("Note: ")]
    assert note.endswith(
        "over gRPC, not over REST, or give them as float32: half (float16)"
    )


def test_how_it_was_made_goes_with_the_version(version, cheaper):
    in_bfloat16 = json.loads((cheaper[0] / "assets.extra/export.json").read_text())
    assert (in_bfloat16["dtype"], in_bfloat16["tolerance"]) == ("bfloat16", 1 / 16)
    about = json.loads((version / "assets.extra" / "export.json").read_text())
    assert about["tolerance"] == 1e-5
    assert about["dtype"] == "float32"
    assert about["versions"]["keras"] == keras.__version__


def test_distributions_may_have_other_names(tmp_path, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)  # but keras-nightly, tensorflow-cpu

    monkeypatch.setattr(metadata, "version", version)
    x = keras.Input((4,), name="x")
    keras.Model(x, {"a": keras.layers.Dense(2)(x)}).save(tmp_path / "model.keras")
    written, _, _ = export(tmp_path / "model.keras", tmp_path / "served")
    about = json.loads((written / "assets.extra" / "export.json").read_text())
    assert about["versions"] == {
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
    }


def test_a_tower_that_is_not_needed_is_gone_from_the_signatures(cheaper, version):
    written, links, _ = cheaper
    assert {(link.unit, link.task, link.source) for link in links} == {
        ("cross_stitch_conv2", "kind", "age"),
        ("cross_stitch_conv2", "normals", "age"),
    }
    before, after = signatures(version), signatures(written)
    # conv1 and conv2 of three towers; kind needs conv2 of two.
    assert before["kind"].ops["Conv2D"] == 6
    assert after["kind"].ops["Conv2D"] == after["normals"].ops["Conv2D"] == 5
    assert after["age"].ops["Conv2D"] == after["serving_default"].ops["Conv2D"] == 6
    assert after["kind"].variable_bytes < before["kind"].variable_bytes


def test_changes_are_against_the_model_as_it_was_trained(cheaper, version, images):
    written, _, changes = cheaper
    before, after = signatures(version), signatures(written)
    assert set(changes) == {"serving_default", "kind", "age", "normals"}
    loaded = [tf.saved_model.load(str(path)) for path in (version, written)]
    for name, change in changes.items():
        assert (change.before, change.after) == (before[name], after[name])
        outputs = [x.signatures[name](image=tf.constant(images)) for x in loaded]
        assert change.largest == pytest.approx(
            max(
                np.abs(outputs[1][task] - y).max() / np.abs(y).max()
                for task, y in outputs[0].items()
            ),
            rel=1e-3,
        )
    assert changes["kind"].metrics["kind"].endswith(" % other classes")
    assert changes["normals"].metrics["normals"].endswith(" degrees")
    assert changes["age"].metrics == {}
    assert set(changes["serving_default"].metrics) == {"kind", "normals"}


def test_changed_answers_are_counted_by_what_they_mean():
    before = np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.3, 0.7]])
    after = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7]])
    metric = changed_answers(before, after, {"kind": "classes"})
    assert metric == "25 % other classes"
    x, y = np.eye(3)[[0, 0]], np.eye(3)[[0, 1]]
    assert changed_answers(x, y, {"kind": "normals"}) == "45 degrees"
    assert changed_answers(3 * x, y / 2, {"kind": "normals"}) == "45 degrees"
    assert changed_answers(x / 3, x / 3, {"kind": "normals"}) == "0 degrees"
    gone = np.array([[0.0, 0, 0], [0, 0, 0]])
    assert changed_answers(gone, gone, {"kind": "normals"}) == "0 degrees"
    assert changed_answers(gone, x, {"kind": "normals"}) == "90 degrees"
    far = {"kind": "depth", "units": "metres"}
    assert changed_answers(2 * x, 2 * y, far) == "0.67 metres"
    assert changed_answers(x, y, {"kind": "text"}) == ""
    assert changed_answers(x, y, {}) == ""


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", object])
def test_changed_classes_are_counted_where_their_numbers_are_given(dtype):
    before = np.array([[[0, 1], [1, 1]], [[1, 0], [0, 0]]]).astype(dtype)
    classes = {"kind": "classes"}
    assert changed_answers(before, before, classes) == "0 % other classes"
    after = before.copy()
    after[1, 0, 1] = after[0, 0, 0] = 1
    assert changed_answers(before, after, classes) == "25 % other classes"
    of_pictures = before.ravel(), after.ravel()
    assert changed_answers(*of_pictures, classes) == "25 % other classes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_below": 0.1}, "--drop-below measures .* on --images: give a folder"),
        ({"dtype": "int8"}, r"\['float32', 'bfloat16'\]. Received: int8"),
        ({"warmup": 251}, "takes 1000 requests .* --warmup 251, which makes 1004"),
        ({"warmup": 126, "from_jpeg": True}, "--warmup 126, which makes 1008"),
        ({"warmup": -1}, "--warmup must be at least 0"),
    ],
)
def test_bad_options_are_errors_before_any_work(model_file, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(model_file, tmp_path / "served", **options)
    assert os.listdir(tmp_path) == []


def test_a_model_of_regions_is_compared_input_by_input(
    region_model_file, shapes_folder, tmp_path
):
    _, _, changes = export(
        region_model_file, tmp_path, images=shapes_folder, dtype="bfloat16"
    )
    assert changes.keys() == {"serving_default", "detection", "attributes"}


def test_an_image_may_have_the_name_of_files(tmp_path):
    image = keras.Input((8, 8, 3), name="image_bytes")
    x = keras.layers.Flatten()(keras.layers.Conv2D(2, 3)(image))
    outputs = {"a": keras.layers.Dense(2)(x), "largest": keras.ops.max(x)}
    keras.Model(image, outputs).save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", np.full((17, 8, 8, 3), 7, "float32"))
    version, _, changes = export(
        tmp_path / "model.keras",
        tmp_path / "served",
        from_jpeg=True,
        images=tmp_path / "x.npy",
        dtype="bfloat16",
    )
    assert changes.keys() == {"serving_default", "a", "largest"}
    differences, _ = recorded.repeat(version, "tensorflow")
    assert differences["a"] == differences["a_from_jpeg"] == {"a": 0}
    timed = bench(version, rounds=2, batches=(1,)).rows
    assert {row.signature for row in timed} == changes.keys()


def test_a_report_that_fails_publishes_nothing(
    region_model_file, shapes_folder, tmp_path, monkeypatch
):
    """It is given each input by its name, whatever the order of a saved map is."""
    asked = []

    def changes(before, after, inputs, answers):
        names = [path.name for path in (tmp_path / "served").iterdir()]
        assert not any(name.isdecimal() for name in names)
        asked.append({name: array.shape[2:] for name, array in inputs.items()})
        raise RuntimeError("what was measured is odd")

    monkeypatch.setattr("export.make.savedmodel.changes", changes)
    options = {"images": shapes_folder, "dtype": "bfloat16"}
    with pytest.raises(RuntimeError, match="odd"):
        export(region_model_file, tmp_path / "served", **options)
    assert asked == [{"image": (64, 3), "rois": (4,)}]
    assert not (tmp_path / "served").exists()


def test_the_docs_add_a_softmax_to_a_task_that_ends_in_logits():
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    (code,) = re.findall(r"```python\n(model = .*?)```", page, re.S)
    x = keras.Input((4,), name="x")
    outputs = {"kind": keras.layers.Dense(3)(x), "age": keras.layers.Dense(1)(x)}
    names = {"keras": keras, "model": keras.Model(x, outputs)}
    logits = names["model"](np.ones((1, 4)))
    exec(code, names)
    answer = names["model"](np.ones((1, 4)))
    np.testing.assert_allclose(answer["kind"], keras.ops.softmax(logits["kind"]))
    np.testing.assert_allclose(answer["age"], logits["age"])
