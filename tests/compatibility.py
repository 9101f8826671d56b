"""Which ready-made models can be stitched: `make compatibility` writes the table.

Every model runs in a process of its own and adds a row to the results as it ends; rows
that are there are not made again. `python tests/compatibility.py pairs` does so for
every pair of models of eight families. Not a test, and not run by CI.
"""

import csv
import inspect
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_cross_stitch import (
    LearningRateGroups,
    common_taps,
    export_saved_model,
    stitch,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "compatibility.csv"
PAGE = ROOT / "docs" / "compatibility.md"
HEADER = ["model", "way", "input", "layers", "taps", "seconds", "result"]
MINUTES = 10  # for one model; the largest have over 300 million weights

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


def applications():
    """The names of all constructors of `keras.applications`, the largest last."""
    large = re.compile("Large|ConvNeXt|B[3-7]$|V2[ML]$|152|169|201")
    return sorted(
        (
            name
            for name, value in vars(keras.applications).items()
            if inspect.isfunction(value)
        ),
        key=lambda name: (bool(large.search(name)), name),
    )


def application(name):
    """A model without weights or top, of the smallest input that it takes."""
    build = getattr(keras.applications, name)
    for side in (32, 48, 64, 71, 75, 96, 128, 224, 331):
        try:
            return build(include_top=False, weights=None, input_shape=(side, side, 3))
        except ValueError as error:
            refusal = error
    raise refusal


def keras_hub_bert():
    import keras_hub

    return keras_hub.models.BertBackbone(
        vocabulary_size=50,
        num_layers=3,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
    )


def keras_hub_resnet():
    import keras_hub

    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[2, 2],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    )


def keras_hub_vit():
    import keras_hub

    return keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=8,
        num_layers=3,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
    )


def keras_cv_resnet(version):
    import keras_cv

    return getattr(keras_cv.models, f"ResNet{version}Backbone")(
        stackwise_filters=[64, 64],
        stackwise_blocks=[2, 2],
        stackwise_strides=[1, 2],
        block_type="block",
        include_rescaling=True,
        input_shape=(32, 32, 3),
    )


def keras_cv_mobilenet():
    import keras_cv

    return keras_cv.models.MobileNetV3Backbone(
        stackwise_expansion=[1, 4],
        stackwise_filters=[16, 24],
        stackwise_kernel_size=[3, 3],
        stackwise_stride=[2, 2],
        stackwise_se_ratio=[0.25, None],
        stackwise_activation=["relu", "hard_swish"],
        include_rescaling=True,
        input_shape=(32, 32, 3),
    )


def keras_cv_efficientnet():
    import keras_cv

    return keras_cv.models.EfficientNetV2Backbone(
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[2, 2],
        stackwise_input_filters=[16, 16],
        stackwise_output_filters=[16, 24],
        stackwise_expansion_ratios=[1, 4],
        stackwise_squeeze_and_excite_ratios=[0, 0.25],
        stackwise_strides=[1, 2],
        stackwise_conv_types=["fused", "unfused"],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        skip_connection_dropout=0.0,
        include_rescaling=True,
        input_shape=(32, 32, 3),
    )


# Small ones: the classes named after presets (ResNet18Backbone) want a download.
BACKBONES = {
    "keras_hub BertBackbone": keras_hub_bert,
    "keras_hub ResNetBackbone": keras_hub_resnet,
    "keras_hub ViTBackbone": keras_hub_vit,
    "keras_cv ResNetBackbone": lambda: keras_cv_resnet(""),
    "keras_cv ResNetV2Backbone": lambda: keras_cv_resnet("V2"),
    "keras_cv MobileNetV3Backbone": keras_cv_mobilenet,
    "keras_cv EfficientNetV2Backbone": keras_cv_efficientnet,
}


