"""Delta_m, how much better a method is over all tasks: one number a method and seed.

The mean over tasks of the mean over a task's metrics of the change relative to the
baseline, in percent, signed so that more is better (Maninis et al., 2019; Vandenhende
et al., 2021):

    delta_m = 100 / T sum_t 1 / K_t sum_k s_tk (M_tk - B_tk) / B_tk

with s = 1 where a higher value is better, and -1 where a lower one is.
"""

from collections.abc import Callable, Iterable

import numpy as np

from training.files import Row
from training.study.results import ALL_TASKS, baseline, metric

SAYS = (  # wherever a table shows it
    "Δm: the mean over tasks of the mean over their metrics of the change relative to "
    "the baseline, in percent, more being better"
)


def rows(
    of_tasks: Iterable[Row], against: Callable[[str], str | None] = baseline
) -> list[Row]:
    """A row of Delta_m for each run whose baseline, of the same seed, is among them.

    Against the compute-matched baseline of each method, if no other is given. A run
    that lacks a metric of its baseline's has none, nor has one whose baseline has a 0,
    to which no change is relative, nor one with a metric that is no number, as of
    normals without a pixel.
    """
    values: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
    for row in of_tasks:
        # Neither a count nor the score of a single class.
        if metric(row.metric).higher_is_better is not None and "/" not in row.metric:
            of_run = values.setdefault((row.method, row.seed), {})
            of_run[row.task, row.metric] = row.value
    found = []
    for (method, seed), ours in values.items():
        theirs = values.get((against(method) or "", seed), {})
        known = np.isfinite([*ours.values(), *theirs.values()]).all()
        if ours.keys() == theirs.keys() and known and all(theirs.values()):
            value = round(delta_m(ours, theirs), 3)
            found.append(Row(method, seed, ALL_TASKS, "delta_m", value))
    return found


def delta_m(
    ours: dict[tuple[str, str], float], theirs: dict[tuple[str, str], float]
) -> float:
    """Delta_m in percent, of the values {(task, metric): value} of two runs."""
    changes: dict[str, list[float]] = {}
    for (task, name), value in ours.items():
        change = (value - theirs[task, name]) / theirs[task, name]
        sign = 1 if metric(name).higher_is_better else -1
        changes.setdefault(task, []).append(sign * change)
    return 100 * float(np.mean([np.mean(of_task) for of_task in changes.values()]))
