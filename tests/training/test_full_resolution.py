"""NYUv2 at the size of its labels and in the official frame, against NumPy."""

import dataclasses
import json
import re

import cv2
import keras
import numpy as np
import pytest
import scipy.io
import tensorflow as tf
from keras import layers
from typer.testing import CliRunner

from training import fitting, full_resolution, recipes, runs
from training.__main__ import app
from training.datasets.nyuv2 import CLASSES
from training.runs import open_experiment

TASKS = ["segmentation", "depth"]


def write_folder(path, scale):
    """Six images of 240x320 times the scale, four to train, with some void."""
    rng = np.random.default_rng(0)
    for name in ("rgb", "labels40", "depth"):
        (path / name).mkdir(parents=True)
    size = (320 * scale, 240 * scale)
    for index in range(1, 7):
        rgb = rng.integers(0, 255, (6, 8, 3), np.uint8)
        labels = rng.integers(0, 41, (12, 16), np.uint8)
        depth = rng.integers(0, 9000, (12, 16), np.uint16)
        for name, array, end in (
            ("rgb", rgb, "jpg"),
            ("labels40", labels, "png"),
            ("depth", depth, "png"),
        ):
            file = str(path / name / f"{index:04d}.{end}")
            cv2.imwrite(file, cv2.resize(array, size, interpolation=cv2.INTER_NEAREST))
    splits = {"trainNdxs": [[1.0], [3], [4], [6]], "testNdxs": [[2.0], [5]]}
    scipy.io.savemat(path / "splits.mat", splits)
    (path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose network is untrained, on prepared data of 320x240."""
    folder = tmp_path_factory.mktemp("run")
    small = write_folder(folder / "small", 1)
    recipe = recipes.with_tasks(recipes.find("nyuv2", toy=True), TASKS)
    experiment = open_experiment(recipe, small, folder / "runs")
    path = experiment.folder("hard_sharing", 0)
    image = keras.Input((*recipe.data.image_size, 3), name="image")
    keras.utils.set_random_seed(0)
    logits = {}
    for name, task in experiment.tasks.items():
        x = layers.Conv2D(task.outputs, 5, 2, padding="same", name=f"{name}_conv")(
            image
        )
        logits[name] = layers.Identity(name=f"{name}_logits")(x)
    model = keras.Model(image, logits)
    runs.claim(path, experiment.depends_on("hard_sharing", 0))
    fitting._save(fitting.answering(model, experiment.tasks), experiment, path)
    (path / "metrics.json").write_text("{}")
    return path, model


def expected(model, folder, scale):
    """mIoU and the absolute error by hand, and how many pixels there are."""
    counts, errors = np.zeros((40, 40)), []
    rows, columns = (slice(45, 471), slice(41, 601))
    if scale == 1:
        rows, columns = slice(23, 235), slice(21, 300)
    for index in (2, 5):
        image = tf.io.decode_jpeg(
            (folder / f"rgb/{index:04d}.jpg").read_bytes()
        ).numpy()
        image = cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA)
        logits = model.predict(image[None].astype("f4"), verbose=0)
        large = {
            name: tf.image.resize(x, (240 * scale, 320 * scale))[
                0, rows, columns
            ].numpy()
            for name, x in logits.items()
        }
        labels = cv2.imread(str(folder / f"labels40/{index:04d}.png"), -1).astype(int)
        labels = labels[rows, columns]
        there = labels > 0
        found = large["segmentation"].argmax(-1)
        np.add.at(counts, (labels[there] - 1, found[there]), 1)
        metres = cv2.imread(str(folder / f"depth/{index:04d}.png"), -1) / 1000
        metres = metres[rows, columns]
        off = np.abs(np.maximum(large["depth"][..., 0], 0) - metres)
        errors.append(off[metres > 0])
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    iou = counts.diagonal()[union > 0] / union[union > 0]
    return 100 * iou.mean(), np.concatenate(errors).mean()


@pytest.mark.parametrize(
    ("scale", "protocol"),
    [
        (
            2,
            r"2 images at 480x640.*rows 45 to 470 and columns 41 to 600: the offic",
        ),
        (1, r"2 images at 240x320.*rows 23 to 234 and columns 21 to 299.*scaled"),
    ],
)
def test_scores_are_of_resized_logits_within_the_frame(run, tmp_path, scale, protocol):
    path, model = run
    folder = write_folder(tmp_path / "nyuv2", scale)

    result = CliRunner().invoke(
        app, ["evaluate", str(path), "--data", str(folder), "--full-resolution"]
    )

    assert result.exit_code == 0, result.output
    written = json.loads((path / "full_resolution.json").read_text())
    assert re.search(protocol, written["protocol"])
    assert " ".join(result.stdout.split()).count("official frame") == 1
    miou, error = expected(model, folder, scale)
    assert written["metrics"]["segmentation"]["miou"] == pytest.approx(miou, abs=0.02)
    assert written["metrics"]["depth"]["abs_error"] == pytest.approx(error, abs=2e-3)


def test_what_cannot_be_scored_so_is_said(run, tmp_path):
    path, _ = run
    folder = write_folder(tmp_path / "nyuv2", 1)
    experiment = runs.of_run(path)
    assert experiment.recipe.name == "nyuv2-toy-segmentation+depth"

    with pytest.raises(ValueError, match=r"finished run, RUNS/RECIPE/METHOD/seedS"):
        runs.of_run(tmp_path)
    on_train = recipes.change(experiment.recipe, "data", test_split="train[80%:]")
    part = dataclasses.replace(experiment, recipe=on_train)
    with pytest.raises(ValueError, match=r"judged on the test .* on train\[80%:\]$"):
        full_resolution.evaluate(part, path, folder)
    other = recipes.change(experiment.recipe, "data", dataset="scenes")
    experiment.recipe = other
    message = r"of NYUv2 only, and .* 'scenes'\. What .* in .*seed0/metrics\.json$"
    with pytest.raises(ValueError, match=message):
        full_resolution.evaluate(experiment, path, folder)
    without = CliRunner().invoke(app, ["evaluate", str(path), "--data", str(folder)])
    assert without.exit_code == 2
    said = " ".join(without.output.split())
    assert "Of a run of NYUv2, give --full-resolution" in said
