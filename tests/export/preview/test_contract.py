"""TF Serving's contract, case by case: over REST, gRPC, and by TensorFlow's own loader.

What is right here is what tensorflow/serving's json_tensor.cc, http_rest_api_util.cc,
http_server.cc and predict_util.cc do.
"""

import gzip
import json
import socket

import grpc
import httpx
import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from export.client.protocol import ServingError
from export.preview import server
from export.preview.loaded_version import Limits, LoadedVersion
from export.preview.served_model import ServedModel
from keras_cross_stitch import export_saved_model
from tests.export.conftest import running

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")

WITHOUT_JSON = ["float16", "bfloat16", "uint16", "complex64"]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"]
DTYPES = ["float32", "float64", *INTEGERS, "bool", "string", *WITHOUT_JSON]


class Echo(tf.Module):
    """A signature for each dtype gives back what it takes; others give odd shapes."""

    def signatures(self):
        def echo(dtype):
            spec = tf.TensorSpec(None, dtype, name="x")
            return tf.function(lambda x: {"y": x}, input_signature=[spec])

        def cast(dtype):
            return lambda x: {"y": tf.cast(x, dtype)}

        x = tf.TensorSpec([None], name="x")
        name = tf.TensorSpec([None], tf.string, name="name")
        two = {
            "without_batch": lambda x: {"y": x, "mean": tf.reduce_mean(x)},
            "uneven": lambda x: {"y": x, "twice": tf.concat([x, x], 0)},
            **{f"as_{dtype}": cast(dtype) for dtype in WITHOUT_JSON},
        }
        return {
            **{dtype: echo(dtype) for dtype in DTYPES},
            **{key: tf.function(f, input_signature=[x]) for key, f in two.items()},
            "serving_default": tf.function(
                lambda x, name: {"y": 2 * x, "name": name, "name_bytes": name},
                input_signature=[x, name],
            ),
        }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "echo" / "3"
    module = Echo()
    module.kept = module.signatures()
    tf.saved_model.save(module, str(path), module.kept)
    return path


@pytest.fixture(scope="module")
def ports(path):
    with running(ServedModel("echo", path.parent, {"stable": 3})) as ports:
        yield ports


@pytest.fixture(scope="module")
def http(ports):
    with httpx.Client(base_url=f"http://127.0.0.1:{ports[1]}") as http:
        yield http


@pytest.fixture(scope="module")
def stub(ports):
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        yield prediction_service_pb2_grpc.PredictionServiceStub(channel)


@pytest.fixture(scope="module")
def loaded(path):
    return tf.saved_model.load(str(path))


def post(http, content, **headers):
    return http.post("/v1/models/echo:predict", content=content, headers=headers)


def body(signature, values, key="inputs"):
    return b'{"signature_name": "%s", "%s": %s}' % (
        signature.encode(),
        key.encode(),
        values if isinstance(values, bytes) else values.encode(),
    )


TAKEN = [
    ("float32", "[1, 2.5, -0.0]", [1, 2.5, -0.0]),
    ("float32", "[16777215, 16777216.0, -16777215]", [16777215, 16777216, -16777215]),
    ("float32", "[1e-60, 3.4e38]", [0, 3.4e38]),
    ("float32", "[NaN, Infinity, -Infinity]", [np.nan, np.inf, -np.inf]),
    ("float32", "[0.1, 0.30000001, 123456.79, 1e-5]", [0.1, 0.3, 123456.79, 1e-5]),
    ("float32", f"[1{'0' * 30}]", [1e30]),
    ("float32", "[[[1], [2]]]", [[[1], [2]]]),
    ("float32", "[[], []]", [[], []]),
    ("float32", "7", 7),
    ("float64", "[9007199254740991, 0.1, 1e300]", [9007199254740991, 0.1, 1e300]),
    ("int64", "[9007199254740993]", [9007199254740993]),
    ("int64", f"[{-(2**63)}, {2**63 - 1}]", [-(2**63), 2**63 - 1]),
    ("uint32", f"[{2**32 - 1}]", [2**32 - 1]),
    ("uint64", f"[{2**64 - 1}]", [2**64 - 1]),
    ("int8", "[-128, 127]", [-128, 127]),
    ("uint8", "[[0], [255]]", [[0], [255]]),
    ("bool", "[true, false]", [True, False]),
    ("string", '["a", "\\u00fc", ""]', [b"a", "ü".encode(), b""]),
    ("string", '[["a"], [{"b64": "Yg=="}]]', [[b"a"], [b"b"]]),
    ("string", '[{"b64": "Yg"}, {"b64": " Y\\ng = =\\n"}]', [b"b", b"b"]),
    ("string", '{"b64": "YmE"}', b"ba"),
    ("string", b'["\xff\xfe"]', [b"\xff\xfe"]),
]


