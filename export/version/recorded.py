"""Predictions kept with a version: TF Serving's warm-up, and what `verify` repeats.

Both are files of `PredictionLog` records in `assets.extra/`, TF Serving's own format.
Imports neither Keras nor anything of ours, and runs as a program where these are
forbidden: `verify` starts it so.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

WARMUP = pathlib.Path("assets.extra", "tf_serving_warmup_requests")
RECORDED = pathlib.Path("assets.extra", "recorded_predictions")
MOST_WARMUP_RECORDS = 1000  # TF Serving does not load a version with more
EXAMPLES = 2  # in a recorded prediction
_VALUES = 4096  # kept of an output: a map's would outweigh the model

Arrays = dict[str, np.ndarray]


def record(version: pathlib.Path, inputs: Mapping[str, Any], warmup: int = 0) -> None:
    """Writes what every signature answers to the first of `inputs`, {name: array}.

    With `warmup`, also so many requests for every signature, each of one example.
    """
    loaded = tf.saved_model.load(str(version))
    (version / RECORDED).parent.mkdir(exist_ok=True)
    predictions, requests = [], []
    for signature, function in loaded.signatures.items():
        given = _given(function, _first(inputs, EXAMPLES))
        outputs = run(function, given)
        sampled = {name: _some(output) for name, output in outputs.items()}
        predictions.append(_log(signature, given, sampled))
        given = _given(function, _first(inputs, warmup))
        for i in range(warmup):
            one = {name: array[[i % len(array)]] for name, array in given.items()}
            requests.append(_log(signature, one))
    _write(version / RECORDED, predictions)
    if warmup:
        _write(version / WARMUP, requests)


def read(path: pathlib.Path) -> list[tuple[str, Arrays, Arrays]]:
    """[(signature, inputs, recorded outputs)] of a file; the outputs are samples."""
    if not path.is_file():
        raise ValueError(
            f"'{path}' is missing: export the model anew with `python -m export "
            "savedmodel`, which records predictions"
        )
    predictions: list[tuple[str, Arrays, Arrays]] = []
    for log in tf.data.TFRecordDataset(str(path)):
        log = prediction_log_pb2.PredictionLog.FromString(log.numpy()).predict_log
        signature = log.request.model_spec.signature_name
        inputs, outputs = (
            {name: tf.make_ndarray(proto) for name, proto in tensors.items()}
            for tensors in (log.request.inputs, log.response.outputs)
        )
        predictions.append((signature, inputs, outputs))
    return predictions


def repeat(
    version: pathlib.Path, engine: str
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Asks again for what was recorded, and what TF Serving warms up with.

    Returns:
        `({signature: {output: difference}}, failures)`; the differences as
        `relative_difference` has them, the failures of the warm-up in words.
    """
    ask = {"tensorflow": _tensorflow, "openvino": _openvino}[engine](version)
    differences = {
        signature: {
            name: _difference(outputs.get(name), recorded.get(name))
            for name in sorted({*outputs, *recorded})
        }
        for signature, inputs, recorded in read(version / RECORDED)
        if (outputs := ask(signature, inputs)) is not None
    }
    return differences, _failures(ask, version / WARMUP)


def _failures(ask: "_Ask", path: pathlib.Path) -> list[str]:
    """Why the requests of a file would keep TF Serving from loading the version."""
    if not path.is_file():
        return []
    try:
        requests = read(path)
    except Exception as error:  # whatever is wrong with it, the version is not served
        return [f"The warm-up requests cannot be read: {_line(error)}"]
    failures = []
    for number, (signature, inputs, _) in enumerate(requests, start=1):
        signature = signature or "serving_default"
        try:
            outputs = ask(signature, inputs)
            why = "it is not there" if outputs == {} else ""
        except Exception as error:  # TensorFlow raises all kinds
            why = _line(error)
        if why:
            failures.append(
                f"Warm-up request {number}, of signature '{signature}', fails: {why}"
            )
    return failures


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _difference(output: np.ndarray | None, recorded: np.ndarray | None) -> float:
    if output is None or recorded is None:
        return float("inf")
    return relative_difference(_some(output), recorded)


def relative_difference(output: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in parts of the largest value that is expected.

    Infinite where it is a NaN, which `max` could hide and no order has a place for;
    and where the shapes differ. Of what are no floats, such as the numbers of classes,
    it is the share that differs.
    """
    if output.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind not in "fV":  # V: bfloat16
        return np.count_nonzero(output != expected) / max(1, expected.size)
    output, expected = output.astype("float64"), expected.astype("float64")
    unequal = output != expected  # infinities can be equal, NaN cannot
    difference = np.abs(output[unequal] - expected[unequal]).max(initial=0)
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    relative = difference / scale if scale else difference
    return float("inf") if np.isnan(relative) else float(relative)


def _some(output: np.ndarray) -> np.ndarray:
    """An output whole, or values spread over it, by steps that no axis divides."""
    if output.size <= _VALUES:
        return output
    return output.ravel()[np.arange(_VALUES) * 1_000_003 % output.size]


_Ask = Callable[[str, Arrays], Arrays | None]  # a signature; None: cannot


def _tensorflow(version: pathlib.Path) -> _Ask:
    loaded = tf.saved_model.load(str(version))

    def ask(signature: str, inputs: Arrays) -> Arrays:
        function = loaded.signatures.get(signature)
        return {} if function is None else run(function, inputs)

    return ask


def run(function: Callable[..., Any], inputs: Arrays) -> Arrays:
    """What a signature's function, in memory, answers to {name: array}."""
    tensors = {name: tf.constant(array) for name, array in inputs.items()}
    return {name: output.numpy() for name, output in function(**tensors).items()}


def _openvino(version: pathlib.Path) -> _Ask:
    import openvino

    # In float32: where the CPU has bfloat16, OpenVINO takes that if not told.
    compiled = openvino.compile_model(
        openvino.Core().read_model(str(version)),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )

    def ask(signature: str, inputs: Arrays) -> Arrays | None:
        if signature != "serving_default":  # the only one that OpenVINO reads
            return None
        outputs = compiled(inputs).to_dict()
        return {port.get_any_name(): array for port, array in outputs.items()}

    return ask


def _first(inputs: Mapping[str, Any], examples: int) -> Arrays:
    return {name: np.asarray(array)[:examples] for name, array in inputs.items()}


def _given(function: Any, inputs: Arrays) -> Arrays:
    """The inputs as the signature takes them: as they are, or as files."""
    if takes(function, inputs):
        return inputs
    (images,) = inputs.values()
    files = [tf.io.encode_png(_as_pixels(image)).numpy() for image in images]
    return {"image_bytes": np.array(files, dtype=object)}


def takes(function: Any, inputs: Arrays) -> bool:
    """Whether a signature takes these arrays, and not files of them."""
    _, specs = function.structured_input_signature
    taken = {name: spec.dtype for name, spec in specs.items()}
    return taken == {name: tf.as_dtype(x.dtype) for name, x in inputs.items()}


def _as_pixels(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 255).astype("uint8")


def _log(
    signature: str, inputs: Arrays, outputs: Arrays | None = None
) -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.signature_name = signature
    for name, array in inputs.items():
        log.predict_log.request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    for name, array in (outputs or {}).items():
        log.predict_log.response.outputs[name].CopyFrom(tf.make_tensor_proto(array))
    return log


def _write(
    path: pathlib.Path, logs: Iterable[prediction_log_pb2.PredictionLog]
) -> None:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())


if __name__ == "__main__":
    json.dump(repeat(pathlib.Path(sys.argv[1]), sys.argv[2]), sys.stdout)
