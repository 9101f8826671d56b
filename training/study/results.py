"""Raw values, and what the seeds come to: mean, deviation, difference to a baseline.

Knows nothing of how a table is shown.
"""

import csv
import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from training.methods import METHODS
from training.metric import Metric
from training.runs import Row
from training.tasks import TASKS

METRICS = {
    **{name: x for task in TASKS.values() for name, x in task.metrics.items()},
    "alpha": Metric("alpha", "", None),
}


class Difference(NamedTuple):
    """A mean paired difference with the ends of its 95 % t-interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self):
        return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the seeds of one method come to in one metric."""

    mean: float
    deviation: float | None  # `None` with one seed
    seeds: int
    difference: Difference | None = None  # to the baseline
    best: bool = False  # of all methods, by more than chance

    @property
    def value(self):
        if self.deviation is None:
            return f"{self.mean:.1f}"
        return f"{self.mean:.2f} ± {self.deviation:.2f}"

    @property
    def gain(self):
        if self.difference is None:
            return ""
        mean, low, high, seeds = self.difference
        pairs = f"; {seeds} seeds" if seeds != self.seeds else ""
        return f"{mean:+.2f} ({low:+.2f} to {high:+.2f}{pairs})"


@dataclasses.dataclass(frozen=True)
class Table:
    """The methods of one task: a cell, or `None`, for each metric."""

    task: str
    metrics: list[str]
    cells: dict[str, list[Cell | None]]
    paper: dict[str, list[float | None]]  # the paper's values, by method

    @property
    def baselines(self):
        """The baseline of each method that a difference is given for."""
        return {
            method: baseline(method)
            for method, cells in self.cells.items()
            if any(cell and cell.difference for cell in cells)
        }

    def seeds(self, method):
        """The number of seeds as text, "2 or 3" where the metrics have not the same."""
        counts = sorted({cell.seeds for cell in self.cells[method] if cell})
        return " or ".join(map(str, counts))


def read_csv(path):
    """The rows of a tidy CSV file.

    Raises:
        ValueError: For a file with other columns, or a value that is no number.
    """
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != Row._fields:
            raise ValueError(
                f"Expected the columns {','.join(Row._fields)} in {path}. "
                f"Received: {','.join(reader.fieldnames or ())}"
            )
        try:
            return [
                Row(
                    x["method"],
                    int(x["seed"]),
                    x["task"],
                    x["metric"],
                    float(x["value"]),
                )
                for x in reader
            ]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def metric(name):
    """The `Metric` of a name, `miou` or, of one class, `iou/chair`."""
    kind, _, of = name.partition("/")
    if kind not in METRICS:
        raise ValueError(
            f"It is not known whether a higher '{name}' is better: add it to the "
            f"`metrics` of its task. There are: {', '.join(METRICS)}"
        )
    known = METRICS[kind]
    label = f"{known.label}, {of.replace('/', ', ')}" if of else known.label
    return dataclasses.replace(known, label=label)


def label(method):
    """A method's name as prose.

    >>> label("split@conv4"), label("cross_stitch@same_task=0.5,per=layer")
    ('split at conv4', 'cross-stitch, same task 0.5, per layer')
    """
    name, _, options = method.partition("@")
    # A folder of runs may hold methods of before.
    name = METHODS[name].label if name in METHODS else name.replace("_", " ")
    options = options.replace("_", " ")
    if not options:
        return name
    if "=" not in options:
        return f"{name} at {options}"
    return f"{name},{options}".replace("=", " ").replace('"', "").replace(",", ", ")


def baseline(method):
    """The method that a method is compared with, `None` for a baseline."""
    known = METHODS.get(method.partition("@")[0])
    return known.baseline if known else None


def by_seed(rows):
    """The values as `{(task, metric): {method: {seed: value}}}`.

    Raises:
        ValueError: Where a value stands twice.
    """
    values: dict = {}
    for method, seed, task, name, value in rows:
        seeds = values.setdefault((task, name), {}).setdefault(method, {})
        if seed in seeds:
            raise ValueError(f"{method}, seed {seed}, has {task} {name} twice")
        seeds[seed] = value
    return values


def paired_difference(values, of_baseline):
    """The `Difference` over the seeds that both have, `None` for fewer than two.

    Args:
        values: Dict of seed to value.
        of_baseline: Dict of seed to value.
    """
    seeds = values.keys() & of_baseline.keys()
    if len(seeds) < 2:
        return None
    differences = np.array([values[seed] - of_baseline[seed] for seed in seeds])
    mean = float(differences.mean())
    error = differences.std(ddof=1) / np.sqrt(len(seeds))
    half = float(student_t.ppf(0.975, len(seeds) - 1) * error)
    return Difference(mean, mean - half, mean + half, len(seeds))


def statistics(rows, of_paper=None):
    """One `Table` per task; methods, tasks and metrics in the order of the rows.

    Args:
        rows: List of `Row`.
        of_paper: The paper's values, as `paper.table` gives them.
    """
    values = by_seed(rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    tables = []
    for task in dict.fromkeys(row.task for row in rows):
        metrics = [name for of, name in values if of == task]
        columns = [
            _column(values[task, name], metric(name).higher_is_better)
            for name in metrics
        ]
        cells = {
            method: [column.get(method) for column in columns]
            for method in methods
            if any(method in column for column in columns)
        }
        reference = {
            method: [known.get((task, name)) for name in metrics]
            for method, known in (of_paper or {}).items()
            if any((task, name) in known for name in metrics)
        }
        tables.append(Table(task, metrics, cells, reference))
    return tables


def _column(of_metric, higher_is_better):
    """{method: Cell}. The best one is marked where its interval excludes zero."""
    cells = {}
    for method, values in of_metric.items():
        known = np.array(list(values.values()))
        deviation = float(known.std(ddof=1)) if len(known) > 1 else None
        difference = None
        if higher_is_better is not None:
            difference = paired_difference(values, of_metric.get(baseline(method), {}))
        cells[method] = Cell(float(known.mean()), deviation, len(known), difference)
    if higher_is_better is None:
        return cells
    best = (max if higher_is_better else min)(
        cells, key=lambda method: cells[method].mean
    )
    difference = cells[best].difference
    if (
        difference
        and difference.excludes_zero
        and (difference.mean > 0) == higher_is_better
    ):
        cells[best] = dataclasses.replace(cells[best], best=True)
    return cells
