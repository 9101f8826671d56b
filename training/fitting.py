"""One training run: (recipe, method, seed) to a folder with a trained model.

A run's folder, `<runs>/<recipe>/<method>/seed<seed>/`, holds

    recipe.json    what was run
    history.csv    losses (and mean alphas) by epoch
    model.keras    the trained model, which answers as it does when served
    alpha.npz      the units' alphas, where there are units
    metrics.json   {task: {metric: value}} on the test split; written last

and, while the run is going on, `backup/`, from which it resumes.
"""

import dataclasses
import json
import os
import shutil

import keras
import numpy as np
import tensorflow as tf

from keras_cross_stitch import (
    AlphaHistory,
    CrossStitch,
    LearningRateGroups,
    fcn_alexnet,
    stitch,
)
from training.datasets import pipeline

# All methods train the tasks' towers side by side, in one model. Without units
# the towers share nothing, so that is each net trained alone.
METHODS = (
    "one_task",
    "one_task_longer",  # the one-task nets trained on as long as the rest: the control
    "cross_stitch",  # the one-task nets, stitched, and trained on
)


def strategy(replicas=None):
    """The `tf.distribute` strategy to train under.

    Args:
        replicas: Integer, a number of logical CPUs to mirror the model over, for
            testing; `None` for the GPUs that there are.

    Returns:
        A `MirroredStrategy` where there are several devices, else the default.
    """
    if replicas:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * replicas,
        )
        return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def folder(runs, recipe, method, seed):
    """The folder of a run."""
    return runs / recipe.name / method / f"seed{seed}"


def check(recipe, methods, tasks):
    """Raises a ValueError for what would only fail once other runs are done."""
    for method in methods:
        if method not in METHODS:
            raise ValueError(
                f"There is no method '{method}'. There are: {', '.join(METHODS)}"
            )
    build(dataclasses.replace(recipe, width=1 / 64), "cross_stitch", tasks)


def build(recipe, method, tasks):
    """The method's model, untrained: image to {task: logits}."""
    towers = {
        name: fcn_alexnet(
            task.outputs,
            (*recipe.image_size, 3),
            width=recipe.width,
            normalization=recipe.normalization,
            dropout=recipe.dropout,
            upsampling=32 * recipe.target_size[0] // recipe.image_size[0],
            # L2 adds the sum of squares, whose gradient is twice the weight.
            kernel_regularizer=keras.regularizers.L2(recipe.weight_decay / 2),
        )
        for name, task in tasks.items()
    }
    at = recipe.at if method == "cross_stitch" else ()
    return stitch(towers, at=at, per=recipe.per, same_task=recipe.same_task)


def compiled(recipe, method, tasks, learning_rate):
    """The method's model, untrained, with its losses and its optimizer."""
    model = build(recipe, method, tasks)
    optimizer = keras.optimizers.SGD(learning_rate, momentum=recipe.momentum)
    if method == "cross_stitch":
        optimizer = LearningRateGroups(optimizer, {"alpha": recipe.alpha_multiplier})
    model.compile(
        optimizer,
        loss={name: task.loss() for name, task in tasks.items()},
        # XLA's convolutions are slower than oneDNN's on a CPU.
        jit_compile=bool(tf.config.list_physical_devices("GPU")),
    )
    return model


