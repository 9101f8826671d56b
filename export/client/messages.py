"""TF Serving's messages, as far as the client sends and reads them.

Declared here, and not imported from tensorflow-serving-api, which needs all of
TensorFlow. Names and numbers of the fields are those of TF Serving's and TensorFlow's
`.proto` files; a test compares them.
"""

from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "keras_cross_stitch.client"

_ENUMS = {
    "DataType": {
        **{"DT_INVALID": 0, "DT_FLOAT": 1, "DT_DOUBLE": 2, "DT_INT32": 3},
        **{"DT_UINT8": 4, "DT_INT16": 5, "DT_INT8": 6, "DT_STRING": 7},
        **{"DT_COMPLEX64": 8, "DT_INT64": 9, "DT_BOOL": 10, "DT_QINT8": 11},
        **{"DT_QUINT8": 12, "DT_QINT32": 13, "DT_BFLOAT16": 14, "DT_QINT16": 15},
        **{"DT_QUINT16": 16, "DT_UINT16": 17, "DT_COMPLEX128": 18, "DT_HALF": 19},
        **{"DT_RESOURCE": 20, "DT_VARIANT": 21, "DT_UINT32": 22, "DT_UINT64": 23},
    },
    "ModelVersionStatus.State": {
        **{"UNKNOWN": 0, "START": 10, "LOADING": 20, "AVAILABLE": 30},
        **{"UNLOADING": 40, "END": 50},
    },
    "StatusProto.Code": {code.name: code.value[0] for code in grpc.StatusCode},
}

# {message: {field: (number, type)}}; `*` after a type is repeated, `{}` a map from
# strings.
_MESSAGES = {
    "Int64Value": {"value": (1, "int64")},
    "Any": {"type_url": (1, "string"), "value": (2, "bytes")},
    "ModelSpec": {
        "name": (1, "string"),
        "version": (2, "Int64Value"),
        "signature_name": (3, "string"),
        "version_label": (4, "string"),
    },
    "Dim": {"size": (1, "int64"), "name": (2, "string")},
    "TensorShapeProto": {"dim": (2, "Dim*"), "unknown_rank": (3, "bool")},
    "TensorProto": {
        "dtype": (1, "DataType"),
        "tensor_shape": (2, "TensorShapeProto"),
        "tensor_content": (4, "bytes"),
        "float_val": (5, "float*"),
        "double_val": (6, "double*"),
        "int_val": (7, "int32*"),
        "string_val": (8, "bytes*"),
        "scomplex_val": (9, "float*"),
        "int64_val": (10, "int64*"),
        "bool_val": (11, "bool*"),
        "dcomplex_val": (12, "double*"),
        "half_val": (13, "int32*"),
        "uint32_val": (16, "uint32*"),
        "uint64_val": (17, "uint64*"),
    },
    "TensorInfo": {
        "name": (1, "string"),
        "dtype": (2, "DataType"),
        "tensor_shape": (3, "TensorShapeProto"),
    },
    "SignatureDef": {
        "inputs": (1, "TensorInfo{}"),
        "outputs": (2, "TensorInfo{}"),
        "method_name": (3, "string"),
    },
    "SignatureDefMap": {"signature_def": (1, "SignatureDef{}")},
    "PredictRequest": {
        "model_spec": (1, "ModelSpec"),
        "inputs": (2, "TensorProto{}"),
    },
    "PredictResponse": {
        "outputs": (1, "TensorProto{}"),
        "model_spec": (2, "ModelSpec"),
    },
    "GetModelMetadataRequest": {
        "model_spec": (1, "ModelSpec"),
        "metadata_field": (2, "string*"),
    },
    "GetModelMetadataResponse": {
        "model_spec": (1, "ModelSpec"),
        "metadata": (2, "Any{}"),
    },
    "GetModelStatusRequest": {"model_spec": (1, "ModelSpec")},
    "StatusProto": {
        "error_code": (1, "StatusProto.Code"),
        "error_message": (2, "string"),
    },
    "ModelVersionStatus": {
        "version": (1, "int64"),
        "state": (2, "ModelVersionStatus.State"),
        "status": (3, "StatusProto"),
    },
    "GetModelStatusResponse": {"model_version_status": (1, "ModelVersionStatus*")},
}

