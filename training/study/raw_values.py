"""The raw values of a study's runs, as the CSV files that its tables are made of."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from training import recipes
from training.files import Row, read_csv, write_csv
from training.provenance import Made
from training.runs import Experiment
from training.study import delta_m
from training.study.recorded import Run, tidy
from training.study.results import ALL_TASKS, read_rows
from training.study.studies import Planned

SIZES = ("method", "parameters", "multiply_adds", "recipe")


def check(planned: Iterable[Planned], results: Path) -> None:
    """Raises a ValueError for what `write` would refuse once the first run is done."""
    for path, of_path in by_file(planned, results).items():
        for run in of_path:
            if (run.folder / "recipe.json").exists():
                run.experiment.claim(run.method, run.seed)
        _made_of(path, of_path)


def write(planned: Sequence[Planned], results: Path) -> list[Path]:
    """Writes the raw values of the finished runs, and returns the files' paths.

    A file per recipe and study, `<results>/<recipe>/<study>.csv`: seed by seed, the
    methods as they are planned. What it holds of other runs, of other seeds or from
    other machines, it keeps. Beside it `sizes.csv` says what each method's model costs.
    Where no run has such values, as those of classes, there is no file.

    Raises:
        ValueError: If a run is of another recipe than the study's, or if a file holds
            rows of another recipe or dtype: what is to be made anew.
    """
    finished = [run for run in planned if run.finished]
    for run in finished:
        run.experiment.claim(run.method, run.seed)
    files = by_file(finished, results)
    all_planned = by_file(planned, results)
    lines = {
        path: _merged(path, of_path, [run.method for run in all_planned[path]])
        for path, of_path in files.items()
    }
    written = []
    for path, of_runs in lines.items():
        body = list(itertools.chain.from_iterable(of_runs.values()))
        if body:  # as of classes there is none where no task has any
            write_csv(path, (*Row._fields, *Made._fields), body)
            _write_sizes(path.with_name("sizes.csv"), files[path])
            written.append(path)
    return written


def by_file(planned: Iterable[Planned], results: Path) -> dict[Path, list[Planned]]:
    """{path that `write` would write: its runs}."""
    files: dict[Path, list[Planned]] = {}
    for run in planned:
        path = results / run.experiment.recipe.name / f"{run.study}.csv"
        files.setdefault(path, []).append(run)
    return files


def _write_sizes(path: Path, finished: Sequence[Planned]) -> None:
    """What each method's model costs, which is the same for all seeds.

    What the file holds of other methods of the same recipe is kept.
    """
    digest = finished[0].experiment.digest
    known = read_csv(path, missing_ok=True)
    lines: dict[str, tuple] = {
        x["method"]: tuple(x.values()) for x in known if x["recipe"] == digest
    }
    for run in finished:
        costs = Run(run.folder).costs
        if "parameters" in costs:  # a run of before has none
            sizes = costs["parameters"], costs["multiply_adds"]
            lines[run.method] = (run.method, *sizes, digest)
    if lines:
        write_csv(path, SIZES, lines.values())


def _merged(
    path: Path, finished: Sequence[Planned], methods: list[str]
) -> dict[tuple[str, int], list[tuple]]:
    """{(method, seed): lines} of the file and of the runs, with each run's Delta_m.

    Seed by seed, the methods in the order of the plan; what is not in it comes last.
    """

    def place(of_run: tuple[str, int]) -> tuple[int, int]:
        method, seed = of_run
        return seed, [*methods, method].index(method)

    known = read_rows(path) if path.exists() else []
    made = _made_of(path, finished)
    new = {(run.method, run.seed): _rows(run) for run in finished}
    kept = [
        row
        for row, _ in known
        if (row.method, row.seed) not in new and row.task != ALL_TASKS
    ]
    rows = [*kept, *itertools.chain.from_iterable(new.values())]
    lines: dict[tuple[str, int], list[tuple]] = {
        of_run: [] for of_run in sorted(made, key=place)
    }
    for row in (*rows, *delta_m.rows(rows)):
        of_run = row.method, row.seed
        lines[of_run].append((*row, *made[of_run]))
    return lines


def _made_of(path: Path, planned: Sequence[Planned]) -> dict[tuple[str, int], Made]:
    """{(method, seed): what made it} of the file's runs and of those that are finished.

    All are of one recipe, dtype and data.
    """
    known = read_rows(path) if path.exists() else []
    made = {(row.method, row.seed): by for row, by in known}
    made |= {(run.method, run.seed): _made(run) for run in planned if run.finished}
    now = _of_experiment(planned[0].experiment)
    others = [
        f"{x}, seed {seed}" for (x, seed), by in made.items() if by[:3] != now[:3]
    ]
    if others:
        raise ValueError(
            f"Expected the rows of {path} to be of the recipe {now.recipe} in "
            f"{now.dtype}, on the data {now.data}, as those of this study. Of another, "
            f"or unknown, are: {'; '.join(others)}. Make these anew, all of their "
            "seeds, with another folder as --results; once they are finished, this one "
            "takes them"
        )
    return made


def _made(run: Planned) -> Made:
    return _of_experiment(run.experiment)._replace(**Run(run.folder).made_by)


def _of_experiment(experiment: Experiment) -> Made:
    return Made(
        experiment.digest, experiment.recipe.training.dtype, experiment.data_digest
    )


def _rows(run: Planned) -> list[Row]:
    """The run's metrics, and what else its study is about, as tidy rows."""
    left = Run(run.folder)
    values: Any = left.json("metrics")
    if run.study == "per-class":
        values = {}
        for row in left.csv("per_class"):
            metric = f"{row['metric']}/{row['class']}"
            values.setdefault(row["task"], {})[metric] = row["value"]
    if run.study == "alpha":
        values = _alphas(run)
    return tidy(run.method, run.seed, values)


def _alphas(run: Planned) -> dict[str, dict[str, float]]:
    """{task: {"alpha/<unit>/from_<source>/<statistic>": value}}, of units if any."""
    tasks = sorted(recipes.kinds(run.experiment.recipe.data))  # as alpha's axes are
    values: dict[str, dict[str, float]] = {task: {} for task in tasks}
    for unit, alpha in Run(run.folder).alphas.items():
        for (i, task), (j, source) in itertools.product(
            enumerate(tasks), enumerate(tasks)
        ):
            name = f"alpha/{unit.removeprefix('cross_stitch_')}/from_{source}"
            for statistic in ("mean", "std", "min", "max"):
                value = float(getattr(alpha[i, j], statistic)())
                values[task][f"{name}/{statistic}"] = round(value, 4)
    return values
