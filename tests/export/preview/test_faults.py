"""What would hurt a server: it refuses each with a code, and answers the next one."""

import asyncio
import contextlib
import gzip
import io
import json
import resource
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, PngImagePlugin
from tensorflow_serving.apis import (
    model_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from export.client import Client, ServingError
from export.preview.loaded_version import Limits, _in_parts
from export.preview.served_model import ServedModel
from export.preview.server import Work
from tests.export.conftest import running

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")

SPEC = model_pb2.ModelSpec(name="cross_stitch")
HALF = 40  # requests, more than the server admits
PREDICT = "/v1/models/cross_stitch:predict"


@pytest.fixture(autouse=True, scope="module")
def memory_is_bounded(server):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 300_000  # kilobytes; one picture here means gigabytes


@pytest.fixture(autouse=True)
def the_next_good_request_is_answered(grpc_address, rest_address, served):
    yield
    image = served.pictures()
    expected = served.predict(image)["normals"]
    for address in (grpc_address, rest_address):
        with Client(address) as client:
            answer = client.predict("normals", image)["normals"]
        np.testing.assert_allclose(answer, expected, atol=1e-5)


def chunk(kind, data):
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png_of(width, height, first=b""):
    """A PNG's few bytes that promise so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        *(first, chunk(b"IHDR", header)),
        *(chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("door", ["grpc", "rest"], indirect=True)
@pytest.mark.parametrize(
    "images",
    [
        [png_of(30_000, 30_000)],
        [png_of(10_000, 10_000)],
        [png_of(1001, 1000)],
        [png_of(700, 1000), png_of(700, 1000)],
    ],
    ids=["bomb", "large", "just too large", "together"],
)
def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(door, images):
    with Client(door[0]) as client, pytest.raises(ServingError) as raised:
        client.predict("normals", images)
    assert raised.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "may have 1000000 pixels in all" in raised.value.message
    assert "fewer at a time, by `Client(..., batch=n)`" in raised.value.message


@pytest.mark.parametrize("door", ["grpc", "rest"], indirect=True)
def test_more_examples_than_batching_takes_are_refused_as_by_tf_serving(door, served):
    files = [served.png(image) for image in served.pictures(257, size=(4, 4))]
    with Client(door[0], batch=300) as client:
        answer = client.predict("normals", files[:256])
        assert len(answer["normals"]) == 256
        with pytest.raises(ServingError) as raised:
            client.predict("normals", files)
    assert raised.value.code == grpc.StatusCode.INVALID_ARGUMENT
    message = "Task size 257 is larger than maximum input batch size 256"
    assert message in raised.value.message
    with Client(door[0]) as client:  # in parts
        assert len(client.predict("normals", files)["normals"]) == 257


@pytest.mark.parametrize("door", ["grpc", "rest"], indirect=True)
def test_a_format_that_is_not_promised_is_refused(door):
    gif = b"GIF89a" + struct.pack("<HHBBB", 30_000, 30_000, 0, 0, 0) + b";"
    # Read as a size, this chunk's content is 1 x 1.
    odd = png_of(30_000, 30_000, chunk(b"aaAa", struct.pack(">II", 1, 1)))
    for file in (gif, odd):
        with Client(door[0]) as client, pytest.raises(ServingError) as raised:
            client.predict("normals", [file])
        assert "Image 0 of 1 must be a JPEG or PNG file" in raised.value.message


@pytest.mark.parametrize("door", ["grpc", "rest"], indirect=True)
def test_a_picture_that_ends_too_soon_is_told_by_its_number(door, served):
    files = [served.png(image) for image in served.pictures(41, size=(9, 9))]
    files[37] = files[37][:150]
    with Client(door[0], batch=50) as client, pytest.raises(ServingError) as raised:
        client.predict("normals", files)
    assert raised.value.code == grpc.StatusCode.INVALID_ARGUMENT
    message = "Image 37 of 41 must be a JPEG or PNG file, and a whole one"
    assert message in raised.value.message


@pytest.mark.parametrize("door", ["grpc", "rest"], indirect=True)
def test_what_is_too_large_at_a_time_is_told_how_to_be_asked(door, served):
    images = served.pictures(300)
    with Client(door[0], batch=200) as client, pytest.raises(ServingError) as raised:
        client.predict("normals", images)
    assert raised.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "in smaller parts, by `Client(..., batch=n)`" in raised.value.message
    assert "Sent at a time: image: uint8 (200, 24, 32, 3)" in raised.value.message
    with Client(door[0]) as client:
        assert len(client.predict("normals", images)["normals"]) == 300


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_an_answer_that_would_be_too_large_is_refused(served, way, monkeypatch):
    one = 24 * 32 * 4 * 3  # bytes of the normals of one picture
    limits = Limits(answer_bytes=5 * one)
    model = ServedModel("cross_stitch", served.directory, {}, limits)
    version = model.find(SPEC)
    images = served.pictures(5).astype("float32")
    assert len(version.predict("normals", {"image": images})["normals"]) == 5
    only = version.predict("serving_default", {"image": images}, ["normals"])
    assert only.keys() == {"normals"}
    # It is not run to be refused.
    monkeypatch.setattr("export.preview.loaded_version._in_parts", None)
    with running(model) as (grpc_port, rest_port):
        port = rest_port if way == "rest" else grpc_port
        address = f"{'http://' if way == 'rest' else ''}127.0.0.1:{port}"
        with (
            Client(address, timeout=60) as client,
            pytest.raises(ServingError) as raised,
        ):
            client.predict("serving_default", served.pictures(2))
    assert raised.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    both = 2 * 24 * 32 * 4 * (5 + 3)
    expected = f"may have {5 * one} bytes as tensors. The one to 2 examples has {both}"
    assert expected in raised.value.message


def test_a_large_batch_is_run_in_parts_where_each_example_is_answered():
    rng = np.random.default_rng(0)
    given = {"x": rng.normal(size=(70, 3)), "y": rng.normal(size=70)}
    asked = []

    def run(outputs):
        def each(part):
            asked.append({name: len(array) for name, array in part.items()})
            return {name: function(part) for name, function in outputs.items()}

        return each

    product = {"p": lambda part: part["x"] * part["y"][:, None]}
    answer = _in_parts(run(product), given)
    np.testing.assert_array_equal(answer["p"], given["x"] * given["y"][:, None])
    assert asked == [{"x": n, "y": n} for n in (32, 32, 6)]
    for odd in (
        {"mean": lambda part: np.array(part["y"].mean())},
        {"twice": lambda part: np.concatenate([part["y"], part["y"]])},
        {"square": lambda part: np.outer(part["y"], part["y"])},
    ):
        ((name, function),) = odd.items()
        np.testing.assert_array_equal(_in_parts(run(odd), given)[name], function(given))


def test_a_body_over_the_limit_is_refused(grpc_address, rest_address):
    images = np.zeros((200, 24, 32, 3), "float32")
    request = predict_pb2.PredictRequest(model_spec=SPEC)
    request.inputs["image"].CopyFrom(tf.make_tensor_proto(images))
    with grpc.insecure_channel(grpc_address) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Predict(request)
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    content = json.dumps({"inputs": images.tolist()})
    response = httpx.post(rest_address + PREDICT, content=content, timeout=60)
    assert response.status_code == 413


def test_a_body_of_unknown_length_is_limited_too(rest_address):
    chunks = (bytes(2**20) for _ in range(400))
    response = httpx.post(rest_address + PREDICT, content=chunks, timeout=60)
    assert response.status_code == 413
    assert "may have 1048576 bytes. Received: 419430400" in response.json()["error"]


HEAD = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"


@pytest.mark.parametrize("half", ["", "POST ", HEAD[:50], HEAD, HEAD + '{"inp'])
def test_half_a_request_then_silence_holds_up_nobody(
    server, rest_address, served, half
):
    with contextlib.ExitStack() as stack:
        for _ in range(HALF):
            connection = socket.create_connection(("127.0.0.1", server[1]))
            stack.enter_context(connection)
            connection.sendall(half.encode())
        with Client(rest_address) as client:
            answer = client.predict("normals", served.pictures())
        assert answer["normals"].shape == (1, 24, 32, 3)


def test_a_zip_bomb_is_refused(rest_address):
    bomb = gzip.compress(bytes(2**25))
    response = httpx.post(
        rest_address + PREDICT, content=bomb, headers={"Content-Encoding": "gzip"}
    )
    assert response.status_code == 413
    # Unpacked no further than that.
    assert "may have 1048576 bytes. Received: 1048577 or" in response.json()["error"]


def test_a_gzip_that_is_cut_or_has_more_behind_it_is_refused(rest_address):
    whole = gzip.compress(b'{"instances": [[1]]}')
    headers = {"Content-Encoding": "gzip"}
    for body in (whole[:-1], whole[:-8], whole[:15], whole + whole, whole + b"x"):
        answer = httpx.post(rest_address + PREDICT, content=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"] == "The body is no whole gzip"
    answer = httpx.post(rest_address + PREDICT, content=whole, headers=headers)
    assert "takes image: float32" in answer.json()["error"]


def test_half_a_grpc_request_then_silence_holds_up_nobody(grpc_address, served):
    end = threading.Event()

    def nothing():
        end.wait()
        return
        yield

    with grpc.insecure_channel(grpc_address) as channel:
        call = channel.stream_unary(
            "/tensorflow.serving.PredictionService/Predict",
            response_deserializer=predict_pb2.PredictResponse.FromString,
        )
        waiting = [call.future(nothing(), timeout=20) for _ in range(HALF)]
        with Client(grpc_address) as client:
            answer = client.predict("normals", served.pictures())
        assert answer["normals"].shape == (1, 24, 32, 3)
        for future in waiting:
            future.cancel()
        end.set()


def test_a_grpc_message_that_is_none_is_refused(grpc_address):
    with grpc.insecure_channel(grpc_address) as channel:
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        with pytest.raises(grpc.RpcError) as raised:
            call(b"\xff" * 100, timeout=10)
    assert raised.value.code() != grpc.StatusCode.DEADLINE_EXCEEDED


def test_more_requests_than_the_limit_are_unavailable():
    async def three():
        work, end = Work(2), threading.Event()
        running = [asyncio.create_task(work.run(end.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ServingError) as raised:
            await work.run(end.wait)
        end.set()
        assert await asyncio.gather(*running) == [True, True]
        assert await work.run(end.wait)
        return raised.value

    with ThreadPoolExecutor(1) as pool:  # this thread's loop may be Playwright's
        error = pool.submit(asyncio.run, three()).result()
    assert error.code == grpc.StatusCode.UNAVAILABLE
    assert "answers 2 requests at a time" in error.message


def test_status_waits_for_no_prediction(served):
    model = ServedModel("cross_stitch", served.directory)
    end, version = threading.Event(), model.find(SPEC)
    predict = version.predict
    version.predict = lambda *arguments: end.wait() and predict(*arguments)
    with running(model) as ports, contextlib.ExitStack() as stack:
        addresses = [f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"]
        clients = [stack.enter_context(Client(x, timeout=60)) for x in addresses]
        pool = stack.enter_context(ThreadPoolExecutor(8))
        stack.callback(end.set)  # before the pool waits for what is asked in it
        for client in clients:
            client.signatures()
            for _ in range(4):
                pool.submit(client.predict, "normals", served.pictures())
        for client in clients:
            assert client.status().model_version_status
            assert "normals" in client.signatures()


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_a_fault_of_the_server_itself_is_an_error_of_tf_servings_form(served, way):
    model = ServedModel("cross_stitch", served.directory)

    def fail(*arguments):
        raise KeyError("what")

    model.find(SPEC).predict = fail
    with running(model) as (grpc_port, rest_port):
        port = rest_port if way == "rest" else grpc_port
        address = f"{'http://' if way == 'rest' else ''}127.0.0.1:{port}"
        with (
            Client(address, timeout=60) as client,
            pytest.raises(ServingError) as raised,
        ):
            client.predict("normals", served.pictures())
    assert "KeyError: 'what'" in raised.value.message


def test_a_page_of_another_site_is_not_answered(rest_address):
    for host, status in (("evil.example", 400), ("localhost:80", 200)):
        response = httpx.get(
            f"{rest_address}/v1/models/cross_stitch", headers={"Host": host}
        )
        assert response.status_code == status


def test_another_address_of_the_machine_is_not_answered(server):
    for port in server:
        with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
            socket.create_connection(("127.0.0.2", port), timeout=5)


@pytest.mark.parametrize("path", ["/draw", PREDICT])
def test_a_page_of_another_site_may_not_ask(rest_address, served, path):
    content = served.png(served.pictures()[0])
    if path == PREDICT:
        inputs = served.pictures().tolist()
        content = json.dumps({"signature_name": "normals", "inputs": inputs})
    for origin in ("https://evil.example", "null", "http://localhost.evil.example"):
        response = httpx.post(
            rest_address + path, content=content, headers={"Origin": origin}
        )
        assert response.status_code == 403
        assert f"Received: Origin {origin}" in response.json()["error"]
    for origin in (rest_address, "http://localhost:3000", "http://127.0.0.1"):
        response = httpx.post(
            rest_address + path, content=content, headers={"Origin": origin}
        )
        assert response.status_code == 200


@pytest.mark.parametrize("door", ["grpc", "rest"], indirect=True)
def test_a_png_with_a_large_text_and_profile_is_answered(door, served):
    (pixels,) = served.pictures()
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2**24, zip=True)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=text, icc_profile=bytes(2**22))
    with Client(door[0]) as client:
        answer = client.predict("normals", [file.getvalue()])
    expected = served.predict([pixels])["normals"]
    np.testing.assert_allclose(answer["normals"], expected, atol=1e-5)
