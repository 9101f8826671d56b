"""How the client's questions travel: over gRPC or REST, one class each."""

import base64
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import httpx
import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from export.client.protocol import HTTP_STATUS, ServingError

Arrays = dict[str, np.ndarray]
_CODE = {504: grpc.StatusCode.DEADLINE_EXCEEDED} | {
    status: code
    for code, status in HTTP_STATUS.items()
    if code != grpc.StatusCode.FAILED_PRECONDITION  # 400 is the argument's
}


class Transport(Protocol):
    def predict(
        self, signature: str, arrays: Arrays, outputs: Any, timeout: float
    ) -> Arrays:
        """The answer; outputs are those of the signature, {name: TensorInfo}."""

    def signatures(self, timeout: float) -> dict[str, Any]: ...
    def status(self, timeout: float) -> get_model_status_pb2.GetModelStatusResponse: ...
    def close(self) -> None: ...


class Grpc:
    def __init__(self, address: str, spec: model_pb2.ModelSpec) -> None:
        sizes = ("grpc.max_send_message_length", "grpc.max_receive_message_length")
        self._channel = grpc.insecure_channel(address, [(size, -1) for size in sizes])
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(
            self._channel
        )
        self._model = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._spec = spec

    def close(self) -> None:
        self._channel.close()

    def predict(
        self, signature: str, arrays: Arrays, outputs: Any, timeout: float
    ) -> Arrays:
        request = predict_pb2.PredictRequest(model_spec=self._spec)
        request.model_spec.signature_name = signature
        for name, array in arrays.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
        response = self._ask(self._prediction.Predict, request, timeout)
        return {name: tf.make_ndarray(x) for name, x in response.outputs.items()}

    def signatures(self, timeout: float) -> dict[str, Any]:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=self._spec, metadata_field=["signature_def"]
        )
        response = self._ask(self._prediction.GetModelMetadata, request, timeout)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return dict(signatures.signature_def)

    def status(self, timeout: float) -> get_model_status_pb2.GetModelStatusResponse:
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=self._spec)
        return self._ask(self._model.GetModelStatus, request, timeout)

    def _ask(self, method: Callable[..., Any], request: Any, timeout: float) -> Any:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise ServingError(error.code(), error.details()) from error


class Rest:
    def __init__(self, address: str, spec: model_pb2.ModelSpec) -> None:
        self._http = httpx.Client(base_url=address)
        self._path = f"/v1/models/{spec.name}"
        if spec.HasField("version"):
            self._path += f"/versions/{spec.version.value}"
        if spec.version_label:
            self._path += f"/labels/{spec.version_label}"

    def close(self) -> None:
        self._http.close()

    def predict(
        self, signature: str, arrays: Arrays, outputs: Any, timeout: float
    ) -> Arrays:
        inputs = {name: _as_json(array) for name, array in arrays.items()}
        body = {"signature_name": signature, "inputs": inputs}
        answer = self._ask("POST", ":predict", timeout, json=body)["outputs"]
        if len(outputs) == 1:
            answer = {next(iter(outputs)): answer}
        if answer.keys() != outputs.keys():
            raise ServingError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"The model has a new version with other outputs: {sorted(answer)}",
            )
        return {
            name: np.array(values, tf.as_dtype(outputs[name].dtype).as_numpy_dtype)
            for name, values in answer.items()
        }

    def signatures(self, timeout: float) -> dict[str, Any]:
        metadata = self._ask("GET", "/metadata", timeout)["metadata"]
        signatures = get_model_metadata_pb2.SignatureDefMap()
        json_format.ParseDict(metadata["signature_def"], signatures)
        return dict(signatures.signature_def)

    def status(self, timeout: float) -> get_model_status_pb2.GetModelStatusResponse:
        response = get_model_status_pb2.GetModelStatusResponse()
        return json_format.ParseDict(self._ask("GET", "", timeout), response)

    def _ask(self, method: str, path: str, timeout: float, **content: Any) -> Any:
        try:
            response = self._http.request(
                method, self._path + path, timeout=timeout, **content
            )
        except httpx.TimeoutException as error:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise ServingError(code, f"No answer in {timeout:.3g} seconds") from error
        except httpx.TransportError as error:
            raise ServingError(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        if response.status_code == httpx.codes.OK:
            return response.json()
        code = _CODE.get(response.status_code, grpc.StatusCode.UNKNOWN)
        try:
            message = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            message = response.text or response.reason_phrase
        raise ServingError(code, message)


def _as_json(array: np.ndarray) -> list:
    if array.dtype == object:
        return [{"b64": base64.b64encode(value).decode()} for value in array]
    return array.tolist()
