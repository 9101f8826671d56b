"""One device, two, and two workers train the same model. A strategy has its process."""

import csv
import dataclasses
import inspect
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cross_stitch import weigh_losses
from training import distribution, recipes, runs
from training.batches import dense
from training.runs import open_experiment

pytestmark = pytest.mark.xdist_group("distribution")

ROOT = Path(__file__).parents[2]
METHOD = "cross_stitch_from_start"


def label_all(experiment):
    """Labels every pixel or RoI: a replica's mean is over its own labels alone."""
    images, targets = experiment.train_examples
    if "boxes" in targets:
        on_objects = tf.repeat(targets["boxes"][:, :1], 32, axis=1)
        experiment.train_examples = images, {**targets, "proposals": on_objects}
        return
    classes, normals = targets["segmentation"], targets["normals"]
    defined = tf.reduce_any(normals != 0, axis=-1, keepdims=True)
    experiment.train_examples = (
        images,
        {
            "segmentation": tf.where(classes == 255, 0, classes),
            "normals": tf.where(defined, normals, [0.0, 0.0, -1.0]),
        },
    )


PROGRAM = """
import os, pickle, signal, sys
from pathlib import Path
import tensorflow as tf
from rich.progress import Progress
from training import callbacks, distribution, fitting
from training.runs import open_experiment

folder, replicas, dies_in_step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
strategy = distribution.strategy(replicas or None)
recipe = pickle.loads((Path(folder) / "recipe").read_bytes())
experiment = open_experiment(recipe, None, Path(folder))
LABEL_ALL
label_all(experiment)

def die(self, batch, logs=None):
    if self.model.optimizer.iterations.numpy() == dies_in_step:
        os.kill(os.getpid(), signal.SIGKILL)

callbacks.ShowProgress.on_train_batch_begin = die
with Progress(disable=True) as progress:
    fitting.fit(experiment, METHOD, 0, strategy=strategy, progress=progress)
""".replace("METHOD", repr(METHOD)).replace("LABEL_ALL", inspect.getsource(label_all))


