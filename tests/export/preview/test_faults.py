"""What would hurt a server: it refuses each with a code, and answers the next one."""

import contextlib
import resource
import socket
import struct
import threading
import zlib

import grpc
import httpx
import numpy as np
import pytest
from tensorflow_serving.apis import predict_pb2

from export.client import Client, ServingError
from export.preview.server import Work

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")

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


def png_of(width, height):
    """A PNG's few bytes that promise so many pixels."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


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


@pytest.mark.parametrize("door", ["grpc", "rest"], indirect=True)
def test_a_format_that_is_not_promised_is_refused(door):
    gif = b"GIF89a" + struct.pack("<HHBBB", 30_000, 30_000, 0, 0, 0) + b";"
    with Client(door[0]) as client, pytest.raises(ServingError) as raised:
        client.predict("normals", [gif])
    assert "Image 0 of 1 must be a JPEG or PNG file" in raised.value.message


@pytest.mark.parametrize("door", ["grpc", "rest"], indirect=True)
def test_a_body_over_the_limit_is_refused(door):
    with Client(door[0]) as client, pytest.raises(ServingError) as raised:
        client.predict("normals", np.zeros((200, 24, 32, 3), "float32"))
    assert raised.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_body_of_unknown_length_is_limited_too(rest_address):
    chunks = (bytes(2**20) for _ in range(400))
    response = httpx.post(rest_address + PREDICT, content=chunks, timeout=60)
    assert response.status_code == 413
    assert "may have 1048576 bytes. Received: 419430400" in response.json()["error"]


def sent(stack, server, data):
    connection = socket.create_connection(("127.0.0.1", server[1]), timeout=20)
    stack.enter_context(connection)
    connection.sendall(data)
    return connection


@pytest.mark.parametrize("head", [b"", b"POST ", b"POST / HTTP/1.1\r\nHost: a\r\nX: "])
def test_half_a_head_then_silence_ends_the_connection(server, head):
    with contextlib.ExitStack() as stack:
        for connection in [sent(stack, server, head) for _ in range(HALF)]:
            assert connection.recv(1000) == b""


def test_half_a_head_after_a_whole_request_ends_the_connection(server):
    whole = b"GET /v1/models/cross_stitch HTTP/1.1\r\nHost: a\r\n\r\n"
    with contextlib.ExitStack() as stack:
        connection = sent(stack, server, whole)
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /v1/mo")
        while connection.recv(10_000):
            pass


def test_half_a_body_then_silence_is_told_so(server):
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for connection in [sent(stack, server, head + b'{"inp') for _ in range(5)]:
            assert connection.recv(10_000).startswith(b"HTTP/1.1 408")


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
    work = Work(2)
    with work.admitted():
        with work.admitted(), pytest.raises(ServingError) as raised, work.admitted():
            pass
        with work.admitted():
            pass
    assert raised.value.code == grpc.StatusCode.UNAVAILABLE
    assert "answers 2 requests at a time" in raised.value.message