def fit(recipe, method, seed, *, tasks, builder, runs, strategy, progress):
    """Trains and evaluates one run; goes on with one that was stopped.

    Args:
        recipe: The `Recipe`.
        method: String, one of `METHODS`.
        seed: Integer.
        tasks: Dict of task name to `Task`.
        builder: The prepared TFDS builder.
        runs: Path of all runs. The methods that start from the one-task nets
            expect the run `one_task` of the same seed there.
        strategy: A `tf.distribute` strategy, see `strategy()`.
        progress: A started `rich.progress.Progress`.

    Returns:
        Dict `{task: {metric: value}}` on the test split.
    """
    run = folder(runs, recipe, method, seed)
    _claim(run, recipe)
    if (run / "metrics.json").exists():
        return json.loads((run / "metrics.json").read_text())

    keras.utils.set_random_seed(seed)
    train = pipeline.train_batches(builder, recipe, tasks, seed)
    first = method == "one_task"
    epochs = recipe.epochs if first else recipe.extra_epochs
    rate = recipe.learning_rate if first else recipe.extra_learning_rate

    with strategy.scope():
        schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(train))
        model = compiled(recipe, method, tasks, schedule)
        if not first:
            start = folder(runs, recipe, "one_task", seed) / "model.keras"
            _copy_weights(keras.models.load_model(start), model)
        served = keras.Model(
            model.inputs,
            {
                name: task.answer(model.output[name], name)
                for name, task in tasks.items()
            },
        )

    callbacks = [
        keras.callbacks.BackupAndRestore(run / "backup", delete_checkpoint=False),
        *([AlphaHistory()] if method == "cross_stitch" else []),
        keras.callbacks.CSVLogger(run / "history.csv", append=True),
        _StopAtNaN(),
        _Progress(progress, f"{recipe.name} {method}, seed {seed}"),
    ]
    model.fit(train, epochs=epochs, callbacks=callbacks, shuffle=False, verbose=0)

    served.save(run / "unfinished.keras")
    os.replace(run / "unfinished.keras", run / "model.keras")
    units = {x.name: x.alpha for x in model.layers if isinstance(x, CrossStitch)}
    if units:
        np.savez(run / "alpha.npz", **units)
    metrics = evaluate(
        run / "model.keras", tasks, pipeline.test_batches(builder, recipe, tasks)
    )
    _write(run / "metrics.json", json.dumps(metrics, indent=2))
    shutil.rmtree(run / "backup")
    return metrics


def evaluate(path, tasks, test):
    """The metrics of a saved model, `{task: {metric: value}}`."""
    model = keras.models.load_model(path)
    metrics = {name: task.metrics() for name, task in tasks.items()}
    model.compile(loss=None, metrics=metrics, jit_compile=False)
    results = model.evaluate(test, verbose=0, return_dict=True)
    return {
        name: {x.name: round(float(results[f"{name}_{x.name}"]), 3) for x in of_task}
        for name, of_task in metrics.items()
    }


def _claim(run, recipe):
    """Writes the recipe down, or checks that it is the one that was begun."""
    settings = json.loads(json.dumps(dataclasses.asdict(recipe)))
    path = run / "recipe.json"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(settings, indent=2))
    begun = json.loads(path.read_text())
    if begun != settings:
        changed = [
            key for key in {**begun, **settings} if begun.get(key) != settings.get(key)
        ]
        raise ValueError(
            f"{run} was begun with another recipe: {', '.join(changed)} changed. "
            "Remove that folder, or give another one with --runs"
        )


def _write(path, text):
    unfinished = path.with_name(f"unfinished-{path.name}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _copy_weights(source, target):
    """Copies the weights of the layers that both models have."""
    names = {layer.name for layer in target.layers}
    for layer in source.layers:
        if layer.weights and layer.name in names:
            target.get_layer(layer.name).set_weights(layer.get_weights())


class _StopAtNaN(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if not np.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"The loss became {logs['loss']} at step {batch} of the epoch: a "
                "learning rate is too high. The last epoch's backup is kept"
            )


class _Progress(keras.callbacks.Callback):
    """Shows the run on a rich progress bar, with the time that is left."""

    def __init__(self, bar, description):
        super().__init__()
        self.bar = bar
        self.description = description

    def on_train_begin(self, logs=None):
        total = self.params["epochs"] * self.params["steps"]
        self.line = self.bar.add_task(self.description, total=total)

    def on_epoch_begin(self, epoch, logs=None):
        self.bar.update(self.line, completed=epoch * self.params["steps"])

    def on_train_batch_end(self, batch, logs=None):
        self.bar.advance(self.line)

    def on_epoch_end(self, epoch, logs=None):
        losses = ", ".join(
            f"{key} {value:.3f}" for key, value in logs.items() if key.endswith("loss")
        )
        text = f"{self.description}, epoch {epoch + 1}/{self.params['epochs']}"
        if self.bar.console.is_terminal:
            self.bar.update(self.line, description=f"{text}: {losses}")
        else:
            self.bar.console.print(f"{text}: {losses}")
