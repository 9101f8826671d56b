"""A folder of versions: which is served, and what a broken one does."""

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import model_pb2, prediction_log_pb2

from export.client import ServingError
from export.preview import rest
from export.preview.served_model import ServedModel, State
from keras_cross_stitch import export_saved_model

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")

SPEC = model_pb2.ModelSpec(name="m")


@pytest.fixture
def folder(served, tmp_path):
    """A folder with version 1, and a function that adds it under another number."""
    source = served.directory / str(served.latest)

    def add(version):
        return shutil.copytree(source, tmp_path / "m" / str(version))

    add(1)
    return tmp_path / "m", add


def served_by(model):
    return model.find(SPEC).number


def state(model, version):
    spec = model_pb2.ModelSpec(name="m")
    spec.version.value = version
    (status,) = model.status(spec).model_version_status
    return State.State.Name(status.state), status.status.error_message


def test_the_highest_number_is_served_and_others_ended(folder):
    directory, add = folder
    (directory / "notes").mkdir()
    (directory / "99").write_text("no folder")
    model = ServedModel("m", directory)
    assert served_by(model) == 1
    add(10)
    add(9)
    model.refresh()
    assert served_by(model) == 10
    assert state(model, 1) == ("END", "")
    assert state(model, 10) == ("AVAILABLE", "")


def test_a_removed_version_gives_way_to_the_one_before(folder):
    directory, add = folder
    add(2)
    model = ServedModel("m", directory)
    shutil.rmtree(directory / "2")
    model.refresh()
    assert served_by(model) == 1
    assert state(model, 2) == ("END", "")


def test_a_request_is_answered_while_the_version_changes(folder):
    directory, add = folder
    model = ServedModel("m", directory)
    add(2)

    class Asking:
        name = "m"

        def HasField(self, field):
            model.refresh()
            return False

    assert model.find(Asking()).number == 1
    assert model.find(Asking()).number == 2


def test_a_folder_that_goes_away_is_served_on(folder):
    directory, _ = folder
    model = ServedModel("m", directory)
    shutil.rmtree(directory)
    model.refresh()
    assert served_by(model) == 1


def test_versions_are_looked_for_again_after_that_failed(
    folder, preview, wait_for, monkeypatch
):
    directory, add = folder
    monkeypatch.setattr("export.preview.server.POLL_SECONDS", 0.05)
    model = ServedModel("m", directory)
    refresh, failures = model.refresh, [OSError("it changes while it is read")]
    monkeypatch.setattr(
        model, "refresh", lambda: refresh() if not failures else fail(failures.pop())
    )
    with preview(model):
        wait_for(lambda: not failures)
        add(2)
        wait_for(lambda: served_by(model) == 2)


def fail(error):
    raise error


def no_graph(version):
    (version / "saved_model.pb").unlink()


def half_a_graph(version):
    graph = version / "saved_model.pb"
    graph.write_bytes(graph.read_bytes()[:1000])


def no_variables(version):
    shutil.rmtree(version / "variables")


def half_the_variables(version):
    (data,) = version.glob("variables/variables.data*")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def a_link_to_nowhere(version):
    (data,) = version.glob("variables/variables.data*")
    data.unlink()
    data.symlink_to(version / "nowhere")


def empty_folder(version):
    shutil.rmtree(version)
    version.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        no_graph,
        half_a_graph,
        no_variables,
        half_the_variables,
        a_link_to_nowhere,
        empty_folder,
    ],
)
def test_a_broken_version_leaves_the_old_one_and_is_served_once_mended(folder, damage):
    directory, add = folder
    model = ServedModel("m", directory)
    damage(add(2))
    model.refresh()
    assert served_by(model) == 1
    assert state(model, 1) == ("AVAILABLE", "")
    name, reason = state(model, 2)
    assert name == "END"
    assert reason.startswith("Version 2 could not be loaded: ")
    model.refresh()
    shutil.rmtree(directory / "2")
    add(2)
    model.refresh()
    assert served_by(model) == 2


def test_what_happens_to_versions_is_told_once(folder):
    directory, add = folder
    told = []
    model = ServedModel("m", directory, tell=told.append)
    assert told == ["Version 1 is loaded"]
    no_graph(add(2))
    (directory / "3").symlink_to(directory / "nowhere")
    for _ in range(2):
        model.refresh()
    link, broken = told[1:]
    assert link.startswith("Version 3 is a link to what is not there: ")
    assert broken.startswith("Version 2 could not be loaded: ")
    assert "\n" not in broken
    shutil.rmtree(directory / "2")
    add(2)
    for _ in range(2):
        model.refresh()
    assert told[3:] == ["Version 2 is loaded", "Version 1 is dropped"]


