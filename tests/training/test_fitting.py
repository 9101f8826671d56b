import csv
import dataclasses
import json

import keras
import numpy as np
import pytest

from training import fitting


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def snapshot(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_run_leaves_what_its_folder_promises(fit, runs):
    fit("one_task")
    metrics = fit("cross_stitch")
    run = runs / "tiny" / "cross_stitch" / "seed0"

    assert set(snapshot(run)) == {
        "recipe.json",
        "history.csv",
        "model.keras",
        "alpha.npz",
        "metrics.json",
    }
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert list(metrics["segmentation"]) == ["pixel_accuracy", "mean_iu", "fw_iu"]
    assert list(metrics["normals"]) == [
        "mean_angle",
        "median_angle",
        "within_11.25",
        "within_22.5",
        "within_30",
    ]
    history = rows(run / "history.csv")
    assert [int(row["epoch"]) for row in history] == [0, 1]
    assert "alpha/cross_stitch_pool1/normals_from_segmentation" in history[0]
    assert set(np.load(run / "alpha.npz")) == {"cross_stitch_pool1", "cross_stitch_fc7"}


def test_the_saved_model_answers_with_probabilities_and_unit_normals(fit, runs):
    fit("one_task")
    model = keras.models.load_model(runs / "tiny/one_task/seed0/model.keras")
    answer = model.predict(np.full((2, 96, 128, 3), 100.0), verbose=0)

    assert {task: x.shape for task, x in answer.items()} == {
        "segmentation": (2, 48, 64, 19),
        "normals": (2, 48, 64, 3),
    }
    np.testing.assert_allclose(answer["segmentation"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(answer["normals"], axis=-1), 1, rtol=1e-5)


def test_what_follows_starts_from_the_one_task_nets(fit, runs, tiny, tasks):
    still = dataclasses.replace(tiny, extra_learning_rate=0.0)
    fit("one_task", still)
    fit("one_task_longer", still)
    fit("cross_stitch", still)
    models = {
        method: keras.models.load_model(runs / "tiny" / method / "seed0/model.keras")
        for method in fitting.METHODS
    }
    kernels = {
        method: model.get_layer("normals_fc6").get_weights()[0]
        for method, model in models.items()
    }

    np.testing.assert_array_equal(kernels["one_task_longer"], kernels["one_task"])
    np.testing.assert_array_equal(kernels["cross_stitch"], kernels["one_task"])
    assert kernels["one_task"].std() > 0
    alpha = models["cross_stitch"].get_layer("cross_stitch_fc7").get_weights()[0]
    np.testing.assert_allclose(alpha[0, 1], 0.1, rtol=1e-5)


def test_training_lowers_the_loss_and_moves_alpha(fit, runs):
    fit("one_task")
    fit("cross_stitch")
    losses = [float(r["loss"]) for r in rows(runs / "tiny/one_task/seed0/history.csv")]
    alpha = np.load(runs / "tiny/cross_stitch/seed0/alpha.npz")["cross_stitch_fc7"]

    assert losses[-1] < losses[0]
    assert np.all(np.abs(alpha[0, 1] - 0.1) > 0)


def test_the_recipes_numbers_reach_the_optimizer_and_the_loss(tiny, tasks):
    settings = dataclasses.replace(
        tiny, momentum=0.75, weight_decay=0.02, alpha_multiplier=7
    )
    model = fitting.compiled(settings, "cross_stitch", tasks, learning_rate=0.125)
    kernels = [
        layer.kernel for layer in model.layers if isinstance(layer, keras.layers.Conv2D)
    ]

    assert float(model.optimizer.learning_rate) == 0.125
    assert model.optimizer.inner_optimizer.momentum == 0.75
    assert model.optimizer.multipliers == {"alpha": 7}
    # The gradient of this is the decay times the kernel.
    penalty = 0.02 / 2 * sum(np.sum(np.square(kernel)) for kernel in kernels)
    np.testing.assert_allclose(sum(model.losses), penalty, rtol=1e-5)
    control = fitting.compiled(settings, "one_task_longer", tasks, 0.125)
    assert isinstance(control.optimizer, keras.optimizers.SGD)


def test_a_finished_run_is_not_run_again(fit, runs):
    first = fit("one_task")
    before = snapshot(runs / "tiny/one_task/seed0")

    assert fit("one_task") == first
    assert snapshot(runs / "tiny/one_task/seed0") == before


class Stopped(Exception):
    """Stands for the power going off."""


# Keras's CSVLogger leaves its file to the garbage collector when fit is stopped.
leaves_a_file_open = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


@leaves_a_file_open
def test_a_stopped_run_goes_on_where_it_was(fit, runs, monkeypatch):
    begun = []
    begin = fitting._Progress.on_epoch_begin

    def stop_in_the_third_epoch(self, epoch, logs=None):
        begun.append(epoch)
        if begun == [0, 1, 2]:
            raise Stopped
        begin(self, epoch, logs)

    monkeypatch.setattr(fitting._Progress, "on_epoch_begin", stop_in_the_third_epoch)
    with pytest.raises(Stopped):
        fit("one_task")
    assert not (runs / "tiny/one_task/seed0/metrics.json").exists()
    metrics = fit("one_task")

    assert begun == [0, 1, 2, 2]
    history = rows(runs / "tiny/one_task/seed0/history.csv")
    assert [int(row["epoch"]) for row in history] == [0, 1, 2]
    assert not (runs / "tiny/one_task/seed0/backup").exists()
    assert np.isfinite(metrics["normals"]["mean_angle"])


def test_a_run_stopped_in_evaluation_does_not_train_again(fit, runs, monkeypatch):
    def stop(*args):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "evaluate", stop)
        with pytest.raises(Stopped):
            fit("one_task")
    before = (runs / "tiny/one_task/seed0/history.csv").read_text()
    fit("one_task")

    assert (runs / "tiny/one_task/seed0/history.csv").read_text() == before


def test_another_recipe_in_the_folder_of_a_run_is_refused(fit, tiny):
    fit("one_task")

    with pytest.raises(ValueError, match="begun with another recipe: momentum changed"):
        fit("one_task", dataclasses.replace(tiny, momentum=0.5))


@leaves_a_file_open
def test_a_diverging_run_stops_with_a_message(fit, tiny):
    with pytest.raises(FloatingPointError, match="learning rate is too high"):
        fit("one_task", dataclasses.replace(tiny, learning_rate=1e30))


def test_what_would_fail_late_is_found_before_training(tiny, tasks):
    with pytest.raises(ValueError, match="There is no method 'stich'"):
        fitting.check(tiny, ["stich"], tasks)
    with pytest.raises(ValueError, match="no layer 'pool9'"):
        fitting.check(dataclasses.replace(tiny, at=("pool9",)), ["cross_stitch"], tasks)
