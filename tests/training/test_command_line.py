import os
import subprocess
import sys
from pathlib import Path

import keras
import matplotlib.image
import pytest
import tensorflow as tf
from typer.testing import CliRunner

from training.__main__ import app

ROOT = Path(__file__).parents[2]


def training(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "training", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )


# Tests of one group run in one process, and so share the demo.
shares_the_demo = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`python -m training --toy`, from nothing."""
    runs = tmp_path_factory.mktemp("demo")
    return training("--toy", "--runs", runs), runs / "scenes-toy"


@shares_the_demo
def test_the_demo_trains_every_method_and_shows_a_table(demo):
    result, folder = demo

    assert result.returncode == 0, result.stderr
    for method in ("one_task", "one_task_longer", "cross_stitch"):
        assert (folder / method / "seed0" / "metrics.json").exists()
    assert "segmentation mean iu" in result.stdout
    assert "one task longer" in result.stdout
    # What the README's pictures and tables are made of.
    tidy = (folder / "comparison/seed0/metrics.csv").read_text().splitlines()
    assert tidy[0] == "method,seed,task,metric,value"
    assert len(tidy) == 1 + 3 * 8
    table = (folder / "comparison/seed0/metrics.md").read_text().splitlines()
    assert table[0] == "|  | one task | one task longer | cross stitch |"
    assert len(table) == 2 + 8


@shares_the_demo
def test_the_demo_draws_predictions_and_alphas(demo):
    _, folder = demo

    for name in ("predictions.png", "alpha.png"):
        picture = matplotlib.image.imread(folder / "comparison/seed0" / name)
        assert picture.shape[0] > 300
        assert picture.std() > 0.1


@shares_the_demo
def test_the_demo_exports_one_signature_per_task(demo):
    _, folder = demo
    served = tf.saved_model.load(folder / "comparison/seed0/serving/1")
    model = keras.models.load_model(folder / "cross_stitch/seed0/model.keras")
    image = tf.random.uniform((2, 192, 256, 3), 0, 255)
    expected = model.predict(image, verbose=0)

    assert set(served.signatures) == {"serving_default", "segmentation", "normals"}
    for task in ("segmentation", "normals"):
        answer = served.signatures[task](image=image)[task]
        tf.debugging.assert_near(answer, expected[task], atol=1e-5)


@shares_the_demo
def test_what_is_finished_is_not_run_again(demo):
    _, folder = demo
    models = list(folder.glob("*/seed0/model.keras"))
    before = [path.stat().st_mtime_ns for path in models]
    result = training("--toy", "--runs", folder.parent)

    assert result.returncode == 0, result.stderr
    assert "epoch 1/" not in result.stdout
    assert [path.stat().st_mtime_ns for path in models] == before


def test_two_replicas_train_and_save_what_one_device_loads(tmp_path):
    options = ("--toy", "--runs", tmp_path, "--replicas", 2)
    result = training("fit", "scenes", "--method", "cross_stitch", *options)

    assert result.returncode == 0, result.stderr
    run = tmp_path / "scenes-toy/cross_stitch/seed0"
    assert keras.models.load_model(run / "model.keras").count_params() > 0
    assert (run / "metrics.json").exists()


def test_nyuv2_runs_whole_on_the_real_data(tmp_path, nyuv2_folder):
    options = ("--data", nyuv2_folder, "--toy", "--runs", tmp_path)
    result = training("fit", "nyuv2", *options)

    assert result.returncode == 0, result.stderr
    assert (tmp_path / "nyuv2-toy/comparison/seed0/serving/1").exists()


def test_bench_measures_stitching_and_pipeline(tmp_path):
    result = training("bench", "--toy", "--runs", tmp_path, "--steps", 3)

    assert result.returncode == 0, result.stderr
    for line in ("stitched", "unstitched", "pipeline alone"):
        assert line in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fit", "kitti"],
            "There is no recipe 'kitti'. There are: ['nyuv2', 'scenes']",
        ),
        (["fit", "scenes", "--toy", "--method", "stich"], "no method 'stich'"),
        (["fit", "nyuv2"], "give it with --data DIR"),
        (["fit", "nyuv2", "--data", "/nowhere"], "Missing: /nowhere"),
        (
            ["prepare", "nyuv2", "new", "--mat=a", "--splits=b", "--mapping=c"],
            "a",
        ),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_help_says_what_there_is():
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100"})

    assert result.exit_code == 0
    for command in ("fit", "bench", "prepare", "scenes", "SavedModel"):
        assert command in result.stdout
