"""What methods and bfloat16 do to a step, and whether a step waits for its data."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras

from training import batches, fitting, methods, recipes, towers
from training.runs import Experiment

BASELINE = "single_task"
COLUMNS = ("method", "measure", "ms", "of_single_task")
DTYPES = ("float32", "mixed_bfloat16")


def measure(experiment: Experiment, steps: int) -> list[tuple[str, str, str]]:
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
        experiment.train_examples, recipe, tasks, seed=0, steps=range(10**4 + steps)
    )
    stream, alone = iter(stream_of), iter(stream_of)
    fixed = next(stream)
    models = {
        (dtype, method): _model(experiment, method, dtype)
        for dtype in DTYPES
        for method in ("single_task", "cross_stitch")
    }
    measured: dict[Any, Callable[[], Any]] = {
        key: functools.partial(model.train_on_batch, *fixed)
        for key, model in models.items()
    }
    both = models[own, "cross_stitch"]
    measured["pipeline"] = lambda: next(alone)
    measured["both"] = lambda: both.train_on_batch(*next(stream))
    return _rows(_interleaved(measured, steps), own)


def of_methods(
    experiment: Experiment, names: Iterable[str], steps: int
) -> list[tuple[str, str, str, str]]:
    """Times a train step and an answer of each method, all in turns.

    Args:
        experiment: The `Experiment`.
        names: List of methods; those that train nothing have no step.
        steps: Integer, measured steps of each.

    Returns:
        List of `(method, "step" or "answer", median in ms, that as a multiple of the
        single-task networks')`.
    """
    recipe, tasks = experiment.recipe, experiment.tasks
    fixed = next(
        iter(
            batches.pipeline(recipe).train_batches(
                experiment.train_examples, recipe, tasks, seed=0, steps=range(1)
            )
        )
    )
    measured: dict[tuple[str, str], Callable[[], Any]] = {}
    for name in dict.fromkeys((BASELINE, *names)):
        if methods.plan(name, recipe).schedule is None:
            continue
        model = _model(experiment, name, recipe.training.dtype)
        answers = fitting.answering(model, tasks)
        step = functools.partial(model.train_on_batch, *fixed)
        answer = functools.partial(answers.predict_on_batch, fixed[0])
        measured |= {(name, "step"): step, (name, "answer"): answer}
    found = _interleaved(measured, steps)
    return [
        (*key, f"{ms:.2f}", f"{ms / found[BASELINE, key[1]]:.3f}")
        for key, ms in found.items()
    ]


def _interleaved(
    measured: Mapping[Any, Callable[[], Any]], steps: int
) -> dict[Any, float]:
    """{what: median time in ms} of functions that are called in turns."""
    for step in measured.values():  # traces the steps
        step()
    times: dict[Any, list[float]] = {key: [] for key in measured}
    for _ in range(steps):
        for key, step in measured.items():
            start = time.perf_counter()
            step()
            times[key].append(1000 * (time.perf_counter() - start))
    return {key: statistics.median(x) for key, x in times.items()}


def _model(experiment: Experiment, method: str, dtype: str) -> keras.Model:
    recipe = recipes.change(experiment.recipe, "training", dtype=dtype)
    plan = methods.plan(method, recipe)
    model = plan.join(towers.build(plan.recipe, experiment.tasks, seed=0))
    return fitting.compiled(model, experiment.tasks, plan.recipe, 1e-4)


def _rows(ms: Mapping[Any, float], own: str) -> list[tuple[str, str, str]]:
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
