"""Predictions kept with a version: TF Serving's warm-up, and what `verify` repeats.

Both are files of `PredictionLog` records in `assets.extra/`, TF Serving's own format.
Imports neither Keras nor anything of ours, and runs as a program where these are
forbidden: `verify` starts it so.
"""

import json
import pathlib
import sys

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

WARMUP = pathlib.Path("assets.extra", "tf_serving_warmup_requests")
RECORDED = pathlib.Path("assets.extra", "recorded_predictions")
MOST_WARMUP_RECORDS = 1000  # TF Serving does not load a version with more
EXAMPLES = 2  # in a recorded prediction
_VALUES = 4096  # kept of an output: a map's would outweigh the model


def record(version, inputs, warmup=0):
    """Writes what every signature answers to the first of `inputs`, {name: array}.

    With `warmup`, also so many requests for every signature, each of one example.
    """
    loaded = tf.saved_model.load(str(version))
    (version / RECORDED).parent.mkdir(exist_ok=True)
    predictions, requests = [], []
    for signature, function in loaded.signatures.items():
        given = _given(function, _first(inputs, EXAMPLES))
        outputs = _run(function, given)
        sampled = {name: _some(output) for name, output in outputs.items()}
        predictions.append(_log(signature, given, sampled))
        given = _given(function, _first(inputs, warmup))
        for i in range(warmup):
            one = {name: array[[i % len(array)]] for name, array in given.items()}
            requests.append(_log(signature, one))
    _write(version / RECORDED, predictions)
    if warmup:
        _write(version / WARMUP, requests)


def read(path):
    """[(signature, inputs, recorded outputs)] of a file; the outputs are samples."""
    if not path.is_file():
        raise ValueError(
            f"'{path}' is missing: export the model anew with `python -m export "
            "savedmodel`, which records predictions"
        )
    predictions = []
    for log in tf.data.TFRecordDataset(str(path)):
        log = prediction_log_pb2.PredictionLog.FromString(log.numpy()).predict_log
        signature = log.request.model_spec.signature_name
        arrays = [
            {name: tf.make_ndarray(proto) for name, proto in tensors.items()}
            for tensors in (log.request.inputs, log.response.outputs)
        ]
        predictions.append((signature, *arrays))
    return predictions


def differences(version, engine):
    """{signature: {output: the largest difference, relative to the largest value}}."""
    run = {"tensorflow": _tensorflow, "openvino": _openvino}[engine](version)
    return {
        signature: {
            name: _difference(outputs.get(name), recorded.get(name))
            for name in sorted({*outputs, *recorded})
        }
        for signature, inputs, recorded in read(version / RECORDED)
        if (outputs := run(signature, inputs)) is not None
    }


def _difference(output, recorded):
    if output is None or recorded is None or _some(output).shape != recorded.shape:
        return float("inf")
    output, recorded = _some(output).astype("float64"), recorded.astype("float64")
    scale = np.abs(recorded).max(initial=0)
    difference = np.abs(output - recorded).max(initial=0)
    return float(difference / scale if scale else difference)


def _some(output):
    """An output whole, or values spread over it, by steps that no axis divides."""
    if output.size <= _VALUES:
        return output
    return output.ravel()[np.arange(_VALUES) * 1_000_003 % output.size]


def _tensorflow(version):
    loaded = tf.saved_model.load(str(version))

    def run(signature, inputs):
        function = loaded.signatures.get(signature)
        return {} if function is None else _run(function, inputs)

    return run


def _run(function, inputs):
    tensors = {name: tf.constant(array) for name, array in inputs.items()}
    return {name: output.numpy() for name, output in function(**tensors).items()}


def _openvino(version):
    import openvino

    # In float32: where the CPU has bfloat16, OpenVINO takes that if not told.
    compiled = openvino.compile_model(
        openvino.Core().read_model(str(version)),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )

    def run(signature, inputs):
        if signature != "serving_default":  # the only one that OpenVINO reads
            return None
        outputs = compiled(inputs).to_dict()
        return {port.get_any_name(): array for port, array in outputs.items()}

    return run


def _first(inputs, examples):
    return {name: np.asarray(array)[:examples] for name, array in inputs.items()}


def _given(function, inputs):
    """The inputs as the signature takes them: as they are, or as files."""
    _, specs = function.structured_input_signature
    if set(specs) == set(inputs):
        return inputs
    (images,) = inputs.values()
    files = [tf.io.encode_png(_as_pixels(image)).numpy() for image in images]
    return {"image_bytes": np.array(files, dtype=object)}


def _as_pixels(image):
    return np.clip(image, 0, 255).astype("uint8")


def _log(signature, inputs, outputs=None):
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.signature_name = signature
    for name, array in inputs.items():
        log.predict_log.request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    for name, array in (outputs or {}).items():
        log.predict_log.response.outputs[name].CopyFrom(tf.make_tensor_proto(array))
    return log


def _write(path, logs):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())


if __name__ == "__main__":
    json.dump(differences(pathlib.Path(sys.argv[1]), sys.argv[2]), sys.stdout)
