"""Fits and evaluates one run; knows no method, tower or data set by name."""

import contextlib
import functools
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.progress import Progress

from keras_cross_stitch import (
    NDDR,
    AlphaHistory,
    CrossStitch,
    DynamicWeightAverage,
    LearningRateGroups,
    weigh_losses,
)
from keras_cross_stitch.faster_layers import exchange
from training import batches, costs, distribution, methods, provenance, runs, towers
from training.callbacks import Backup, History, ShowProgress, StopAtNaN
from training.files import remove_unfinished, unfinished, write_csv, write_json
from training.gradients import PCGrad
from training.locks import lock
from training.preemption import at_sigterm
from training.recipes import Recipe, Schedule, change
from training.runs import Experiment
from training.tasks import Scores, Task


def check(experiment: Experiment, spelled: Iterable[str]) -> None:
    """Raises a ValueError for what would only fail once other runs are done."""
    batches.pipeline(experiment.recipe).check(experiment.builder, experiment.recipe)
    fresh: dict[Any, methods.Towers] = {}
    for name in spelled:
        plan = methods.plan(name, experiment.recipe)
        if plan.schedule:
            kind = plan.recipe.tower
            if kind not in fresh:
                fresh[kind] = towers.build(plan.recipe, experiment.tasks, 0)
            compiled(plan.join(fresh[kind]), experiment.tasks, plan.recipe, 0.1)


def fit(
    experiment: Experiment,
    method: str,
    seed: int,
    *,
    strategy: tf.distribute.Strategy,
    progress: Progress,
    wait: bool = False,
) -> dict[str, dict[str, float]] | None:
    """Trains and evaluates a run, and first those that it starts from.

    What is finished is not run again; what was stopped goes on where it was.

    Args:
        experiment: The `Experiment`.
        method: String, a method as `methods.plan` reads it.
        seed: Integer.
        strategy: A `tf.distribute` strategy, see `distribution.strategy`.
        progress: A started `rich.progress.Progress`.
        wait: Boolean, whether to wait for another process that trains the run.

    Returns:
        Dict `{task: {metric: value}}` on the test split.
    """
    validates = getattr(experiment.recipe.data, "validation_split", None)
    if validates and distribution.workers(strategy) > 1:
        raise ValueError("Several workers validate nothing: leave --validate")
    provenance.of_this_process()  # before an edit can be taken for what made the run
    # Equal runs of equal seeds. On a CPU it costs nothing that can be measured.
    tf.config.experimental.enable_op_determinism()
    plan = methods.plan(method, experiment.recipe)
    depends = experiment.depends_on(method, seed)
    run = experiment.folder(method, seed)
    starts = []
    if plan.method.start:
        for offset in plan.method.seeds:
            before = (plan.method.start, seed + offset)
            fit(experiment, *before, strategy=strategy, progress=progress, wait=True)
            starts.append(experiment.folder(*before) / "model.keras")
    writes = distribution.is_chief(strategy)
    with contextlib.ExitStack() as stack:
        finished = runs.metrics(run) is not None
        if writes and not finished:
            stack.enter_context(lock(run / ".lock", wait=wait))
            finished = runs.metrics(run) is not None  # meanwhile, by another process
        if distribution.from_chief(strategy, finished):
            runs.claim(run, depends)
            return runs.metrics(run)
        if writes:
            remove_unfinished(run)
        if writes or (run / "recipe.json").exists():
            runs.claim(run, depends, _made_with(strategy))
        if not distribution.from_chief(strategy, (run / "model.keras").exists()):
            keras.backend.clear_session()
            if plan.schedule:
                model = _train(
                    experiment, plan, plan.schedule, seed, starts, strategy, progress
                )
            else:
                model = _averaged(starts, experiment.tasks)
            if writes:
                _save(model, experiment, run)
        if writes:
            shutil.rmtree(run / "backup", ignore_errors=True)
            _evaluate(experiment, run, seed)
        distribution.from_chief(strategy, True)
    return runs.metrics(run)


def _made_with(strategy: tf.distribute.Strategy) -> dict[str, Any]:
    """What changes a run's numbers, though the recipe says nothing of it."""
    return {
        # Batch normalisation is over a replica's part of the batch.
        "replicas": strategy.num_replicas_in_sync,
        "versions": provenance.versions(),
    }


