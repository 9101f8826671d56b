"""What stitching and bfloat16 do to a step, and whether a step waits for its data."""

import statistics
import time

from training import batches, fitting, methods, recipes, towers

DTYPES = ("float32", "mixed_bfloat16")


def measure(experiment, steps):
    """Times train steps, interleaved, and returns the rows of a table.

    Args:
        experiment: The `Experiment`.
        steps: Integer, measured steps of each kind.

    Returns:
        List of rows `(what, median in ms, ratio)`.
    """
    own = experiment.recipe.training.dtype
    recipe, tasks = experiment.recipe, experiment.tasks
    stream_of = batches.pipeline(recipe).train_batches(
        experiment.train_examples, recipe, tasks, seed=0, steps=range(10**4)
    )
    stream, alone = iter(stream_of), iter(stream_of)
    fixed = next(stream)
    models = {
        (dtype, method): _model(experiment, method, dtype)
        for dtype in DTYPES
        for method in ("single_task", "cross_stitch")
    }
    measured = {
        key: lambda model=model: model.train_on_batch(*fixed)
        for key, model in models.items()
    }
    both = models[own, "cross_stitch"]
    measured["pipeline"] = lambda: next(alone)
    measured["both"] = lambda: both.train_on_batch(*next(stream))
    for step in measured.values():  # traces the steps
        step()
    times = {key: [] for key in measured}
    for _ in range(steps):
        for key, step in measured.items():
            start = time.perf_counter()
            step()
            times[key].append(1000 * (time.perf_counter() - start))
    return _rows({key: statistics.median(x) for key, x in times.items()}, own)


def _model(experiment, method, dtype):
    recipe = recipes.change(experiment.recipe, "training", dtype=dtype)
    of_tasks = towers.build(recipe, experiment.tasks, seed=0)
    model = methods.plan(method, recipe).join(of_tasks)
    return fitting.compiled(model, experiment.tasks, recipe, 1e-4)


def _rows(ms, own):
    base = ms["float32", "single_task"]
    rows = []
    for dtype in DTYPES:
        apart, stitched = ms[dtype, "single_task"], ms[dtype, "cross_stitch"]
        rows += [
            (f"{dtype}, unstitched", f"{apart:.1f}", f"{apart / base:.3f} of float32"),
            (
                f"{dtype}, stitched",
                f"{stitched:.1f}",
                f"{stitched / apart:.3f} of unstitched",
            ),
        ]
    stitched, pipeline, both = ms[own, "cross_stitch"], ms["pipeline"], ms["both"]
    return [
        *rows,
        (
            "pipeline alone, a batch",
            f"{pipeline:.1f}",
            f"{pipeline / stitched:.3f} of a stitched step in {own}",
        ),
        (
            "pipeline and stitched step",
            f"{both:.1f}",
            f"{both / stitched:.3f} of the step on a batch in memory",
        ),
    ]
