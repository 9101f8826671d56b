"""A preview of TF Serving on this machine alone, for development.

It answers the same gRPC services and REST paths, on a SavedModel; it is neither fast
nor safe enough for more.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import socket

import grpc
import h11
import tensorflow as tf
import uvicorn
from tensorflow_serving.apis import (
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from uvicorn.protocols.http.h11_impl import H11Protocol

from export.client.protocol import ServingError
from export.preview import rest

HOST = "127.0.0.1"
POLL_SECONDS = 1.0  # between two looks at the model's folder, as TF Serving
DRAIN_SECONDS = 10  # for what is under way when the server ends
_THREADS = 4


class Work:
    """Admits so many requests at a time, and answers them in a few threads."""

    def __init__(self, limit):
        self._limit = limit
        self._admitted = 0
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS)

    @contextlib.contextmanager
    def admitted(self):
        if self._admitted >= self._limit:
            raise ServingError(
                grpc.StatusCode.UNAVAILABLE,
                f"The server answers {self._limit} requests at a time: try again",
            )
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def run(self, function, *arguments):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)


def _answers(method):
    """A servicer's method from one that runs in a thread and may raise ServingError."""

    @functools.wraps(method)
    async def answer(self, request, context):
        try:
            with self.work.admitted():
                return await self.work.run(method, self, request)
        except ServingError as error:
            await context.abort(error.code, error.message)

    return answer


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Predict and GetModelMetadata, as TF Serving answers them."""

    def __init__(self, model, work):
        self.model = model
        self.work = work

    @_answers
    def Predict(self, request):
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
    def GetModelMetadata(self, request):
        if list(request.metadata_field) != ["signature_def"]:
            raise ServingError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "metadata_field must be 'signature_def'. Received: "
                f"{list(request.metadata_field)}",
            )
        return self.model.metadata(request.model_spec)

    @_answers
    def Classify(self, request):
        raise ServingError(grpc.StatusCode.UNIMPLEMENTED, "Use Predict")

    Regress = MultiInference = Classify


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """GetModelStatus; the configuration cannot be reloaded."""

    def __init__(self, model, work):
        self.model = model
        self.work = work

    @_answers
    def GetModelStatus(self, request):
        return self.model.status(request.model_spec)

    @_answers
    def HandleReloadConfigRequest(self, request):
        raise ServingError(grpc.StatusCode.UNIMPLEMENTED, "Start the server anew")


class _TimedProtocol(H11Protocol):
    """Closes a connection on which half a request's head came, and then nothing.

    uvicorn waits for ever. What it counts down between two requests, this counts down
    until a head is complete.
    """

    def connection_made(self, transport):
        super().connection_made(transport)
        self._count_down()

    def data_received(self, data):
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._count_down()

    def _count_down(self):
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )


def _grpc_server(model, work, port):
    limits = model.limits
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            # Room for what surrounds the tensors.
            ("grpc.max_receive_message_length", limits.body_bytes + 2**16),
            ("grpc.max_send_message_length", -1),
            # Ends what never sends its request, without harm to what does.
            ("grpc.max_connection_age_ms", 30_000),
            ("grpc.max_connection_age_grace_ms", int(1000 * limits.seconds)),
        ]
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(model, work), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(
        ModelService(model, work), server
    )
    server.add_insecure_port(f"{HOST}:{port}")
    return server


async def _watch(model, work):
    while True:
        await asyncio.sleep(POLL_SECONDS)
        try:
            await asyncio.to_thread(model.refresh)
        except OSError as error:  # a folder that changes while it is read
            logging.getLogger(__name__).warning("Looking for versions: %s", error)


def server(model, port) -> uvicorn.Server:
    """The server of a `ServedModel`: gRPC on `port`, REST where `run` is told."""
    work = Work(model.limits.requests)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        grpc_server = _grpc_server(model, work, port)
        await grpc_server.start()
        watching = asyncio.create_task(_watch(model, work))
        yield
        watching.cancel()
        await grpc_server.stop(DRAIN_SECONDS)

    return uvicorn.Server(
        uvicorn.Config(
            rest.application(model, work, lifespan),
            http=_TimedProtocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            timeout_keep_alive=int(model.limits.seconds),
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )


def listen(port, rest_port) -> socket.socket:
    """The socket for REST; a ValueError where one of the ports is taken."""
    _listening(port).close()  # gRPC would only say that it could not start
    return _listening(rest_port)


def _listening(port):
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"Port {port} of {HOST} cannot be used: {error}") from error
