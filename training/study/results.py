"""Raw values, and what the seeds come to: mean, deviation, difference to a baseline.

Knows nothing of how a table is shown.
"""

import csv
import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from scipy.stats import t as student_t

from training.files import Row
from training.methods import METHODS
from training.metric import Metric
from training.provenance import Made
from training.tasks import TASKS

METRICS = {
    **{name: x for task in TASKS.values() for name, x in task.metrics.items()},
    "alpha": Metric("alpha", "", None),
    "delta_m": Metric("Δm", "%", True),
}
PUBLISHED = Path(__file__).parents[2] / "docs" / "results"
ALL_TASKS = "all tasks"  # what Delta_m is of
# Who shares, chooses between these; and the control that tells what is sharing.
_RIVALS = ("hard_sharing", "own_maps_from_start")
LEVEL = 0.05  # at which a difference is certain

Key = tuple[str, str]  # (task, metric)
OfMetric = dict[str, dict[int, float]]  # {method: {seed: value}}
Values = dict[Key, OfMetric]
_Hypothesis = TypeVar("_Hypothesis", bound=Hashable)


class Difference(NamedTuple):
    """A mean paired difference, the ends of its 95 % t-interval, and its p-value."""

    mean: float
    low: float
    high: float
    seeds: int
    p: float  # of the paired t-test


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the seeds of one method come to in one metric."""

    mean: float
    deviation: float | None  # `None` with one seed
    seeds: int
    metric: Metric
    difference: Difference | None = None  # to the baseline
    certain: bool = False  # that there is a difference, by Holm over the table
    best: bool = False  # certainly better than the baseline and all other methods

    @property
    def value(self) -> str:
        sign = "+" if self.is_change else ""
        digits = self.metric.digits
        if self.deviation is None:
            return f"{self.mean:{sign}.{digits}f}"
        digits += 1
        return f"{self.mean:{sign}.{digits}f} ± {self.deviation:.{digits}f}"

    @property
    def change(self) -> str:
        """The difference alone, with its interval; the value of what has none."""
        if self.difference is None:
            return self.value
        digits = self.metric.digits + 1
        mean = f"{self.mean:+.{digits}f} " if self.is_change else ""
        return f"{mean}{self.gain}"

    @property
    def gain(self) -> str:
        if self.difference is None:
            return ""
        mean, low, high, seeds, _ = self.difference
        digits = self.metric.digits + 1
        pairs = f"; {seeds} seeds" if seeds != self.seeds else ""
        interval = f"({low:+.{digits}f} to {high:+.{digits}f}{pairs})"
        change = "" if self.is_change else f"{mean:+.{digits}f} "
        return f"{change}{interval}{' †' if self.certain else ''}"

    @property
    def is_change(self) -> bool:
        """Whether the value is a change to the baseline itself, as Delta_m is."""
        return self.metric == METRICS["delta_m"]


@dataclasses.dataclass(frozen=True)
class Table:
    """The methods of one task: a cell, or `None`, for each metric."""

    task: str
    metrics: list[str]
    cells: dict[str, list[Cell | None]]
    # Cross-stitch against each of `_RIVALS`: a cell, as it differs, for each metric.
    rivals: dict[tuple[str, str], list[Cell | None]]
    paper: dict[str, list[float | None]]  # the paper's values, by method

    @property
    def baselines(self) -> dict[str, str]:
        """The baseline of each method that a difference is given for."""
        return {
            method: of
            for method, cells in self.cells.items()
            if (of := baseline(method))
            and any(cell and cell.difference for cell in cells)
        }

    def seeds(self, method: str) -> str:
        """The number of seeds as text, "2 or 3" where the metrics have not the same."""
        counts = sorted({cell.seeds for cell in self.cells[method] if cell})
        return " or ".join(map(str, counts))


def read_rows(path: Path) -> list[tuple[Row, Made]]:
    """The rows of a tidy CSV file, each with what it was made by.

    Returns:
        List of `(Row, Made)`.

    Raises:
        ValueError: For a file with other columns, or a value that is no number.
    """
    expected = (*Row._fields, *Made._fields)
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != expected:
            raise ValueError(
                f"Expected the columns {','.join(expected)} in {path}. "
                f"Received: {','.join(reader.fieldnames or ())}"
            )
        try:
            return [
                (
                    Row(
                        x["method"],
                        int(x["seed"]),
                        x["task"],
                        x["metric"],
                        float(x["value"]),
                    ),
                    Made(*(x[name] for name in Made._fields)),
                )
                for x in reader
            ]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def metric(name: str) -> Metric:
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


def label(method: str) -> str:
    """A method's name as prose.

    >>> label("split@conv4"), label("single_task_as_long@epochs=9,dropout=0.5")
    ('split at conv4', 'single-task, as long, epochs 9, dropout 0.5')
    >>> label("split@fc6,epochs=9")
    'split at fc6, epochs 9'
    """
    name, _, options = method.partition("@")
    # A folder of runs may hold methods of before.
    name = METHODS[name].label if name in METHODS else name.replace("_", " ")
    layer, _, rest = options.partition(",")
    if layer and "=" not in layer:
        name, options = f"{name} at {layer.replace('_', ' ')}", rest
    if not options:
        return name
    for old, new in (("_", " "), ("=", " "), ('"', ""), (",", ", ")):
        options = options.replace(old, new)
    return f"{name}, {options}"


def baseline(method: str) -> str | None:
    """The method that a method is compared with, `None` for a baseline.

    Its towers are trained as long, by whatever `epochs`.

    >>> baseline("split@conv4"), baseline("cross_stitch@epochs=8,same_task=0.5")
    ('single_task_as_long', 'single_task_longer@epochs=8')
    """
    name, _, options = method.partition("@")
    known = METHODS.get(name)
    if known is None or known.baseline is None:
        return None
    epochs = [x for x in options.split(",") if x.startswith("epochs=")]
    return known.baseline + (f"@{','.join(epochs)}" if epochs else "")


def by_seed(rows: Iterable[Row]) -> Values:
    """The values as `{(task, metric): {method: {seed: value}}}`.

    Raises:
        ValueError: Where a value stands twice.
    """
    values: Values = {}
    for method, seed, task, name, value in rows:
        seeds = values.setdefault((task, name), {}).setdefault(method, {})
        if seed in seeds:
            raise ValueError(f"{method}, seed {seed}, has {task} {name} twice")
        seeds[seed] = value
    return values


def paired_difference(
    values: Mapping[int, float], of_baseline: Mapping[int, float]
) -> Difference | None:
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
    error = float(differences.std(ddof=1) / np.sqrt(len(seeds)))
    half = float(student_t.ppf(0.975, len(seeds) - 1) * error)
    if error:
        p = float(2 * student_t.sf(abs(mean) / error, len(seeds) - 1))
    else:
        p = 0.0 if mean else 1.0
    return Difference(mean, mean - half, mean + half, len(seeds), p)


def prediction_interval(values: Iterable[float]) -> tuple[float, float] | None:
    """Where one more seed is with 95 % chance, by those before; `None` for few.

    Args:
        values: The values of the seeds before. Of fewer than three, it says nothing.
    """
    known = np.array(list(values))
    if len(known) < 3:
        return None
    spread = known.std(ddof=1) * np.sqrt(1 + 1 / len(known))
    half = float(student_t.ppf(0.975, len(known) - 1) * spread)
    return float(known.mean()) - half, float(known.mean()) + half


def holm(p_values: Mapping[_Hypothesis, float]) -> set[_Hypothesis]:
    """Which of several hypotheses are rejected, at 5 % for all together (Holm, 1979).

    Args:
        p_values: Dict of hypothesis to its p-value. One of NaN is not rejected.

    Returns:
        Set of hypotheses.

    Example:

    >>> sorted(holm({"a": 0.012, "b": 0.6, "c": 0.024}))
    ['a', 'c']
    >>> holm({"a": 0.02, "b": 0.6, "c": 0.024})
    set()
    """
    rejected = set()
    finite = {x: p for x, p in p_values.items() if np.isfinite(p)}
    for k, (hypothesis, p) in enumerate(sorted(finite.items(), key=lambda x: x[1])):
        if p > LEVEL / (len(p_values) - k):
            break
        rejected.add(hypothesis)
    return rejected


def statistics(
    rows: Sequence[Row], of_paper: Mapping[str, Mapping[Key, float]] | None = None
) -> list[Table]:
    """One `Table` per task; methods, tasks and metrics in the order of the rows.

    The last column of each is Delta_m, where the rows have it. Which differences are
    certain is decided over all of these tables together.

    Args:
        rows: List of `Row`, see `delta_m.rows`.
        of_paper: The paper's values, as `paper.table` gives them.
    """
    values = by_seed(rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    columns = {key: _column(key, of_metric) for key, of_metric in values.items()}
    pairs = _rivals(methods)
    # {(key, method or pair of rivals): cell}
    cells: dict[tuple[Key, Hashable], Cell] = {
        (key, method): cell
        for key, column in columns.items()
        for method, cell in column.items()
    }
    cells |= {
        (key, pair): cell
        for key, of_metric in values.items()
        for pair in pairs
        if (cell := _against(key, pair, of_metric))
    }
    certain = holm(
        {x: cell.difference.p for x, cell in cells.items() if cell.difference}
    )
    best = {(key, _best(key, columns[key], values[key])) for key in values} & certain
    cells = {
        x: dataclasses.replace(cell, certain=x in certain, best=x in best)
        for x, cell in cells.items()
    }

    def rows_of(
        compared: Iterable[_Hypothesis], keys: list[Key]
    ) -> dict[_Hypothesis, list[Cell | None]]:
        """{method or pair: its cell for each key}, of those that have any."""
        found = {x: [cells.get((key, x)) for key in keys] for x in compared}
        return {x: row for x, row in found.items() if any(row)}

    tables = []
    for task in dict.fromkeys(row.task for row in rows if row.task != ALL_TASKS):
        keys = [key for key in values if key[0] == task]
        keys += [key for key in values if key[0] == ALL_TASKS]
        reference = {
            method: [known.get(key) for key in keys]
            for method, known in (of_paper or {}).items()
            if any(key in known for key in keys)
        }
        names = [name for _, name in keys]
        tables.append(
            Table(task, names, rows_of(methods, keys), rows_of(pairs, keys), reference)
        )
    return tables


def _column(key: Key, of_metric: OfMetric) -> dict[str, Cell]:
    """{method: Cell}, without marks."""
    cells = {}
    for method, values in of_metric.items():
        known = np.array(list(values.values()))
        cells[method] = Cell(
            float(known.mean()),
            float(known.std(ddof=1)) if len(known) > 1 else None,
            len(known),
            metric(key[1]),
            _difference(key, method, of_metric),
        )
    return cells


def _difference(key: Key, method: str, of_metric: OfMetric) -> Difference | None:
    """To the method's baseline, or of Delta_m, which has it in it, to zero."""
    task, name = key
    if task == ALL_TASKS:
        return paired_difference(of_metric[method], dict.fromkeys(of_metric[method], 0))
    if metric(name).higher_is_better is None:
        return None
    return paired_difference(
        of_metric[method], of_metric.get(baseline(method) or "", {})
    )


