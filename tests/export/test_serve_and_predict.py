"""python -m export serve, and predict."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import predict_pb2
from typer.testing import CliRunner

from export import predicting
from export.__main__ import app
from export.client import ServingError, messages
from export.preview.loaded_version import LoadedVersion

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, list(map(str, arguments)))


@pytest.fixture
def picture(served, tmp_path):
    (pixels,) = served.pictures(seed=5)
    path = tmp_path / "room.png"
    Image.fromarray(pixels).save(path)
    return path, pixels


@pytest.mark.parametrize("address", ["grpc_address", "rest_address"])
def test_predict_draws_each_task_over_the_picture(
    served, picture, address, request, tmp_path, monkeypatch
):
    path, pixels = picture
    asked = []  # both tasks in one request

    def watched(version, signature, *rest):
        asked.append(signature)
        return predict(version, signature, *rest)

    predict = LoadedVersion.predict
    monkeypatch.setattr(LoadedVersion, "predict", watched)
    address = request.getfixturevalue(address)
    tasks = ("--task", "segmentation", "--task", "normals")
    folder = ("--model", served.directory, "--output", tmp_path / "drawn")
    result = run("predict", path, *tasks, "--address", address, *folder)
    assert result.exit_code == 0, result.output
    assert asked == ["from_jpeg"]

    expected = served.predict([pixels])
    colours = np.array(served.answers["segmentation"]["colours"])
    colours = colours[expected["segmentation"][0].argmax(axis=-1)]
    with Image.open(tmp_path / "drawn" / "room.segmentation.png") as drawn:
        over = np.array(drawn)[:24, :32].astype("float64")
    np.testing.assert_allclose(over, 0.4 * pixels + 0.6 * colours, atol=1)
    assert (tmp_path / "drawn" / "room.normals.png").is_file()


def test_predict_prints_numbers_where_nothing_says_what_they_mean(
    picture, grpc_address, tmp_path
):
    output = ("--output", tmp_path)
    result = run(
        "predict", picture[0], "--task", "normals", "--address", grpc_address, *output
    )
    assert result.exit_code == 0
    assert "normals, mean" in result.output
    assert list(tmp_path.iterdir()) == [picture[0]]


def test_predict_says_how_maps_are_drawn_and_how_a_server_is_started(
    picture, free_port, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "300")
    assert "Without it, maps are printed as numbers" in run("predict", "--help").output
    at = ("--task", "normals", "--timeout", 2, "--address")
    for address in (f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"):
        result = run("predict", picture[0], *at, address)
        in_one_line(result, "UNAVAILABLE: ", code=1)
        assert "`python -m export serve FOLDER` starts one" in result.stderr
    in_one_line(run("predict", picture[0], *at, "localhost"), "must be HOST:PORT")


def test_tasks_that_only_answers_json_has_are_left_out(
    served, picture, grpc_address, tmp_path
):
    shutil.copytree(
        served.directory / str(served.latest),
        tmp_path / "served" / str(served.latest),
        ignore=shutil.ignore_patterns("variables"),
    )
    (path,) = tmp_path.glob("served/*/assets.extra/answers.json")
    answers = {"gone": {"kind": "detection"}, "normals": {"kind": "attributes"}}
    path.write_text(json.dumps(answers))
    at = ("--address", grpc_address, "--task", "normals", "--output", tmp_path)
    result = run("predict", picture[0], *at, "--model", tmp_path / "served")
    assert result.exit_code == 0, result.output
    assert "normals, mean" in result.output


def test_a_bad_picture_is_named_and_the_others_are_answered(
    served, picture, grpc_address, tmp_path
):
    path, pixels = picture
    folder = tmp_path / "of pictures"
    folder.mkdir()
    for name in ("1.png", "3.png"):
        Image.fromarray(pixels).save(folder / name)
    (folder / "2.jpg").write_bytes(path.read_bytes()[:200])
    (folder / "4.jpg").write_text("no picture")
    at = ("--address", grpc_address, "--task", "normals", "--output", tmp_path / "out")
    result = run("predict", folder, *at, "--model", served.directory)
    assert result.exit_code == 1
    drawn = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert drawn == ["1.normals.png", "3.normals.png"]
    told = result.stderr.splitlines()
    assert len(told) == 2
    for line, name in zip(told, ("2.jpg", "4.jpg"), strict=True):
        start = f"Error: {folder / name}: INVALID_ARGUMENT: Image 0 of 1 must be a JPEG"
        assert line.startswith(start)


def test_a_picture_that_is_too_large_is_named_and_the_next_is_answered(
    served, picture, grpc_address, tmp_path
):
    large = tmp_path / "large.png"
    Image.fromarray(served.pictures(size=(700, 700))[0]).save(large)
    at = ("--address", grpc_address, "--task", "normals", "--output", tmp_path / "out")
    result = run("predict", large, picture[0], *at, "--model", served.directory)
    in_one_line(result, f"{large}: RESOURCE_EXHAUSTED: ", code=1)
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["room.normals.png"]


def test_a_drawing_that_fails_leaves_the_one_before_it(
    served, picture, grpc_address, tmp_path, monkeypatch
):
    class Full:
        def save(self, path, kind):
            path.write_bytes(b"half")
            raise OSError("No space left on device")

    monkeypatch.setattr("export.predicting.drawing.over", lambda *_: Full())
    (tmp_path / "room.normals.png").write_text("the one before")
    at = ("--address", grpc_address, "--task", "normals", "--output", tmp_path)
    result = run("predict", picture[0], *at, "--model", served.directory)
    in_one_line(result, "No space left on device", code=1)
    assert (tmp_path / "room.normals.png").read_text() == "the one before"
    assert len([*tmp_path.iterdir()]) == 2


def test_drawings_have_names_that_differ_on_any_file_system():
    files = [Path("left", "Room.png"), Path("right", "room.png")]
    names = predicting._names(files).values()
    assert sorted(names) == ["left/Room.png", "right/room.png"]


def test_a_picture_that_is_given_twice_is_asked_about_once(picture):
    path, _ = picture
    assert predicting._files([path, path.parent, path]) == [path]


def test_answers_mean_what_the_version_that_is_served_says(tmp_path):
    status = messages.GetModelStatusResponse()
    for version, state in ((3, "LOADING"), (2, "END"), (1, "AVAILABLE")):
        status.model_version_status.add(version=version, state=state)
        path = tmp_path / str(version) / "assets.extra" / "answers.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"age": {"units": f"of {version}"}}))
    client = types.SimpleNamespace(
        status=lambda: status, signatures=lambda: {"age": None}
    )
    assert predicting._answers(client, tmp_path) == {"age": {"units": "of 1"}}


def test_what_no_picture_can_be_answered_for_is_told_once(
    picture, grpc_address, tmp_path
):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture[0].read_bytes())
    result = run("predict", tmp_path, "--address", grpc_address, "--task", "depth")
    in_one_line(result, f"{tmp_path / 'a.png'}: NOT_FOUND: ", code=1)


def test_a_picture_that_takes_too_long_is_named_and_the_next_is_answered(
    shapes_folder, tmp_path
):
    asked = []

    class Slow:
        def predict(self, task, images):
            asked.append(images[0].name)
            if len(asked) == 1:
                raise ServingError(grpc.StatusCode.DEADLINE_EXCEEDED, "why")
            return {task: np.zeros((1, 2))}

    answered = predicting.predict(Slow(), [shapes_folder], ["x"], None, tmp_path)
    assert not answered
    assert asked == ["plain.png", "shapes.jpg"]


def test_names_of_pictures_and_of_a_version_are_taken_as_they_are(
    served, picture, grpc_address, tmp_path
):
    (tmp_path / "versions").mkdir()
    latest = served.directory / str(served.latest)
    (tmp_path / "versions" / f"000{served.latest}").symlink_to(latest)
    # Together they name a tag that nothing opened.
    odd = tmp_path / "[" / "nothing] [b] :cat:.png"
    odd.parent.mkdir()
    picture[0].rename(odd)
    at = ("--address", grpc_address, "--task", "normals", "--output", odd.parent)
    result = run("predict", odd, *at, "--model", tmp_path / "versions")
    assert result.exit_code == 0, result.output
    assert f"Wrote {odd.with_suffix('.normals.png')}" in result.output
    result = run("predict", odd, *at)  # a table
    assert f"{odd.name}, normals" in result.output


def in_one_line(result, message, code=2):
    assert result.exit_code == code
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_what_predict_cannot_do_is_told_in_a_line(picture, grpc_address, tmp_path):
    path, _ = picture
    at = ("--address", grpc_address, "--task", "normals")
    in_one_line(run("predict", "none.png", *at), "There is no file none.png")
    in_one_line(run("predict", path, *at, "--name", "x"), "Model 'x' not found", code=1)
    in_one_line(run("predict", path, *at, "--model", tmp_path), "does not hold the")
    at = ("--address", grpc_address, "--task", "depth")
    message = "no signature 'depth_from_jpeg'. There are"
    in_one_line(run("predict", path, *at), message, code=1)


def test_what_serve_cannot_do_is_told_in_a_line(
    served, server, tmp_path, free_port, monkeypatch
):
    free_port = free_port()
    any_ports = ("--port", 0, "--rest-port", 0)
    in_one_line(run("serve", tmp_path, *any_ports), "must hold versions")
    in_one_line(run("serve", tmp_path / "none", *any_ports), "must hold versions")
    label = ("--label", "stable")
    in_one_line(run("serve", served.directory, *label), "--label must be LABEL=VERSION")
    label = ("--label", "stable=9", "--port", server[0])  # taken: it never serves
    message = f"There are: {', '.join(map(str, sorted(served.models)))}. Received: sta"
    in_one_line(run("serve", served.directory, *label), message)
    label = ("--label", "stable=9", *any_ports)
    in_one_line(run("serve", tmp_path, *label), "must hold versions")
    name = ("--name", "a/b", *any_ports)
    in_one_line(run("serve", served.directory, *name), "any but those with")
    monkeypatch.setattr(
        "export.preview.served_model.LoadedVersion",
        lambda *_: pytest.fail("a model is loaded before its server has ports"),
    )
    for ports in (
        ("--port", server[0]),
        ("--port", 0, "--rest-port", server[1]),
        ("--port", 70_000),
    ):
        result = run("serve", served.directory, *ports)
        in_one_line(result, "cannot be used: ")
    ports = ("--port", free_port, "--rest-port", free_port)
    message = f"--rest-port must differ. Received: {free_port} for both"
    in_one_line(run("serve", served.directory, *ports), message)


def test_rest_has_its_port_before_the_model_is_loaded(served, free_port, monkeypatch):
    """Who connects waits in the queue; over gRPC nobody is there until then."""
    grpc_port, rest_port = free_port(), free_port()
    connected = []

    def load(*_):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", grpc_port))
        socket.create_connection(("127.0.0.1", rest_port), timeout=20).close()
        connected.append(rest_port)
        raise ValueError("so far and no further")

    monkeypatch.setattr("export.preview.served_model.LoadedVersion", load)
    result = run(
        "serve", served.directory, "--port", grpc_port, "--rest-port", rest_port
    )
    assert connected == [rest_port]
    assert "so far and no further" in result.stderr


def test_a_port_that_is_taken_while_the_model_is_loaded_is_told_in_a_line(
    served, free_port, monkeypatch
):
    port = free_port()
    taken = []

    def load(*arguments):
        taken.append(socket.create_server(("127.0.0.1", port)))
        return LoadedVersion(*arguments)

    monkeypatch.setattr("export.preview.served_model.LoadedVersion", load)
    result = run("serve", served.directory, "--port", port, "--rest-port", 0)
    taken[0].close()
    in_one_line(result, f"Port {port} of 127.0.0.1 cannot be used: ")


@pytest.fixture
def process(served, tmp_path, wait_for, free_port):
    """`serve` in a process of its own, with version 1: it, and its ports."""
    source = served.directory / str(served.latest)
    shutil.copytree(source, tmp_path / "served" / "1")
    ports = free_port(), free_port()
    command = [sys.executable, "-m", "export", "serve", tmp_path / "served"]
    command += ["--port", str(ports[0]), "--rest-port", str(ports[1])]
    command += ["--name", "rooms", "--label", "stable=1"]
    # Its directory is the checkout's, from which export is imported.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{ports[1]}/v1/models/rooms/labels/stable"
        wait_for(lambda: answers(address), seconds=180)
        yield process, *ports
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def answers(address):
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_answers_what_is_under_way(served, process, wait_for):
    process, port, rest_port = process
    image = served.pictures().astype("float32")
    expected = served.predict(image)["normals"]
    body = json.dumps({"signature_name": "normals", "inputs": image.tolist()}).encode()
    head = f"POST /v1/models/rooms:predict HTTP/1.1\r\nContent-Length: {len(body)}"
    head = f"{head}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "rooms"
    request.model_spec.signature_name = "normals"
    request.inputs["image"].CopyFrom(tf.make_tensor_proto(image))
    ended = threading.Event()

    def late():
        ended.wait()
        yield request

    with (
        socket.create_connection(("127.0.0.1", rest_port), timeout=20) as rest,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        rest.sendall(head + body[:1000])
        call = channel.stream_unary(
            "/tensorflow.serving.PredictionService/Predict",
            predict_pb2.PredictRequest.SerializeToString,
            predict_pb2.PredictResponse.FromString,
        )
        grpc.channel_ready_future(channel).result(timeout=20)
        answer = call.future(late(), timeout=30)
        wait_for(lambda: answers(f"http://127.0.0.1:{rest_port}/v1/models/rooms"))

        os.kill(process.pid, signal.SIGTERM)
        wait_for(lambda: not accepts(rest_port))
        rest.sendall(body[1000:])
        with rest.makefile("rb") as file:
            status, _, content = file.read().partition(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 200")
        np.testing.assert_allclose(json.loads(content)["outputs"], expected, atol=1e-5)
        wait_for(lambda: not accepts(port))
        ended.set()
        normals = tf.make_ndarray(answer.result().outputs["normals"])
        np.testing.assert_allclose(normals, expected, atol=1e-5)
    assert process.wait(timeout=20) in (0, -signal.SIGTERM)
    told = process.stdout.read()
    assert told.startswith("Version 1 is loaded\nPreview server, for development only")


def accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True
