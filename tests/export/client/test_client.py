"""The client, against each server: gRPC and REST of the preview, and TF Serving."""

import re
import types
from pathlib import Path

import grpc
import numpy as np
import pytest
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus

from export.client import Client, ServingError, messages

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture
def client(door):
    with Client(door[0]) as client:
        yield client


@pytest.fixture
def behind(door):
    """The models behind the address."""
    return door[1]


@pytest.mark.parametrize("task", ["segmentation", "normals"])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_arrays_are_answered_as_by_predict(client, behind, task, dtype):
    images = behind.pictures(3)
    answer = client.predict(task, images.astype(dtype))
    assert answer.keys() == {task}
    assert answer[task].dtype == "float32"
    np.testing.assert_allclose(answer[task], behind.predict(images)[task], atol=1e-5)


def test_serving_default_answers_all_tasks(client, behind):
    images = behind.pictures(2)
    answer = client.predict("serving_default", {"image": images})
    expected = behind.predict(images)
    assert answer.keys() == expected.keys()
    for task in expected:
        np.testing.assert_allclose(answer[task], expected[task], atol=1e-5)


def test_files_and_bytes_are_answered_as_their_pixels(client, behind, tmp_path):
    images = behind.pictures(2)
    path = tmp_path / "image.png"
    path.write_bytes(behind.png(images[0]))
    answer = client.predict("normals", [path, behind.png(images[1])])
    expected = behind.predict(images)["normals"]
    np.testing.assert_allclose(answer["normals"], expected, atol=1e-5)


@pytest.mark.parametrize("signature", ["serving_default", "from_jpeg"])
def test_all_tasks_are_asked_about_files_in_one_request(client, behind, signature):
    images = behind.pictures(2)
    answer = client.predict(signature, [behind.png(image) for image in images])
    expected = behind.predict(images)
    assert answer.keys() == expected.keys()
    for task in expected:
        np.testing.assert_allclose(answer[task], expected[task], atol=1e-5)


def test_a_version_can_be_asked_for(door, behind):
    with Client(door[0], version=behind.latest) as client:
        assert client.predict("normals", behind.pictures())["normals"].shape[0] == 1


def test_signatures_say_shapes_and_status_says_versions(client, behind):
    signatures = client.signatures()
    image = signatures["normals"].inputs["image"].tensor_shape
    assert [dim.size for dim in image.dim] == [-1, 24, 32, 3]
    state = {x.version: x.state for x in client.status().model_version_status}
    assert state[behind.latest] == ModelVersionStatus.AVAILABLE


@pytest.mark.parametrize(
    ("images", "received"),
    [
        (np.zeros((24, 32, 3), "float32"), "image: float32 (24, 32, 3)"),
        (np.zeros((1, 24, 31, 3), "float32"), "image: float32 (1, 24, 31, 3)"),
        (np.zeros((1, 24, 32, 3), "complex64"), "image: complex64 (1, 24, 32, 3)"),
        ({"picture": np.zeros((1, 24, 32, 3), "float32")}, "picture: float32"),
    ],
    ids=["rank", "size", "dtype", "name"],
)
def test_a_wrong_input_is_told_what_the_signature_takes(client, images, received):
    if (
        client.address.startswith("http")
        and getattr(images, "dtype", "") == "complex64"
    ):
        pytest.skip("JSON has no complex numbers")
    with pytest.raises(ServingError) as raised:
        client.predict("normals", images)
    assert raised.value.code == INVALID
    assert "'normals' takes image: float32 (N, 24, 32, 3)" in raised.value.message
    assert f"Sent: {received}" in raised.value.message


