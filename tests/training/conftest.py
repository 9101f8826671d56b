"""Runs small enough to train in a test, on real code from end to end."""

import dataclasses
import os
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from rich.progress import Progress

from training import distribution, fitting, recipes
from training.runs import open_experiment

tfds.disable_progress_bar()


@pytest.fixture(scope="session")
def nyuv2_folder():
    """The real NYUv2: `$KCS_DATA/nyuv2`, or `../shared/data/nyuv2`."""
    shared = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("KCS_DATA", shared)) / "nyuv2"
    if not path.exists():
        pytest.skip(f"needs NYUv2: set KCS_DATA to the folder that has it, not {path}")
    return path


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A saved model of few layers, with the names that `nyuv2_pretrained` asks for."""
    image = keras.Input((None, None, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling")(image)
    for index, stride in ((4, 8), (7, 4)):
        x = keras.layers.Conv2D(8, 9, stride, padding="same", name=f"conv{index}")(x)
        x = keras.layers.BatchNormalization(name=f"block{index}_output")(x)
        x = keras.layers.ReLU(name=f"relu{index}")(x)
    for index in (10, 14, 15):
        x = keras.layers.Activation("linear", name=f"block{index}_output")(x)
    model = keras.Model(image, x)
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.01, 0.1, w.shape) for w in model.get_weights()])
    path = tmp_path_factory.mktemp("models") / "backbone.keras"
    model.save(path)
    return path


@pytest.fixture(scope="session")
def tiny(backbone):
    """The scenes recipe on that backbone, with dropout."""
    small = recipes.find("scenes", toy=True)
    small = recipes.change(small, "training", dtype="float32", batch_size=8)
    small = recipes.change(small, "single_task", epochs=3)
    small = recipes.change(small, "units", at=("relu4", "relu7"))
    tower = recipes.SavedBackbone(
        backbone, frozen_to="rescaling", dropout=0.5, pixel_range=None
    )
    return dataclasses.replace(small, name="tiny", tower=tower)


@pytest.fixture(scope="session")
def alexnet(tiny):
    """The same recipe with the towers of `scenes`, narrow."""
    tower = recipes.find("scenes", toy=True).tower
    small = recipes.change(tiny, "units", at=("pool1", "fc7"))
    return dataclasses.replace(small, name="alexnet", tower=tower)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny):
    """The experiment whose runs are trained once for all tests: only to be read."""
    return open_experiment(tiny, None, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def single_task(finished):
    """The folder of a finished run of `single_task`."""
    train(finished, "single_task")
    return finished.folder("single_task", 0)


@pytest.fixture(scope="session")
def cross_stitch(finished, single_task):
    """The folder of a finished run of `cross_stitch`."""
    train(finished, "cross_stitch")
    return finished.folder("cross_stitch", 0)


@pytest.fixture
def experiment(tmp_path, finished):
    """The same experiment, with an empty folder of runs."""
    (tmp_path / "datasets").symlink_to(finished.runs / "datasets")
    return dataclasses.replace(finished, runs=tmp_path)


@pytest.fixture(scope="session")
def tasks(finished):
    return finished.tasks


def train(experiment, method, seed=0):
    """Trains a run of the experiment, and returns its metrics."""
    with Progress() as progress:
        return fitting.fit(
            experiment,
            method,
            seed,
            strategy=distribution.strategy(),
            progress=progress,
        )


@pytest.fixture(scope="session", name="train")
def train_fixture():
    return train
