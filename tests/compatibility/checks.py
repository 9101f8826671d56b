"""What is asked of two towers that are joined; each check raises an AssertionError."""

import subprocess
import sys
import tempfile

import keras
import numpy as np

from keras_cross_stitch import (
    LearningRateGroups,
    common_taps,
    export_saved_model,
    stitch,
)
from tests.compatibility.models import SIDE, layers_of, tower, two_taps

# Runs where Keras is not installed: TensorFlow's loader alone.
SERVED = """
import sys
import numpy as np
sys.modules["keras"] = None
import tensorflow as tf
data = np.load(sys.argv[2] + "/data.npz")
loaded = tf.saved_model.load(sys.argv[1])
inputs = {k[3:]: tf.constant(data[k]) for k in data if k.startswith("in/")}
for task in ("a", "b"):
    served = loaded.signatures[task](**inputs)[task].numpy()
    expected = data["out/" + task]
    assert np.abs(served - expected).max() <= 1e-5 * np.abs(expected).max(), task
assert "keras" not in {name for name, module in sys.modules.items() if module}
"""


def one_model(name, way):
    """Two towers of a model; returns its input, how many layers, and the taps."""
    way = {"nested": way == "nested", "frozen": True}
    towers = {"a": tower(name, 2, **way), "b": tower(name, 3, **way)}
    # Names that Keras makes up count on from tower to tower.
    by_task = {task: two_taps(model) for task, model in towers.items()}
    at = [
        dict(zip(towers, tap, strict=True))
        for tap in zip(*by_task.values(), strict=True)
    ]
    joined(towers, at, without_keras=True)
    shapes = ", ".join(str(tuple(x.shape[1:])) for x in towers["a"].inputs)
    return shapes, len(list(layers_of(towers["a"]))), " ".join(by_task["a"])


def pair(first, second):
    """Towers of two models, joined where they fit; returns at how many taps."""
    side = None if "LSTM" in first or "keras_hub" in first else SIDE
    towers = {"a": tower(first, 2, side=side), "b": tower(second, 3, side=side)}
    at = common_taps(towers, project=True)
    assert at, "no taps were found"
    joined(towers, at, project=True)
    return (len(at),)


def joined(towers, at, project=False, without_keras=False):
    """Joins the towers, and saves, loads, exports and trains what comes out."""
    model = stitch(towers, at, project=project, same_task=1.0)
    data = data_for(model)
    given = data if isinstance(model.input, dict) else next(iter(data.values()))
    outputs = {task: np.asarray(x) for task, x in model(given).items()}
    for task, one in towers.items():
        apart = one(data if len(one.inputs) > 1 else next(iter(data.values())))
        assert_close(outputs[task], apart, "identity gives other outputs")

    with tempfile.TemporaryDirectory() as directory:
        model.save(f"{directory}/model.keras")
        loaded = keras.saving.load_model(f"{directory}/model.keras", compile=False)
        for task, output in loaded(given).items():
            assert_close(output, outputs[task], "a loaded .keras gives other outputs")
        # It compares what it has written with the model.
        path = export_saved_model(loaded, f"{directory}/served", sample=given)
        if without_keras:
            serve_without_keras(path, directory, data, outputs)
    # Last: untrained statistics of a batch normalisation may take what follows away.
    frozen = {v.path: v.numpy() for v in model.non_trainable_variables}
    model.compile(
        LearningRateGroups(keras.optimizers.SGD(1e-6), alpha=100, projections=10),
        loss="mse",
        run_eagerly=True,  # one step is quicker than its graph
    )
    targets = {"a": np.zeros((2, 2)), "b": np.zeros((2, 3))}
    loss = model.train_on_batch(given, targets)
    assert np.isfinite(loss).all(), f"the loss of a step is {loss}"
    for variable in model.trainable_variables:
        assert np.isfinite(variable.numpy()).all(), f"{variable.path} is not finite"
    for variable in model.non_trainable_variables:
        if "moving" not in variable.path and "seed" not in variable.path:
            same = np.array_equal(variable.numpy(), frozen[variable.path])
            assert same, f"{variable.path} is frozen, and moved"


def data_for(model, n=2):
    """Random input: ids are 0 or 1, images in [-1, 1], as most of the models take."""
    rng = np.random.default_rng(0)

    def draw(x):
        shape = [n, *(size or 8 for size in x.shape[1:])]
        if "int" in x.dtype:
            return rng.integers(0, 2, shape).astype(x.dtype)
        return rng.uniform(-1, 1, shape).astype(x.dtype)

    return {x.name: draw(x) for x in model.inputs}


def serve_without_keras(path, directory, data, outputs):
    np.savez(
        f"{directory}/data.npz",
        **{f"in/{key}": x for key, x in data.items()},
        **{f"out/{task}": x for task, x in outputs.items()},
    )
    served = subprocess.run(
        [sys.executable, "-c", SERVED, str(path), directory],
        capture_output=True,
        text=True,
    )
    assert served.returncode == 0, served.stderr.strip().splitlines()[-1]


def assert_close(actual, expected, what):
    actual, expected = np.asarray(actual), np.asarray(expected)
    difference = np.abs(actual - expected).max()
    # Written so that a NaN is a failure.
    assert difference <= 1e-5 * max(np.abs(expected).max(), 1e-6), (
        f"{what}: they differ by {difference:.2g}"
    )
