"""What runs left in their folders, `<runs>/<recipe>/<method>/seed<seed>/`.

Reads files and trains nothing; opens no model and no data set.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.files import Row, read_csv, read_json
from training.methods import METHODS
from training.study.results import Key, baseline, metric

# {what a run costs: (its title, one unit of it)}
COSTS = {
    "parameters": ("parameters, million", 1e6),
    "multiply_adds": ("multiply-adds an image, billion", 1e9),
    "seconds": ("trained, minutes", 60),
}


def shown_costs(costs: Mapping[str, float]) -> list[str]:
    """A text for each of `COSTS`, empty for what is not known, of `Run.costs`."""
    return [
        f"{float(f'{costs[name] / unit:.3g}'):g}" if name in costs else ""
        for name, (_, unit) in COSTS.items()
    ]


def tidy(
    method: str, seed: int, of_run: Mapping[str, Mapping[str, float]]
) -> list[Row]:
    """A run's {task: {metric: value}} as tidy rows."""
    return [
        Row(method, seed, task, name, value)
        for task, values in of_run.items()
        for name, value in values.items()
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path

    @property
    def method(self) -> str:
        return self.folder.parent.name

    @property
    def seed(self) -> int:
        return int(self.folder.name.removeprefix("seed"))

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").exists()

    @property
    def rows(self) -> list[Row]:
        return tidy(self.method, self.seed, self.json("metrics"))

    @property
    def losses(self) -> dict[str, list[float]]:
        """{task: training losses by epoch}."""
        return {k: v for k, v in self._losses().items() if not k.startswith("val_")}

    @property
    def validation_losses(self) -> dict[str, list[float]]:
        """{task: losses by epoch on what is held out}, empty where nothing is."""
        return {
            k.removeprefix("val_"): v
            for k, v in self._losses().items()
            if k.startswith("val_")
        }

    def _losses(self) -> dict[str, list[float]]:
        lines = self.csv("history")
        return {
            name.removesuffix("_loss"): [float(line[name]) for line in lines]
            for name in (lines or [{}])[0]
            if name.endswith("_loss") and name != "val_loss"
        }

    @property
    def weighed(self) -> bool:
        """Whether its losses are told as they were weighed in training."""
        return bool(self.json("recipe").get("training", {}).get("loss_weighting"))

    @property
    def made_by(self) -> dict[str, str]:
        """Commit, versions and processor, empty where they were not written down."""
        return self.json("made_by") if (self.folder / "made_by.json").exists() else {}

    @property
    def alphas(self) -> dict[str, np.ndarray]:
        """{unit: alpha}, empty for a method without units."""
        path = self.folder / "alpha.npz"
        if not path.exists():
            return {}
        with np.load(path) as units:
            return dict(units)

    @property
    def alphas_by_epoch(self) -> dict[tuple[str, ...], list[float]]:
        """{(unit, task, source): mean alphas by epoch}, empty without units."""
        lines = self.csv("history")
        columns: dict[tuple[str, ...], list[float]] = {}
        for name in (lines or [{}])[0]:
            kind, _, rest = name.partition("/")
            unit, _, pair = rest.partition("/")
            task, parted, source = pair.partition("_from_")
            if kind == "alpha" and parted:
                columns[unit, task, source] = [float(line[name]) for line in lines]
        return columns

    @property
    def costs(self) -> dict[str, float]:
        """{"parameters", "multiply_adds", "seconds" of all that was trained for it}.

        What the run has not kept is left out.
        """
        path = self.folder / "costs.json"
        counted = self.json("costs") if path.exists() else {}
        seconds = self._seconds()
        return {**counted, "seconds": seconds} if seconds else counted

    def _seconds(self) -> float:
        lines = self.csv("history")
        own = sum(float(line.get("seconds") or 0) for line in lines)
        known = METHODS.get(self.method.partition("@")[0])
        if known is None or not known.start:  # `None` for a method of before
            return own
        folder = self.folder.parents[1] / known.start
        starts = [Run(folder / f"seed{self.seed + x}") for x in known.seeds]
        return own + sum(start._seconds() for start in starts)

    @property
    def settings(self) -> dict[str, str]:
        """What the run depended on, as {dotted name: text}; the same for all seeds."""
        flat = _flat(self.json("recipe"))
        return {k: v for k, v in flat.items() if k.rpartition(".")[2] != "seed"}

    def json(self, name: str) -> Any:
        return read_json(self.folder / f"{name}.json")

    def csv(self, name: str) -> list[dict[str, str]]:
        """The lines of a CSV file, none where the run has no such file."""
        return read_csv(self.folder / f"{name}.csv", missing_ok=True)


def by_method(folder: Path, finished: bool = True) -> dict[str, list[Run]]:
    """{method: its runs} of a recipe's folder, finished or stopped, by seed."""
    grouped: dict[str, list[Run]] = {}
    for path in folder.glob("*/seed*/recipe.json"):
        run = Run(path.parent)
        if not run.folder.name.removeprefix("seed").isdecimal():
            continue  # renamed, as a copy is
        if run.finished == finished:
            grouped.setdefault(run.method, []).append(run)
    return {
        method: sorted(runs, key=lambda run: run.seed)
        for method, runs in sorted(grouped.items(), key=lambda x: _natural(x[0]))
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """By which `block7` comes before `block11`."""
    parts = re.split(r"(\d+)", name)
    return [(int(x) if x.isdecimal() else 0, x) for x in parts]


def epochs_before(methods: Mapping[str, Sequence[Run]]) -> dict[str, int]:
    """{method: epochs for which its towers had been trained before it began}."""
    lines = methods["single_task"][0].csv("history") if "single_task" in methods else []
    return {
        method: len(lines)
        for method in methods
        if "single_task_longer" in (name := method.partition("@")[0], baseline(name))
    }


def class_changes(
    runs: Iterable[Run], baselines: Iterable[Run]
) -> dict[Key, tuple[list[str], np.ndarray, np.ndarray]]:
    """By how much a method changes the score of each class, seed by seed.

    Returns:
        Dict of (task, metric) to (classes, changes, counts): a list of C names, an
        array (seeds, C) and an array (C,), how frequent they are. Classes without a
        score are left out.
    """
    ours = {run.seed: _by_class(run) for run in runs}
    theirs = {run.seed: _by_class(run) for run in baselines}
    seeds = sorted(seed for seed in ours if ours[seed] and theirs.get(seed))
    changes = {}
    first = ours[seeds[0]] if seeds else {}
    # What is counted is neither good nor bad. What train has comes last, and counts.
    counted = {task: x for (task, name), x in first.items() if _is_count(name)}
    for task, name in first:
        if _is_count(name):
            continue
        pairs = [(ours[seed][task, name], theirs[seed][task, name]) for seed in seeds]
        by_name = {
            of: [after[of] - before[of] for after, before in pairs]
            for of in counted[task]
            if all(of in scores for pair in pairs for scores in pair)
        }
        counts = np.array([counted[task][of] for of in by_name])
        changes[task, name] = (
            list(by_name),
            np.array(list(by_name.values())).T,
            counts,
        )
    return changes


def label_fraction(runs: Iterable[Run]) -> tuple[str, float] | None:
    """The (task, fraction) whose labels the runs had in part, `None` where not told."""
    for run in runs:
        known = run.json("recipe").get("data", {}).get("label_fraction")
        if known:
            return tuple(known)
    return None


def _is_count(name: str) -> bool:
    return metric(name).higher_is_better is None


def _by_class(run: Run) -> dict[Key, dict[str, float]]:
    """{(task, metric): {class: value}}."""
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for line in run.csv("per_class"):
        of_metric = scores.setdefault((line["task"], line["metric"]), {})
        if np.isfinite(value := float(line["value"] or "nan")):
            of_metric[line["class"]] = value
    return scores


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested JSON as {dotted name: text}."""
    if isinstance(value, list) and any(isinstance(x, dict) for x in value):
        value = dict(enumerate(value, start=1))
    if isinstance(value, dict):
        inner = (_flat(x, f"{name}.{key}".strip(".")) for key, x in value.items())
        return {key: text for part in inner for key, text in part.items()}
    return {name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)}
