"""What the client sends and gives, over gRPC and REST alike, and from odd servers."""

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import types

import grpc
import numpy as np
import pytest
import tensorflow as tf

from export.client import Client, ServingError, all_tasks, transports
from export.client.client import _cast
from export.client.messages import CLASSES, to_tensor
from export.preview.served_model import ServedModel

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")

NUMBERS = ("float32", "float16", "int32", "int64", "uint8", "uint64", "bool")
DTYPES = (*NUMBERS, "string")


@pytest.fixture(scope="module")
def echo(tmp_path_factory, preview):
    """A model whose signatures give back what they take: gRPC's address and REST's."""
    module = tf.Module()
    signatures = {}
    for dtype in DTYPES:
        for rank in range(3):
            spec = tf.TensorSpec([None] * rank, dtype, name="x")
            same = tf.function(lambda x: {"y": tf.identity(x)}, input_signature=[spec])
            signatures[f"{dtype}_{rank}"] = same
    path = tmp_path_factory.mktemp("echo") / "a model" / "1"
    tf.saved_model.save(module, path, signatures=signatures)
    with preview(ServedModel("a model", path.parent, {"a/b ü": 1})) as (
        port,
        rest_port,
    ):
        yield {"grpc": f"127.0.0.1:{port}", "rest": f"http://127.0.0.1:{rest_port}"}


@pytest.fixture(params=["grpc", "rest"])
def client(echo, request):
    with Client(echo[request.param], "a model") as client:
        yield client


def skip_without_json(client, dtype):
    if dtype == "float16" and client.address.startswith("http"):
        pytest.skip("TF Serving has no JSON of it")


VALUES = {
    "float32": [1 / 3, -0.0, 1e-45, 3.4028235e38, np.nan, np.inf, -np.inf],
    "float16": [1 / 3, -2.5, 65504, np.nan, np.inf],
    "int32": [-(2**31), 2**31 - 1, 0],
    "int64": [-(2**63), 2**63 - 1, 2**53 + 1],
    "uint8": [0, 255],
    "uint64": [1, 2**64 - 1],
    "bool": [True, False],
    "string": [b"", b"room", "Räume".encode(), b'"\\\n', b"\xff\xfe"],
}


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_sent_comes_back(client, dtype, rank):
    skip_without_json(client, dtype)
    kind = object if dtype == "string" else dtype
    values = np.array(VALUES[dtype], kind)
    sent = {0: values[1], 1: values, 2: np.stack([values, values[::-1]])}[rank]
    sent = np.array(sent, kind)
    answer = client.predict(f"{dtype}_{rank}", {"x": sent})["y"]
    assert answer.dtype == sent.dtype
    assert answer.shape == sent.shape
    np.testing.assert_array_equal(answer, sent)


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_a_label_may_be_any_text(echo, way):
    with Client(echo[way], "a model", label="a/b ü") as client:
        assert client.predict("int32_1", {"x": [7]})["y"].tolist() == [7]


def test_an_answer_over_grpc_may_have_more_than_4_megabytes(echo):
    sent = np.arange(1_200_000, dtype="float32")[None]
    with Client(echo["grpc"], "a model") as client:
        answer = client.predict("float32_2", {"x": sent})["y"]
    np.testing.assert_array_equal(answer, sent)


@pytest.mark.parametrize(
    "sent",
    [
        [["ab", "ü"], ["", "d"]],
        np.array([["ab", "ü"], ["", "d"]]),
        np.array([["ab", "ü"], ["", "d"]], object),
        np.array([[b"ab", "ü".encode()], [b"", b"d"]]),
    ],
    ids=["list", "text", "objects", "bytes"],
)
def test_text_and_bytes_are_taken_and_bytes_given(client, sent):
    answer = client.predict("string_2", {"x": sent})["y"]
    assert answer.tolist() == [[b"ab", "ü".encode()], [b"", b"d"]]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ([[1, 2]], "float32"),
        (np.array([[1, 255]], "int64"), "uint8"),
        (np.array([[2**24, -(2**30)]], "int32"), "float32"),
        (np.array([[0.1, np.nan, np.inf]], "float64"), "float32"),
        (np.array([[2049 - 1]], "uint16"), "float16"),
        (np.array([[True, False]]), "int32"),
        (np.array([[2**63 - 1]], "uint64"), "int64"),
    ],
)
def test_a_cast_that_changes_nothing_is_made(client, given, taken):
    skip_without_json(client, taken)
    answer = client.predict(f"{taken}_2", {"x": given})["y"]
    assert answer.dtype == taken
    np.testing.assert_array_equal(answer, np.asarray(given).astype(taken))


