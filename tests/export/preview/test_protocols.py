"""What goes over the wire, as TF Serving has it: REST's JSON, gRPC's messages."""

import base64

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")

MODEL = "/v1/models/cross_stitch"


@pytest.fixture(scope="module")
def http(rest_address):
    with httpx.Client(base_url=rest_address) as http:
        yield http


@pytest.fixture(scope="module")
def channel(grpc_address):
    with grpc.insecure_channel(grpc_address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


def b64(data):
    return {"b64": base64.b64encode(data).decode()}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("path", ["", "/labels/v{}", "/versions/{}"])
def test_rows_of_one_output_are_a_list(http, served, named, path):
    path = path.format(served.latest)
    images = served.pictures(2).tolist()
    rows = [{"image": image} for image in images] if named else images
    body = {"signature_name": "normals", "instances": rows}
    answer = http.post(f"{MODEL}{path}:predict", json=body).json()
    assert answer.keys() == {"predictions"}
    expected = served.predict(images)["normals"]
    np.testing.assert_allclose(answer["predictions"], expected, atol=1e-5)


@pytest.mark.parametrize("named", [False, True])
def test_columns_of_one_output_are_its_value(http, served, named):
    images = served.pictures(2).tolist()
    inputs = {"image": images} if named else images
    body = {"signature_name": "normals", "inputs": inputs}
    answer = http.post(f"{MODEL}:predict", json=body).json()
    assert answer.keys() == {"outputs"}
    expected = served.predict(images)["normals"]
    np.testing.assert_allclose(answer["outputs"], expected, atol=1e-5)


def test_rows_and_columns_of_several_outputs_are_named(http, served):
    images = served.pictures(2).tolist()
    expected = served.predict(images)
    rows = http.post(f"{MODEL}:predict", json={"instances": images}).json()
    columns = http.post(f"{MODEL}:predict", json={"inputs": images}).json()
    for task in ("segmentation", "normals"):
        by_row = [row[task] for row in rows["predictions"]]
        np.testing.assert_allclose(by_row, expected[task], atol=1e-5)
        np.testing.assert_allclose(columns["outputs"][task], expected[task], atol=1e-5)


@pytest.mark.parametrize("named", [False, True])
def test_bytes_come_as_b64_objects(http, served, named):
    image = served.pictures()[0]
    encoded = b64(served.png(image))
    row = {"image_bytes": encoded} if named else encoded
    body = {"signature_name": "normals_from_jpeg", "instances": [row]}
    answer = http.post(f"{MODEL}:predict", json=body).json()
    expected = served.predict([image])["normals"]
    np.testing.assert_allclose(answer["predictions"], expected, atol=1e-5)


def test_status_and_metadata_are_tf_servings(http, served):
    status = http.get(MODEL).json()["model_version_status"]
    assert status[-1].keys() == {"version", "state", "status"}
    assert status[-1]["version"] == "1"
    assert status[-1]["status"] == {"error_code": "OK", "error_message": ""}
    metadata = http.get(f"{MODEL}/metadata").json()
    assert metadata["model_spec"]["version"] == str(served.latest)
    signatures = metadata["metadata"]["signature_def"]["signature_def"]
    image = signatures["normals"]["inputs"]["image"]
    assert image["dtype"] == "DT_FLOAT"
    assert [d["size"] for d in image["tensor_shape"]["dim"]] == ["-1", "24", "32", "3"]


IMAGE = np.zeros((24, 32, 3)).tolist()


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "message"),
    [
        ("GET", "/v1/models/nobody", None, 404, "'nobody' not found"),
        ("GET", f"{MODEL}/versions/77", None, 404, "Could not find version 77"),
        ("POST", f"{MODEL}/labels/x:predict", {}, 400, "Unrecognized servable version"),
        ("GET", f"{MODEL}/mettadata", None, 400, "Malformed request: GET"),
        ("GET", f"{MODEL}:predict", None, 400, "Malformed request: GET"),
        ("POST", f"{MODEL}:prredict", {}, 400, "Malformed request: POST"),
        ("POST", MODEL, {}, 400, "Malformed request: POST"),
        ("POST", f"{MODEL}:classify", {}, 501, "Use :predict"),
        ("POST", f"{MODEL}:regress", {}, 501, "Use :predict"),
        ("POST", "/v1/models/nobody:predict", {}, 404, "'nobody' not found"),
        ("POST", f"{MODEL}/versions/9:predict", {}, 404, "Version 9 of model"),
        ("POST", f"{MODEL}:predict", [], 400, "either 'instances' or 'inputs'"),
        ("POST", f"{MODEL}:predict", {}, 400, "either 'instances' or 'inputs'"),
        (
            "POST",
            f"{MODEL}:predict",
            {"instances": [IMAGE], "inputs": [IMAGE]},
            400,
            "either 'instances' or 'inputs'",
        ),
        (
            "POST",
            f"{MODEL}:predict",
            {"signature_name": 7, "inputs": [IMAGE]},
            400,
            "'signature_name' must be a string",
        ),
        (
            "POST",
            f"{MODEL}:predict",
            {"signature_name": "depth", "inputs": [IMAGE]},
            400,
            "Signature 'depth' not found",
        ),
        ("POST", f"{MODEL}:predict", {"instances": []}, 400, "at least one item"),
        ("POST", f"{MODEL}:predict", {"inputs": []}, 400, "Received: image: float32"),
        ("POST", f"{MODEL}:predict", {"inputs": "text"}, 400, "type float32"),
        ("POST", f"{MODEL}:predict", {"inputs": {"x": 1}}, 400, "Received: ['x']"),
        (
            "POST",
            f"{MODEL}:predict",
            {"instances": [IMAGE, 1]},
            400,
            "differ in length",
        ),
        (
            "POST",
            f"{MODEL}:predict",
            {"instances": [{"image": IMAGE}, {"x": 1}]},
            400,
            "same keys",
        ),
        (
            "POST",
            f"{MODEL}:predict",
            {"instances": [[1, 2], [3]]},
            400,
            "differ in len",
        ),
        (
            "POST",
            f"{MODEL}:predict",
            {"signature_name": "normals_from_jpeg", "instances": [{"b64": "%"}]},
            400,
            "'image_bytes' must be of type string: ",
        ),
        (
            "POST",
            f"{MODEL}:predict",
            {"signature_name": "normals_from_jpeg", "instances": [1]},
            400,
            "1 is neither a string nor",
        ),
    ],
)
def test_a_malformed_rest_request_has_its_code(
    http, served, method, path, body, code, message
):
    response = http.request(method, path, json=body)
    assert response.status_code == code
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 10**5, b'{"inputs": ' + b"[" * 10**5]
)
def test_a_body_that_is_no_json_is_refused(http, body):
    response = http.post(f"{MODEL}:predict", content=body)
    assert response.status_code == 400
    assert "JSON parse error" in response.json()["error"]