def test_an_unknown_signature_is_told_which_there_are(client, behind):
    message = r"no signature 'depth'. There are: from_jpeg, normals, normals_from"
    with pytest.raises(ServingError, match=message):
        client.predict("depth", behind.pictures())


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ({"name": "nobody"}, {NOT_FOUND}),
        ({"version": 4000}, {NOT_FOUND}),
        ({"label": "never"}, {INVALID}),
    ],
    ids=["model", "version", "label"],
)
def test_what_is_not_served_has_its_code(door, options, codes):
    address, behind = door
    with Client(address, **options) as client, pytest.raises(ServingError) as raised:
        client.predict("normals", behind.pictures())
    assert raised.value.code in codes
    assert address in raised.value.message


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_a_file_that_is_no_image_is_refused_and_the_next_answered(client, behind, kind):
    whole = behind.png(behind.pictures()[0])
    file = {"truncated": whole[: len(whole) // 2], "text": b"a text", "empty": b""}
    with pytest.raises(ServingError) as raised:
        client.predict("normals", [file[kind]])
    assert raised.value.code == INVALID
    assert "'normals_from_jpeg' takes image_bytes: string (N,)" in raised.value.message
    assert client.predict("normals", [whole])["normals"].shape == (1, 24, 32, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("room.jpg", r"a list of files .* or a folder. Received: str room.jpg"),
        ([[1.0, 2.0]], r"or a folder. Received: list \[\[1.0, 2.0\]\]"),
        (b"JFIF", "or a folder. Received: bytes"),
        ([], "at least one file. Received: none"),
        ({"image": [[1], [2, 3]]}, "'image' must be an array: "),
        ({"image": [[None]]}, "'image' must be an array of numbers, or of bytes"),
    ],
    ids=["path", "numbers", "bytes", "none", "ragged", "objects"],
)
def test_what_is_neither_files_nor_arrays_is_refused(client, images, message):
    with pytest.raises((TypeError, ValueError), match=message):
        client.predict("normals", images)


def test_a_folder_is_its_pictures_in_the_order_of_names(client, behind, tmp_path):
    images = behind.pictures(3)
    for name, image in zip(("b.PNG", "a.jpg", "c.jpeg"), images, strict=True):
        (tmp_path / name).write_bytes(behind.png(image))
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._a.jpg"):
        (tmp_path / name).write_bytes(b"left by a file manager")
    (tmp_path / "notes.txt").write_text("no picture")
    expected = behind.predict(images[[1, 0, 2]])["normals"]
    for folder in (tmp_path, str(tmp_path)):
        answer = client.predict("normals", folder)["normals"]
        np.testing.assert_allclose(answer, expected, atol=1e-5)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no JPEG or PNG files in"):
        client.predict("normals", tmp_path / "none")


def test_more_than_a_batch_is_asked_in_parts_and_joined(door, behind, monkeypatch):
    images = behind.pictures(7)
    files = [behind.png(image) for image in images]
    expected = behind.predict(images)["normals"]
    with Client(door[0], batch=3) as client:
        sizes = []
        ask = client._transport.predict

        def watched(signature, arrays, outputs, deadline):
            sizes.append({len(array) for array in arrays.values()})
            return ask(signature, arrays, outputs, deadline)

        monkeypatch.setattr(client._transport, "predict", watched)
        for given in (images, {"image": images}, files):
            answer = client.predict("normals", given)["normals"]
            np.testing.assert_allclose(answer, expected, atol=1e-5)
        assert len(client.predict("normals", images[:4])["normals"]) == 4
    assert sizes == [{3}, {3}, {1}] * 3 + [{3}, {1}]


def test_answers_without_a_batch_axis_are_asked_for_at_once():
    signature = messages.CLASSES["SignatureDef"]()
    signature.inputs["x"].dtype = 1  # float32
    signature.inputs["x"].tensor_shape.dim.add(size=-1)
    client = Client("127.0.0.1:1", batch=3)
    client._transport = Answers(*[{"largest": signature}] * 2)
    client._transport.predict = lambda *_: {"largest": np.array(5.0)}
    message = "'largest' has no batch axis, .* at once, by `Client.*, batch=7"
    with pytest.raises(ServingError, match=message):
        client.predict("largest", np.zeros(7, "float32"))


def test_what_has_a_fixed_size_is_no_batch_and_not_split():
    signature = messages.CLASSES["SignatureDef"]()
    signature.inputs["x"].dtype = 1  # float32
    signature.inputs["x"].tensor_shape.dim.add(size=7)
    client = Client("127.0.0.1:1", batch=3)
    client._transport = Answers({"double": signature})
    client._transport.predict = lambda _, arrays, *__: {"size": arrays["x"].shape}
    answer = client.predict("double", np.ones(7, "float32"))
    assert answer == {"size": (7,)}


def test_a_closed_client_says_so(door, behind):
    client = Client(door[0])
    client.predict("normals", behind.pictures())
    client.close()
    client.close()
    for ask in (client.status, client.signatures):
        with pytest.raises(ValueError, match=r"client of .* is closed: make another"):
            ask()
    with pytest.raises(ValueError, match="is closed"):
        client.predict("normals", behind.pictures())


def test_files_for_a_model_without_their_signatures_are_told_how_to_export_it():
    client = Client("127.0.0.1:1")
    known = {"normals": messages.CLASSES["SignatureDef"]()}
    client._transport = Answers(known, known)
    message = "'normals_from_jpeg', .* --from-jpeg, .*from_jpeg=True.* There are: norm"
    with pytest.raises(ServingError, match=message):
        client.predict("normals", [b"a file"])


@pytest.mark.parametrize("address", ["localhost", "localhost:"])
def test_an_address_without_a_port_is_refused(address):
    message = f"must be HOST:PORT for gRPC, .* Received: {address}$"
    with pytest.raises(ValueError, match=message):
        Client(address)


@pytest.mark.parametrize(
    "address",
    [
        *("http://localhost:85x1", "http://localhost:99999", "http://"),
        *("https://:8501", "grpc://localhost:8500", "ftp://localhost:8500"),
    ],
)
def test_an_address_that_is_no_url_is_refused(address):
    message = f"HOST:PORT for gRPC, .* http.?://HOST:PORT .* REST. Received: {address}$"
    with pytest.raises(ValueError, match=message):
        Client(address)


def test_a_scheme_may_be_in_capitals(rest_address):
    with Client(rest_address.replace("http", "HTTP")) as client:
        assert "normals" in client.signatures()


def test_version_and_label_exclude_each_other():
    with pytest.raises(ValueError, match="Give `version` or `label`, not both"):
        Client("127.0.0.1:1", version=1, label="stable")


def test_the_code_in_docs_runs(behind, door, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # A PNG: what a file holds says what it is, not its name.
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "room.jpg").write_bytes(behind.png(behind.pictures()[0]))
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    _, code, _ = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code.replace("127.0.0.1:8500", door[0]), {})
    assert capsys.readouterr().out == "(1, 24, 32, 3)\n"