def test_a_broken_version_is_not_tried_again_until_it_changes(folder, monkeypatch):
    directory, add = folder
    model = ServedModel("m", directory)
    no_graph(add(2))
    model.refresh()
    loaded = "export.preview.served_model.LoadedVersion"
    monkeypatch.setattr(loaded, lambda *_: pytest.fail("tried again"))
    model.refresh()


@pytest.mark.parametrize("damage", [shutil.rmtree, no_graph])
def test_a_folder_without_a_good_version_is_an_error(folder, damage):
    directory, _ = folder
    damage(directory / "1")
    message = "None is there" if damage is shutil.rmtree else "Version 1 could not be"
    with pytest.raises(ValueError, match=f"must hold versions, .* {message}"):
        ServedModel("m", directory)


def test_a_labelled_version_is_not_enough_where_the_latest_is_broken(folder):
    directory, add = folder
    no_graph(add(2))
    with pytest.raises(ValueError, match="Version 2 could not be loaded"):
        ServedModel("m", directory, {"stable": 1})


def test_a_link_that_no_version_needs_does_no_harm(folder):
    directory, _ = folder
    (directory / "1" / "notes").symlink_to(directory / "nowhere")
    assert served_by(ServedModel("m", directory)) == 1


def test_a_folder_of_a_link_to_nowhere_alone_is_told_so(folder):
    directory, _ = folder
    model = ServedModel("m", directory)
    shutil.rmtree(directory / "1")
    (directory / "1").symlink_to(directory / "nowhere")
    with pytest.raises(ValueError, match="Version 1 is a link to what is not there"):
        ServedModel("m", directory)
    model.refresh()  # what is loaded is served on
    assert (served_by(model), state(model, 1)) == (1, ("AVAILABLE", ""))


def test_a_version_is_no_folder_of_versions(folder):
    directory, _ = folder
    message = rf"It is a version itself: give the folder above, '{directory}'$"
    with pytest.raises(ValueError, match=message):
        ServedModel("m", directory / "1")


def test_version_0_is_served(folder):
    directory, add = folder
    add(0)
    shutil.rmtree(directory / "1")
    model = ServedModel("m", directory, {"stable": 0})
    assert served_by(model) == labelled(model, "stable") == 0
    assert state(model, 0) == ("AVAILABLE", "")
    add(1)
    model.refresh()
    assert served_by(model) == 1


def test_what_was_sent_is_told_in_the_order_of_names(folder):
    version = ServedModel("m", folder[0]).find(SPEC)
    sent = {name: np.float32(0) for name in "dbac"}
    message = r"Received: a: float32 \(\), b: .*, c: .*, d: float32 \(\)$"
    with pytest.raises(ServingError, match=message):
        version.predict("normals", sent)


def labelled(model, label):
    return model.find(model_pb2.ModelSpec(name="m", version_label=label)).number


def test_labelled_versions_are_served_beside_the_latest(folder):
    directory, add = folder
    model = ServedModel("m", directory, {"stable": 1, "canary": 2, "gone": 7})
    assert served_by(model) == labelled(model, "stable") == 1
    for label, message in (
        ("canary", "Version 2 of model 'm' is not served. Served: 1"),
        ("gone", "Version 7 of model 'm' is not served. Served: 1"),
        ("new", r"Unrecognized servable version label: new.*\['canary', 'gone', 's"),
    ):
        with pytest.raises(ServingError, match=message):
            labelled(model, label)
    for number in (2, 3, 4):
        add(number)
        model.refresh()
        assert served_by(model) == number
    assert (labelled(model, "stable"), labelled(model, "canary")) == (1, 2)
    states = {number: state(model, number)[0] for number in (1, 2, 3, 4)}
    assert states == {1: "AVAILABLE", 2: "AVAILABLE", 3: "END", 4: "AVAILABLE"}
    shutil.rmtree(directory / "1")
    model.refresh()
    assert state(model, 1)[0] == "END"
    assert served_by(model) == 4


def test_versions_are_numbers_and_no_text(folder):
    directory, add = folder
    add(9)
    add(10)
    model = ServedModel("m", directory, {"stable": 9})
    assert (served_by(model), labelled(model, "stable")) == (10, 9)
    states = model.status(SPEC).model_version_status
    assert [x.version for x in states] == [10, 9]


