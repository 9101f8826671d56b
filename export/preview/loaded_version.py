"""One SavedModel in memory: checks a request's tensors, then runs a signature."""

import dataclasses
import math
import pathlib
import struct
from collections.abc import Mapping, Sequence

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from export import meanings
from export.client.protocol import (
    CODES,
    ServingError,
    dtype_name,
    in_words,
    info_in_words,
    shape_of,
)
from export.meanings import Meanings

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    body_bytes: int = 32 * 2**20  # sent, and as tensors
    examples: int = 256  # as max_batch_size in tf_serving/batching.config
    pixels: int = 64 * 2**20  # of all images of a request, once decoded
    requests: int = 32  # at a time, those that wait included


class LoadedVersion:
    """A SavedModel in memory."""

    def __init__(self, path: pathlib.Path, limits: Limits) -> None:
        self.number = int(path.name)
        self._answers: Meanings | str
        try:
            self._answers = meanings.of_version(path)
        except ValueError as error:  # TF Serving would not read it, and serves
            self._answers = str(error)
        self._limits = limits
        proto = saved_model_pb2.SavedModel.FromString(
            (path / "saved_model.pb").read_bytes()
        )
        self.signature_defs = proto.meta_graphs[0].signature_def
        self._model = tf.saved_model.load(str(path))  # keeps the variables alive
        self._replay(path / "assets.extra" / "tf_serving_warmup_requests")

    def _replay(self, path: pathlib.Path) -> None:
        """Warms up: runs the requests that came with the model."""
        if path.is_file():
            for record in tf.data.TFRecordDataset(str(path)):
                log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
                request = log.predict_log.request
                signature = request.model_spec.signature_name or "serving_default"
                self.predict(signature, self.arrays(signature, request.inputs))

    @property
    def answers(self) -> Meanings:
        """What the answers mean; a ServingError where that cannot be read."""
        if isinstance(self._answers, str):
            raise ServingError(grpc.StatusCode.FAILED_PRECONDITION, self._answers)
        return self._answers

    def signature(self, name: str) -> meta_graph_pb2.SignatureDef:
        """The SignatureDef of that name."""
        if name not in self._model.signatures:
            raise ServingError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"Signature '{name}' not found in version {self.number}, which has: "
                f"{', '.join(sorted(self._model.signatures))}",
            )
        return self.signature_defs[name]

    def arrays(
        self, signature: str, protos: Mapping[str, TensorProto]
    ) -> dict[str, np.ndarray]:
        """The request's tensors as {name: array}, checked before they take memory."""
        described = {
            name: (dtype_name(proto.dtype), shape_of(proto.tensor_shape))
            for name, proto in protos.items()
        }
        self._check(signature, described)
        try:
            return {name: self._array(name, protos[name]) for name in protos}
        except ValueError as error:
            raise ServingError(INVALID, f"A tensor is malformed: {error}") from error

    def _array(self, name: str, proto: TensorProto) -> np.ndarray:
        # One value may stand for a whole tensor: few bytes can mean a great many.
        count = math.prod(shape_of(proto.tensor_shape))
        dtype = tf.as_dtype(proto.dtype)
        if dtype == tf.string and count != len(proto.string_val):
            raise ValueError(f"{name} has {len(proto.string_val)} strings, not {count}")
        if count * dtype.size > self._limits.body_bytes:
            raise ValueError(f"{name} is larger than {self._limits.body_bytes} bytes")
        return tf.make_ndarray(proto)

    def _check(
        self, signature: str, described: Mapping[str, tuple[str, Sequence[int]]]
    ) -> None:
        """Compares {name: (dtype, shape)} with what the signature takes."""
        inputs = self.signature(signature).inputs
        fits = described.keys() == inputs.keys() and all(
            dtype == dtype_name(inputs[name].dtype)
            and _fits(shape, inputs[name].tensor_shape)
            for name, (dtype, shape) in described.items()
        )
        if not fits:
            received = (f"{n}: {in_words(*what)}" for n, what in described.items())
            raise ServingError(
                INVALID,
                f"Signature '{signature}' takes {info_in_words(inputs)}, N at least 1. "
                f"Received: {', '.join(received) or 'nothing'}",
            )
        size = max((shape[0] for _, shape in described.values() if shape), default=0)
        if size > self._limits.examples:
            raise ServingError(
                INVALID,  # in TF Serving's words
                f"Task size {size} is larger than maximum input batch size "
                f"{self._limits.examples}",
            )

    def predict(
        self,
        signature: str,
        arrays: Mapping[str, np.ndarray],
        only: Sequence[str] = (),
    ) -> dict[str, np.ndarray]:
        """Runs a signature on {name: array}; gives {name: array}, or those of only."""
        described = {n: (_dtype_name(a), a.shape) for n, a in arrays.items()}
        self._check(signature, described)
        unknown = set(only) - set(self.signature(signature).outputs)
        if unknown:
            raise ServingError(
                INVALID, f"Signature '{signature}' has no output {sorted(unknown)}"
            )
        if len(set(only)) < len(only):
            raise ServingError(INVALID, f"Outputs are asked for twice: {[*only]}")
        if arrays.keys() == {"image_bytes"}:
            for images in arrays.values():
                check_images(images, self._limits.pixels)
        tensors = {name: tf.constant(array) for name, array in arrays.items()}
        try:
            outputs = self._model.signatures[signature](**tensors)
            return {name: _as_array(outputs[name]) for name in only or outputs}
        except tf.errors.OpError as error:
            raise ServingError(CODES[error.error_code], error.message) from error


def _as_array(tensor: tf.Tensor) -> np.ndarray:
    # A string without axes would be bytes, and no array.
    return np.array(tensor.numpy(), object if tensor.dtype == tf.string else None)


def _dtype_name(array: np.ndarray) -> str:
    return "string" if array.dtype == object else array.dtype.name


def _fits(shape: Sequence[int], expected: TensorShapeProto) -> bool:
    sizes = shape_of(expected)
    return expected.unknown_rank or (
        len(shape) == len(sizes)
        and all(
            size == wanted or (wanted < 0 and size > 0)
            for size, wanted in zip(shape, sizes, strict=True)
        )
    )


def check_images(images: Sequence[bytes] | np.ndarray, limit: int) -> None:
    """Reads the headers alone: few bytes can hold a picture of 30000x30000 pixels."""
    pixels = 0
    for number, encoded in enumerate(images):
        try:
            pixels += math.prod(_size(encoded))
        except (ValueError, struct.error, tf.errors.InvalidArgumentError) as error:
            raise ServingError(
                INVALID, f"Image {number} of {len(images)} must be a JPEG or PNG file"
            ) from error
        if pixels > limit:
            raise ServingError(
                INVALID, f"The images of one request may have {limit} pixels in all"
            )


def _size(encoded: bytes) -> tuple[int, ...]:
    """Height and width in pixels, wherever TensorFlow would find them."""
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):  # then the chunk IHDR
        width, height = struct.unpack_from(">II", encoded, 16)
        return height, width
    if encoded.startswith(b"\xff\xd8\xff"):
        height, width, _ = tf.io.extract_jpeg_shape(encoded).numpy().tolist()
        return height, width
    raise ValueError("neither JPEG nor PNG")
