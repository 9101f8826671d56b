"""TF Serving's JSON: "instances" are rows, "inputs" are columns, bytes are base64.

https://www.tensorflow.org/tfx/serving/api_rest, and where that says nothing, TF
Serving's json_tensor.cc.
"""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
import tensorflow as tf

from export.client.arrays import FLOATS, Arrays, encoded, flattened
from export.client.protocol import INVALID, JSON_DTYPES, ServingError, array_dtype

# By the kind of a tensor's dtype: 1.0 is no integer, and 1 no boolean.
_TYPES: dict[str, set[type]] = {
    "f": {int, float},
    "i": {int},
    "u": {int},
    "b": {bool},
}


def parsed(body: bytes) -> dict[str, Any]:
    """The request's object, checked to have either `instances` or `inputs`."""
    # Strings may hold any bytes, as TF Serving's; `_text` gives them back.
    text = body.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    try:
        parsed = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_decimal
        )
    except (ValueError, RecursionError) as error:
        raise ServingError(INVALID, f"JSON parse error: {error}") from error
    if not isinstance(parsed, dict) or ("instances" in parsed) == ("inputs" in parsed):
        raise ServingError(
            INVALID, "The body must be an object with either 'instances' or 'inputs'"
        )
    if not isinstance(parsed.get("signature_name", ""), str):
        raise ServingError(INVALID, "'signature_name' must be a string")
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(reversed(pairs))  # of equal keys, TF Serving finds the first


def _integer(digits: str) -> int | float:
    """An integer of 64 bits, signed or not; a larger one is a decimal."""
    if len(digits) <= 20 and -(2**63) <= (value := int(digits)) < 2**64:
        return value
    return _decimal(digits)


def _decimal(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits:.40} is too large for 64 bits")
    return value


def arrays(body: dict[str, Any], infos: Mapping[str, Any]) -> Arrays:
    """The request's tensors as {input name: array}, for a signature's inputs."""
    if "inputs" in body:
        named = body["inputs"]
        if not _is_object(named):
            named = _of_the_only_input(named, infos)
        missing = infos.keys() - named.keys()  # others are passed over
    elif not isinstance(body["instances"], list) or not body["instances"]:
        raise ServingError(INVALID, "'instances' must be a list with at least one item")
    elif all(map(_is_object, body["instances"])):
        names = body["instances"][0].keys()
        if any(row.keys() != names for row in body["instances"]):
            raise ServingError(INVALID, "All instances must have the same keys")
        named = {name: [row[name] for row in body["instances"]] for name in names}
        missing = infos.keys() ^ named.keys()
    else:
        named = _of_the_only_input(body["instances"], infos)
        missing = set()
    if missing:
        raise ServingError(
            INVALID, f"The inputs are {sorted(infos)}. Received: {sorted(named)}"
        )
    return {name: _array(name, named[name], infos[name].dtype) for name in infos}


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and not _is_base64(value)


def _is_base64(value: dict[str, Any]) -> bool:
    return value.keys() == {"b64"} and isinstance(value["b64"], str)


def _of_the_only_input(values: Any, infos: Mapping[str, Any]) -> dict[str, Any]:
    if len(infos) != 1:
        raise ServingError(INVALID, f"The inputs must be named: {sorted(infos)}")
    return {next(iter(infos)): values}


def _array(name: str, values: Any, number: int) -> np.ndarray:
    dtype = tf.as_dtype(number)
    if dtype.name not in JSON_DTYPES:
        raise ServingError(
            grpc.StatusCode.UNIMPLEMENTED,
            f"Send '{name}' of type {dtype.name} over gRPC: TF Serving reads none from "
            "JSON",
        )
    try:
        shape, flat = flattened(values)
        if dtype == tf.string:
            array = np.array([_bytes(value) for value in flat], object)
        else:
            array = _numbers(flat, dtype)
        return array.reshape(shape)
    except (ValueError, OverflowError) as error:
        raise ServingError(
            INVALID, f"Input '{name}' must be of type {dtype.name}: {error}"
        ) from error