@pytest.mark.parametrize(
    ("given", "taken", "value"),
    [
        (np.array([[0, 2**32 + 1]], "int64"), "int32", r"4294967297 at \(0, 1\)"),
        (np.array([[256, 1]], "uint16"), "uint8", "256 at"),
        (np.array([[-1]], "int32"), "uint8", "-1 at"),
        (np.array([[2**63]], "uint64"), "int64", "9223372036854775808 at"),
        (np.array([[2**24 + 1]], "int32"), "float32", "16777217 at"),
        (np.array([[1.0, 70000.0]]), "float16", r"70000.0 at \(0, 1\)"),
        (np.array([[1e39]]), "float32", "1e\\+39 at"),
        (np.array([[2**60 + 1]], "int64"), "float32", f"{2**60 + 1} at"),
    ],
)
def test_a_cast_that_changes_a_value_is_refused(client, given, taken, value):
    message = f"'x' has values that {taken} cannot hold: {value}.* Sent: x: "
    with pytest.raises(ServingError, match=message) as raised:
        client.predict(f"{taken}_2", {"x": given})
    assert raised.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_no_example_is_refused_by_both_protocols_alike(client):
    message = r"'x' must hold at least one example.* Sent: x: float32 \(0, 7\)"
    with pytest.raises(ServingError, match=message):
        client.predict("float32_2", {"x": np.zeros((0, 7), "float32")})


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (np.array([[1.5]]), "int32"),
        (np.array([[1]]), "bool"),
        (np.array([[1.0]]), "string"),
        (np.array([["1"]]), "float32"),
        (np.array([[1 + 1j]]), "float32"),
    ],
)
def test_another_kind_of_value_is_refused(client, given, taken):
    with pytest.raises(ServingError) as raised:
        client.predict(f"{taken}_2", {"x": given})
    assert raised.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_random_integers_are_cast_as_python_compares_them():
    """Each is a float, or is refused, as its Python int equals the float or not."""
    rng = np.random.default_rng(0)
    info = CLASSES["TensorInfo"]()
    for number, name in ((1, "float32"), (2, "float64"), (19, "float16")):
        info.dtype = number
        for dtype in ("int64", "uint64", "int32", "int8"):
            bits = rng.integers(1, np.iinfo(dtype).bits - 1, 300)
            for value in (2**bits + rng.integers(-1, 2, 300)).tolist():
                value = min(value, np.iinfo(dtype).max)
                with np.errstate(over="ignore"):
                    as_float = np.array(value).astype(name)
                same = np.isfinite(as_float) and int(as_float) == value
                try:
                    _cast(np.array([value], dtype), "x", info)
                except ServingError:
                    assert not same, (value, dtype, name)
                else:
                    assert same, (value, dtype, name)


class Server:
    """Answers each connection over HTTP with what it is told; then it is closed."""

    def __init__(self, *parts, pause=0.0, tls=None):
        self._parts, self._pause, self._tls = parts, pause, tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._ended = threading.Event()
        self.asked = 0
        threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._ended.set()
        self._listening.close()

    def _run(self):
        while not self._ended.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.asked += 1
            with connection:
                try:
                    if self._tls:
                        connection = self._tls.wrap_socket(connection, True)
                    connection.recv(1 << 16)
                    for part in self._parts:
                        connection.sendall(part)
                        time.sleep(self._pause)
                except OSError:
                    continue


def response(status, body, length=None):
    length = len(body) if length is None else length
    head = f"HTTP/1.1 {status} Status\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    "parts",
    [
        [response(200, b"", 10**6), *[b" "] * 1000],
        [b"HTTP/1.1 200 OK\r\n", *[b"A: b\r\n"] * 1000],
        [b"", *[b""] * 1000],
    ],
    ids=["body", "head", "silence"],
)
def test_an_answer_that_comes_drop_by_drop_ends_with_the_time(parts):
    """Each drop is in time; without an end to it all, this takes 30 seconds."""
    with (
        Server(*parts, pause=0.03) as server,
        Client(server.address, timeout=0.3) as client,
    ):
        with pytest.raises(ServingError) as raised:
            client.status()
        assert raised.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert server.asked == 1