_SCALARS = {
    name: getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name.upper()}")
    for name in (
        *("int32", "int64", "uint32", "uint64", "float", "double"),
        *("bool", "string", "bytes"),
    )
}


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="keras_cross_stitch_client.proto", package=_PACKAGE, syntax="proto3"
    )
    messages = {name: file.message_type.add(name=name) for name in _MESSAGES}
    for path, numbers in _ENUMS.items():
        where, _, name = path.rpartition(".")
        enum = (messages[where] if where else file).enum_type.add(name=name)
        for value, number in numbers.items():
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        message = messages[name]
        for field, (number, kind) in fields.items():
            if kind.endswith("{}"):
                entry = f"{field.title().replace('_', '')}Entry"
                nested = message.nested_type.add(name=entry)
                nested.options.map_entry = True
                _add_field(nested, "key", 1, "string")
                _add_field(nested, "value", 2, kind.removesuffix("{}"))
                kind = f"{name}.{entry}*"
            _add_field(message, field, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")
        )
        for name in _MESSAGES
    }


def _add_field(message: Any, name: str, number: int, kind: str) -> None:
    field = message.field.add(name=name, number=number)
    field.label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
    kind = kind.removesuffix("*")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = field.TYPE_ENUM if kind in _ENUMS else field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{kind}"


CLASSES = _classes()
ModelSpec = CLASSES["ModelSpec"]
PredictRequest = CLASSES["PredictRequest"]
PredictResponse = CLASSES["PredictResponse"]
GetModelMetadataRequest = CLASSES["GetModelMetadataRequest"]
GetModelMetadataResponse = CLASSES["GetModelMetadataResponse"]
GetModelStatusRequest = CLASSES["GetModelStatusRequest"]
GetModelStatusResponse = CLASSES["GetModelStatusResponse"]
SignatureDefMap = CLASSES["SignatureDefMap"]
AVAILABLE = CLASSES["ModelVersionStatus"].AVAILABLE

# Numbers of DataType by NumPy's name of what they are; strings are Python objects.
_NUMBERS = {
    number: {"float": "float32", "double": "float64", "half": "float16"}.get(
        name.removeprefix("DT_").lower(), name.removeprefix("DT_").lower()
    )
    for name, number in _ENUMS["DataType"].items()
}
_VALUES = {
    **dict.fromkeys(("uint8", "int8", "int16", "uint16", "int32"), "int_val"),
    **{"float32": "float_val", "float64": "double_val", "int64": "int64_val"},
    **{"bool": "bool_val", "uint32": "uint32_val", "uint64": "uint64_val"},
    **{"complex64": "scomplex_val", "complex128": "dcomplex_val"},
    **{"float16": "half_val", "bfloat16": "half_val"},
}


def dtype_name(number: int) -> str:
    """A DataType by TensorFlow's name; the number where it has none here."""
    return _NUMBERS.get(number, f"type {number}")


def numpy_dtype(number: int) -> np.dtype:
    """The dtype of an array for a DataType; bytes stand in arrays of objects.

    Raises:
        ValueError: For a type of which there are no arrays.
    """
    name = dtype_name(number)
    if name == "string":
        return np.dtype(object)
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    if name not in _VALUES:
        raise ValueError(f"There are no arrays of {name}")
    return np.dtype(name)


def to_tensor(array: np.ndarray) -> Any:
    """A TensorProto of an array: of numbers, or of objects that are bytes.

    Raises:
        ValueError: For an array of anything else.
    """
    names = {name: number for number, name in _NUMBERS.items()}
    tensor = CLASSES["TensorProto"]()
    tensor.tensor_shape.SetInParent()  # a scalar has a shape, too
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    if array.dtype == object:
        tensor.dtype = names["string"]
        tensor.string_val.extend(array.ravel().tolist())
    elif array.dtype.name in _VALUES:
        tensor.dtype = names[array.dtype.name]
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        tensor.tensor_content = little.tobytes()
    else:
        raise ValueError(f"TensorFlow has no tensors of {array.dtype}")
    return tensor


def to_array(tensor: Any) -> np.ndarray:
    """The array of a TensorProto.

    Raises:
        ValueError: Where the values are not as many as the shape says, or of a type of
            which there are no arrays.
    """
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    dtype = numpy_dtype(tensor.dtype)
    if dtype.kind == "O":
        values = np.array(list(tensor.string_val), object)
    elif tensor.tensor_content:
        values = np.frombuffer(tensor.tensor_content, dtype.newbyteorder("<"))
    else:
        given = getattr(tensor, _VALUES[dtype.name])
        if dtype.name.endswith("float16"):
            values = np.array(given, "uint16").view(dtype)
        elif dtype.kind == "c":
            values = np.array(given, f"float{4 * dtype.itemsize}").view(dtype)
        else:
            values = np.array(given, dtype)
    count = int(np.prod(shape))
    # The last value stands for all that follow, and none for zeros.
    if 0 < len(values) < count:
        values = np.concatenate([values, np.repeat(values[-1:], count - len(values))])
    elif not len(values) and count:
        values = np.zeros(count, dtype) if dtype.kind != "O" else np.full(count, b"")
    return np.array(values, dtype).reshape(shape)
