"""What goes wrong outside ends in an error that says what, and nothing is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cross_stitch import LearningRateGroups
from training import files
from training.callbacks import Backup, StopAtNaN
from training.datasets import prepared
from training.locks import lock
from training.runs import open_experiment

pytestmark = pytest.mark.xdist_group("tiny")

ROOT = Path(__file__).parents[2]


def fit_linear(path, rates, examples=8):
    """A linear model, an epoch at each rate, with four examples a step."""
    x = keras.Input((2,))
    model = keras.Model(x, keras.layers.Dense(1, name="line")(x))
    sgd = keras.optimizers.SGD(rates[0])
    model.compile(LearningRateGroups(sgd, {"kernel": 10}), loss="mse")
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch]),
        StopAtNaN(),
        Backup(path / "latest.npz", examples // 4, seed=0),
    ]
    data = np.ones((examples, 2)), np.zeros((examples, 1))
    model.fit(*data, batch_size=4, epochs=len(rates), callbacks=callbacks, verbose=0)


@pytest.mark.slow
def test_text_is_utf_8_in_a_locale_that_knows_ascii_alone(single_task, tmp_path):
    """The report and its title hold arrows and degree signs."""
    run = tmp_path / "tiny/single_task/seed0"
    shutil.copytree(single_task, run)
    for path in (run / "recipe.json", run / "history.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # an editor's mark
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    command = [sys.executable, "-m", "training", "report", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)

    assert (result.returncode, result.stderr) == (0, b"")  # nor TensorFlow's notices
    assert "↓" in (tmp_path / "report.html").read_text("utf-8")


def test_two_writers_of_one_file_leave_one_of_them_whole(tmp_path):
    def write(text):
        for _ in range(100):
            files.write_text(tmp_path / "page.html", text)

    texts = ["a" * 10**5, "b" * 10**5]
    with ThreadPoolExecutor() as executor:
        list(executor.map(write, texts))
    assert (tmp_path / "page.html").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_json_that_is_none_is_named_with_what_to_do(tmp_path):
    (tmp_path / "metrics.json").write_bytes(b"")

    with pytest.raises(
        ValueError, match=rf"JSON in {tmp_path}/metrics\.json\. .*\. Remove {tmp_path}"
    ):
        files.read_json(tmp_path / "metrics.json")


def test_a_full_disk_is_said_with_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=rf"No space left.*{tmp_path}/alpha\.npz"),
        files.unfinished(tmp_path / "alpha.npz"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as np.savez has it
    assert not list(tmp_path.iterdir())


def test_divergence_names_the_first_variable_and_its_group(tmp_path):
    with pytest.raises(FloatingPointError) as stopped:
        fit_linear(tmp_path, [1e-3, 1e25], examples=20)
    text = str(stopped.value)

    assert "at step 1 of the epoch" in text or "at step 2 of the epoch" in text
    assert "line/kernel (of the group 'kernel', learning rate x10)" in text
    with np.load(tmp_path / "latest.npz") as kept:
        assert all(np.isfinite(x).all() for x in kept.values())


def test_an_update_that_no_loss_has_seen_is_not_kept(tmp_path):
    with pytest.raises(FloatingPointError, match=r"last step of epoch 0 .*line/kernel"):
        fit_linear(tmp_path, [3e38], examples=4)
    assert not (tmp_path / "latest.npz").exists()


def test_one_process_alone_holds_a_lock_and_a_killed_one_does_not(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from training.locks import lock\n"
        "with lock(Path(sys.argv[1]), wait=False): print('held', flush=True); "
        "time.sleep(600)"
    )
    path = tmp_path / "run" / ".lock"
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            message = rf"run is being written by process {process.pid} on \S+\. Wait"
            with pytest.raises(ValueError, match=message), lock(path, wait=False):
                pass
        finally:
            process.kill()
    for wait in (False, True):
        with lock(path, wait=wait):
            pass


def test_a_run_that_another_process_trains_is_refused(experiment, train):
    run = experiment.folder("single_task", 0)
    with lock(run / ".lock", wait=False), pytest.raises(ValueError, match="by process"):
        train(experiment, "single_task")
    assert not (run / "recipe.json").exists()


@pytest.fixture
def copied(finished, tmp_path):
    """The prepared data, to be spoilt."""
    shutil.copytree(finished.runs / "datasets", tmp_path / "datasets")
    (info,) = (tmp_path / "datasets").glob("scenes/*/*/dataset_info.json")
    return info.parent


def test_prepared_data_that_lost_their_end_are_refused(copied, finished, tmp_path):
    file = sorted(copied.glob("*.tfrecord*"))[-1]
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    message = rf"{file.name} has {size - 100} bytes, not the {size} that were prepared"
    with pytest.raises(ValueError, match=message):
        open_experiment(finished.recipe, None, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} has no bytes"):
        open_experiment(finished.recipe, None, tmp_path)


def test_equal_examples_are_identified_alike(tmp_path):
    """Whatever the order of their features, which is by chance in each process."""

    def digest(*parts):
        of_part = [
            tf.train.Example(features=tf.train.Features(feature={name: feature}))
            for name, feature in parts
        ]
        # Protobuf's messages behind each other are read as one.
        record = b"".join(x.SerializeToString() for x in of_part)
        with tf.io.TFRecordWriter(str(tmp_path / "x.tfrecord-00000-of-00001")) as file:
            file.write(record)
        return prepared._digests(tmp_path)

    def feature(*values):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    before = digest(("a", feature(1)), ("b", feature(2, 3)))
    assert digest(("b", feature(2, 3)), ("a", feature(1))) == before
    assert digest(("b", feature(2, 4)), ("a", feature(1))) != before
    assert digest(("a", feature(2, 3)), ("b", feature(1))) != before


def test_prepared_data_of_another_version_are_refused(copied, finished, tmp_path):
    path = copied / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "version": "0.9.0"}))
    with pytest.raises(ValueError, match=r"Proto version: 0\.9\.0\. Remove"):
        open_experiment(finished.recipe, None, tmp_path)
