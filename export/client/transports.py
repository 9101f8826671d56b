"""How the client's questions travel: over gRPC or REST, one class each.

Both are given and give arrays: strings are objects that are bytes. Each question has a
deadline, as `time.monotonic` tells the time; `predict` is told the signature's outputs,
{name: TensorInfo}.
"""

import base64
import contextlib
import json
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grpc
import httpcore
import numpy as np
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from . import messages
from .arrays import Arrays, encoded, flattened
from .protocol import HTTP_STATUS, ServingError, fits, in_words

_CODE = {
    **{
        status: code
        for code, status in HTTP_STATUS.items()
        if code != grpc.StatusCode.FAILED_PRECONDITION  # 400 is the argument's
    },
    401: grpc.StatusCode.UNAUTHENTICATED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    502: grpc.StatusCode.UNAVAILABLE,  # of a gateway, behind which nobody answers
}


class Grpc:
    def __init__(self, address: str, spec: Any):
        options = [
            ("grpc.max_receive_message_length", -1),
            # A server that was away is found again at once, not after 20 seconds.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 100),
        ]
        self._channel = grpc.insecure_channel(address, options)
        self._spec = spec

    def close(self) -> None:
        self._channel.close()

    def predict(
        self, signature: str, arrays: Arrays, outputs: Any, deadline: float
    ) -> Arrays:
        request = messages.PredictRequest(model_spec=self._spec)
        request.model_spec.signature_name = signature
        for name, array in arrays.items():
            request.inputs[name].CopyFrom(messages.to_tensor(array))
        method = "PredictionService/Predict"
        response = self._ask(method, request, messages.PredictResponse, deadline)
        with _odd_answers_told():
            # Sorted: a message's maps are in another order in each process.
            outputs = sorted(response.outputs.items())
            return {name: messages.to_array(x) for name, x in outputs}

    def signatures(self, deadline: float) -> dict[str, Any]:
        request = messages.GetModelMetadataRequest(
            model_spec=self._spec, metadata_field=["signature_def"]
        )
        method = "PredictionService/GetModelMetadata"
        kind = messages.GetModelMetadataResponse
        response = self._ask(method, request, kind, deadline)
        with _odd_answers_told():
            packed = response.metadata["signature_def"].value
            signatures = messages.SignatureDefMap.FromString(packed)
        return dict(sorted(signatures.signature_def.items()))

    def status(self, deadline: float) -> Any:
        request = messages.GetModelStatusRequest(model_spec=self._spec)
        method = "ModelService/GetModelStatus"
        return self._ask(method, request, messages.GetModelStatusResponse, deadline)

    def _ask(self, method: str, request: Any, kind: Any, deadline: float) -> Any:
        ask = self._channel.unary_unary(
            f"/tensorflow.serving.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=kind.FromString,
        )
        try:
            return ask(request, timeout=_left(deadline))
        except grpc.RpcError as error:
            raise ServingError(error.code(), error.details() or "") from error