def evaluate(
    model: keras.Model,
    tasks: Mapping[str, Any],
    test: Iterable[tuple[Any, Mapping[str, tf.Tensor]]],
) -> dict[str, Scores]:
    """The scores of a model that gives answers, {task: `Scores`}."""
    scores = {name: task.scores() for name, task in tasks.items()}
    for inputs, targets in test:
        answers = model.predict_on_batch(inputs)
        for name in tasks:
            scores[name].update(targets[name].numpy(), answers[name])
    return scores


def compiled(
    model: keras.Model,
    tasks: Mapping[str, Any],
    recipe: Recipe,
    schedule: float | keras.optimizers.schedules.LearningRateSchedule,
) -> keras.Model:
    """The model, which may get weights of its losses, with losses and optimizer."""
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    # A step takes less time. On a GPU a frozen norm's gradient is not deterministic.
    exchange(layer for layer in model.layers if layer.trainable or not has_gpu)
    optimizer = keras.optimizers.SGD(schedule, momentum=recipe.training.momentum)
    multipliers: dict[str, float] = {}
    if towers.has(model, NDDR):
        multipliers["^nddr_"] = recipe.units.alpha_multiplier
    of_tasks = recipe.training.learning_rate_multipliers
    if of_tasks:
        names = (_own_layers(task, tasks) for task in tasks)
        multipliers |= dict(zip(names, of_tasks, strict=True))
    if multipliers or towers.has(model, CrossStitch):
        optimizer = LearningRateGroups(
            optimizer, multipliers, alpha=recipe.units.alpha_multiplier
        )
    loss = {name: task.loss() for name, task in tasks.items()}
    if recipe.training.loss_weighting:
        model, loss = weigh_losses(model, loss, by=recipe.training.loss_weighting)
    weights = recipe.training.loss_weights
    kind = PCGrad if recipe.training.gradients == "pcgrad" else keras.Model
    model = distribution.for_current_strategy(model, kind)
    model.compile(
        optimizer,
        loss=loss,
        loss_weights=weights and dict(zip(tasks, weights, strict=True)),
        # XLA's convolutions are slower than oneDNN's on a CPU, and it cannot compile
        # what goes between replicas.
        jit_compile=has_gpu and tf.distribute.get_strategy().num_replicas_in_sync == 1,
    )
    return model


def _own_layers(task: str, tasks: Iterable[str]) -> str:
    """A pattern of the layers of a task, and not of `<task>_<more>`'s."""
    longer = (x.removeprefix(task) for x in tasks if x.startswith(f"{task}_"))
    others = "".join(f"(?!{re.escape(x)}_)" for x in longer)
    return f"^{re.escape(task)}{others}_"


def answering(model: keras.Model, tasks: Mapping[str, Any]) -> keras.Model:
    """The model with each task's answer in place of its logits."""
    logits = model.output
    answers = {
        name: task.answer(logits[name], name, model.input)
        for name, task in tasks.items()
    }
    return keras.Model(model.input, answers)