def _numbers(flat: list[Any], dtype: tf.DType) -> np.ndarray:
    kind = np.dtype(dtype.as_numpy_dtype).kind
    wrong = {type(value) for value in flat} - _TYPES[kind]
    if wrong:
        example = next(value for value in flat if type(value) in wrong)
        raise ValueError(f"{json.dumps(example):.50} is none")
    if kind != "f":
        return np.array(flat, dtype.as_numpy_dtype)  # too large is an OverflowError
    # As TF Serving: no integer that a float may not hold, no decimal beyond its range.
    largest = max((abs(x) for x in flat if type(x) is int), default=0)
    if largest >= 2 ** FLOATS[dtype.name]:
        raise ValueError(f"{largest} has more digits than it holds")
    array = np.array(flat, "float64")
    if (np.abs(array[np.isfinite(array)]) > float(dtype.max)).any():
        raise ValueError("a value is beyond its range")
    return array.astype(dtype.as_numpy_dtype)


def _bytes(value: Any) -> bytes:
    """A string's bytes; those that {"b64": ...} encodes."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if not isinstance(value, dict) or not _is_base64(value):
        raise ValueError(
            f'{json.dumps(value):.50} is neither a string nor {{"b64": "<base64>"}}'
        )
    # As TF Serving: with white space or without, with padding or without.
    digits = "".join(value["b64"].split())
    if not digits.endswith("="):
        digits += "=" * (-len(digits) % 4)
    return base64.b64decode(digits, validate=True)


def columns(outputs: Mapping[str, np.ndarray]) -> Any:
    """Column format: the only output's value, or {name: value}."""
    values = {name: _plain(name, array) for name, array in outputs.items()}
    return values if len(values) > 1 else next(iter(values.values()))


def rows(outputs: Mapping[str, np.ndarray]) -> list[Any]:
    """Row format: a list with an item for each instance."""
    shapes = {name: array.shape for name, array in outputs.items()}
    if not all(shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise ServingError(
            INVALID,
            "Rows need outputs with one batch axis: ask with 'inputs'. Their shapes: "
            f"{shapes}",
        )
    values = {name: _plain(name, array) for name, array in outputs.items()}
    if len(values) == 1:
        return next(iter(values.values()))
    items = zip(*values.values(), strict=True)
    return [dict(zip(values, item, strict=True)) for item in items]


def _plain(name: str, array: np.ndarray) -> Any:
    if (dtype := array_dtype(array)) not in JSON_DTYPES:
        raise ServingError(
            INVALID,
            f"Ask for '{name}' of type {dtype} over gRPC, or give it as float32: TF "
            "Serving writes none to JSON",
        )
    if array.dtype == object:
        as_json = encoded if name.endswith("_bytes") else _text
        return np.vectorize(as_json, otypes=[object])(array).tolist()
    if array.dtype == "float32":
        return _of_few_digits(array).tolist()
    return array.tolist()


def _of_few_digits(array: np.ndarray) -> np.ndarray:
    """As float64 that are written with the 6 to 9 digits of a float32, not with 17."""
    few = array.astype("float64")
    with np.errstate(all="ignore"):  # what has no digits stays as it is
        before_point = np.floor(np.log10(np.abs(few))) + 1
        for digits in (9, 8, 7, 6):
            after_point = digits - before_point
            scale = 10.0 ** np.abs(after_point)
            rounded = np.where(
                after_point > 0,
                np.rint(array * scale) / scale,
                np.rint(array / scale) * scale,
            )
            few = np.where(rounded.astype("float32") == array, rounded, few)
    return few


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def body(answer: dict[str, Any]) -> bytes:
    """An answer as TF Serving writes it: with NaN, and with any bytes in strings."""
    text = json.dumps(answer, ensure_ascii=False)
    return text.encode("utf-8", "surrogateescape")
