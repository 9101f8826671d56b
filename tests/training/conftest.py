"""A run small enough to train in a test, on real code from end to end."""

import dataclasses
import os
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from rich.progress import Progress

from training import fitting, recipe
from training.datasets import pipeline
from training.tasks import TASKS

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
def tiny():
    """The scenes recipe, tiny."""
    return dataclasses.replace(
        recipe.find("scenes", toy=True),
        name="tiny",
        image_size=(96, 128),
        target_size=(48, 64),
        width=1 / 64,
        at=("pool1", "fc7"),
        epochs=3,
        extra_epochs=2,
    )


@pytest.fixture(scope="session")
def runs_with_data(tmp_path_factory, tiny):
    """A folder of runs with the toy scenes prepared; to be copied from."""
    runs = tmp_path_factory.mktemp("runs")
    pipeline.prepare(tiny, None, runs)
    return runs


@pytest.fixture
def runs(tmp_path, runs_with_data):
    """An empty folder of runs, in which the toy scenes are prepared."""
    (tmp_path / "datasets").symlink_to(runs_with_data / "datasets")
    return tmp_path


@pytest.fixture
def builder(tiny, runs):
    return pipeline.prepare(tiny, None, runs)


@pytest.fixture
def tasks(tiny, builder):
    return {name: TASKS[name].of(builder) for name in tiny.tasks}


@pytest.fixture
def fit(tiny, runs, builder, tasks):
    """`fit(method)` trains the tiny recipe."""

    def fit(method, settings=tiny, seed=0):
        with Progress() as progress:
            return fitting.fit(
                settings,
                method,
                seed,
                tasks=tasks,
                builder=builder,
                runs=runs,
                strategy=fitting.strategy(),
                progress=progress,
            )

    return fit