class Rest:
    def __init__(self, address: str, spec: Any):
        try:
            url = httpcore.URL(address)
            known = url.scheme in (b"http", b"https") and url.host
        except ValueError:  # such as a port that is no number
            known = False
        if not known:
            raise ValueError(
                "`address` must be HOST:PORT for gRPC, such as localhost:8500, or "
                f"http://HOST:PORT or https://HOST:PORT for REST. Received: {address}"
            )
        self._pool = httpcore.ConnectionPool(network_backend=_UntilDeadline())
        self._url = f"{address.rstrip('/')}/v1/models/{_quoted(spec.name)}"
        if spec.HasField("version"):
            self._url += f"/versions/{spec.version.value}"
        if spec.version_label:
            self._url += f"/labels/{_quoted(spec.version_label)}"

    def close(self) -> None:
        self._pool.close()

    def predict(
        self, signature: str, arrays: Arrays, outputs: Any, deadline: float
    ) -> Arrays:
        inputs = {name: _as_json(array) for name, array in arrays.items()}
        # NaN and the infinities as TF Serving reads and writes them.
        body = json.dumps({"signature_name": signature, "inputs": inputs})
        with _odd_answers_told():
            answer = self._ask("POST", ":predict", deadline, body)["outputs"]
            # An only output comes without its name; bytes come as an object, too.
            named = isinstance(answer, dict) and answer.keys() != {"b64"}
            if len(outputs) == 1 and not named:
                answer = {next(iter(outputs)): answer}
            elif not named or answer.keys() != outputs.keys():
                raise _others_answered(sorted(answer) if named else "one, unnamed")
            return {x: _output(answer[x], outputs[x]) for x in sorted(answer)}

    def signatures(self, deadline: float) -> dict[str, Any]:
        with _odd_answers_told():
            metadata = self._ask("GET", "/metadata", deadline)["metadata"]
            signatures = messages.SignatureDefMap()
            json_format.ParseDict(metadata["signature_def"], signatures, True)
        return dict(sorted(signatures.signature_def.items()))

    def status(self, deadline: float) -> Any:
        with _odd_answers_told():
            answer = self._ask("GET", "", deadline)
            response = messages.GetModelStatusResponse()
            return json_format.ParseDict(answer, response, True)

    def _ask(
        self, method: str, path: str, deadline: float, body: str | None = None
    ) -> Any:
        try:
            response = self._pool.request(
                method,
                self._url + path,
                content=None if body is None else body.encode(),
                headers=None if body is None else {"Content-Type": "application/json"},
                extensions={
                    "timeout": {
                        **dict.fromkeys(("connect", "read", "write"), deadline),
                        "pool": _left(deadline),
                    }
                },
            )
        except httpcore.TimeoutException as error:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise ServingError(code, "No answer in time") from error
        except httpcore.ConnectError as error:
            code, message = grpc.StatusCode.UNAVAILABLE, str(error)
            # Not its cause, which httpcore takes from it.
            if isinstance(error.__context__, ssl.SSLCertVerificationError):
                code = grpc.StatusCode.UNAUTHENTICATED
                message += ": name the certificate of your authority by SSL_CERT_FILE"
            raise ServingError(code, message) from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise ServingError(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        if response.status == 200:
            # TF Serving writes strings as they are, and they may hold any bytes.
            return json.loads(response.content.decode("utf-8", "surrogateescape"))
        code = _CODE.get(response.status, grpc.StatusCode.UNKNOWN)
        try:
            message = json.loads(response.content)["error"]
        except (ValueError, KeyError, TypeError):
            text = response.content.decode(errors="replace")
            message = f"HTTP status {response.status}: {text:.300}"
        raise ServingError(code, str(message))


Transport = Grpc | Rest


class _UntilDeadline(httpcore.NetworkBackend):
    """Connections whose timeouts are moments, as `time.monotonic` tells them.

    httpcore's own are for each read, and a body that comes drop by drop never ends.
    """

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        left = _left(timeout, httpcore.ConnectTimeout)
        stream = httpcore.SyncBackend().connect_tcp(
            host, port, left, local_address, socket_options
        )
        return _Stream(stream)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream):
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        size = 1 << 16
        for start in range(0, len(buffer), size):
            left = _left(timeout, httpcore.WriteTimeout)
            self._stream.write(buffer[start : start + size], left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(
    deadline: float | None, late: Callable[[], Exception] | None = None
) -> float | None:
    """The seconds until then; none that are left raise `late`, where it is given."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0 and late:
        raise late()
    return max(left, 0.001)


def _others_answered(received: object) -> ServingError:
    """Of an answer that is not what the signature, as it was known, gives."""
    return ServingError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"The model has a new version with other outputs: {received}. Ask again",
    )


@contextlib.contextmanager
def _odd_answers_told() -> Iterator[None]:
    """An answer that is not TF Serving's is told as such."""
    try:
        yield
    except (
        *(ValueError, LookupError, TypeError, AttributeError),
        *(DecodeError, json_format.ParseError),
    ) as error:
        raise ServingError(
            grpc.StatusCode.UNKNOWN,
            f"The answer is none of TF Serving's: {type(error).__name__}, {error}",
        ) from error


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def _as_json(array: np.ndarray) -> Any:
    if array.dtype.kind == "c":
        message = "JSON has no complex numbers: ask over gRPC"
        raise ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)
    if array.dtype != object:
        return array.tolist()
    return np.vectorize(encoded, otypes=[object])(array).tolist()


# Of a dtype, the kinds that its JSON is read as: TF Serving writes the float 1 as 1.0.
_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "f", "V": "f", "O": "O"}  # V: bfloat16


def _output(values: Any, info: Any) -> np.ndarray:
    dtype = messages.numpy_dtype(info.dtype)
    array = _strings(values) if dtype.kind == "O" else np.array(values)
    if dtype == "uint64" and array.dtype == "float64":
        # What NumPy makes of integers on both sides of 2**63.
        whole = all(type(x) is int and x >= 0 for x in flattened(values)[1])
        array = np.array(values, dtype) if whole else array
    if not array.size:  # it says neither its kind nor all of its axes
        return array.astype(dtype)
    if array.dtype.kind not in "biufU" and dtype.kind != "O":
        raise ValueError(f"values of {array.dtype} for {dtype}")
    same_kind = array.dtype.kind in _KINDS[dtype.kind]
    if not same_kind or not fits(array.shape, info.tensor_shape):
        raise _others_answered(in_words(array.dtype.name, array.shape))
    return array.astype(dtype)


def _strings(values: Any) -> np.ndarray:
    shape, flat = flattened(values)
    if any(isinstance(value, int | float) for value in flat):
        raise _others_answered(in_words(np.array(flat).dtype.name, shape))
    return np.array([_bytes(value) for value in flat], object).reshape(shape)


def _bytes(value: str | Mapping[str, str]) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    return base64.b64decode(value["b64"])
