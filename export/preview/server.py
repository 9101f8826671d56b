"""A preview of TF Serving for one's own machine, for development.

It answers the same gRPC services and REST paths, on a SavedModel. It is neither fast
nor safe enough for more: nothing ends a client that is slow, or stays away.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import tensorflow as tf
import uvicorn
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from export.client.protocol import ServingError
from export.preview import rest
from export.preview.served_model import ServedModel

HOST = "127.0.0.1"
POLL_SECONDS = 1.0  # between two looks at the model's folder, as TF Serving
DRAIN_SECONDS = 10  # for what is under way when the server ends
_THREADS = 4


class Work:
    """Answers so many requests at a time, in a few threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._admitted = 0
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS)

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function gives; a ServingError where too many wait for a thread."""
        if self._admitted >= self._limit:
            raise ServingError(
                grpc.StatusCode.UNAVAILABLE,
                f"The server answers {self._limit} requests at a time: try again",
            )
        self._admitted += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, function, *arguments)
        finally:
            self._admitted -= 1


def _answers(method: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A servicer's method from one that may raise; predictions run in a thread."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            if method.__name__ == "Predict":
                return await self.work.run(method, self, request)
            return method(self, request)  # at once: status waits for no prediction
        except ServingError as error:
            await context.abort(error.code, error.message)
        except Exception as error:
            logging.getLogger(__name__).exception("A request was not answered")
            message = f"{type(error).__name__}: {error}"
            await context.abort(grpc.StatusCode.INTERNAL, message)

    return answer


def _check_spec(request: Any) -> None:
    if not request.HasField("model_spec"):
        raise ServingError(grpc.StatusCode.INVALID_ARGUMENT, "Missing ModelSpec")


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Predict and GetModelMetadata, as TF Serving answers them."""

    def __init__(self, model: ServedModel, work: Work) -> None:
        self.model = model
        self.work = work

    @_answers
    def Predict(self, request: predict_pb2.PredictRequest) -> Any:
        _check_spec(request)
        version = self.model.find(request.model_spec)
        signature = request.model_spec.signature_name or "serving_default"
        arrays = version.arrays(signature, request.inputs)
        outputs = version.predict(signature, arrays, request.output_filter)
        response = predict_pb2.PredictResponse(
            model_spec=self.model.answered_by(version, signature)
        )
        for name, array in outputs.items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(array))
        return response

    @_answers
    def GetModelMetadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest
    ) -> Any:
        _check_spec(request)
        if set(request.metadata_field) != {"signature_def"}:
            raise ServingError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "metadata_field must be 'signature_def'. Received: "
                f"{list(request.metadata_field)}",
            )
        return self.model.metadata(request.model_spec)

    @_answers
    def Classify(self, request: Any) -> Any:
        raise ServingError(grpc.StatusCode.UNIMPLEMENTED, "Use Predict")

    Regress = MultiInference = Classify


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """GetModelStatus; the configuration cannot be reloaded."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model

    @_answers
    def GetModelStatus(
        self, request: get_model_status_pb2.GetModelStatusRequest
    ) -> Any:
        _check_spec(request)
        return self.model.status(request.model_spec)

    @_answers
    def HandleReloadConfigRequest(self, request: Any) -> Any:
        raise ServingError(grpc.StatusCode.UNIMPLEMENTED, "Start the server anew")


def _grpc_server(model: ServedModel, work: Work, port: int) -> grpc.aio.Server:
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            # Room for what surrounds the tensors.
            ("grpc.max_receive_message_length", model.limits.body_bytes + 2**16),
        ]
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(model, work), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(
        ModelService(model), server
    )
    server.add_insecure_port(f"{HOST}:{port}")
    return server


async def _watch(model: ServedModel) -> None:
    while True:
        await asyncio.sleep(POLL_SECONDS)
        try:
            await asyncio.to_thread(model.refresh)
        except Exception:  # such as a folder that changes while it is read
            logging.getLogger(__name__).exception("Looking for versions failed")


def server(model: ServedModel, port: int) -> uvicorn.Server:
    """The server of a model: gRPC on `port`, REST where `run` is told.

    A ValueError where the port was taken while the model was loaded.
    """
    _listening(port).close()
    work = Work(model.limits.requests)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        grpc_server = _grpc_server(model, work, port)
        await grpc_server.start()
        watching = asyncio.create_task(_watch(model))
        yield
        watching.cancel()
        await grpc_server.stop(DRAIN_SECONDS)

    return uvicorn.Server(
        uvicorn.Config(
            rest.application(model, work.run, lifespan),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )


def listen(port: int, rest_port: int) -> tuple[int, socket.socket]:
    """The port for gRPC, and the socket for REST; port 0 is any that is free.

    A ValueError where one of them is taken, or both are one. Who connects to the socket
    waits until the server runs.
    """
    if port and port == rest_port:
        raise ValueError(
            f"--port, of gRPC, and --rest-port must differ. Received: {port} for both"
        )
    # Both at once, so that they differ. gRPC would only say that it could not start.
    with _listening(port) as probe:
        listening = _listening(rest_port)
        return probe.getsockname()[1], listening


def _listening(port: int) -> socket.socket:
    # Of TCP by its number, without which asyncio leaves Nagle's algorithm on, and an
    # answer waits 40 ms.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise ValueError(f"Port {port} of {HOST} cannot be used: {error}") from error
    return listening