def _train(
    experiment: Experiment,
    plan: methods.Plan,
    schedule: Schedule,
    seed: int,
    starts: list[Path],
    strategy: tf.distribute.Strategy,
    progress: Progress,
) -> keras.Model:
    recipe, tasks = plan.recipe, experiment.tasks
    examples, batch_size = experiment.train_examples, recipe.training.batch_size
    epochs = schedule.epochs
    steps = len(examples[0]) // batch_size

    def batches_from(done: int, rows: np.ndarray | None = None) -> tf.data.Dataset:
        left = range(done, epochs * steps)
        make = batches.pipeline(recipe).train_batches
        return make(examples, recipe, tasks, seed, left, rows)

    validation = None
    if split := getattr(recipe.data, "validation_split", None):
        of_part = change(recipe, "data", test_split=split)
        ((_, validation),) = batches.test_passes(experiment.builder, of_part, tasks)
    run, writes = experiment.folder(plan.spelled, seed), distribution.is_chief(strategy)
    backup = Backup(run / "backup" / "latest.npz", steps, seed, writes)
    with strategy.scope():
        joined = _joined(plan, tasks, seed, starts)
        decay = keras.optimizers.schedules.CosineDecay(
            schedule.learning_rate, epochs * steps
        )
        model = compiled(joined, tasks, recipe, decay)
        _, targets = next(iter(batches_from(0)))
        distribution.build_losses(model, {name: x[:1] for name, x in targets.items()})
        done = backup.restore(model)
    units = towers.has(model, CrossStitch)
    dynamic = recipe.training.loss_weighting == "dynamic_average"
    description = f"{recipe.name} {plan.spelled}, seed {seed}"
    callbacks = [
        StopAtNaN(),
        *([AlphaHistory()] if units else []),
        *([DynamicWeightAverage()] if dynamic else []),
        *([History(run / "history.csv")] if writes else []),
        backup,
        ShowProgress(progress, description, epochs, steps, done),
    ]

    # Not in the scope, in which Keras cannot save for one worker alone.
    # Of several workers, one may be asked to stop: it does so at once.
    alone = distribution.workers(strategy) == 1
    stop = at_sigterm(backup.stop) if alone else contextlib.nullcontext()
    with stop, distribution.lost_workers_named():
        while done < epochs * steps:
            # An epoch that was stopped within, or all that are left.
            count = steps - done % steps
            end = done + count if done % steps else epochs * steps
            model.fit(
                distribution.batches_of_replicas(
                    strategy, batch_size, functools.partial(batches_from, done)
                ),
                initial_epoch=done // steps,
                epochs=end // steps,
                steps_per_epoch=count,
                validation_data=validation,
                shuffle=False,  # the batches are in their order already
                callbacks=callbacks,
                verbose=0,
            )
            done = end
    backup.end_if_asked()  # it may have been after the last epoch's backup
    with strategy.scope():
        return answering(joined, tasks)


def _joined(
    plan: methods.Plan, tasks: Mapping[str, Any], seed: int, starts: list[Path]
) -> keras.Model:
    """The method's model, of untrained towers or of those that it starts from."""
    if starts:
        start = keras.models.load_model(starts[0], compile=False)
        of_tasks = {name: towers.take_out(start, name) for name in tasks}
    else:
        of_tasks = towers.build(plan.recipe, tasks, seed)
    keras.utils.set_random_seed(seed)
    return plan.join(of_tasks)


def _averaged(starts: list[Path], tasks: Mapping[str, Any]) -> keras.Model:
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


def _save(model: keras.Model, experiment: Experiment, run: Path) -> None:
    units = {x.name: x.alpha for x in model.layers if isinstance(x, CrossStitch)}
    if units:
        with unfinished(run / "alpha.npz") as temporary:
            np.savez(temporary, **units)
    answers = {name: task.describe() for name, task in experiment.tasks.items()}
    write_json(run / "answers.json", answers)
    write_json(run / "made_by.json", provenance.of_this_process())
    proposals = getattr(experiment.recipe.data, "proposals", 1)
    write_json(run / "costs.json", costs.count(model, free=proposals))
    with unfinished(run / "model.keras") as temporary:
        model.save(temporary)


def _evaluate(experiment: Experiment, run: Path, seed: int) -> None:
    model = keras.models.load_model(run / "model.keras", compile=False)
    scores: dict[str, Scores] = {}
    recipe, tasks = experiment.recipe, experiment.tasks
    for together, test in batches.test_passes(experiment.builder, recipe, tasks):
        answers = {name: model.output[name] for name in together}
        scores |= evaluate(keras.Model(model.input, answers), together, test)
    labels = batches.pipeline(recipe).labels(
        experiment.train_examples, recipe, tasks, seed
    )
    per_class = [
        (task, name, metric, _rounded(value, tasks[task], metric))
        for task, of_task in scores.items()
        for name, values in of_task.per_class().items()
        for metric, value in {**values, "labels": labels[task][name]}.items()
    ]
    if per_class:
        header = ("task", "class", "metric", "value")
        write_csv(run / "per_class.csv", header, per_class)
    write_json(run / "metrics.json", rounded(scores, experiment.tasks))


def rounded(
    scores: Mapping[str, Scores], tasks: Mapping[str, Task]
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}}, as it is written."""
    return {
        task: {
            name: _rounded(value, tasks[task], name)
            for name, value in of_task.result().items()
        }
        for task, of_task in scores.items()
    }


def _rounded(value: float, task: Task, name: str) -> float:
    """With two digits more than are shown."""
    return round(float(value), task.metrics[name].digits + 2)