@contextlib.contextmanager
def late(seconds=5):
    """What is refused for the time that is up, and not long after that."""
    start = time.monotonic()
    with pytest.raises(ServingError) as raised:
        yield
    assert raised.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_server_that_is_silent_is_waited_for_until_the_time_is_up(scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
        with Client(address, timeout=0.3) as client, late():
            client.status()


def test_a_server_that_takes_no_connection_is_waited_for_until_the_time_is_up():
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # more than wait for it to take them
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        address = f"http://127.0.0.1:{full.getsockname()[1]}"
        with Client(address, timeout=0.3) as client, late():
            client.status()


def test_a_request_that_is_read_drop_by_drop_ends_with_the_time():
    """Each drop is in time; without an end to it all, this takes 15 seconds."""

    def read():
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            while connection.recv(1 << 16):
                time.sleep(0.03)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=read, daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with Client(address) as client, late():
            deadline = time.monotonic() + 2
            client._transport._ask("POST", ":predict", deadline, " " * 2**25)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "UNAUTHENTICATED"),
        (403, "PERMISSION_DENIED"),
        (404, "NOT_FOUND"),
        (413, "RESOURCE_EXHAUSTED"),
        (418, "UNKNOWN"),
        (429, "RESOURCE_EXHAUSTED"),
        (500, "UNKNOWN"),
        (504, "DEADLINE_EXCEEDED"),
    ],
)
@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"<html>no</html>", r"HTTP status \d+: <html>no"),
        (b'{"error": "why"}', "why"),
        (b"[1]", r"HTTP status \d+: \[1\]"),
        (b"\xff", "HTTP status"),
    ],
)
def test_a_status_has_its_code_whatever_the_body_is(status, code, body, told):
    with (
        Server(response(status, body)) as server,
        Client(server.address, timeout=5) as client,
        pytest.raises(ServingError, match=told) as raised,
    ):
        client.status()
    assert raised.value.code.name == code


@pytest.mark.parametrize("status", [502, 503])
def test_nobody_behind_a_gateway_is_asked_again(status):
    with (
        Server(response(status, b"Bad Gateway")) as server,
        Client(server.address, timeout=1) as client,
    ):
        with pytest.raises(ServingError, match="Bad Gateway") as raised:
            client.status()
        assert raised.value.code == grpc.StatusCode.UNAVAILABLE
        assert server.asked > 1


@pytest.mark.parametrize(
    "body",
    [b"<html></html>", b"[]", b"{}", b"null", b'{"metadata": 1}', b"\xff", b"1"],
)
def test_an_answer_that_is_none_of_tf_servings_is_told_as_such(body):
    with (
        Server(response(200, body)) as server,
        Client(server.address, timeout=5) as client,
        pytest.raises(
            ServingError, match="The answer is none of TF Serving's"
        ) as raised,
    ):
        client.signatures()
    assert raised.value.code == grpc.StatusCode.UNKNOWN


def info(dtype, *sizes):
    made = CLASSES["TensorInfo"](dtype=dtype)
    for size in sizes:
        made.tensor_shape.dim.add(size=size)
    return made


FLOAT, INT, STRING, BOOL = 1, 3, 7, 10


def answered(outputs, known):
    """What a client reads that knows these outputs of the signature."""
    with (
        Server(response(200, json.dumps({"outputs": outputs}).encode())) as server,
        Client(server.address, timeout=5) as client,
    ):
        return client._transport.predict("x", {}, known, time.monotonic() + 5)


@pytest.mark.parametrize("outputs", [[[1], [2, 3]], [None]])
def test_odd_outputs_are_told_as_such(outputs):
    with pytest.raises(ServingError) as raised:
        answered(outputs, {"y": info(FLOAT, -1)})
    assert raised.value.code == grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize(
    ("outputs", "known", "told"),
    [
        ({"a": [1.0], "b": [2.0]}, {"y": info(FLOAT, -1)}, r"\['a', 'b'\]"),
        ({"a": [1.0]}, {"a": info(FLOAT, -1), "b": info(INT, -1)}, r"\['a'\]"),
        ([1.0], {"a": info(FLOAT, -1), "b": info(INT, -1)}, "one, unnamed"),
        ([3, 4], {"y": info(FLOAT, -1)}, r"int64 \(2,\)"),
        ([0.5], {"y": info(INT, -1)}, r"float64 \(1,\)"),
        ([1, 0], {"y": info(BOOL, -1)}, r"int64 \(2,\)"),
        ([1.5, 2.5], {"y": info(FLOAT, -1, 4)}, r"float64 \(2,\)"),
        ([[1.5, 2.5]], {"y": info(FLOAT, -1, 4)}, r"float64 \(1, 2\)"),
        ([["a"]], {"y": info(STRING, -1)}, r"object \(1, 1\)"),
        ([3, 4], {"y": info(STRING, -1)}, r"int64 \(2,\)"),
        (["3", "4"], {"y": info(INT, -1)}, r"str\d+ \(2,\)"),
    ],
)
def test_the_outputs_of_a_new_version_are_told_as_such(outputs, known, told):
    message = f"has a new version with other outputs: {told}. Ask again"
    with pytest.raises(ServingError, match=message) as raised:
        answered(outputs, known)
    assert raised.value.code == grpc.StatusCode.FAILED_PRECONDITION