@pytest.mark.parametrize(("signature", "values", "expected"), TAKEN)
def test_what_is_taken_is_answered_alike_by_each_way(
    http, stub, loaded, signature, values, expected
):
    dtype = tf.as_dtype(signature).as_numpy_dtype
    expected = np.array(expected, object if signature == "string" else dtype)
    by_loader = loaded.signatures[signature](x=tf.constant(expected))["y"]
    np.testing.assert_array_equal(by_loader.numpy(), expected)

    request = predict_pb2.PredictRequest()
    request.model_spec.name = "echo"
    request.model_spec.signature_name = signature
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(expected))
    if expected.size:
        by_grpc = tf.make_ndarray(stub.Predict(request).outputs["y"])
        np.testing.assert_array_equal(by_grpc, expected)

    response = post(http, body(signature, values))
    assert response.status_code == 200, response.text
    text = response.content.decode("utf-8", "surrogateescape")
    by_rest = json.loads(text)["outputs"]
    if signature == "string":
        by_rest = np.array(by_rest, object)
        by_rest = np.vectorize(
            lambda x: x.encode("utf-8", "surrogateescape"), otypes=[object]
        )(by_rest)
    by_rest = np.array(by_rest, object if signature == "string" else dtype)
    np.testing.assert_array_equal(by_rest, expected)


@pytest.mark.parametrize(
    ("signature", "values", "message"),
    [
        ("float32", "[16777216]", "16777216 has more digits than it holds"),
        ("float32", "[-16777217, 0.5]", "16777217 has more digits than it holds"),
        ("float32", "[1e39]", "a value is beyond its range"),
        ("float32", "[1e400]", "JSON parse error: 1e400 is too large"),
        ("float32", f"[1{'0' * 5000}]", "JSON parse error: 1000"),
        ("float32", "[1, true]", "type float32: true is none"),
        ("float32", '["1"]', 'type float32: "1" is none'),
        ("float32", "[null]", "type float32: null is none"),
        ("float32", '[{"b64": "Yg=="}]', 'type float32: {"b64": "Yg=="} is none'),
        ("float32", "[[1], [2, 3]]", "its lists at depth 1 differ in length"),
        ("float32", "[1, [2]]", "there are lists and values at depth 1"),
        ("float32", "[[1], 2]", "its lists at depth 1 differ in length"),
        ("float64", "[9007199254740993]", "9007199254740993 has more digits"),
        ("int64", "[1.0]", "type int64: 1.0 is none"),
        ("int64", "[1e3]", "type int64: 1000.0 is none"),
        ("int64", f"[{2**63}]", "type int64: "),
        ("int64", f"[{2**64}]", "type int64: "),
        ("int32", "[NaN]", "type int32: NaN is none"),
        ("int32", f"[{2**31}]", "type int32: "),
        ("int32", "[true]", "type int32: true is none"),
        ("uint8", "[256]", "type uint8: "),
        ("uint8", "[-1]", "type uint8: "),
        ("bool", "[1]", "type bool: 1 is none"),
        ("bool", '["true"]', 'type bool: "true" is none'),
        ("string", "[1]", "type string: 1 is neither a string nor"),
        ("string", '[{"b64": 5}]', 'type string: {"b64": 5} is neither'),
        ("string", '[{"b64": "YQ", "a": 1}]', "is neither a string nor"),
        ("string", '[{"b64": "%"}]', "type string: "),
        ("string", '[{"b64": "YQ="}]', "type string: "),
        ("string", '[{"b64": "Y"}]', "type string: "),
        ("string", '["\\ud800"]', "type string: "),
    ],
)
def test_what_is_refused_is_told_why(http, signature, values, message):
    response = post(http, body(signature, values))
    assert response.status_code == 400
    assert message in response.json()["error"]


