"""What an answer costs: latency and throughput of each signature of a version."""

import dataclasses
import functools
import pathlib
import tempfile

import grpc
import keras
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from export.make.inputs import load_model
from export.version import recorded
from export.version.signatures import Signature, signatures
from export.version.timing import batch_of, interleaved
from keras_cross_stitch import CrossStitch, export_saved_model

BATCHES = (1, 8, 32)
_ALL = "serving_default"
_UNSTITCHED = "unstitched"


@dataclasses.dataclass(frozen=True)
class Row:
    """One signature at one batch size, over one way of asking."""

    signature: str
    way: str  # "in process" or "gRPC"
    batch: int
    seconds: np.ndarray  # of each call

    def percentile(self, percent) -> float:
        return float(np.percentile(self.seconds, percent))

    @property
    def throughput(self) -> float:
        """Examples a second, of one client that waits for each answer."""
        return self.batch / float(self.seconds.mean())


@dataclasses.dataclass(frozen=True)
class Report:
    """Times, ratios of them by batch size, and what each signature runs."""

    rows: list[Row]
    together: dict[int, float]  # all tasks in one request, against one after another
    stitched: dict[int, float]  # with the units, against without; needs the model
    signatures: dict[str, Signature]


def bench(
    version: pathlib.Path,
    *,
    address: str | None = None,
    name: str = "",
    model: pathlib.Path | None = None,
    rounds: int = 30,
    batches: tuple[int, ...] = BATCHES,
) -> Report:
    """Times the signatures that take arrays, all in turns.

    Args:
        version: Path of a version that `python -m export savedmodel` wrote.
        address: `"host:port"` of a server of this version, to ask over gRPC too.
        name: The model's name on that server.
        model: The `.keras` file of the version, to time the towers without their
            units too.
        rounds: Number of calls of each kind.
        batches: Batch sizes.
    """
    costs = signatures(version)
    given = {
        signature: inputs
        for signature, inputs, _ in recorded.read(version / recorded.RECORDED)
        if "image_bytes" not in inputs
    }
    ways = {"in process": _in_process(version)}
    if address:
        ways["gRPC"] = _over_grpc(address, name)
    with tempfile.TemporaryDirectory() as folder:
        if model:
            plain = unstitched(load_model(model))
            without = _in_process(export_saved_model(plain, folder))
        rows = []
        for batch in batches:
            calls = {}
            for signature, inputs in given.items():
                repeated = batch_of(inputs, batch)
                for way, ask in ways.items():
                    calls[signature, way] = functools.partial(ask, signature, repeated)
                if model and signature == _ALL:
                    calls[_UNSTITCHED, "in process"] = functools.partial(
                        without, signature, repeated
                    )
            seconds = interleaved(calls, rounds)
            rows += [
                Row(signature, way, batch, taken)
                for (signature, way), taken in seconds.items()
            ]
    together, stitched = _ratios(rows)
    return Report(rows, together, stitched, costs)


def unstitched(model) -> keras.Model:
    """The same towers in one model, without the units between them."""

    def call(layer, *args, **kwargs):
        return args[0] if isinstance(layer, CrossStitch) else layer(*args, **kwargs)

    return keras.models.clone_model(
        model, clone_function=lambda layer: layer, call_function=call
    )


def _ratios(rows):
    together, stitched = {}, {}
    for batch in dict.fromkeys(row.batch for row in rows):
        medians = {
            row.signature: row.percentile(50)
            for row in rows
            if row.batch == batch and row.way == "in process"
        }
        without = medians.pop(_UNSTITCHED, None)
        all_tasks = medians.pop(_ALL)
        together[batch] = all_tasks / sum(medians.values())
        if without:
            stitched[batch] = all_tasks / without
    return together, stitched


def _in_process(version):
    loaded = tf.saved_model.load(str(version))

    def ask(signature, inputs):
        tensors = {name: tf.constant(array) for name, array in inputs.items()}
        outputs = loaded.signatures[signature](**tensors)
        return {name: output.numpy() for name, output in outputs.items()}

    return ask


def _over_grpc(address, name):
    unlimited = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
    ]
    channel = grpc.insecure_channel(address, options=unlimited)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def ask(signature, inputs):
        request = predict_pb2.PredictRequest()
        request.model_spec.name = name
        request.model_spec.signature_name = signature
        for key, array in inputs.items():
            request.inputs[key].CopyFrom(tf.make_tensor_proto(array))
        try:
            response = stub.Predict(request, timeout=60)
        except grpc.RpcError as error:
            raise RuntimeError(
                f"The server at {address} does not answer for model '{name}': "
                f"{error.details()}"
            ) from error
        return {key: tf.make_ndarray(x) for key, x in response.outputs.items()}

    return ask