def test_what_is_named_like_a_version_but_is_none_is_told_or_passed_over(folder):
    directory, add = folder
    (directory / "12345678901234567890").mkdir()
    (directory / "٣").mkdir()
    (directory / "5").symlink_to(directory / "nowhere")
    (directory / f"1{'0' * 19}").symlink_to(directory / "nowhere")
    model = ServedModel("m", directory)
    assert served_by(model) == 1
    told = f"Version 5 is a link to what is not there: {directory / 'nowhere'}"
    assert state(model, 5) == ("END", told)
    (directory / "5").unlink()
    add(5)
    model.refresh()
    assert served_by(model) == 5


@pytest.mark.parametrize("name", ["a/b", "a:b", ""])
def test_a_name_that_cannot_stand_in_a_path_is_an_error(folder, name):
    with pytest.raises(ValueError, match=f"'/' or ':'. Received: '{name}'"):
        ServedModel(name, folder[0])


def warm_up(version, *images):
    path = version / "assets.extra" / "tf_serving_warmup_requests"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for image in images:
            log = prediction_log_pb2.PredictionLog()
            request = log.predict_log.request
            request.model_spec.signature_name = "normals"
            request.inputs["image"].CopyFrom(tf.make_tensor_proto(image))
            writer.write(log.SerializeToString())


def test_warm_up_requests_are_run_before_a_version_is_served(folder):
    directory, add = folder
    model = ServedModel("m", directory)
    image = np.zeros((1, 24, 32, 3), "float32")
    warm_up(add(2), image, image[:, 1:])
    model.refresh()
    assert served_by(model) == 1
    assert "Signature 'normals' takes image" in state(model, 2)[1]
    warm_up(directory / "2", image)
    model.refresh()
    assert served_by(model) == 2


def test_a_version_knows_what_its_answers_mean(folder):
    directory, _ = folder
    answers = json.loads((directory / "1/assets.extra/answers.json").read_text())
    assert ServedModel("m", directory).find(SPEC).answers == answers


def test_tasks_that_only_answers_json_has_are_left_out(folder, served):
    directory, _ = folder
    answers = {"gone": {"kind": "detection"}, "normals": {"kind": "attributes"}}
    path = directory / "1/assets.extra/answers.json"
    path.write_text(json.dumps(answers))
    model = ServedModel("m", directory)
    assert model.find(SPEC).answers == {"normals": {"kind": "attributes"}}
    body = rest._draw(model, served.png(served.pictures()[0])).body
    drawn = [x["task"] for x in json.loads(body)["answers"]]
    assert drawn == ["normals", "segmentation"]


def test_answers_that_cannot_be_read_are_told_where_they_are_needed(folder):
    directory, _ = folder
    (directory / "1/assets.extra/answers.json").write_text("{")
    version = ServedModel("m", directory).find(SPEC)
    with pytest.raises(ServingError, match=r"answers\.json' must be JSON"):
        _ = version.answers


def test_pictures_for_a_model_that_takes_none_are_told_how_to_export_it(folder):
    version = ServedModel("m", folder[0]).find(SPEC)
    version.signature_defs = {"normals": version.signature_defs["normals"]}
    message = "with --from-jpeg, or by `export_saved_model.*from_jpeg=True"
    with pytest.raises(ServingError, match=message):
        rest._drawn(version)


def test_the_page_shows_text_and_one_answer_for_all_examples_too(tmp_path, served):
    image = keras.Input((8, 8, 3), name="image")
    mean = keras.layers.GlobalAveragePooling2D()(image)
    names = keras.layers.StringLookup(vocabulary=["café"], invert=True)
    outputs = {
        "name": names(keras.ops.cast(0 * mean[:, 0] + 1, "int64")),
        "brightest": keras.ops.max(0 * mean + 7),
        "bright": mean[:, 0] < 0,
    }
    model = keras.Model(image, outputs)
    export_saved_model(model, tmp_path, from_jpeg=True)
    body = rest._draw(ServedModel("m", tmp_path), served.png(served.pictures()[0])).body
    rows = {x["task"]: x["rows"] for x in json.loads(body)["answers"]}
    assert rows == {
        "name": [["name", "café"]],
        "brightest": [["brightest", "7"]],
        "bright": [["bright", "False"]],
    }