def _rivals(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Cross-stitch and each of `_RIVALS` with the same options."""
    known = list(methods)
    pairs = []
    for method in known:
        name, at, options = method.partition("@")
        for rival in _RIVALS:
            if name == "cross_stitch_from_start" and f"{rival}{at}{options}" in known:
                pairs.append((method, f"{rival}{at}{options}"))
    return pairs


def _against(key: Key, pair: tuple[str, str], of_metric: OfMetric) -> Cell | None:
    """How the first method differs from the second, over the seeds of both."""
    if metric(key[1]).higher_is_better is None:
        return None
    ours, theirs = (of_metric.get(method, {}) for method in pair)
    known = paired_difference(ours, theirs)
    if known is None:
        return None
    return Cell(known.mean, None, known.seeds, metric(key[1]), known)


def _best(key: Key, column: dict[str, Cell], of_metric: OfMetric) -> str | None:
    """The method that is better than its baseline and than all others, by Holm."""
    higher = metric(key[1]).higher_is_better
    if higher is None or len(column) < 2:
        return None
    best = (max if higher else min)(column, key=lambda method: column[method].mean)
    others = {
        method: paired_difference(of_metric[best], values)
        for method, values in of_metric.items()
        if method != best
    }
    apart = holm({x: known.p if known else 1.0 for x, known in others.items()})
    # Means of other seeds may say what those of the same seeds do not.
    ahead = [column[best].difference, *others.values()]
    gains = all(known and (known.mean > 0) == higher for known in ahead)
    return best if gains and apart == set(others) else None
