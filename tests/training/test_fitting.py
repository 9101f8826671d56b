import contextlib
import csv
import dataclasses
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import keras
import numpy as np
import pytest
from tensorflow.python.framework import config

from training import (
    batches,
    callbacks,
    files,
    fitting,
    methods,
    provenance,
    recipes,
    runs,
    towers,
)
from training.locks import lock
from training.preemption import Preempted
from training.runs import open_experiment
from training.study import recorded

pytestmark = pytest.mark.xdist_group("tiny")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def snapshot(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def load(folder):
    return keras.models.load_model(folder / "model.keras", compile=False)


def with_(experiment, part, **values):
    """The experiment, its recipe changed in one part."""
    recipe = recipes.change(experiment.recipe, part, **values)
    return dataclasses.replace(experiment, recipe=recipe)


def test_a_run_leaves_what_its_folder_promises(cross_stitch):
    assert set(snapshot(cross_stitch)) == {
        ".lock",
        "recipe.json",
        "history.csv",
        "model.keras",
        "alpha.npz",
        "answers.json",
        "made_by.json",
        "costs.json",
        "per_class.csv",
        "metrics.json",
    }
    metrics = json.loads((cross_stitch / "metrics.json").read_text())
    assert list(metrics["segmentation"]) == ["pixel_accuracy", "miou", "fwiou"]
    assert list(metrics["normals"]) == [
        "mean_angle",
        "median_angle",
        "within_11_25",
        "within_22_5",
        "within_30",
    ]
    history = rows(cross_stitch / "history.csv")
    assert [int(row["epoch"]) for row in history] == [0]
    assert float(history[0]["seconds"]) > 0
    assert "alpha/cross_stitch_relu4/normals_from_segmentation" in history[0]
    units = {"cross_stitch_relu4", "cross_stitch_relu7"}
    assert set(np.load(cross_stitch / "alpha.npz")) == units
    made_with = json.loads((cross_stitch / "recipe.json").read_text())["made_with"]
    assert made_with == {"replicas": 1, "versions": provenance.versions()}
    answers = json.loads((cross_stitch / "answers.json").read_text())
    assert answers["segmentation"]["names"][0] == "floor"
    assert len(answers["segmentation"]["colours"]) == 19
    assert answers["normals"]["kind"] == "normals"


def test_what_is_edited_while_a_run_trains_did_not_make_it(
    experiment, single_task, train, monkeypatch
):
    commit = ["begun"]
    read = functools.cache(lambda: {"commit": commit[-1]})
    monkeypatch.setattr(provenance, "of_this_process", read)

    def edit(*args):
        commit.append("edited")
        return load(single_task)

    monkeypatch.setattr(fitting, "_train", edit)
    train(experiment, "single_task")

    made_by = experiment.folder("single_task", 0) / "made_by.json"
    assert json.loads(made_by.read_text()) == {"commit": "begun"}


def test_keras_may_be_installed_under_another_name(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)  # but keras-nightly, tensorflow-cpu

    before = provenance.versions()
    monkeypatch.setattr(metadata, "version", version)
    assert provenance.versions() == before
    assert f"keras={keras.__version__} " in before


def test_the_commit_is_read_once_in_a_process(monkeypatch):
    """A study trains for hours, one run after the other."""
    before = provenance.of_this_process()
    monkeypatch.setattr(provenance, "_commit", lambda: "edited")

    assert provenance.of_this_process() == before


def test_a_commit_that_is_edited_is_not_that_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text("1")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init"], ["add", "."], [*who, "commit", "-m", "begin"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    commit = provenance._commit()
    (tmp_path / "code.py").write_text("2")

    assert len(commit) == 12
    assert provenance._commit() == f"{commit}-dirty"


def test_what_is_pooled_is_counted_for_all_proposals(tmp_path, monkeypatch):
    recipe = recipes.find("voc2008")
    monkeypatch.setattr(fitting.costs, "count", lambda model, free: {"free": free})
    image = keras.Input((2,))
    model = keras.Model(image, keras.layers.Dense(1)(image))
    fitting._save(model, types.SimpleNamespace(tasks={}, recipe=recipe), tmp_path)

    costs = json.loads((tmp_path / "costs.json").read_text())
    assert costs == {"free": recipe.data.proposals}


def test_the_scores_by_class_are_those_of_the_mean(single_task):
    by_class = rows(single_task / "per_class.csv")
    metrics = json.loads((single_task / "metrics.json").read_text())
    iou = [float(row["value"]) for row in by_class if row["metric"] == "iou"]

    assert list(by_class[0]) == ["task", "class", "metric", "value"]
    assert np.mean(iou) == pytest.approx(metrics["segmentation"]["miou"], abs=2e-3)


def test_the_saved_model_answers_with_probabilities_and_unit_normals(single_task):
    answer = load(single_task).predict(np.full((2, 96, 128, 3), 100.0), verbose=0)

    assert {task: x.shape for task, x in answer.items()} == {
        "segmentation": (2, 48, 64, 19),
        "normals": (2, 48, 64, 3),
    }
    np.testing.assert_allclose(answer["segmentation"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(answer["normals"], axis=-1), 1, rtol=1e-5)


def test_what_follows_starts_from_the_single_task_networks(
    experiment, single_task, train
):
    shutil.copytree(single_task, experiment.folder("single_task", 0))
    still = with_(experiment, "finetuning", learning_rate=0.0)
    train(still, "cross_stitch")
    start, end = load(single_task), load(experiment.folder("cross_stitch", 0))

    for name in ("normals_conv7", "segmentation_conv4", "segmentation_score"):
        kernel = start.get_layer(name).get_weights()[0]
        assert kernel.std() > 0
        np.testing.assert_array_equal(end.get_layer(name).get_weights()[0], kernel)
    alpha = end.get_layer("cross_stitch_relu7").get_weights()[0]
    np.testing.assert_allclose(alpha[0, 1], 0.1, rtol=1e-5)


def test_training_lowers_the_loss_and_moves_alpha(single_task, cross_stitch):
    losses = [float(row["loss"]) for row in rows(single_task / "history.csv")]
    alpha = np.load(cross_stitch / "alpha.npz")["cross_stitch_relu7"]

    assert losses[-1] < losses[0]
    assert np.all(np.abs(alpha[0, 1] - 0.1) > 0)


def test_the_recipes_numbers_reach_the_optimizer_and_the_loss(alexnet, tasks):
    recipe = recipes.change(alexnet, "training", momentum=0.75)
    recipe = recipes.change(recipe, "tower", weight_decay=0.02)
    recipe = recipes.change(recipe, "units", alpha_multiplier=7)

    def compiled(method):
        plan = methods.plan(method, recipe)
        model = plan.join(towers.build(recipe, tasks, 0))
        return fitting.compiled(model, tasks, plan.recipe, 0.125)

    model = compiled("cross_stitch")
    kernels = [
        layer.kernel for layer in model.layers if isinstance(layer, keras.layers.Conv2D)
    ]

    assert float(model.optimizer.learning_rate) == 0.125
    assert model.optimizer.inner_optimizer.momentum == 0.75
    assert model.optimizer.alpha == 7
    # The gradient of this is the decay times the kernel.
    penalty = 0.02 / 2 * sum(np.sum(np.square(kernel)) for kernel in kernels)
    np.testing.assert_allclose(sum(model.losses), penalty, rtol=1e-5)
    assert isinstance(compiled("single_task_longer").optimizer, keras.optimizers.SGD)
    nddr = compiled("nddr")
    assert nddr.optimizer.multipliers == {"^nddr_": 7}
    of_tasks = compiled("single_task@learning_rate_multipliers=2+0.5").optimizer
    assert of_tasks.multipliers == {"^segmentation_": 2, "^normals_": 0.5}
    assert len(nddr.losses) == len(model.losses) + 4  # two tasks at two taps
    units = [nddr.get_layer(f"nddr_{name}") for name in ("pool1", "fc7")]
    more = sum(np.sum(np.square(x)) for unit in units for x in unit.kernels.values())
    total = penalty + 0.02 / 2 * more
    np.testing.assert_allclose(sum(nddr.losses), total, rtol=1e-5)
    other = compiled("nddr@same_task=0.5").get_layer("nddr_pool1")
    np.testing.assert_allclose(other.kernels["normals"][0, 0], 0.5, rtol=1e-5)
    per_layer = compiled("cross_stitch@per=layer,same_task=0.5")
    alpha = per_layer.get_layer("cross_stitch_pool1").alpha
    np.testing.assert_allclose(alpha, np.full((2, 2), 0.5), rtol=1e-5)
    control = compiled("own_maps_from_start@alpha_multiplier=3")
    assert control.optimizer.alpha == 3
    unit = control.get_layer("cross_stitch_pool1")
    np.testing.assert_array_equal(unit.alpha[0, 1], np.zeros(unit.alpha.shape[2]))
    np.testing.assert_array_equal(unit.alpha[1, 1], np.ones(unit.alpha.shape[2]))
    taken = unit.alpha_constraint(np.full(unit.alpha.shape, 2.0, "float32"))
    assert np.sum(taken) == 2 * 2 * unit.alpha.shape[2]  # each task's own alone


def test_of_two_tasks_of_which_one_begins_as_the_other_each_has_its_own_rate():
    """And of more: `a`, `a_b`, `a_b_c`, and a name that is no pattern."""
    tasks = ["a", "a_b", "a_b_c", "a.b"]
    patterns = [fitting._own_layers(task, tasks) for task in tasks]
    layers = ["a_conv1/kernel", "a_b_conv1/bias", "a_b_c_fc6/kernel", "a.b_x/kernel"]

    found = [[bool(re.search(x, layer)) for x in patterns] for layer in layers]
    np.testing.assert_array_equal(found, np.eye(4))


def test_the_schedule_and_the_seed_are_those_of_the_run(experiment, train, monkeypatch):
    seeds, rates = {}, []
    build, make = towers.build, batches.dense.train_batches

    def compiled(model, tasks, recipe, schedule):
        rates.extend(float(schedule(step)) for step in (0, 3, 6))
        return build_model(model, tasks, recipe, schedule)

    def begin(self, epoch, logs=None):
        seeds["backup"] = self.seed
        assert config.is_op_determinism_enabled()
        raise Stopped

    def train_batches(examples, recipe, tasks, seed, *rest):
        seeds["batches"] = seed
        return make(examples, recipe, tasks, seed, *rest)

    def towers_of(recipe, tasks, seed):
        seeds["towers"] = seed
        return build(recipe, tasks, seed)

    build_model = fitting.compiled
    monkeypatch.setattr(fitting, "compiled", compiled)
    monkeypatch.setattr(callbacks.Backup, "on_epoch_begin", begin)
    monkeypatch.setattr(batches.dense, "train_batches", train_batches)
    monkeypatch.setattr(towers, "build", towers_of)
    with pytest.raises(Stopped):
        train(experiment, "single_task", seed=3)

    assert seeds == {"towers": 3, "batches": 3, "backup": 3}
    rate = experiment.recipe.single_task.learning_rate
    np.testing.assert_allclose(rates, [rate, rate / 2, 0], atol=1e-7)  # of 3 epochs


def test_each_seed_epoch_and_layer_has_its_own_chance(tmp_path):
    x = image = keras.Input((2,))
    for _ in range(2):
        x = keras.layers.Dropout(0.5)(x)
    found = set()
    for seed in (0, 1):
        backup = callbacks.Backup(tmp_path / "latest.npz", 1, seed)
        backup.set_model(keras.Model(image, x))
        for epoch in (0, 1):
            backup.on_epoch_begin(epoch)
            found |= {tuple(np.array(x)) for x in backup._random_states()}

    assert len(found) == 2 * 2 * 2


def test_a_finished_run_is_not_run_again(finished, cross_stitch, train):
    before = snapshot(cross_stitch)

    assert train(finished, "cross_stitch") == runs.metrics(cross_stitch)
    assert snapshot(cross_stitch) == before


class Stopped(Exception):
    """Stands for the power going off."""


def stop_in_a_step(monkeypatch):
    """In the middle of the third epoch, whose first step is lost."""
    begun = []

    def on_train_batch_begin(self, batch, logs=None):
        begun.append(batch)
        if len(begun) == 6:
            raise Stopped

    monkeypatch.setattr(
        callbacks.ShowProgress, "on_train_batch_begin", on_train_batch_begin
    )


def stop_in_a_backup(monkeypatch):
    """When the second epoch's is half written, its row in the history is."""
    replace = files.os.replace

    def stop(unfinished, path):
        if path.name == "latest.npz" and path.exists():
            unfinished.write_bytes(unfinished.read_bytes()[:1000])
            raise Stopped
        replace(unfinished, path)

    monkeypatch.setattr(files.os, "replace", stop)


def stop_by_sigterm(monkeypatch):
    """In the first step of the third epoch, which is not lost."""
    begun = []

    def on_train_batch_begin(self, batch, logs=None):
        begun.append(batch)
        if len(begun) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(
        callbacks.ShowProgress, "on_train_batch_begin", on_train_batch_begin
    )


def stop_by_sigterm_at_the_end(monkeypatch):
    """When the last epoch's backup is written."""
    on_epoch_end = callbacks.Backup.on_epoch_end

    def stop(self, epoch, logs=None):
        on_epoch_end(self, epoch, logs)
        if epoch + 1 == self.params["epochs"]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(callbacks.Backup, "on_epoch_end", stop)


def stop_by_a_full_disk(monkeypatch):
    """When the second epoch's backup is half written."""
    save = np.savez

    def savez(path, *arrays):
        if not path.parent.joinpath("latest.npz").exists():
            return save(path, *arrays)
        # Files end there, for this process: the nearest thing to a full disk.
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            return save(path, *arrays)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(np, "savez", savez)


@pytest.mark.parametrize(
    ("stop", "error", "kept"),
    [
        (stop_in_a_step, Stopped, 4),
        (stop_in_a_backup, Stopped, 2),
        (stop_by_sigterm, Preempted, 5),
        (stop_by_sigterm_at_the_end, Preempted, 6),
        (stop_by_a_full_disk, OSError, 2),
    ],
)
def test_a_stopped_run_ends_as_one_that_never_stopped(
    experiment, single_task, train, monkeypatch, stop, error, kept
):
    run = experiment.folder("single_task", 0)
    with monkeypatch.context() as patch:
        stop(patch)
        with pytest.raises(error):
            train(experiment, "single_task")
    assert os.listdir(run / "backup") == ["latest.npz"]
    with np.load(run / "backup/latest.npz") as file:
        assert kept in [x for x in file.values() if x.ndim == 0]  # the steps
    assert not (run / "model.keras").exists()
    train(experiment, "single_task")

    expected, resumed = load(single_task).get_weights(), load(run).get_weights()
    for one, other in zip(expected, resumed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert runs.metrics(run) == runs.metrics(single_task)
    histories = rows(single_task / "history.csv"), rows(run / "history.csv")
    assert [r["loss"] for r in histories[0]] == [r["loss"] for r in histories[1]]
    assert not (run / "backup").exists()


def test_a_run_stopped_in_evaluation_does_not_train_again(
    experiment, single_task, train, monkeypatch
):
    run = experiment.folder("single_task", 0)
    shutil.copytree(single_task, run)
    (run / "metrics.json").unlink()
    monkeypatch.setattr(fitting, "_train", None)

    assert train(experiment, "single_task") == runs.metrics(single_task)


@pytest.mark.parametrize("written", ["per_class.csv", "metrics.json"])
def test_an_evaluation_that_is_stopped_is_done_again(
    experiment, single_task, train, monkeypatch, written
):
    run = experiment.folder("single_task", 0)
    shutil.copytree(single_task, run)
    for name in ("metrics.json", "per_class.csv"):
        (run / name).unlink()
    replace = os.replace

    def stop(unfinished, path):
        if path.name == written:
            unfinished.write_bytes(unfinished.read_bytes()[:20])
            raise Stopped
        replace(unfinished, path)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", stop)
        with pytest.raises(Stopped):
            train(experiment, "single_task")
    assert runs.metrics(run) is None
    assert train(experiment, "single_task") == runs.metrics(single_task)
    assert rows(run / "per_class.csv") == rows(single_task / "per_class.csv")


def test_a_run_that_is_stopped_again_and_again_ends_the_same(
    experiment, single_task, train, monkeypatch
):
    """Before a step, before or after a file gets its name: three times, by chance."""
    run = experiment.folder("single_task", 0)
    rng = np.random.default_rng()
    replace, left = os.replace, []

    def moment():
        left[0] -= 1
        if left[0] == 0:
            raise Stopped

    def stop(unfinished, path):
        moment()
        replace(unfinished, path)
        moment()

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        patch.setattr(
            callbacks.ShowProgress, "on_train_batch_begin", lambda *_, **__: moment()
        )
        for _ in range(3):
            left[:] = [rng.integers(1, 14)]
            print(f"stops after {left[0]} moments")
            with contextlib.suppress(Stopped):
                train(experiment, "single_task")
    train(experiment, "single_task")

    expected, resumed = load(single_task).get_weights(), load(run).get_weights()
    for one, other in zip(expected, resumed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert runs.metrics(run) == runs.metrics(single_task)


def test_a_part_of_train_is_held_out_and_its_losses_are_told(experiment, train):
    short = with_(experiment, "single_task", epochs=1)
    recipe = recipes.with_validation(short.recipe)
    assert recipe.name == "tiny-validated"
    held_out = open_experiment(recipe, None, experiment.runs)
    train(held_out, "single_task")
    run = recorded.Run(held_out.folder("single_task", 0))

    assert len(held_out.train_examples[0]) == 14  # of 16
    assert set(run.losses) == set(run.validation_losses) == set(held_out.tasks)
    model = load(run.folder)
    recipe = recipes.change(recipe, "data", test_split="train[90%:]")
    ((tasks, part),) = batches.test_passes(held_out.builder, recipe, held_out.tasks)
    ((images, targets),) = part
    for name, task in tasks.items():
        logits = keras.Model(model.input, model.get_layer(f"{name}_logits").output)
        expected = float(task.loss()(targets[name], logits(images)))
        assert run.validation_losses[name] == [pytest.approx(expected, rel=1e-4)]
    part_of = recipes.change(recipe, "data", train_split="train[:50%]")
    with pytest.raises(ValueError, match=r"'train\[:50%\]' of .* is a part already"):
        recipes.with_validation(part_of)
    with pytest.raises(ValueError, match="leave --validate"):
        recipes.with_validation(recipes.find("scenes_detection"))


def test_a_recipe_weighs_its_losses(experiment, single_task, train):
    weighed = with_(experiment, "training", loss_weighting="dynamic_average")
    train(weighed, "single_task")
    folder = weighed.folder("single_task", 0)

    # The third epoch is the first whose weights are not 1.
    histories = [rows(x / "history.csv") for x in (folder, single_task)]
    differ = [
        [
            abs(float(own[x]) / float(plain[x]) - 1) > 1e-3
            for x in ("segmentation_loss", "normals_loss")
        ]
        for own, plain in zip(*histories, strict=True)
    ]
    assert differ == [[False, False], [False, False], [True, True]]
    assert not any("dynamic" in layer.name for layer in load(folder).layers)


def test_a_method_weighs_its_tasks(tiny, tasks):
    plan = methods.plan("single_task@loss_weights=0.5+3", tiny)
    joined = plan.join(towers.build(plan.recipe, tasks, 0))
    model = fitting.compiled(joined, tasks, plan.recipe, 0.0)
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 255, (2, 96, 128, 3))
    targets = {
        "segmentation": rng.integers(0, 19, (2, 48, 64)),
        "normals": rng.normal(size=(2, 48, 64, 3)).astype("float32"),
    }
    logs = model.train_on_batch(image, targets, return_dict=True)

    of_tasks = 0.5 * logs["segmentation_loss"] + 3 * logs["normals_loss"]
    assert logs["loss"] == pytest.approx(of_tasks, rel=1e-5)


@pytest.mark.parametrize("by", ["uncertainty", "dynamic_average"])
def test_a_weighed_loss_is_over_the_labels_alone(tiny, tasks, by):
    recipe = recipes.change(tiny, "training", loss_weighting=by)
    joined = methods.plan("single_task", recipe).join(towers.build(recipe, tasks, 0))
    model = fitting.compiled(joined, tasks, recipe, 0.1)
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 19, (2, 48, 64))
    normals = rng.normal(size=(2, 48, 64, 3)).astype("float32")
    classes[:, 10:], normals[:, :20] = 255, 0
    logits = {
        name: rng.normal(size=(2, 48, 64, task.outputs)).astype("float32")
        for name, task in tasks.items()
    }
    targets = {"segmentation": classes, "normals": normals}
    total = model.compute_loss(y=targets, y_pred=logits)
    plain = sum(tasks[x].loss()(targets[x], logits[x]) for x in tasks)

    # With log s^2 = 0 it is half of the loss.
    factor = {"uncertainty": 0.5, "dynamic_average": 1.0}[by]
    np.testing.assert_allclose(total, factor * plain, rtol=1e-5)


def test_another_recipe_in_the_folder_of_a_run_is_refused(finished, single_task, train):
    other = with_(finished, "training", momentum=0.5)

    with pytest.raises(ValueError, match=r"another recipe: training\.momentum changed"):
        train(other, "single_task")
    # Through the run that it starts from, too, before anything is claimed.
    with pytest.raises(ValueError, match="single_task/seed0 was begun with another"):
        train(other, "single_task_longer")
    assert not other.folder("single_task_longer", 0).exists()


@pytest.mark.parametrize(
    ("part", "values", "voided"),
    [
        (
            "finetuning",
            {"epochs": 9},
            {"single_task_longer", "cross_stitch", "hard_sharing"},
        ),
        ("units", {"same_task": 0.8}, {"cross_stitch"}),
        ("tower", {"dropout": 0.4}, {"all"}),
        ("data", {"colour": 0.5}, {"all"}),
        ("single_task", {"epochs": 9}, {"all"}),
    ],
)
def test_a_run_is_claimed_with_what_it_depends_on(finished, part, values, voided):
    spelled = {
        "single_task",
        "single_task_longer",
        "cross_stitch",
        "hard_sharing",
        "ensemble",
    }
    other = with_(finished, part, **values)
    changed = {
        method
        for method in spelled
        if finished.depends_on(method, 0) != other.depends_on(method, 0)
    }

    assert changed == (spelled if voided == {"all"} else voided)


def test_a_part_that_came_later_voids_no_run_unless_it_is_used(finished, tmp_path):
    """Of what the run starts from, too."""
    now = finished.depends_on("single_task_longer", 0)
    before = json.loads(json.dumps(now))
    for begun in (before, *before["starts_from"]):
        del begun["training"]["loss_weighting"]
    runs.claim(tmp_path, before)
    runs.claim(tmp_path, now)
    now["starts_from"][0]["training"]["loss_weighting"] = "uncertainty"

    message = r"starts_from\[0\]\.training\.loss_weighting changed"
    with pytest.raises(ValueError, match=message):
        runs.claim(tmp_path, now)


def test_a_run_that_goes_on_goes_on_with_what_it_was_begun_with(finished, tmp_path):
    depends = finished.depends_on("single_task", 0)
    begun = {"replicas": 1, "versions": {"keras": "3.15.1"}}
    runs.claim(tmp_path, depends, begun)
    runs.claim(tmp_path, depends, begun)
    for other, place in (
        ({**begun, "replicas": 2}, "made_with.replicas"),
        ({**begun, "versions": {"keras": "3.15.2"}}, "made_with.versions.keras"),
    ):
        with pytest.raises(ValueError, match=rf"another recipe: {place} changed"):
            runs.claim(tmp_path, depends, other)
    # One that is finished stays what it is.
    runs.claim(tmp_path, depends)


def test_a_run_depends_on_its_codewords(finished, tmp_path):
    """Another clustering would leave a stopped run with other classes half-way."""
    before = finished.depends_on("single_task", 0)
    shutil.copytree(finished.runs / "datasets", tmp_path / "datasets")
    (path,) = (tmp_path / "datasets").rglob("codewords-train.npy")
    np.save(path, np.load(path)[::-1])
    other = runs.open_experiment(finished.recipe, None, tmp_path)

    changed = runs._differences(before, other.depends_on("single_task", 0))
    assert changed == ["tasks.normals"]


def test_a_run_depends_on_what_its_backbone_holds_and_not_where(finished, tmp_path):
    moved = tmp_path / "moved.keras"
    other = with_(finished, "tower", backbone=moved)
    before = finished.depends_on("single_task", 0)
    whole = finished.recipe.tower.backbone.read_bytes()
    moved.write_bytes(whole)
    assert other.depends_on("single_task", 0) == before
    renamed = dataclasses.replace(other.recipe, name="other")
    renamed = dataclasses.replace(other, recipe=renamed)
    assert renamed.digest == other.digest == finished.digest

    moved.write_bytes(whole + b"x")
    changed = runs._differences(before, other.depends_on("single_task", 0))
    assert changed == ["tower.backbone"]
    assert other.digest != finished.digest


def test_a_run_depends_on_the_features_that_it_reads(finished):
    depends = finished.depends_on("single_task", 0)
    assert set(depends["examples"]) == {"image", "normals", "segmentation"}


def test_a_run_that_another_process_trains_is_waited_for_where_others_start_from_it(
    experiment, single_task, train, monkeypatch
):
    run = experiment.folder("single_task", 0)
    taken = threading.Event()

    def other():
        with lock(run / ".lock", wait=False):
            taken.set()
            time.sleep(1)
            shutil.copytree(single_task, run, dirs_exist_ok=True)

    with ThreadPoolExecutor() as executor:
        executor.submit(other)
        taken.wait()
        trained = []
        real = fitting._train
        monkeypatch.setattr(
            fitting,
            "_train",
            lambda experiment, plan, *rest: (
                trained.append(plan.spelled) or real(experiment, plan, *rest)
            ),
        )
        train(experiment, "single_task_longer")
    assert trained == ["single_task_longer"]


def test_a_diverging_run_stops_with_a_message(experiment, train):
    diverging = with_(experiment, "single_task", learning_rate=1e30)

    with pytest.raises(FloatingPointError, match=r"rate is too high.*first variable"):
        train(diverging, "single_task")
    assert not (experiment.folder("single_task", 0) / "model.keras").exists()


def test_what_diverged_in_the_last_step_of_an_epoch_is_not_kept(experiment, train):
    diverging = with_(experiment, "single_task", learning_rate=float("inf"))
    diverging = with_(diverging, "training", batch_size=16)  # one step an epoch

    with pytest.raises(FloatingPointError, match="last step of epoch 0 was too large"):
        train(diverging, "single_task")
    assert not (experiment.folder("single_task", 0) / "backup").exists()


def test_what_would_fail_late_is_found_before_training(finished):
    with pytest.raises(ValueError, match="There is no method 'stich'"):
        fitting.check(finished, ["single_task", "stich"])
    with pytest.raises(ValueError, match="no layer 'pool9'"):
        fitting.check(with_(finished, "units", at=("pool9",)), ["cross_stitch"])
    with pytest.raises(ValueError, match="no layer 'conv9'"):
        fitting.check(finished, ["split@conv9"])
    with pytest.raises(ValueError, match=r"of 64 images, .* has 16\."):
        fitting.check(with_(finished, "training", batch_size=64), ["single_task"])
    for spelled in ("hard_sharing@dropout=1.5", "cross_stitch@alpha_multiplier=-5"):
        with pytest.raises(ValueError, match=r"1\.5|-5"):
            fitting.check(finished, ["single_task", spelled])
    unknown = with_(finished, "data", tasks=("segmentation", "parts:letters"))
    with pytest.raises(ValueError, match=r"no task 'letters', .*'tiny'.*: segmentatio"):
        open_experiment(unknown.recipe, None, finished.runs)


def test_an_ensemble_answers_with_the_average_of_two_nets(
    experiment, single_task, train
):
    # Another net, without its training: the same, mirrored in one layer.
    other = load(single_task)
    score = other.get_layer("segmentation_score")
    score.set_weights([-weights for weights in score.get_weights()])
    for seed, model in ((0, load(single_task)), (1000, other)):
        folder = experiment.folder("single_task", seed)
        shutil.copytree(single_task, folder)
        depends = experiment.depends_on("single_task", seed)
        (folder / "recipe.json").write_text(json.dumps(depends))
        model.save(folder / "model.keras")
    metrics = train(experiment, "ensemble")
    ensemble = load(experiment.folder("ensemble", 0))
    image = np.random.default_rng(0).uniform(0, 255, (2, 96, 128, 3))
    answers = [
        x.predict(image, verbose=0) for x in (load(single_task), other, ensemble)
    ]
    first, second, both = (answer["segmentation"] for answer in answers)

    assert np.abs(first - second).max() > 0.01
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-6)
    np.testing.assert_allclose(answers[2]["normals"], answers[0]["normals"], atol=1e-6)
    assert metrics["normals"] == runs.metrics(single_task)["normals"]


def test_any_score_of_any_model_can_be_evaluated(finished):
    """The model has no loss, no regularizer; the score is no Keras metric."""

    class Largest:
        def __init__(self):
            self.values = []

        def update(self, target, answer):
            self.values.append((target.max(), answer.max()))

        def result(self):
            return {"largest": max(answer for _, answer in self.values)}

    class Task:
        scores = Largest

    image = keras.Input((2,), name="image")
    model = keras.Model(image, {"age": keras.layers.Rescaling(2.0)(image)})
    data = [(np.float32([[1, x]]), {"age": keras.ops.ones(1)}) for x in (5, 7, 3)]
    scores = fitting.evaluate(model, {"age": Task()}, data)

    assert scores["age"].result() == {"largest": 14.0}
