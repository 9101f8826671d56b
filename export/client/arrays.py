"""Arrays in the dtype that a model takes, where that changes no value."""

import base64
import itertools
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

# The whole numbers below 2**bits are all among them, but not all above.
FLOATS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}


def as_array(values: Any, name: str) -> np.ndarray:
    """An array of numbers, or of objects that are bytes for bytes and text."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"'{name}' must be an array: {error}") from error
    if array.dtype.kind not in "OSU":
        return array
    objects = np.empty(array.size, object)
    for place, value in enumerate(array.ravel().tolist()):
        value = value.encode() if isinstance(value, str) else value
        if not isinstance(value, bytes):
            raise ValueError(
                f"'{name}' must be an array of numbers, or of bytes or text alone. "
                f"Received: {value!r:.80} among its values"
            )
        objects[place] = value
    return objects.reshape(array.shape)


def flattened(values: Any) -> tuple[list[int], list[Any]]:
    """The shape of nested lists, and their values in order."""
    shape: list[int] = []
    flat = [values]
    while flat and isinstance(flat[0], list):
        size = len(flat[0])
        if any(not isinstance(x, list) or len(x) != size for x in flat):
            raise ValueError(f"its lists at depth {len(shape)} differ in length")
        shape.append(size)
        flat = list(itertools.chain.from_iterable(flat))
    if any(isinstance(x, list) for x in flat):
        raise ValueError(f"there are lists and values at depth {len(shape)}")
    return shape, flat


def encoded(value: bytes) -> dict[str, str]:
    """Bytes as TF Serving's JSON has them."""
    return {"b64": base64.b64encode(value).decode()}


def cast_to(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in that dtype, where that changes no value.

    Floats may be rounded to fewer digits. What a cast would make another kind of
    number, or text, stays as it is.

    Raises:
        ValueError: For a value that the dtype cannot hold.
    """
    if array.dtype == dtype or not _of_a_kind(array.dtype, dtype):
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    changed = _changed(array, cast)
    if changed.any():
        first = tuple(np.argwhere(changed)[0].tolist())
        raise ValueError(
            f"'{name}' has values that {dtype} cannot hold: {array[first]} at {first}"
        )
    return cast


def _of_a_kind(given: np.dtype, taken: np.dtype) -> bool:
    """Whether integers become integers or floats, and floats floats."""
    if taken.name in FLOATS:
        return given.kind in "biu" or given.name in FLOATS
    return taken.kind in "iu" and given.kind in "biu"


def _changed(array: np.ndarray, cast: np.ndarray) -> np.ndarray:
    if array.dtype.name in FLOATS:
        return np.isfinite(array) & ~np.isfinite(cast)
    if cast.dtype.kind in "iu":
        limits = np.iinfo(cast.dtype)
        return (array < limits.min) | (array > limits.max)
    # All integers up to here are floats; of those beyond, some.
    largest = 2 ** FLOATS[cast.dtype.name]
    changed = (array < -largest) | (array > largest)
    changed[changed] = [
        not np.isfinite(float(b)) or int(a) != int(float(b))
        for a, b in zip(array[changed], cast[changed], strict=True)
    ]
    return changed
