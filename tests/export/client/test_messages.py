"""The client's messages and arrays are TF Serving's and TensorFlow's."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, types_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    predict_pb2,
)

from export.client import messages

STATUS = get_model_status_pb2.ModelVersionStatus.DESCRIPTOR.fields_by_name["status"]
THEIRS = {"StatusProto": STATUS.message_type} | {
    each.DESCRIPTOR.name: each.DESCRIPTOR
    for each in (
        tensor_pb2.TensorProto,
        tensor_shape_pb2.TensorShapeProto,
        tensor_shape_pb2.TensorShapeProto.Dim,
        meta_graph_pb2.TensorInfo,
        meta_graph_pb2.SignatureDef,
        get_model_metadata_pb2.SignatureDefMap,
        get_model_metadata_pb2.GetModelMetadataRequest,
        get_model_metadata_pb2.GetModelMetadataResponse,
        get_model_status_pb2.GetModelStatusRequest,
        get_model_status_pb2.GetModelStatusResponse,
        get_model_status_pb2.ModelVersionStatus,
        model_pb2.ModelSpec,
        predict_pb2.PredictRequest,
        predict_pb2.PredictResponse,
    )
}
NUMBERS = (
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("bool", "float16", "float32", "float64", "complex64", "complex128"),
    tf.bfloat16.as_numpy_dtype,
)


@pytest.mark.parametrize("name", sorted(messages.CLASSES.keys() & THEIRS.keys()))
def test_fields_have_their_numbers_and_types(name):
    theirs = THEIRS[name].fields_by_name
    for field in messages.CLASSES[name].DESCRIPTOR.fields:
        other = theirs[field.name]
        assert (field.number, field.type) == (other.number, other.type), field.name
        assert field.is_repeated == other.is_repeated, field.name
        for kind in ("message_type", "enum_type"):
            if getattr(field, kind):
                assert getattr(field, kind).name == getattr(other, kind).name


def test_every_message_but_protobufs_own_is_compared():
    assert messages.CLASSES.keys() - THEIRS.keys() == {"Any", "Int64Value"}


def test_types_and_states_have_their_numbers():
    ours = messages.CLASSES["TensorProto"].DESCRIPTOR.fields_by_name["dtype"].enum_type
    for value in ours.values:
        assert types_pb2.DataType.Value(value.name) == value.number
        if value.number:
            name = tf.as_dtype(value.number).name
            assert messages.dtype_name(value.number) == name
    states = messages.CLASSES["ModelVersionStatus"].DESCRIPTOR.enum_types_by_name
    theirs = get_model_status_pb2.ModelVersionStatus.State
    assert {x.name: x.number for x in states["State"].values} == dict(theirs.items())


def some(dtype, shape):
    rng = np.random.default_rng(0)
    if dtype == "string":
        values = [rng.bytes(size) for size in range(int(np.prod(shape)))]
        array = np.empty(len(values), object)
        array[:] = values
        return array.reshape(shape)
    return rng.normal(0, 50, shape).astype(dtype)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 1)])
@pytest.mark.parametrize("dtype", [*NUMBERS, "string"], ids=str)
def test_arrays_go_and_come_as_with_tensorflow(dtype, shape):
    array = some(dtype, shape)
    sent = tensor_pb2.TensorProto.FromString(
        messages.to_tensor(array).SerializeToString()
    )
    went = tf.make_ndarray(sent)
    assert went.dtype == array.dtype
    assert went.shape == array.shape
    np.testing.assert_array_equal(went, array)

    made = tf.make_tensor_proto(array, shape=shape).SerializeToString()
    came = messages.to_array(messages.CLASSES["TensorProto"].FromString(made))
    assert came.dtype == array.dtype
    assert came.shape == array.shape
    np.testing.assert_array_equal(came, array)


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_values_in_fields_of_their_own_come_too(dtype):
    """As TF Serving answers, and not as `make_tensor_proto` does."""
    array = some(dtype, (2, 3))
    sent = tf.make_tensor_proto(array)
    field = messages._VALUES[array.dtype.name]
    values = array.ravel()
    if field == "half_val":
        values = values.view("uint16")
    elif array.dtype.kind == "c":
        values = values.view(f"float{4 * array.dtype.itemsize}")
    sent.ClearField("tensor_content")
    sent.ClearField(field)
    getattr(sent, field).extend(values.tolist())
    np.testing.assert_array_equal(tf.make_ndarray(sent), array)
    came = messages.CLASSES["TensorProto"].FromString(sent.SerializeToString())
    np.testing.assert_array_equal(messages.to_array(came), array)


def test_the_last_value_stands_for_those_that_follow():
    sent = tf.make_tensor_proto([1.0, 2.0], shape=(4,), dtype="float32")
    assert len(sent.float_val) == 2
    came = messages.CLASSES["TensorProto"].FromString(sent.SerializeToString())
    np.testing.assert_array_equal(messages.to_array(came), [1, 2, 2, 2])


@pytest.mark.parametrize("order", ["<", ">"])
def test_bytes_go_in_the_order_of_tensorflow(order):
    sent = messages.to_tensor(np.arange(3, dtype=f"{order}f4")).SerializeToString()
    went = tf.make_ndarray(tensor_pb2.TensorProto.FromString(sent))
    np.testing.assert_array_equal(went, [0, 1, 2])


def test_what_is_no_tensor_is_refused():
    with pytest.raises(ValueError, match="no tensors of datetime64"):
        messages.to_tensor(np.zeros(2, "datetime64[s]"))
    resource = messages.CLASSES["TensorProto"](dtype=types_pb2.DT_RESOURCE)
    with pytest.raises(ValueError, match="no arrays of resource"):
        messages.to_array(resource)
