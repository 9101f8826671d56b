"""Fits and evaluates one run; knows no method, tower or data set by name."""

import json
import os
import shutil

import keras
import numpy as np
import tensorflow as tf

from keras_cross_stitch import AlphaHistory, CrossStitch, LearningRateGroups
from training import batches, methods, runs, towers
from training.callbacks import Backup, History, ShowProgress, StopAtNaN


def check(experiment, spelled):
    """Raises a ValueError for methods that would only fail once others are done."""
    fresh = None
    for name in spelled:
        plan = methods.plan(name, experiment.recipe)
        if plan.method.join:
            fresh = fresh or towers.build(experiment.recipe, experiment.tasks, 0)
            plan.join(fresh)


def fit(experiment, method, seed, *, strategy, progress):
    """Trains and evaluates a run, and first those that it starts from.

    What is finished is not run again; what was stopped goes on where it was.

    Args:
        experiment: The `Experiment`.
        method: String, a method as `methods.plan` reads it.
        seed: Integer.
        strategy: A `tf.distribute` strategy, see `distribution.strategy`.
        progress: A started `rich.progress.Progress`.

    Returns:
        Dict `{task: {metric: value}}` on the test split.
    """
    plan = methods.plan(method, experiment.recipe)
    depends = experiment.depends_on(method, seed)
    run = experiment.folder(method, seed)
    starts = []
    if plan.method.start:
        for offset in plan.method.seeds:
            before = (plan.method.start, seed + offset)
            fit(experiment, *before, strategy=strategy, progress=progress)
            starts.append(experiment.folder(*before) / "model.keras")
    runs.claim(run, depends)
    if not (run / "model.keras").exists():
        keras.backend.clear_session()
        with strategy.scope():
            if plan.schedule:
                model = _train(experiment, plan, seed, starts, run, progress)
            else:
                model = _averaged(starts, experiment.tasks)
        _save(model, experiment.tasks, run)
    metrics = runs.metrics(run)
    if metrics is None:
        metrics = _evaluate(experiment, run)
    shutil.rmtree(run / "backup", ignore_errors=True)
    return metrics


def evaluate(model, tasks, test):
    """The scores of a model that gives answers, {task: `Scores`}."""
    scores = {name: task.scores() for name, task in tasks.items()}
    for inputs, targets in test:
        answers = model.predict_on_batch(inputs)
        for name in tasks:
            scores[name].update(targets[name].numpy(), answers[name])
    return scores


def compiled(model, tasks, recipe, schedule):
    """The model with its losses and its optimizer."""
    optimizer = keras.optimizers.SGD(schedule, momentum=recipe.training.momentum)
    if any(isinstance(layer, CrossStitch) for layer in model.layers):
        multipliers = {"cross_stitch.*/alpha": recipe.units.alpha_multiplier}
        optimizer = LearningRateGroups(optimizer, multipliers)
    model.compile(
        optimizer,
        loss={name: task.loss() for name, task in tasks.items()},
        # XLA's convolutions are slower than oneDNN's on a CPU.
        jit_compile=bool(tf.config.list_physical_devices("GPU")),
    )
    return model


def answering(model, tasks):
    """The model with each task's answer in place of its logits."""
    logits = model.output
    answers = {
        name: task.answer(logits[name], name, model.input)
        for name, task in tasks.items()
    }
    return keras.Model(model.input, answers)


def _train(experiment, plan, seed, starts, run, progress):
    recipe, tasks = plan.recipe, experiment.tasks
    if starts:
        start = keras.models.load_model(starts[0], compile=False)
        of_tasks = {name: towers.take_out(start, name) for name in tasks}
    else:
        of_tasks = towers.build(recipe, tasks, seed)
    keras.utils.set_random_seed(seed)
    model = plan.join(of_tasks)

    epochs = plan.schedule.epochs
    steps = len(experiment.train_examples[0]) // recipe.training.batch_size
    schedule = keras.optimizers.schedules.CosineDecay(
        plan.schedule.learning_rate, epochs * steps
    )
    compiled(model, tasks, recipe, schedule)
    backup = Backup(run / "backup" / "latest.weights.h5", steps, seed)
    first = backup.restore(model)
    of_steps = batches.of(recipe).train_batches(
        experiment.train_examples,
        recipe,
        tasks,
        seed,
        range(first * steps, epochs * steps),
    )
    units = any(isinstance(layer, CrossStitch) for layer in model.layers)
    callbacks = [
        StopAtNaN(),
        *([AlphaHistory()] if units else []),
        History(run / "history.csv"),
        backup,
        ShowProgress(progress, f"{recipe.name} {plan.spelled}, seed {seed}"),
    ]
    model.fit(
        of_steps,
        epochs=epochs,
        initial_epoch=first,
        steps_per_epoch=steps,
        shuffle=False,  # the batches are in their order already
        callbacks=callbacks,
        verbose=0,
    )
    return answering(model, tasks)


def _averaged(starts, tasks):
    """The models' common answer."""
    models = [keras.models.load_model(path, compile=False) for path in starts]
    inputs = keras.tree.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype=x.dtype, name=x.name), models[0].input
    )
    logits = []
    for index, model in enumerate(models):
        outputs = {name: model.get_layer(f"{name}_logits").output for name in tasks}
        logits.append(keras.Model(model.input, outputs, name=f"net{index}")(inputs))
    answers = {
        name: task.average([of_model[name] for of_model in logits], name, inputs)
        for name, task in tasks.items()
    }
    return keras.Model(inputs, answers)


def _save(model, tasks, run):
    units = {x.name: x.alpha for x in model.layers if isinstance(x, CrossStitch)}
    if units:
        np.savez(run / "alpha.npz", **units)
    answers = {name: task.describe() for name, task in tasks.items()}
    runs.write(run / "answers.json", json.dumps(answers, indent=2))
    model.save(run / "unfinished.keras")
    os.replace(run / "unfinished.keras", run / "model.keras")


def _evaluate(experiment, run):
    model = keras.models.load_model(run / "model.keras", compile=False)
    scores = {}
    for tasks, test in batches.test_passes(
        experiment.builder, experiment.recipe, experiment.tasks
    ):
        part = keras.Model(model.input, {name: model.output[name] for name in tasks})
        scores |= evaluate(part, tasks, test)
    per_class = [
        (task, name, metric, round(value, 3))
        for task, of_task in scores.items()
        for name, values in of_task.per_class().items()
        for metric, value in values.items()
    ]
    if per_class:
        header = ("task", "class", "metric", "value")
        runs.write_csv(run / "per_class.csv", header, per_class)
    metrics = {
        task: {name: round(float(value), 3) for name, value in of_task.result().items()}
        for task, of_task in scores.items()
    }
    runs.write(run / "metrics.json", json.dumps(metrics, indent=2))
    return metrics