def test_outputs_of_the_known_form_are_read():
    assert answered({"b64": "Yg=="}, {"y": info(STRING)})["y"][()] == b"b"
    assert answered([], {"y": info(FLOAT, -1, 4)})["y"].dtype == "float32"
    both = {"a": info(FLOAT, -1), "b": info(INT, -1, 2)}
    answer = answered({"a": [1.0], "b": [[2, 3]]}, both)
    assert (answer["a"].tolist(), answer["b"].tolist()) == ([1.0], [[2, 3]])


NAMES = sorted("abcdefgh")  # by chance, they are hardly ever in this order


@pytest.mark.parametrize("way", ["Grpc", "Rest"])
def test_outputs_and_signatures_are_in_the_order_of_names(way, monkeypatch):
    """In the messages they are in an order that is another in each process."""
    signatures = CLASSES["SignatureDefMap"]()
    predicted = CLASSES["PredictResponse"]()
    for name in reversed(NAMES):
        signatures.signature_def[name].outputs[name].dtype = FLOAT
        predicted.outputs[name].CopyFrom(to_tensor(np.zeros(1, "float32")))
    metadata = CLASSES["GetModelMetadataResponse"]()
    metadata.metadata["signature_def"].value = signatures.SerializeToString()
    as_json = {name: {} for name in reversed(NAMES)}
    answers = {
        "Grpc": [predicted, metadata],
        "Rest": [
            {"outputs": {name: [0.0] for name in as_json}},
            {"metadata": {"signature_def": {"signature_def": as_json}}},
        ],
    }[way]
    kind = getattr(transports, way)
    monkeypatch.setattr(kind, "_ask", lambda *_: answers.pop(0))
    transport = kind("http://127.0.0.1:1", CLASSES["ModelSpec"](name="m"))
    known = {name: info(FLOAT, -1) for name in NAMES}
    assert list(transport.predict("x", {}, known, 1)) == NAMES
    assert list(transport.signatures(1)) == NAMES


def test_a_tasks_outputs_are_in_the_order_of_names():
    outputs = {f"task_{name}": np.zeros(1) for name in NAMES}
    assert list(all_tasks.of_task("task", outputs, NAMES[::-1])) == NAMES


def saved(path, outputs):
    """A version whose only signature gives these, {name: function}."""

    def call(x):
        return {name: function(x) for name, function in outputs.items()}

    spec = tf.TensorSpec([None, 2], name="x")
    module = tf.Module()
    module.call = tf.function(call, input_signature=[spec])
    tf.saved_model.save(module, str(path), {"answer": module.call})


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_a_client_lives_through_versions_with_other_outputs(tmp_path, preview, way):
    versions = [
        {"a": tf.identity},
        {"a": tf.identity, "b": lambda x: 2 * x},
        {"sum": lambda x: tf.reduce_sum(x, axis=1)},
        {"classes": lambda x: tf.argmax(x, axis=1)},
        {"names": lambda x: tf.as_string(tf.argmax(x, axis=1))},
        {"a": tf.identity, "b": lambda x: 3 * x},
    ]
    x = np.array([[1, 2.5]], "float32")
    saved(tmp_path / "1", versions[0])
    model = ServedModel("cross_stitch", tmp_path)
    with preview(model) as ports:
        address = f"127.0.0.1:{ports[0]}"
        if way == "rest":
            address = f"http://127.0.0.1:{ports[1]}"
        with Client(address) as client:
            client.predict("answer", x)
            for number, outputs in enumerate(versions[1:], start=2):
                saved(tmp_path / str(number), outputs)
                model.refresh()
                answer = client.predict("answer", x)
                assert answer.keys() == outputs.keys()
                for name, function in outputs.items():
                    expected = np.asarray(function(x))
                    np.testing.assert_array_equal(answer[name], expected)


@pytest.mark.parametrize("way", ["grpc", "rest"])
def test_a_new_version_may_take_something_else(tmp_path, preview, way):
    versions = [("float32", "x"), ("float32", "image"), ("int32", "image")]
    x = np.array([[1, 2]])
    for number, (dtype, name) in enumerate(versions, start=1):
        module = tf.Module()
        spec = tf.TensorSpec([None, 2], dtype, name=name)
        call = tf.function(lambda **x: {"y": 2 * next(iter(x.values()))})
        module.call = call.get_concrete_function(**{name: spec})
        tf.saved_model.save(module, str(tmp_path / str(number)), {"y": module.call})
        if number == 1:
            model = ServedModel("cross_stitch", tmp_path)
            running = preview(model)
            ports = running.__enter__()
            address = f"127.0.0.1:{ports[0]}"
            if way == "rest":
                address = f"http://127.0.0.1:{ports[1]}"
            client = Client(address)
        model.refresh()
        answer = client.predict("y", x)["y"]
        assert answer.tolist() == [[2, 4]]
        assert answer.dtype == dtype
    client.close()
    running.__exit__(None, None, None)


