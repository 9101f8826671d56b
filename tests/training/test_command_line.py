import io
import json
import math
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, get_origin, get_type_hints

import keras
import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from training import (
    benchmark,
    distribution,
    fitting,
    methods,
    preemption,
    recipes,
    runs,
)
from training.__main__ import app, path, prepare_app
from training.callbacks import ShowProgress
from training.files import Row, write_csv
from training.gradients import PCGrad
from training.locks import lock
from training.preemption import Preempted, preemptible
from training.provenance import Made
from training.study import raw_values, studies


def training(*arguments):
    environment = {"COLUMNS": "120"}
    return CliRunner().invoke(app, [str(x) for x in arguments], env=environment)


# Tests of one group run in one process, and so share the demo.
shares_the_demo = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`python -m training --toy`, from nothing."""
    runs = tmp_path_factory.mktemp("demo")
    return training("--toy", "--runs", runs), runs / "scenes-toy-labels10"


@shares_the_demo
def test_the_demo_trains_every_method_and_shows_a_table(demo):
    result, folder = demo

    assert result.exit_code == 0, result.output
    for method in ("single_task_as_long", "hard_sharing", "cross_stitch_from_start"):
        assert (folder / method / "seed0" / "metrics.json").exists()
    # As the terminal's width breaks the lines.
    for words in ("mIoU, % ↑", "cross-stitch", "Δm, % ↑", "trained, minutes"):
        assert words in result.stdout
    assert "data:image/png" in (folder.parent / "report.html").read_text()
    assert "SavedModel of cross_stitch_from_start: " in result.stdout


@shares_the_demo
def test_traffic_is_that_of_the_recipes_method(demo):
    _, folder = demo
    arguments = ("traffic", "scenes", "--toy", "--runs", folder.parent)
    result = training(*arguments, "--devices", 2, "--devices", 4)
    alone = training(*arguments, "--devices", 2, "--method", "single_task")
    model = keras.models.load_model(
        folder / "cross_stitch_from_start/seed0/model.keras", compile=False
    )
    gradients = 4 * sum(math.prod(x.shape) for x in model.trainable_variables)

    assert result.exit_code == 0, result.output
    assert f"{gradients / 1e6:.2f}" in result.stdout
    assert f"{1.5 * gradients / 1e6:.2f}" in result.stdout
    assert f"{gradients / 1e6:.2f}" not in alone.stdout


@shares_the_demo
def test_the_demo_exports_one_signature_per_task(demo):
    _, folder = demo
    served = tf.saved_model.load(folder / "comparison/seed0/serving/1")
    run = folder / "cross_stitch_from_start/seed0"
    model = keras.models.load_model(run / "model.keras")
    image = tf.random.uniform((2, 96, 128, 3), 0, 255)
    expected = model.predict(image, verbose=0)

    both = {"segmentation", "normals"}
    pictures = {"from_jpeg", *(f"{task}_from_jpeg" for task in both)}
    assert set(served.signatures) == {"serving_default"} | both | pictures
    meanings = folder / "comparison/seed0/serving/1/assets.extra/answers.json"
    made_of = json.loads(meanings.with_name("made_of.json").read_text())
    assert made_of["method"] == "cross_stitch_from_start"
    assert meanings.read_text() == (run / "answers.json").read_text()
    for task in ("segmentation", "normals"):
        answer = served.signatures[task](image=image)[task]
        tf.debugging.assert_near(answer, expected[task], atol=1e-4)


@shares_the_demo
def test_a_study_uses_the_runs_that_there_are(demo, tmp_path, monkeypatch):
    _, folder = demo
    study = ("study", "scenes-labels10", "tower-init", "--toy")
    options = ("--runs", folder.parent, "--results", tmp_path)
    listed = training(*study, *options, "--dry-run")
    trained = []
    monkeypatch.setattr(
        fitting, "fit", lambda experiment, method, seed, **_: trained.append(method)
    )
    result = training(*study, *options)

    assert listed.exit_code == 0, listed.output
    assert "Missing: 4 runs, time: about 0 minutes" in listed.stdout
    assert "single_task_as_long" not in listed.stdout
    assert result.exit_code == 0, result.output
    # What others start from comes first.
    assert trained[:2] == ["single_task", "single_task_longer"]
    table = (tmp_path / "scenes-toy-labels10/tower-init.csv").read_text()
    assert table.count("\nsingle_task_as_long,0,") == 8
    result = training("study", "scenes-labels10", "alpha", "--toy", *options)
    assert "Not written:" in result.stdout
    assert not (tmp_path / "scenes-toy-labels10/alpha.csv").exists()


@shares_the_demo
def test_a_study_that_is_stopped_has_written_the_rows_of_what_was_finished(
    demo, tmp_path, monkeypatch
):
    _, folder = demo
    (tmp_path / "datasets").symlink_to(folder.parent / "datasets")
    trained = []

    def fit(experiment, method, seed, **_):
        if trained:
            raise KeyboardInterrupt
        trained.append(method)
        run = experiment.folder(method, seed)
        shutil.copytree(folder / run.relative_to(tmp_path / folder.name), run)

    monkeypatch.setattr(fitting, "fit", fit)
    study = ("study", "scenes-labels10", "demo", "--toy", "--runs", tmp_path)
    training(*study, "--results", tmp_path)

    assert len(trained) == 1
    table = (tmp_path / "scenes-toy-labels10/demo.csv").read_text()
    assert f"\n{trained[0]},0," in table


@shares_the_demo
def test_a_shard_waits_for_a_run_that_another_one_trains(demo, tmp_path, monkeypatch):
    _, folder = demo
    (tmp_path / "datasets").symlink_to(folder.parent / "datasets")
    first, *others = studies.DEMO
    for method in others:
        shutil.copytree(folder / method, tmp_path / folder.name / method)
    run = tmp_path / folder.name / first / "seed0"
    taken, asked = threading.Event(), threading.Event()

    def train():
        with lock(run / ".lock", wait=False):
            taken.set()
            asked.wait(60)
            time.sleep(1)
            shutil.copytree(folder / first / "seed0", run, dirs_exist_ok=True)

    def ask(path, *, wait):
        asked.set()
        return lock(path, wait=wait)

    monkeypatch.setattr(fitting, "lock", ask)
    with ThreadPoolExecutor() as executor:
        other = executor.submit(train)
        taken.wait(60)
        study = ("study", "scenes-labels10", "demo", "--toy", "--runs", tmp_path)
        result = training(*study, "--shard", "1/2")
        asked.set()
        other.result()

    assert result.exit_code == 0, result.output
    table = (tmp_path / "results/scenes-toy-labels10/demo.csv").read_text()
    assert f"\n{first},0," in table


@shares_the_demo
def test_one_study_at_a_time_writes_to_a_folder_of_results(demo, tmp_path, monkeypatch):
    """Those of other runs, too: each would keep the rows that it had read."""
    _, folder = demo
    found = []

    def write(planned, results):
        (path,) = results.glob(".*lock")
        with (
            pytest.raises(ValueError, match="is being written"),
            lock(path, wait=False),
        ):
            pass
        found.append(results)
        return []

    monkeypatch.setattr(raw_values, "write", write)
    study = ("study", "scenes-labels10", "demo", "--toy", "--runs", folder.parent)
    result = training(*study, "--results", tmp_path)

    assert result.exit_code == 0, result.output
    assert found == [tmp_path]


@shares_the_demo
def test_rows_of_another_recipe_are_found_before_training(demo, tmp_path, monkeypatch):
    _, folder = demo
    row = (*Row("single_task", 7, "segmentation", "miou", 1.0), *Made("another"))
    path = tmp_path / folder.name / "tower-init.csv"
    write_csv(path, (*Row._fields, *Made._fields), [row])
    trained = []
    monkeypatch.setattr(fitting, "fit", lambda *run, **_: trained.append(run))
    study = ("study", "scenes-labels10", "tower-init", "--toy")
    result = training(*study, "--runs", folder.parent, "--results", tmp_path)

    assert result.exit_code == 2
    assert "Of another, or unknown, are: single_task, seed 7. Make" in result.stderr
    assert trained == []


@shares_the_demo
def test_a_try_that_diverges_does_not_end_a_search(demo, tmp_path, monkeypatch):
    _, folder = demo
    tried = []

    def fit(experiment, method, seed, **_):
        tried.append(method)
        raise FloatingPointError("The loss became nan")

    def opened(recipe, data, folder):
        splits.append((recipe.data.train_split, recipe.data.test_split))
        return open_experiment(recipe, data, folder)

    open_experiment, splits = runs.open_experiment, []
    monkeypatch.setattr(runs, "open_experiment", opened)
    monkeypatch.setattr(fitting, "fit", fit)
    options = ("--toy", "--runs", folder.parent, "--results", tmp_path)
    result = training("study", "scenes-labels10", "search", *options)
    assert result.exit_code == 0, result.output
    # What is held out is a part of train, and nothing else is prepared.
    assert splits == [("train[:80%]", "train[80%:]")]
    assert len(tried) > 10
    assert "single_task_as_long, seed 0: The loss became nan" in result.output
    tried.clear()
    assert training("study", "scenes-labels10", "methods", *options).exit_code
    assert len(tried) == 1


@shares_the_demo
def test_what_is_claimed_otherwise_ends_in_one_line(demo, tmp_path):
    _, folder = demo
    run = shutil.copytree(
        folder / "hard_sharing/seed0", tmp_path / folder.name / "hard_sharing/seed0"
    )
    (tmp_path / "datasets").symlink_to(folder.parent / "datasets")
    depends = json.loads((run / "recipe.json").read_text())
    depends["schedule"]["epochs"] = 99
    (run / "recipe.json").write_text(json.dumps(depends))
    result = training(
        "fit", "scenes-labels10", "--method=hard_sharing", "--toy", "--runs", tmp_path
    )

    assert result.exit_code == 2
    assert "another recipe: schedule.epochs changed" in result.stderr
    assert result.stderr.count("\n") == 1


@shares_the_demo
def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(demo, monkeypatch):
    def fit(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "fit", fit)
    methods = ("--method", "hard_sharing", "--method", "split@conv4")
    command = ("fit", "scenes-labels10", "--toy", "--runs", demo[1].parent, *methods)
    result = training(*command)

    assert result.exit_code == 130
    assert "Stopped. Run the same command again, and it goes on" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "hard_sharing, seed 0: finished already" in result.stdout
    assert "split@conv4, seed 0: finished" not in result.stdout


def test_a_run_that_goes_on_says_after_which_step():
    out = io.StringIO()
    with Progress(console=Console(file=out)) as progress:
        ShowProgress(progress, "new, seed 0", epochs=2, steps=10, done=0)
        ShowProgress(progress, "old, seed 0", epochs=2, steps=10, done=7)

    assert "old, seed 0: goes on after step 7\n" in out.getvalue()
    assert "new, seed 0: goes on" not in out.getvalue()


@shares_the_demo
def test_sigterm_ends_in_one_line_and_a_code_of_its_own(demo, monkeypatch):
    def fit(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fitting, "fit", fit)
    before = signal.getsignal(signal.SIGTERM)
    result = training("fit", "scenes", "--toy", "--runs", demo[1].parent)

    assert result.exit_code == 75
    assert "Run the same command again" in result.stderr
    assert result.stderr.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) == before


class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_the_garbage_collector_drops_is_asked_for_again(monkeypatch):
    # Not while pytest still reports what was dropped.
    monkeypatch.setattr(preemption, "AGAIN", 0.5)
    reached = []

    def work():
        Dropped()
        reached.append("went on")
        for _ in range(1000):  # one long sleep would end first
            time.sleep(0.01)
        reached.append("was never stopped")

    with preemptible(), pytest.raises(Preempted):
        work()
    assert reached == ["went on"]


def test_a_stop_that_other_code_makes_an_error_of_is_a_stop():
    def in_c():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except Preempted:
            raise ValueError("Invalid affine transformation matrix") from None

    with pytest.raises(Preempted, match="as asked"), preemptible():
        in_c()
    with pytest.raises(ValueError, match="its own"), preemptible():
        raise ValueError("its own")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@shares_the_demo
def test_sigterm_at_any_moment_loses_nothing(demo, tmp_path):
    """While models are built, trained, saved, evaluated: six times by chance."""
    _, folder = demo
    (tmp_path / "datasets").symlink_to(folder.parent / "datasets")
    method = ("--method", "cross_stitch_from_start")
    command = ("fit", "scenes-labels10", "--toy", "--runs", tmp_path, *method)
    rng = np.random.default_rng()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # between two commands
    codes = []
    try:
        # Each goes on where the last one was stopped, if it came to a step at all.
        for wait in [
            *rng.permutation(2 * np.arange(6) + rng.uniform(0.01, 2, 6)),
            None,
        ]:
            if wait is None:
                result = training(*command)
            else:
                timer = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGTERM))
                timer.start()
                result = training(*command)
                timer.cancel()
            print(f"stopped after {wait} s: {result.exit_code} {result.stderr}")
            codes.append(result.exit_code)
            assert result.exit_code in (0, 75), result.output
    finally:
        signal.signal(signal.SIGTERM, before)

    assert 75 in codes
    assert codes[-1] == 0
    assert not list(tmp_path.rglob("*unfinished*"))
    weights = [
        keras.models.load_model(
            runs / "cross_stitch_from_start/seed0/model.keras", compile=False
        ).get_weights()
        for runs in (folder, tmp_path / folder.name)
    ]
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


@shares_the_demo
@pytest.mark.parametrize(
    ("command", "error"),
    [
        (["fit", "scenes"], FloatingPointError("The loss became nan")),
        (["study", "scenes", "per-class"], ValueError("refused:\n- the export")),
    ],
)
def test_errors_of_long_work_end_in_one_line_too(demo, monkeypatch, command, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(fitting, "fit", fail)
    result = training(*command, "--toy", "--runs", demo[1].parent)

    assert result.exit_code == 2
    assert result.stderr == f"Error: {' '.join(str(error).split())}\n"


def test_nyuv2_runs_whole_on_the_real_data(tmp_path, nyuv2_folder, backbone):
    options = ("--data", nyuv2_folder, "--toy", "--runs", tmp_path)
    result = training(
        "fit",
        "nyuv2_pretrained",
        "--backbone",
        backbone,
        "--method=hard_sharing",
        *options,
    )

    assert result.exit_code == 0, result.output
    assert (tmp_path / "nyuv2_pretrained-toy/gallery/normals_seed0.png").exists()
    assert "No SavedModel, since no method has units" in result.stdout


@pytest.mark.parametrize(
    "command", [["fit", "scenes"], ["study", "scenes", "methods"]], ids=" ".join
)
def test_the_dtype_is_float32_unless_another_is_asked_for(command, tmp_path, finished):
    (tmp_path / "datasets").symlink_to(finished.runs / "datasets")
    asked = []

    def stop(experiment, methods):
        asked.append(experiment.recipe.training.dtype)
        raise ValueError("far enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "check", stop)
        for options in ([], ["--dtype", "mixed_bfloat16"]):
            result = training(*command, "--toy", "--runs", tmp_path, *options)
            assert result.stderr == "Error: far enough\n"
            assert f"dtype='{asked[-1]}'" in "".join(result.stdout.split())

    assert asked == ["float32", "mixed_bfloat16"]


def test_bench_measures_both_dtypes_stitching_and_pipeline(finished):
    rows = benchmark.measure(finished, 3)
    names = " ".join(row[0] for row in rows)

    for line in ("float32, unstitched", "mixed_bfloat16, stitched", "pipeline alone"):
        assert line in names


def test_methods_are_timed_as_multiples_of_the_single_task_networks(finished):
    rows = benchmark.of_methods(finished, ["hard_sharing", "ensemble"], 3)

    assert [row[:2] for row in rows] == [
        ("single_task", "step"),
        ("single_task", "answer"),
        ("hard_sharing", "step"),
        ("hard_sharing", "answer"),
    ]
    assert [row[3] for row in rows[:2]] == ["1.000", "1.000"]
    for _, measure, ms, ratio in rows:
        base = next(float(row[2]) for row in rows if row[1] == measure)
        assert float(ratio) == pytest.approx(float(ms) / base, rel=0.1, abs=0.01)
    # With the method's own options.
    spelled = "hard_sharing@gradients=pcgrad"
    assert isinstance(benchmark._model(finished, spelled, "float32"), PCGrad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "kitti"], "There is no recipe 'kitti'. There are: ["),
        (["fit", "scenes", "--toy", "--method", "stich"], "no method 'stich'"),
        (["study", "scenes", "table5", "--toy"], "no study 'table5'"),
        (["fit", "scenes", "--backbone", "x.keras"], "has no backbone"),
        (["fit", "scenes", "--weights", "x.npy"], "takes no weights"),
        (["fit", "voc2008_alexnet", "--weights", "x.npz"], "x.npz. There is no such"),
        (["fit", "voc2008_alexnet"], "give it with --data DIR"),
        (["fit", "voc2008_alexnet", "--data", "/nowhere"], "Missing: /nowhere"),
        (["prepare", "voc2008", "new", "--devkit=a", "--apascal=b"], "Missing: a/JPEG"),
        (["fit", "nyuv2", "--data=.", "--method", "stich"], "no method 'stich'"),
        (["fit", "nyuv2_pretrained", "--backbone", "x.keras"], "no backbone x.keras"),
        (["study", "nyuv2", "splits", "--shard", "2"], "--shard must be k/n"),
        (["fit", "scenes", "--toy", "--runs", "/sys/runs"], "'/sys/runs'"),
        (["fit", "nyuv2"], "give it with --data DIR"),
        (["fit", "nyuv2", "--data", "/nowhere"], "Missing: /nowhere"),
        (["report", "nowhere"], "There is no finished run in nowhere"),
        (["report", "[no]where/[/x]"], "There is no finished run in [no]where/[/x]"),
        (["bench", "nyuv2", "--data=.", "--method", "stich"], "no method 'stich'"),
        (["tables", "nowhere.md"], "nowhere.md"),
        (["prepare", "nyuv2", "new", "--mat=a", "--splits=b", "--mapping=c"], "a"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = training(*arguments)

    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/*/*/seed0"))


def test_several_workers_are_told_that_they_validate_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(distribution, "workers", lambda strategy: 2)
    result = training("fit", "scenes", "--toy", "--validate", "--runs", tmp_path)

    assert result.exit_code == 2
    assert "leave --validate" in result.stderr
    assert not list(tmp_path.glob("*/*/seed0"))  # nothing is begun


def test_weights_are_read_before_data_are_prepared(tmp_path):
    np.save(tmp_path / "alexnet.npy", {"conv1": "a pickle"})
    data = ("--data", tmp_path / "nowhere", "--weights", tmp_path / "alexnet.npy")
    result = training("fit", "voc2008_alexnet", *data)

    assert result.exit_code == 2
    assert "Expected AlexNet's weights, an .npz of arrays, in " in result.stderr


def test_every_path_begins_at_home_where_it_says_so(monkeypatch, tmp_path):
    commands = [x.callback for x in (*app.registered_commands, app.registered_callback)]
    commands += [x.callback for x in prepare_app.registered_commands]
    paths = [
        (command.__name__, name, hint.__metadata__[0].parser)
        for command in commands
        for name, hint in get_type_hints(command, include_extras=True).items()
        if get_origin(hint) is Annotated and "Path" in str(hint.__origin__)
    ]
    assert len(paths) > 20
    assert {parser for _, _, parser in paths} == {path}, paths

    monkeypatch.setenv("HOME", str(tmp_path))
    result = training("report", "~/runs")
    assert f"no finished run in {tmp_path}/runs" in result.stderr
    result = training("report", "~no_such_user/runs")
    assert "no finished run in ~no_such_user/runs" in result.stderr


def test_what_is_missing_is_listed_without_the_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = training("study", "nyuv2_pretrained", "methods", "--dry-run")

    assert result.exit_code == 0, result.output
    assert "Missing: 9 runs, time: unknown" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_study_takes_methods_of_ones_own(tmp_path):
    study = ("study", "scenes", "demo", "--dry-run", "--runs", tmp_path)
    more = ("--method", "cross_stitch_from_start@same_task=0.5", "--seeds", 2)
    result = training(*study, *more)

    assert result.exit_code == 0, result.output
    assert "Missing: 8 runs" in result.stdout
    result = training(*study, "--method", "cross_stich")
    assert result.exit_code == 2
    assert "There is no method 'cross_stich'" in result.stderr


def test_help_says_what_there_is():
    result = training("--help")

    assert result.exit_code == 0
    for command in (
        "fit",
        "study",
        "tables",
        "report",
        "bench",
        "prepare",
        "scenes",
        "SavedModel",
    ):
        assert command in result.stdout
    fit = "".join(training("fit", "--help").stdout.replace("│", "").split())
    assert ",".join(recipes.names()) in fit
    for method in methods.METHODS:
        assert method in fit
