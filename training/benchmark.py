"""What stitching costs a step, and whether a step ever waits for its data."""

import statistics
import time

import keras
import tensorflow as tf

from keras_cross_stitch import LearningRateGroups
from training import fitting
from training.datasets import pipeline


def measure(recipe, tasks, builder, steps):
    """Times train steps, interleaved, and returns the rows of a table.

    Args:
        recipe: The `Recipe`.
        tasks: Dict of task name to `Task`.
        builder: The prepared TFDS builder.
        steps: Integer, measured steps of each kind.

    Returns:
        List of rows `(what, median in ms, ratio)`.
    """
    epoch = pipeline.train_batches(builder, recipe, tasks, seed=0)
    stream = iter(epoch.repeat())
    fixed = next(stream)
    stitched = _model(recipe, "cross_stitch", tasks)
    unstitched = _model(recipe, "one_task", tasks)

    def one_pass():
        for _ in epoch:
            pass

    measured = {
        "unstitched": lambda: unstitched.train_on_batch(*fixed),
        "stitched": lambda: stitched.train_on_batch(*fixed),
        "pipeline": one_pass,
        "both": lambda: stitched.train_on_batch(*next(stream)),
    }
    for step in measured.values():  # traces the steps and fills the caches
        step()
    times = {name: [] for name in measured}
    for _ in range(steps):
        for name, step in measured.items():
            start = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - start))
    times["pipeline"] = [t / len(epoch) for t in times["pipeline"]]

    unstitched_ms, stitched_ms, pipeline_ms, both_ms = map(
        statistics.median, times.values()
    )
    return [
        ("two towers, unstitched", f"{unstitched_ms:.1f}", "1"),
        (
            "two towers, stitched",
            f"{stitched_ms:.1f}",
            f"{stitched_ms / unstitched_ms:.3f} of unstitched",
        ),
        (
            "pipeline alone, a batch",
            f"{pipeline_ms:.1f}",
            f"{pipeline_ms / stitched_ms:.3f} of a stitched step",
        ),
        (
            "pipeline and stitched step",
            f"{both_ms:.1f}",
            f"{both_ms / stitched_ms:.3f} of the step on a batch in memory",
        ),
    ]


def _model(recipe, method, tasks):
    model = fitting.build(recipe, method, tasks)
    optimizer = keras.optimizers.SGD(1e-4, momentum=recipe.momentum)
    if method == "cross_stitch":
        optimizer = LearningRateGroups(optimizer, {"alpha": recipe.alpha_multiplier})
    model.compile(
        optimizer,
        loss={name: task.loss() for name, task in tasks.items()},
        jit_compile=bool(tf.config.list_physical_devices("GPU")),
    )
    return model
