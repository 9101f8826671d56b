"""What stitching costs a step, and whether a step ever waits for its data."""

import statistics
import time

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
    stitched = fitting.compiled(recipe, "cross_stitch", tasks, learning_rate=1e-4)
    unstitched = fitting.compiled(recipe, "one_task", tasks, learning_rate=1e-4)

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
