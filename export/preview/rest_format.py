"""TF Serving's JSON: "instances" are rows, "inputs" are columns, bytes are base64.

https://www.tensorflow.org/tfx/serving/api_rest
"""

import base64
import binascii
import json

import grpc
import numpy as np
import tensorflow as tf

from export.client.protocol import ServingError

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def parsed(body):
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ServingError(INVALID, f"JSON parse error: {error}") from error
    if not isinstance(parsed, dict) or ("instances" in parsed) == ("inputs" in parsed):
        raise ServingError(
            INVALID, "The body must be an object with either 'instances' or 'inputs'"
        )
    return parsed


def arrays(body, infos):
    """The request's tensors as {input name: array}, for a signature's inputs."""
    if "inputs" in body:
        named = body["inputs"]
        if not _is_object(named):
            named = _of_the_only_input(named, infos)
    elif not isinstance(body["instances"], list) or not body["instances"]:
        raise ServingError(INVALID, "'instances' must be a list with at least one item")
    elif all(map(_is_object, body["instances"])):
        names = body["instances"][0].keys()
        if any(row.keys() != names for row in body["instances"]):
            raise ServingError(INVALID, "All instances must have the same keys")
        named = {name: [row[name] for row in body["instances"]] for name in names}
    else:
        named = _of_the_only_input(body["instances"], infos)
    if named.keys() != infos.keys():
        raise ServingError(
            INVALID, f"The inputs are {sorted(infos)}. Received: {sorted(named)}"
        )
    return {name: _array(name, named[name], infos[name].dtype) for name in infos}


def _is_object(value):
    return isinstance(value, dict) and value.keys() != {"b64"}


def _of_the_only_input(values, infos):
    if len(infos) != 1:
        raise ServingError(INVALID, f"The inputs must be named: {sorted(infos)}")
    return {next(iter(infos)): values}


def _array(name, values, dtype):
    dtype = tf.as_dtype(dtype)
    try:
        if dtype == tf.string:
            array = np.array(_decoded(values), dtype=object)
            right = all(isinstance(x, bytes) for x in array.flat)
        else:
            array = np.array(values)
            right = array.dtype.kind in ("b" if dtype.is_bool else "iuf")
            if right:
                given = array
                with np.errstate(all="raise"):
                    array = given.astype(dtype.as_numpy_dtype)
                # A float may be rounded, an integer not: 300 is no uint8, nor is 0.5.
                right = dtype.is_floating or np.array_equal(array, given)
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise ServingError(INVALID, f"{name} is malformed: {error}") from error
    if not right:
        raise ServingError(INVALID, f"{name} must hold values of type {dtype.name}")
    return array


def _decoded(value):
    """Strings as bytes; {"b64": ...} as those that it encodes."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except (KeyError, TypeError, binascii.Error) as error:
            raise ValueError('an object must be {"b64": "<base64>"}') from error
    if isinstance(value, str):
        return value.encode()
    raise ValueError(f"{value!r:.50} is neither a string nor a b64 object")


def columns(outputs):
    """Column format: the only output's value, or {name: value}."""
    values = {name: _plain(name, array) for name, array in outputs.items()}
    return values if len(values) > 1 else next(iter(values.values()))


def rows(outputs):
    """Row format: a list with an item for each instance."""
    if any(array.ndim == 0 for array in outputs.values()):
        raise ServingError(INVALID, "An output has no batch axis: ask with 'inputs'")
    values = {name: _plain(name, array) for name, array in outputs.items()}
    if len(values) == 1:
        return next(iter(values.values()))
    items = zip(*values.values(), strict=True)
    return [dict(zip(values, item, strict=True)) for item in items]


def _plain(name, array):
    if isinstance(array, bytes):  # TensorFlow's scalar of a string
        array = np.array(array, object)
    if array.dtype == object:
        as_json = _encoded if name.endswith("_bytes") else bytes.decode
        return np.vectorize(as_json, otypes=[object])(array).tolist()
    # bfloat16 is a kind of its own, whose items json does not know.
    return (array.astype("float32") if array.dtype.kind == "V" else array).tolist()


def _encoded(value):
    return {"b64": base64.b64encode(value).decode()}
