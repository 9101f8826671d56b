"""One SavedModel in memory: checks a request's tensors, then runs a signature."""

import dataclasses
import math
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from export import meanings
from export.client import all_tasks, drawing
from export.client.arrays import Arrays
from export.client.protocol import (
    CODES,
    INVALID,
    ServingError,
    array_dtype,
    dtype_name,
    fits,
    in_words,
    info_in_words,
    shape_of,
)
from export.meanings import Meanings
from export.version import recorded

PART = 32  # examples run at once, as max_execution_batch_size in batching.config


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    body_bytes: int = 32 * 2**20  # sent, and as tensors
    examples: int = 256  # as max_batch_size in tf_serving/batching.config
    pixels: int = 64 * 2**20  # of all images of a request, once decoded
    answer_bytes: int = 128 * 2**20  # as tensors; as JSON they take many times that
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
        self._replay(path / recorded.WARMUP)

    def _replay(self, path: pathlib.Path) -> None:
        """Warms up: runs the requests that came with the model."""
        if path.is_file():
            for signature, inputs, _ in recorded.read(path):
                self.predict(signature or "serving_default", inputs)

    @property
    def answers(self) -> Meanings:
        """What the tasks' answers mean; a ServingError where that cannot be read."""
        if isinstance(self._answers, str):
            raise ServingError(grpc.StatusCode.FAILED_PRECONDITION, self._answers)
        return drawing.served(self._answers, self.signature_defs)

    def signature(self, name: str) -> meta_graph_pb2.SignatureDef:
        """The SignatureDef of that name."""
        if name not in self._model.signatures:
            raise ServingError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"Signature '{name}' not found in version {self.number}, which has: "
                f"{', '.join(sorted(self._model.signatures))}",
            )
        return self.signature_defs[name]

    def arrays(self, signature: str, protos: Mapping[str, TensorProto]) -> Arrays:
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
        as_taken = described.keys() == inputs.keys() and all(
            dtype == dtype_name(inputs[name].dtype)
            and fits(shape, inputs[name].tensor_shape)
            for name, (dtype, shape) in described.items()
        )
        if not as_taken:
            sent = sorted(described.items())
            received = (f"{name}: {in_words(*what)}" for name, what in sent)
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
    ) -> Arrays:
        """Runs a signature on {name: array}; gives {name: array}, or those of only."""
        described = {n: (array_dtype(a), a.shape) for n, a in arrays.items()}
        self._check(signature, described)
        infos = self.signature(signature)
        unknown = set(only) - set(infos.outputs)
        if unknown:
            raise ServingError(
                INVALID, f"Signature '{signature}' has no output {sorted(unknown)}"
            )
        if len(set(only)) < len(only):
            raise ServingError(INVALID, f"Outputs are asked for twice: {[*only]}")
        files = _files(signature, arrays)
        check_images(files, self._limits.pixels)
        size = max((len(array) for array in arrays.values() if array.ndim), default=0)
        answer = _least_bytes([infos.outputs[x] for x in only or infos.outputs], size)
        if answer > self._limits.answer_bytes:
            raise ServingError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"An answer may have {self._limits.answer_bytes} bytes as tensors. "
                f"The one to {size} examples has {answer}",
            )
        function = self._model.signatures[signature]

        def run(part: Mapping[str, np.ndarray]) -> Arrays:
            tensors = {name: tf.constant(array) for name, array in part.items()}
            outputs = function(**tensors)
            return {name: _as_array(outputs[name]) for name in only or outputs}

        first_axes = [shape_of(x.tensor_shape)[:1] for x in infos.inputs.values()]
        try:
            # What is of one size, or may have no axis, is no batch.
            if all(sizes == [-1] for sizes in first_axes):
                return _in_parts(run, arrays)
            return run(arrays)
        except tf.errors.OpError as error:
            _check_whole(files)
            _check_one_size(files, error)
            raise ServingError(CODES[error.error_code], error.message) from error


def _files(signature: str, arrays: Mapping[str, np.ndarray]) -> list[bytes]:
    """The JPEG or PNG files in a request; a model's own input may have their name."""
    if not all_tasks.takes_files(signature):
        return []
    return [file for x in arrays.values() if x.dtype == object for file in x.flat]


def _in_parts(
    run: Callable[[Mapping[str, np.ndarray]], Arrays], arrays: Mapping[str, np.ndarray]
) -> Arrays:
    """Runs a large batch as TF Serving does, part by part, which needs less memory."""
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1 or max(counts) <= PART:
        return run(arrays)
    (count,) = counts
    answers = []
    for start in range(0, count, PART):
        part = {name: array[start : start + PART] for name, array in arrays.items()}
        answers.append(run(part))
        size = min(PART, count - start)
        # Outputs that are not one for each example can only be had of all together.
        for name, array in answers[-1].items():
            if array.shape != (size, *answers[0][name].shape[1:]):
                return run(arrays)
    return {name: np.concatenate([x[name] for x in answers]) for name in answers[0]}


def _least_bytes(outputs: Iterable[meta_graph_pb2.TensorInfo], size: int) -> int:
    """Of an answer to so many examples, as far as its shapes are known."""
    count = 0
    for info in outputs:
        first, *others = shape_of(info.tensor_shape) or [1]
        sizes = [size if first < 0 else first, *(max(1, x) for x in others)]
        count += math.prod(sizes) * tf.as_dtype(info.dtype).size
    return count


def _as_array(tensor: tf.Tensor) -> np.ndarray:
    # A string without axes would be bytes, and no array.
    return np.array(tensor.numpy(), object if tensor.dtype == tf.string else None)


def _check_whole(images: Sequence[bytes]) -> None:
    """Decodes them one by one, to find which it is that could not be decoded."""
    for number, encoded in enumerate(images):
        try:
            tf.io.decode_image(encoded, 3, expand_animations=False)
        except tf.errors.InvalidArgumentError as error:
            raise ServingError(
                INVALID,
                f"Image {number} of {len(images)} must be a JPEG or PNG file, and a "
                "whole one: it cannot be decoded",
            ) from error


def _check_one_size(images: Sequence[bytes], error: tf.errors.OpError) -> None:
    """Of images that are not resized, since the model takes any size."""
    sizes = sorted(set(map(_size, images)))
    if len(sizes) > 1 and isinstance(error, tf.errors.InvalidArgumentError):
        raise ServingError(
            INVALID,
            "Where the model takes images of any size, those of one request must have "
            "one size: send them one by one, by `Client(..., batch=1)`. Received: "
            f"{sizes}, height and width",
        ) from error


def check_images(images: Sequence[bytes], limit: int) -> None:
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
                INVALID,
                f"The images of one request may have {limit} pixels in all: send "
                "smaller ones, or fewer at a time, by `Client(..., batch=n)`",
            )


def _size(encoded: bytes) -> tuple[int, ...]:
    """Height and width in pixels, wherever TensorFlow would find them."""
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        if encoded[12:16] != b"IHDR":
            raise ValueError("another chunk comes before that with the size")
        width, height = struct.unpack_from(">II", encoded, 16)
        return height, width
    if encoded.startswith(b"\xff\xd8\xff"):
        height, width, _ = tf.io.extract_jpeg_shape(encoded).numpy().tolist()
        return height, width
    raise ValueError("neither JPEG nor PNG")