@pytest.mark.parametrize("key", ["inputs", "instances"])
@pytest.mark.parametrize("dtype", WITHOUT_JSON)
def test_types_that_tf_serving_does_not_read_or_write_as_json_are_refused(
    http, dtype, key
):
    response = post(http, body(dtype, "[1]", key))
    assert response.status_code == 501
    assert f"'x' of type {dtype} over gRPC: TF Serving" in response.json()["error"]
    response = post(http, body(f"as_{dtype}", "[1]", key))
    assert response.status_code == 400
    assert f"'y' of type {dtype} over gRPC, or give" in response.json()["error"]


def test_floats_have_the_digits_of_a_float32(http):
    response = post(http, body("float32", "[0.1, 16777216.0, 0.33333334, 1e-30, 3]"))
    assert response.text == '{"outputs": [0.1, 16777216.0, 0.33333334, 1e-30, 3.0]}'


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b'{"inputs": {"x": [1], "name": ["a"]}}', {}),
        (b'{"signature_name": "", "inputs": {"x": [1], "name": ["a"]}}', {}),
        (b'{"inputs": {"x": [1], "name": ["a"], "unknown": 5}, "else": null}', {}),
        (b'{"inputs": {"x": [1], "x": [2], "name": ["a"]}, "inputs": 5}', {}),
        (b'\xef\xbb\xbf{"inputs": {"x": [1], "name": ["a"]}}', {}),
        (
            gzip.compress(b'{"inputs": {"x": [1], "name": ["a"]}}'),
            {"Content-Encoding": "gzip"},
        ),
        (b'{"inputs": {"x": [1], "name": ["a"]}}', {"Content-Type": "text/plain"}),
    ],
    ids=["plain", "no signature", "unknown keys", "twice", "BOM", "gzip", "type"],
)
def test_a_body_is_read_as_tf_serving_does(http, content, headers):
    response = post(http, content, **headers)
    answer = {"y": [2.0], "name": ["a"], "name_bytes": [{"b64": "YQ=="}]}
    assert response.json() == {"outputs": answer}
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "JSON parse error"),
        (b'{"inputs": [1],}', "JSON parse error"),
        (b'{"inputs": [1]} 2', "JSON parse error"),
        (b'{"inputs": {"x": [1]}}', "The inputs are ['name', 'x']. Received: ['x']"),
        (b'{"inputs": [1]}', "The inputs must be named: ['name', 'x']"),
        (body("\\ud800", "[1]"), "Signature '\\ud800' not found in version 3"),
        (b'{"instances": [{"x": 1, "name": "a", "z": 1}]}', "Received: ['name', 'x',"),
        (b'{"instances": {"x": 1}}', "'instances' must be a list"),
        (body("without_batch", "[1, 2]", "instances"), "Rows need outputs with one ba"),
        (body("uneven", "[1, 2]", "instances"), "Rows need outputs with one batch"),
    ],
)
def test_a_body_that_tf_serving_refuses_is_refused(http, content, message):
    response = post(http, content)
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_a_body_that_is_no_gzip_is_refused(http):
    response = post(http, b'{"inputs": [1]}', **{"Content-Encoding": "gzip"})
    assert response.status_code == 400
    assert "The body is no gzip" in response.json()["error"]


def test_columns_may_have_no_batch_axis(http):
    answer = post(http, body("without_batch", "[1, 2]")).json()
    assert answer == {"outputs": {"y": [1.0, 2.0], "mean": 1.5}}
    answer = post(http, body("uneven", "[1]")).json()
    assert answer == {"outputs": {"y": [1.0], "twice": [1.0, 1.0]}}


