"""What client and preview server share: errors, codes, words."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from .messages import dtype_name

INVALID = grpc.StatusCode.INVALID_ARGUMENT
IMAGES = "_from_jpeg"  # ends the names of signatures that take encoded images

# TF Serving's REST codes. What is too large is the one exhausted resource here.
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
# The types that TF Serving reads from JSON and writes to it.
JSON_DTYPES = (
    *("float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint32", "uint64", "bool", "string"),
)
CODES = {code.value[0]: code for code in grpc.StatusCode}


class ServingError(RuntimeError):
    """A request that was not answered: `code`, and `message` that says why."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message


def in_words(dtype: str, shape: Iterable[int | None] | None) -> str:
    """A tensor as `float32 (N, 240, 320, 3)`; an unknown size is `?`, of batches N."""
    if shape is None:
        return f"{dtype} of any shape"
    sizes = ["?" if size is None or size < 0 else str(size) for size in shape]
    if sizes and sizes[0] == "?":
        sizes[0] = "N"
    comma = "," if len(sizes) == 1 else ""
    return f"{dtype} ({', '.join(sizes)}{comma})"


def array_dtype(array: np.ndarray) -> str:
    """TensorFlow's name for the type of an array, whose objects are strings."""
    return "string" if array.dtype == object else array.dtype.name


def info_in_words(infos: Mapping[str, Any]) -> str:
    """A signature's inputs or outputs, {name: TensorInfo}, as `name: dtype shape`."""
    return ", ".join(
        f"{name}: {in_words(dtype_name(info.dtype), _shape_or_any(info.tensor_shape))}"
        for name, info in sorted(infos.items())
    )


def _shape_or_any(proto: Any) -> list[int] | None:
    return None if proto.unknown_rank else shape_of(proto)


def shape_of(proto: Any) -> list[int]:
    """The sizes in a TensorShapeProto, -1 for unknown ones."""
    return [dim.size for dim in proto.dim]


def fits(shape: Sequence[int], expected: Any) -> bool:
    """Whether a shape is of a TensorShapeProto, whose unknown sizes are at least 1."""
    sizes = shape_of(expected)
    return expected.unknown_rank or (
        len(shape) == len(sizes)
        and all(
            size == wanted or (wanted < 0 and size > 0)
            for size, wanted in zip(shape, sizes, strict=True)
        )
    )
