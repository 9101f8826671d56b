"""What client and preview server share: errors, codes, answers.json, words."""

import json
import pathlib

import grpc
import tensorflow as tf

NAME = "cross_stitch"  # of the served model, here and in export/tf_serving/
IMAGES = "_from_jpeg"  # ends the names of signatures that take encoded images

# TF Serving's REST codes. A body over the limit is the one exhausted resource here.
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 408,  # what is late here is the request
}
CODES = {code.value[0]: code for code in grpc.StatusCode}


class ServingError(Exception):
    """A request that was not answered: `code`, and `message` that says why."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message


def read_answers(version: pathlib.Path) -> dict[str, dict]:
    """What the answers of a version mean, by task; empty where nothing says it."""
    path = version / "assets.extra" / "answers.json"
    if not path.is_file():
        return {}
    try:
        answers = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"'{path}' must be JSON: {error}") from error
    if not isinstance(answers, dict):
        raise ValueError(f"'{path}' must hold {{task: meaning}}. Received: {answers}")
    return answers


def in_words(dtype, shape) -> str:
    """A tensor as `float32 (N, 240, 320, 3)`; an unknown size is `?`, of batches N."""
    sizes = ["?" if size is None or size < 0 else str(size) for size in shape]
    if sizes and sizes[0] == "?":
        sizes[0] = "N"
    comma = "," if len(sizes) == 1 else ""
    return f"{dtype} ({', '.join(sizes)}{comma})"


def info_in_words(infos) -> str:
    """A signature's inputs or outputs, {name: TensorInfo}, as `name: dtype shape`."""
    return ", ".join(
        f"{name}: {in_words(dtype_name(info.dtype), shape_of(info.tensor_shape))}"
        for name, info in sorted(infos.items())
    )


def shape_of(proto) -> list[int]:
    """The sizes in a TensorShapeProto, -1 for unknown ones."""
    return [dim.size for dim in proto.dim]


def dtype_name(number) -> str:
    """A DataType of a proto by TensorFlow's name; the number where it has none."""
    try:
        return tf.as_dtype(number).name
    except TypeError:
        return f"type {number}"