def test_a_request_that_is_wrong_is_not_asked_twice():
    signature = CLASSES["SignatureDef"]()
    signature.inputs["x"].CopyFrom(info(FLOAT, -1))
    asked = []

    class Transport:
        def predict(self, *what):
            asked.append("predict")
            raise ServingError(grpc.StatusCode.INVALID_ARGUMENT, "why")

        def signatures(self, deadline):
            asked.append("signatures")
            return {"x": signature}

    client = Client("127.0.0.1:1")
    client._transport = Transport()
    with pytest.raises(ServingError, match=r"why .*takes x: float32 \(N,\). Sent: x"):
        client.predict("x", np.zeros(4, "float32"))
    assert asked == ["signatures", "predict", "signatures"]


def test_parts_that_two_versions_answered_are_not_joined():
    answers = [{"a": np.zeros((2, 3))}, {"b": np.zeros((2, 3))}]

    class Transport:
        def predict(self, *asked):
            return answers.pop(0)

        def signatures(self, deadline):
            signature = CLASSES["SignatureDef"]()
            signature.inputs["x"].CopyFrom(info(FLOAT, -1))
            return {"x": signature}

    client = Client("127.0.0.1:1", batch=2)
    client._transport = Transport()
    with pytest.raises(ServingError, match=r"cannot be joined: .*'a'.* and .*'b'"):
        client.predict("x", np.zeros(4, "float32"))


def test_a_search_for_regions_takes_none_of_the_time(monkeypatch, shapes):
    hours, deadlines = [0], []

    class Transport:
        def predict(self, signature, arrays, outputs, deadline):
            deadlines.append(deadline)
            return {}

        def signatures(self, deadline):
            signature = CLASSES["SignatureDef"]()
            signature.inputs["image"].CopyFrom(info(FLOAT, -1, 48, 64, 3))
            signature.inputs["rois"].CopyFrom(info(FLOAT, -1, -1, 4))
            return {"objects": signature}

    def search(images):
        hours[0] += 1
        return np.zeros((len(images), 1, 4))

    clock = types.SimpleNamespace(monotonic=lambda: 3600.0 * hours[0])
    monkeypatch.setattr("export.client.client.time", clock)
    monkeypatch.setattr("export.client.regions._proposals", search)
    client = Client("127.0.0.1:1", timeout=10)
    client._transport = Transport()
    client.predict("objects", [shapes.jpeg])
    assert deadlines == [3600 + 10]


@pytest.mark.parametrize("kind", ["grpc", "rest"])
def test_a_server_that_is_back_is_found_at_once(served, preview, free_port, kind):
    """gRPC's own waits grow to 20 seconds while a server is away."""
    ports = free_port(), free_port()
    address = (
        f"127.0.0.1:{ports[0]}" if kind == "grpc" else (f"http://127.0.0.1:{ports[1]}")
    )
    with Client(address, timeout=5) as client:
        for _ in range(2):
            with pytest.raises(ServingError):
                client.status()
        with preview(ServedModel("cross_stitch", served.directory, {}), ports):
            answer = client.predict("normals", served.pictures())
    assert answer["normals"].shape == (1, 24, 32, 3)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Of nobody's authority, for localhost: paths of it and of its key."""
    folder = tmp_path_factory.mktemp("certificate")
    names = folder / "certificate.pem", folder / "key.pem"
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-out", names[0], "-keyout", names[1]]
    subprocess.run(command, check=True, capture_output=True)
    return names


@pytest.mark.parametrize("trusted", [False, True])
def test_a_certificate_that_does_not_verify_is_told_at_once(
    certificate, trusted, monkeypatch
):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with Server(response(200, b"{}"), tls=context) as server:
        port = server.address.rpartition(":")[2]
        with Client(f"https://localhost:{port}", timeout=5) as client:
            if trusted:
                assert not client.status().model_version_status
            else:
                message = "certificate .* by SSL_CERT_FILE"
                with pytest.raises(ServingError, match=message) as raised:
                    client.status()
                assert raised.value.code == grpc.StatusCode.UNAUTHENTICATED
        assert server.asked == 1