@pytest.fixture(scope="module")
def plain(finished, tmp_path_factory):
    """The experiment without chance, and without what is a replica's own.

    That is dropout, and batch normalization, whose statistics are of a replica's part
    of the batch.
    """
    keras.utils.set_random_seed(0)
    x = image = keras.Input((None, None, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling")(x)
    for index, stride in ((4, 8), (7, 4)):
        x = keras.layers.Conv2D(8, 9, stride, padding="same", name=f"conv{index}")(x)
        x = keras.layers.ReLU(name=f"relu{index}")(x)
    path = tmp_path_factory.mktemp("plain") / "backbone.keras"
    keras.Model(image, x).save(path)
    tower = recipes.SavedBackbone(
        path, frozen_to="rescaling", dropout=0.0, pixel_range=None
    )
    small = dataclasses.replace(finished.recipe, name="plain", tower=tower)
    small = recipes.change(small, "single_task", epochs=9)
    return dataclasses.replace(finished, recipe=small, runs=path.parent)


@pytest.fixture(scope="module")
def plain_regions(plain, alone):
    """The same for boxes: detection and attributes of the rooms."""
    small = recipes.find("scenes_detection", toy=True)
    tower = recipes.FastRcnnBackbone(
        plain.recipe.tower.backbone,
        frozen_to="rescaling",
        dropout=0.0,
        pixel_range=None,
        pooled=("relu4", "relu7"),
        pooled_size=2,
        fully_connected=8,
    )
    units = dataclasses.replace(small.units, at=("relu7", "fc6"))
    small = dataclasses.replace(small, name="plain_regions", tower=tower, units=units)
    small = recipes.change(small, "training", dtype="float32")
    return open_experiment(recipes.change(small, "data", sampled=8), None, plain.runs)


@pytest.fixture
def processes():
    """All that were started, of which none outlives the test."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(experiment, folder, replicas=0, dies_in_step=-1, cluster=None):
    """The program in a process, on the data that are prepared."""
    folder.mkdir(exist_ok=True)
    if not (folder / "datasets").exists():
        (folder / "datasets").symlink_to(experiment.runs / "datasets")
    (folder / "recipe").write_bytes(pickle.dumps(experiment.recipe))
    arguments = [str(folder), str(replicas), str(dies_in_step)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if cluster:
        environment["TF_CONFIG"] = json.dumps(cluster)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_workers(experiment, folder, dies_in_step=-1):
    """Two workers, of which the second may die in a step."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    worker = [f"127.0.0.1:{port}" for port in ports]
    return [
        start(
            experiment,
            folder,
            dies_in_step=dies_in_step if index else -1,
            cluster={
                "cluster": {"worker": worker},
                "task": {"type": "worker", "index": index},
            },
        )
        for index in (0, 1)
    ]


def finish(*processes):
    """Waits until they end well."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(errors), errors


def assert_same_run(run, expected):
    one, other = (
        keras.models.load_model(x / "model.keras", compile=False)
        for x in (run, expected)
    )
    for variable, truth in zip(one.variables, other.variables, strict=True):
        truth = keras.ops.convert_to_numpy(truth)
        np.testing.assert_allclose(
            variable, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).max()
        )
    histories = []
    for folder in (run, expected):
        with open(folder / "history.csv", newline="") as file:
            histories.append(list(csv.DictReader(file)))
    for row, true_row in zip(*histories, strict=True):
        for key in true_row.keys() - {"seconds"}:
            assert float(row[key]) == pytest.approx(float(true_row[key]), rel=1e-5)
    metrics, true_metrics = runs.metrics(run), runs.metrics(expected)
    for task, of_task in true_metrics.items():
        assert metrics[task] == pytest.approx(of_task, abs=0.01)


@pytest.fixture(scope="module")
def alone(plain, finished, train):
    """The folder of the run on one device, in this process."""
    label_all(plain)
    (plain.runs / "datasets").symlink_to(finished.runs / "datasets")
    train(plain, METHOD)
    return plain.folder(METHOD, 0)


def test_two_processes_with_one_seed_train_equal_weights(
    plain, alone, tmp_path, processes
):
    again = start(plain, tmp_path)
    processes.append(again)
    finish(again)

    run = tmp_path / alone.relative_to(plain.runs)
    one, other = (
        keras.models.load_model(x / "model.keras", compile=False).get_weights()
        for x in (run, alone)
    )
    for weights, truth in zip(one, other, strict=True):
        np.testing.assert_array_equal(weights, truth)


def test_one_device_two_and_two_workers_train_the_same(
    plain, alone, tmp_path, processes
):
    """Two workers even though one of them is killed, and both begin again."""
    of_two = start(plain, tmp_path / "devices", replicas=2)
    killed = start_workers(plain, tmp_path / "workers", dies_in_step=5)
    processes += [of_two, *killed]
    moved = np.load(alone / "alpha.npz")["cross_stitch_relu7"]
    assert np.abs(moved[0, 1] - 0.1).max() > 1e-3

    assert killed[1].wait(timeout=300) == -signal.SIGKILL
    # It would see in half a minute that the other is gone.
    killed[0].kill()
    run = tmp_path / "workers" / alone.relative_to(plain.runs)
    assert not (run / "model.keras").exists()
    restarted = start_workers(plain, tmp_path / "workers")
    processes += restarted
    finish(of_two, *restarted)

    assert_same_run(tmp_path / "devices" / alone.relative_to(plain.runs), alone)
    assert_same_run(run, alone)


def test_one_device_and_two_train_the_same_on_regions(
    plain_regions, train, tmp_path, processes
):
    of_two = start(plain_regions, tmp_path, replicas=2)
    processes.append(of_two)
    label_all(plain_regions)
    train(plain_regions, METHOD)
    run = plain_regions.folder(METHOD, 0)
    finish(of_two)

    alpha = np.load(run / "alpha.npz")["cross_stitch_relu7"]
    assert np.abs(alpha[[0, 1], [1, 0]] - 0.1).max() > 1e-3
    assert_same_run(tmp_path / run.relative_to(plain_regions.runs), run)


def test_the_bytes_of_a_step_are_those_of_a_ring():
    """Counted: each replica sends a part of each sum, R - 1 times, and so again."""
    x = keras.Input((5,))
    x_to_y = keras.layers.Dense(7, name="moves", dtype="mixed_bfloat16")(x)
    y = keras.layers.Dense(2, trainable=False)(x_to_y)
    model = keras.Model(x, y)
    for replicas in (1, 2, 6):
        part = (5 * 7 + 7) * 4 / replicas
        sent = sum(part for _ in range(replicas - 1)) * 2
        assert distribution.traffic(model, replicas) == sent


@pytest.mark.parametrize(("pipelines", "replicas"), [(1, 1), (1, 4), (2, 2), (2, 4)])
def test_each_row_of_a_batch_is_one_replicas(pipelines, replicas):
    parts = []
    for pipeline in range(pipelines):
        context = tf.distribute.InputContext(pipelines, pipeline, replicas)
        strategy = FakeStrategy(context)
        batches = distribution.batches_of_replicas(
            strategy, 8, lambda rows: tf.data.Dataset.from_tensors(rows)
        )
        parts += list(batches.as_numpy_iterator())

    assert len(parts) == replicas
    assert sorted(np.concatenate(parts)) == list(range(8))
    for part in parts:
        # The first half are the examples with labels.
        assert np.sum(part < 4) == 4 / replicas


class FakeStrategy:
    """Of which one worker is looked at."""

    def __init__(self, context):
        self.context = context

    def distribute_datasets_from_function(self, function):
        return function(self.context)


def test_a_batch_that_the_replicas_cannot_share_is_refused():
    strategy = FakeStrategy(tf.distribute.InputContext(1, 0, 3))
    with pytest.raises(ValueError, match="8 is not divisible by"):
        distribution.batches_of_replicas(strategy, 8, None)


def test_the_rows_of_a_worker_are_those_of_the_whole_batch(finished):
    recipe_ = recipes.change(finished.recipe, "data", smallest_crop=0.5, colour=0.2)

    def batch(rows):
        (only,) = dense.train_batches(
            finished.train_examples, recipe_, finished.tasks, 0, range(3, 4), rows
        )
        return only

    whole, part = batch(None), batch(np.array([1, 5]))
    tf.nest.map_structure(
        lambda x, y: np.testing.assert_array_equal(x.numpy()[[1, 5]], y), whole, part
    )


def test_the_losses_metrics_are_made_and_still_empty():
    """Of a regularized model, too, and one whose losses have weights."""
    x = keras.Input((5,))
    heads = {
        task: keras.layers.Dense(3, kernel_regularizer="l2", name=task)(x)
        for task in ("a", "b")
    }
    model, loss = weigh_losses(
        keras.Model(x, heads), dict.fromkeys(heads, "mse"), by="uncertainty"
    )
    model.compile("sgd", loss=loss)
    before = model.get_weights()
    distribution.build_losses(model, dict.fromkeys(heads, np.ones((2, 3))))

    # The total's, and each task's: sum and count.
    assert [float(x) for x in model.metrics_variables] == [0.0] * 6
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("jobs", "task", "index", "chief"),
    [
        ({"worker": ["a:1", "b:1"]}, "worker", 0, True),
        ({"worker": ["a:1", "b:1"]}, "worker", 1, False),
        ({"chief": ["a:1"], "worker": ["b:1"]}, "chief", 0, True),
        ({"chief": ["a:1"], "worker": ["b:1"]}, "worker", 0, False),
    ],
)
def test_one_of_the_workers_is_the_chief(jobs, task, index, chief):
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(jobs), task_type=task, task_id=index
    )
    strategy = types.SimpleNamespace(cluster_resolver=resolver)

    assert distribution.workers(strategy) == 2
    assert distribution.is_chief(strategy) == chief


def test_alone_a_process_is_the_chief():
    strategy = tf.distribute.get_strategy()

    assert distribution.workers(strategy) == 1
    assert distribution.is_chief(strategy)
    assert distribution.from_chief(strategy, 3) == 3


def test_a_lost_worker_ends_in_an_error_that_says_so():
    lost = tf.errors.UnavailableError(None, None, "Socket closed\nmore")
    with (
        pytest.raises(ConnectionError, match=r"Start all of them.*Socket closed$"),
        distribution.lost_workers_named(),
    ):
        raise lost