class Answers:
    """A transport that raises, or returns, one thing after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.deadlines = []

    def status(self, deadline):
        return self.signatures(deadline)

    def signatures(self, deadline):
        self.deadlines.append(deadline)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def fails(code):
    return ServingError(code, "why")


def test_unavailable_is_tried_again_until_one_moment():
    unavailable = fails(grpc.StatusCode.UNAVAILABLE)
    client = Client("127.0.0.1:1", timeout=5)
    client._transport = Answers(unavailable, unavailable, "status")
    assert client.status() == "status"
    assert len(client._transport.deadlines) == 3
    assert len(set(client._transport.deadlines)) == 1


@pytest.mark.parametrize(
    "code",
    [code for code in grpc.StatusCode if code.name not in ("OK", "UNAVAILABLE")],
)
def test_nothing_else_is_tried_again(code):
    client = Client("127.0.0.1:1")
    client._transport = Answers(fails(code), "status")
    with pytest.raises(ServingError, match=rf"{code.name}: why \(from 127.0.0.1:1\)"):
        client.status()


def test_a_late_server_is_not_asked_what_it_takes_besides(served):
    client = Client("127.0.0.1:1")
    client._transport = Answers(fails(grpc.StatusCode.DEADLINE_EXCEEDED))
    with pytest.raises(ServingError, match="DEADLINE_EXCEEDED: why"):
        client.predict("normals", served.pictures())
    assert len(client._transport.deadlines) == 1


def test_who_is_away_is_asked_twice_a_second_until_the_time_is_up(monkeypatch):
    now, pauses = [0.0], []

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds

    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr("export.client.client.time", clock)
    client = Client("127.0.0.1:1", timeout=5)
    client._transport = Answers(*[fails(grpc.StatusCode.UNAVAILABLE)] * 200)
    with pytest.raises(ServingError, match="UNAVAILABLE: why"):
        client.status()
    assert 4.5 <= now[0] <= 5
    assert max(pauses) <= 0.5


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1"])
def test_a_server_that_is_away_is_unavailable_when_the_time_is_up(address):
    with Client(address, timeout=0.3) as client, pytest.raises(ServingError) as raised:
        client.status()
    assert raised.value.code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