def tower(name, way, outputs):
    """The model with a head, flat (on its output) or nested (called as a layer)."""
    backbone = BACKBONES[name]() if name in BACKBONES else application(name)
    # The first third is frozen, as a user would who has few labels.
    for layer in backbone.layers[: len(backbone.layers) // 3]:
        layer.trainable = False
    inputs, features = backbone.input, backbone.output
    if way == "nested":
        inputs = keras.tree.map_structure(
            lambda x: keras.Input(x.shape[1:], dtype=x.dtype, name=x.name), inputs
        )
        features = backbone(inputs)
    if isinstance(features, dict):
        features = features.get("pooled_output", next(iter(features.values())))
    while len(features.shape) > 2:
        features = keras.ops.mean(features, axis=1)
    return keras.Model(inputs, keras.layers.Dense(outputs, name="task_score")(features))


def inner(model, prefix=""):
    """(path, layer) of the layers of a model, those of nested models in their place."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from inner(layer, f"{prefix}{layer.name}/")
        else:
            yield prefix + layer.name, layer


def taps(model):
    """Two taps, at a third and two thirds of the layers that can be one."""
    found = [
        path
        for path, layer in inner(model)
        if not isinstance(layer, keras.layers.InputLayer)
        and layer.name != "task_score"
        and isinstance(layer.output, keras.KerasTensor)
        and 2 <= len(layer.output.shape) <= 5
        and layer.output.shape[-1] is not None
        and "float" in layer.output.dtype
    ]
    return [found[len(found) // 3], found[2 * len(found) // 3]]


def data_for(model, n=2):
    """Random input: ids are 0 or 1, images in [-1, 1], as most of the models take."""
    rng = np.random.default_rng(0)

    def draw(x):
        shape = [n, *(size or 8 for size in x.shape[1:])]
        if "int" in x.dtype:
            return rng.integers(0, 2, shape).astype(x.dtype)
        return rng.uniform(-1, 1, shape).astype(x.dtype)

    return {x.name: draw(x) for x in model.inputs}


def check(name, way):
    """Stitches two towers of the model; returns what there is to say in the table."""
    towers = {"a": tower(name, way, 2), "b": tower(name, way, 3)}
    # Names that Keras makes up count on from tower to tower.
    by_task = {task: taps(one) for task, one in towers.items()}
    at = [
        dict(zip(towers, tap, strict=True))
        for tap in zip(*by_task.values(), strict=True)
    ]
    model = stitch(towers, at, same_task=1.0)
    data = data_for(model)
    given = data if isinstance(model.input, dict) else next(iter(data.values()))
    for task, one in towers.items():
        apart = one(data if len(one.inputs) > 1 else next(iter(data.values())))
        _assert_close(model(given)[task], apart, "identity gives other outputs")

    with tempfile.TemporaryDirectory() as directory:
        outputs = {task: np.asarray(x) for task, x in model(given).items()}
        model.save(f"{directory}/model.keras")
        loaded = keras.saving.load_model(f"{directory}/model.keras", compile=False)
        for task, output in loaded(given).items():
            _assert_close(output, outputs[task], "a loaded .keras gives other outputs")
        path = export_saved_model(loaded, f"{directory}/served", sample=given)
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
    # Last: untrained statistics of a batch normalisation may take what follows away.
    frozen = {v.path: v.numpy() for v in model.non_trainable_variables}
    model.compile(
        LearningRateGroups(keras.optimizers.SGD(1e-6), alpha=100),
        loss="mse",
        jit_compile=False,
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

    shapes = ", ".join(str(tuple(x.shape[1:])) for x in model.inputs)
    return shapes, len(list(inner(towers["a"]))), " ".join(by_task["a"])


def _assert_close(actual, expected, what):
    actual, expected = np.asarray(actual), np.asarray(expected)
    difference = np.abs(actual - expected).max()
    # Written so that a NaN is a failure.
    assert difference <= 1e-5 * max(np.abs(expected).max(), 1e-6), (
        f"{what}: they differ by {difference:.2g}"
    )


def run(name, way):
    """One row, in this process."""
    keras.utils.set_random_seed(0)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    try:
        shapes, layers, at = check(name, way)
        result = "works"
    except Exception as error:
        shapes, layers, at = "", "", ""
        result = " ".join(str(error).split())[:300]
    seconds = round(time.monotonic() - start)
    with open(RESULTS, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(
            [name, way, shapes, layers, at, seconds, result]
        )


def rows():
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


# Every ordered pair of eight families, joined where `common_taps` finds that they fit.
FAMILIES = [
    "ConvNeXtTiny",
    "DenseNet121",
    "EfficientNetB0",
    "InceptionV3",
    "MobileNetV2",
    "ResNet50",
    "VGG16",
    "Xception",
]
PAIRS = ROOT / "docs" / "results" / "compatibility_pairs.csv"
PAIRS_HEADER = ["first", "second", "taps", "seconds", "result"]
SIDE = 75  # the smallest that all of them take


def family(name, outputs):
    build = getattr(keras.applications, name)
    backbone = build(include_top=False, weights=None, input_shape=(SIDE, SIDE, 3))
    x = keras.layers.GlobalAveragePooling2D(name="pooled")(backbone.output)
    return keras.Model(
        backbone.input, keras.layers.Dense(outputs, name="task_score")(x)
    )


def check_pair(first, second):
    """Joins two families; returns how many taps there are."""
    towers = {"a": family(first, 2), "b": family(second, 3)}
    taps = common_taps(towers, project=True)
    assert taps, "no taps were found"
    model = stitch(towers, at=taps, project=True, same_task=1.0)
    images = np.random.default_rng(0).uniform(-1, 1, (2, SIDE, SIDE, 3))
    images = images.astype("float32")
    outputs = {task: np.asarray(x) for task, x in model(images).items()}
    for task, one in towers.items():
        _assert_close(outputs[task], one(images), "identity gives other outputs")
    with tempfile.TemporaryDirectory() as directory:
        model.save(f"{directory}/model.keras")
        loaded = keras.saving.load_model(f"{directory}/model.keras", compile=False)
        for task, output in loaded(images).items():
            _assert_close(output, outputs[task], "a loaded .keras gives other outputs")
        export_saved_model(loaded, f"{directory}/served", sample=images)
    model.compile(keras.optimizers.SGD(1e-6), loss="mse", jit_compile=False)
    targets = {"a": np.zeros((2, 2)), "b": np.zeros((2, 3))}
    loss = model.train_on_batch(images, targets)
    assert np.isfinite(loss).all(), f"the loss of a step is {loss}"
    return len(taps)


def run_pair(first, second):
    """One pair's row, in this process."""
    keras.utils.set_random_seed(0)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    try:
        taps, result = check_pair(first, second), "works"
    except Exception as error:
        taps, result = "", " ".join(str(error).split())[:300]
    seconds = round(time.monotonic() - start)
    _append_pair([first, second, taps, seconds, result])


def _append_pair(row):
    with open(PAIRS, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row)


def pair_rows():
    if not PAIRS.exists():
        return []
    with open(PAIRS, newline="") as file:
        return list(csv.DictReader(file))


def pairs():
    """The matrix, a pair a process; pairs that are there are not made again."""
    if not PAIRS.exists():
        PAIRS.write_text(",".join(PAIRS_HEADER) + "\n")
    there = {(row["first"], row["second"]) for row in pair_rows()}
    for first in FAMILIES:
        for second in FAMILIES:
            if (first, second) in there:
                continue
            command = [sys.executable, __file__, "pair", first, second]
            try:
                ended = subprocess.run(command, timeout=60 * MINUTES).returncode
            except subprocess.TimeoutExpired:
                ended = f"takes over {MINUTES} minutes"
            if ended:
                _append_pair([first, second, "", "", f"ended with {ended}"])
            print(*pair_rows()[-1].values(), flush=True)
            write_page()


def pairs_as_matrix():
    """The lines of the page, as far as pairs are there."""
    found = {(row["first"], row["second"]): row for row in pair_rows()}
    if not found:
        return []
    lines = [
        "",
        "## Models that were not made for each other",
        "",
        f"{sum(row['result'] == 'works' for row in found.values())} of {len(found)} "
        f"ordered pairs out of {len(FAMILIES)} families work (of "
        f"{len(FAMILIES) ** 2}), joined at `common_taps(towers, project=True)`: how "
        "many taps there are. With alpha = identity the joined model gives the towers' "
        "outputs (1e-5), saved, loaded and exported; a training step is finite.",
        "",
        f"| | {' | '.join(FAMILIES)} |",
        f"| --- |{' ---: |' * len(FAMILIES)}",
    ]
    for first in FAMILIES:
        cells = []
        for second in FAMILIES:
            row = found.get((first, second))
            works = row and row["result"] == "works"
            cells.append(row["taps"] if works else "fails" if row else "")
        lines.append(f"| {first} | {' | '.join(cells)} |")
    fails = [row for row in found.values() if row["result"] != "works"]
    return lines + [f"\n{r['first']}, {r['second']}: {r['result']}" for r in fails]


def write_page():
    """The table, from the results as far as they are there."""
    works = sum(row["result"] == "works" for row in rows())
    lines = [
        "# Compatibility",
        "",
        f"Keras {keras.__version__}. {works} of {len(rows())} ready-made models are "
        "stitched, trained, saved and served.",
        "",
        "Each row: two towers of the model with random weights and a head each, the "
        "first third of the layers frozen, as one flat model or with the backbone "
        "nested (called as a layer). Units at two layers. With alpha = identity the "
        "stitched model gives the towers' outputs (1e-5); a training step is finite, "
        "and what is frozen stays; a saved `.keras` file gives the same; and one "
        "signature a task, loaded without Keras, gives what the model gives (1e-5).",
        "",
        "ViTBackbone fails in Keras's loader, not here: one plain tower of it, saved "
        "and loaded alone, fails with the same words.",
        "",
        "Made by `make compatibility`; raw rows in "
        "[`results/compatibility.csv`](results/compatibility.csv).",
        "",
        "| model | backbone | input | layers | units behind | result |",
        "| --- | --- | --- | ---: | --- | --- |",
    ]
    for row in sorted(rows(), key=lambda row: (row["model"].lower(), row["way"])):
        cells = [row[key] for key in ("model", "way", "input", "layers", "taps")]
        result = row["result"].replace("|", "\\|")
        lines.append(f"| {' | '.join(cells)} | {result} |")
    PAGE.write_text("\n".join([*lines, *pairs_as_matrix()]) + "\n")


def main():
    if not RESULTS.exists():
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(",".join(HEADER) + "\n")
    there = {(row["model"], row["way"]) for row in rows()}
    for name in [*BACKBONES, *applications()]:
        for way in ("nested", "flat"):
            if (name, way) in there:
                continue
            command = [sys.executable, __file__, name, way]
            limit = f"takes over {MINUTES} minutes on two cores"
            try:
                ended = subprocess.run(command, timeout=60 * MINUTES).returncode
            except subprocess.TimeoutExpired:
                ended = limit
            if ended:
                result = ended if ended == limit else f"ended with exit code {ended}"
                with open(RESULTS, "a", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerow(
                        [name, way, "", "", "", "", result]
                    )
            row = rows()[-1]
            print(f"{name}, {way}: {row['result']} ({row['seconds']} s)", flush=True)
            write_page()


if __name__ == "__main__":
    if sys.argv[1:] == ["pairs"]:
        pairs()
    elif sys.argv[1:2] == ["pair"]:
        run_pair(*sys.argv[2:])
    elif len(sys.argv) == 3:
        run(*sys.argv[1:])
    else:
        main()