def predict_request(signature="normals", **inputs):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "cross_stitch"
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        proto = value
        if not isinstance(value, TensorProto):
            proto = tf.make_tensor_proto(value)
        request.inputs[name].CopyFrom(proto)
    return request


def test_the_default_signature_and_an_output_filter(stub, served):
    images = served.pictures(2).astype("float32")
    request = predict_request("", image=images)
    request.output_filter.append("normals")
    response = stub.Predict(request)
    assert response.model_spec.version.value == served.latest
    assert response.model_spec.signature_name == "serving_default"
    assert set(response.outputs) == {"normals"}
    answer = tf.make_ndarray(response.outputs["normals"])
    np.testing.assert_allclose(answer, served.predict(images)["normals"], atol=1e-5)


def refused(call, request):
    with pytest.raises(grpc.RpcError) as raised:
        call(request, timeout=10)
    return raised.value.code().name, raised.value.details()


def splat(dtype, shape, **value):
    """Few bytes that stand for a tensor of any size."""
    proto = TensorProto(dtype=tf.as_dtype(dtype).as_datatype_enum, **value)
    proto.tensor_shape.CopyFrom(tf.TensorShape(shape).as_proto())
    return proto


GOOD = np.zeros((1, 24, 32, 3), "float32")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (predict_request(), "Received: nothing"),
        (predict_request(x=GOOD), "Received: x: float32 (1, 24, 32, 3)"),
        (predict_request(image=GOOD[:0]), "N at least 1. Received: image: float32 (0,"),
        (predict_request(image=GOOD[0]), "Received: image: float32 (24, 32, 3)"),
        (predict_request(image=GOOD[:, 1:]), "float32 (1, 23, 32, 3)"),
        (predict_request(image=GOOD.astype("float64")), "image: float64 (1, 24, 32"),
        (
            predict_request(image=splat("float32", (200, 24, 32, 3), float_val=[1])),
            "image is larger than 1048576 bytes",
        ),
        (
            predict_request(image=splat("float32", (10**4, 24, 32, 3), float_val=[1])),
            "Task size 10000 is larger than maximum input batch size 256",
        ),
        (
            predict_request(
                image=splat("float32", (1, 24, 32, 3), tensor_content=b"123")
            ),
            "malformed",
        ),
        (
            predict_request(
                "normals_from_jpeg",
                image_bytes=splat("string", (200,), string_val=[b"x"]),
            ),
            "image_bytes has 1 strings, not 200",
        ),
        (
            predict_request(
                "normals_from_jpeg",
                image_bytes=splat("string", (10**9,), string_val=[b"x"]),
            ),
            "Task size 1000000000 is larger than maximum input batch size 256",
        ),
    ],
)
def test_a_malformed_grpc_request_is_refused(stub, request_, message):
    code, details = refused(stub.Predict, request_)
    assert code == "INVALID_ARGUMENT"
    assert message in details