@pytest.mark.parametrize(
    ("method", "url", "status", "message"),
    [
        ("GET", "/v1/models/echo", 200, None),
        ("GET", "/V1/Models/echo/Versions/3/Metadata", 200, None),
        ("GET", "/v1/models/ech%6f", 200, None),
        ("GET", "/v1/models/echo/labels/nobodys", 200, None),  # is not looked at
        ("GET", "/v1/models/echo?x=1", 200, None),
        ("OPTIONS", "/v1/models/echo:predict", 200, None),
        ("GET", "/v1/models", 400, "Missing model name in request."),
        ("GET", "/v1/models/echo/", 400, "Malformed request: GET /v1/models/echo/"),
        ("GET", "/v1/models/a%2fb", 404, "Model 'a/b' not found"),
        ("GET", "/v1/models/echo/versions/4", 404, "Could not find version 4"),
        ("GET", f"/v1/models/echo/versions/{2**63}", 400, "Failed to convert version"),
        # More digits than Python reads.
        pytest.param(
            *("GET", f"/v1/models/echo/versions/{'7' * 5000}", 400, "Failed to conver"),
            id="5000 digits",
        ),
        pytest.param(
            *("GET", f"/v1/models/echo/versions/{'0' * 5000}3", 200, None),
            id="5000 zeros",
        ),
        (
            "GET",
            "/v1/models/echo/labels/nobodys/metadata",
            400,
            "Unrecognized servable",
        ),
        ("PUT", "/v1/models/echo", 400, "Malformed request: PUT /v1/models/echo"),
        ("DELETE", "/v1/models/echo:predict", 400, "Malformed request: DELETE"),
        ("POST", "/v1/models/echo", 400, "Malformed request: POST /v1/models/echo"),
        ("GET", "/v1/models/echo:predict", 400, "Malformed request: GET"),
        ("GET", "/v2/models", 404, "There is nothing at /v2/models"),
        ("GET", "/draw", 404, "There is nothing at /draw"),
    ],
)
def test_paths_and_methods_have_tf_servings_status(http, method, url, status, message):
    response = http.request(method, url)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert (message or "") in response.json().get("error", "")
    assert "access-control-allow-origin" not in response.headers


def test_equal_outputs_in_a_filter_are_refused(stub):
    request = predict_pb2.PredictRequest(output_filter=["y", "y"])
    request.model_spec.name = "echo"
    request.model_spec.signature_name = "float32"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto([1.0]))
    with pytest.raises(grpc.RpcError) as raised:
        stub.Predict(request)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("signature", ["float32", "odd_from_jpeg"])
def test_an_array_may_have_the_name_of_files(tmp_path, signature):
    image = keras.Input((4, 4, 3), name="image_bytes")
    model = keras.Model(image, {signature: keras.layers.Flatten()(image)})
    version = LoadedVersion(export_saved_model(model, tmp_path), Limits(pixels=1))
    x = np.ones((1, 4, 4, 3), "float32")
    answer = version.predict(signature, {"image_bytes": x})
    np.testing.assert_array_equal(answer[signature], x.reshape(1, -1))


def test_images_of_unequal_sizes_are_told_to_be_sent_one_by_one(tmp_path):
    image = keras.Input((None, None, 3), name="image")
    model = keras.Model(image, {"mean": keras.layers.GlobalAveragePooling2D()(image)})
    path = export_saved_model(model, tmp_path, from_jpeg=True)
    version = LoadedVersion(path, Limits())
    files = [
        tf.io.encode_png(np.zeros((4, size, 3), "uint8")).numpy() for size in (5, 6)
    ]
    for file in files:
        one = version.predict("mean_from_jpeg", {"image_bytes": np.array([file], "O")})
        assert one["mean"].shape == (1, 3)
    message = "must have one size: send them one by one"
    with pytest.raises(ServingError, match=message) as raised:
        version.predict("mean_from_jpeg", {"image_bytes": np.array(files, object)})
    assert raised.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_an_answer_on_a_kept_connection_does_not_wait_for_acknowledgments():
    port, listening = server.listen(0, 0)
    with listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            # By this asyncio knows TCP, and turns Nagle's algorithm off.
            assert accepted.proto == socket.IPPROTO_TCP
    assert port