def test_a_dtype_without_a_name_is_refused(stub):
    request = predict_request(image=GOOD)
    request.inputs["image"].dtype = 999
    code, details = refused(stub.Predict, request)
    assert code == "INVALID_ARGUMENT"
    assert "image: type 999 (1, 24, 32, 3)" in details


def test_an_unknown_output_or_signature_is_refused(stub):
    request = predict_request(image=GOOD)
    request.output_filter.append("depth")
    assert refused(stub.Predict, request)[0] == "INVALID_ARGUMENT"
    code, details = refused(stub.Predict, predict_request("depth", image=GOOD))
    assert code == "FAILED_PRECONDITION"
    assert "Signature 'depth' not found" in details


def test_what_tf_serving_has_besides_is_unimplemented(stub, channel):
    for call, request in (
        (stub.Classify, classification_pb2.ClassificationRequest()),
        (stub.Regress, regression_pb2.RegressionRequest()),
        (stub.MultiInference, inference_pb2.MultiInferenceRequest()),
    ):
        assert refused(call, request) == ("UNIMPLEMENTED", "Use Predict")
    reload_ = model_service_pb2_grpc.ModelServiceStub(channel).HandleReloadConfigRequest
    request = model_management_pb2.ReloadConfigRequest()
    assert refused(reload_, request) == ("UNIMPLEMENTED", "Start the server anew")


def test_metadata_needs_a_field_that_there_is(stub):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["x"])
    request.model_spec.name = "cross_stitch"
    code, details = refused(stub.GetModelMetadata, request)
    assert code == "INVALID_ARGUMENT"
    assert "must be 'signature_def'. Received: ['x']" in details
    request.metadata_field[:] = ["signature_def", "signature_def"]
    assert stub.GetModelMetadata(request).metadata.keys() == {"signature_def"}


def test_a_request_says_which_model_it_is_for(stub, channel):
    status = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus
    nameless = "INVALID_ARGUMENT", "ModelSpec has no name specified."
    for call, request, code in (
        (stub.Predict, predict_pb2.PredictRequest(), nameless),
        (
            stub.GetModelMetadata,
            get_model_metadata_pb2.GetModelMetadataRequest(
                metadata_field=["signature_def"]
            ),
            nameless,
        ),
        (
            status,
            get_model_status_pb2.GetModelStatusRequest(),
            ("NOT_FOUND", "Model '' not found: this server has 'cross_stitch'"),
        ),
    ):
        assert refused(call, request) == ("INVALID_ARGUMENT", "Missing ModelSpec")
        request.model_spec.version.value = 1
        assert refused(call, request) == code


def test_the_status_of_one_version(channel):
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "cross_stitch"
    request.model_spec.version.value = 1
    (status,) = stub.GetModelStatus(request).model_version_status
    assert status.version == 1
    request.model_spec.version.value = 77
    assert refused(stub.GetModelStatus, request)[0] == "NOT_FOUND"
