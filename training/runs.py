"""A run, (recipe, method, seed), and its folder.

`<runs>/<recipe>/<method>/seed<seed>/` holds

    recipe.json    what the result depends on, and no more
    history.csv    losses, mean alphas and seconds by epoch
    alpha.npz      the units' alphas, where there are units
    made_by.json   commit, versions and processor that made it
    answers.json   what each task's answers mean: names, colours, units
    model.keras    the trained model, which answers as it does when served
    per_class.csv  scores by class, of the tasks that have classes
    metrics.json   {task: {metric: value}} on the test split; written last
    .lock          who trains it, or did

and, while the run is going on, `backup/`, from which it resumes.
"""

import csv
import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from training import batches, methods, provenance, towers
from training.datasets import prepared, proposals
from training.recipes import Recipe, RegionData
from training.tasks import TASKS


class Row(NamedTuple):
    """One raw value, as a line of a tidy CSV file."""

    method: str
    seed: int
    task: str
    metric: str
    value: float


@dataclasses.dataclass(eq=False)
class Experiment:
    """A recipe on its prepared data, and where its runs are kept."""

    recipe: Recipe
    builder: tfds.core.DatasetBuilder | None  # `None` to look at its runs alone
    runs: Path

    @functools.cached_property
    def tasks(self):
        return {
            name: TASKS[name].for_dataset(self.builder)
            for name in self.recipe.data.tasks
        }

    @functools.cached_property
    def train_examples(self):
        data = self.recipe.data
        kind = batches.pipeline(self.recipe)
        return kind.load(self.builder, data.train_split, data, self.tasks)

    @functools.cached_property
    def _data(self):
        """What identifies the prepared data."""
        found = {"examples": prepared.digest(self.builder)}
        data = self.recipe.data
        if isinstance(data, RegionData):
            splits = (data.train_split, data.test_split)
            found["proposals"] = proposals.digest(self.builder, splits)
        return found

    @property
    def digest(self):
        """What tells the recipe from any other, but for names, its own and files'."""
        content = _said(self.recipe)
        del content["name"]
        content["tower"] |= towers.identity(self.recipe.tower)
        return provenance.digest(content)

    def folder(self, method, seed):
        return self.runs / self.recipe.name / method / f"seed{seed}"

    def depends_on(self, method, seed):
        """What the result of a run depends on, as JSON has it."""
        plan = methods.plan(method, self.recipe)
        depends = {**plan.depends_on, "seed": seed}
        if plan.schedule:
            depends |= self._data
        if "tower" in depends:
            depends["tower"] |= towers.identity(plan.recipe.tower)
        starts = [
            self.depends_on(plan.method.start, seed + offset)
            for offset in plan.method.seeds
            if plan.method.start
        ]
        if starts:
            depends["starts_from"] = starts
        return json.loads(json.dumps(depends))

    def claim(self, method, seed):
        """Checks that the run is of this recipe, see `claim`."""
        claim(self.folder(method, seed), self.depends_on(method, seed))


def open_experiment(recipe, data, runs):
    """The recipe with its data prepared under `<runs>/datasets`, once.

    Args:
        recipe: The `Recipe`.
        data: Path of the folder with the original files, or `None`.
        runs: Path of all runs.
    """
    return Experiment(recipe, prepared.prepare(recipe, data, runs / "datasets"), runs)


def claim(folder, depends):
    """Writes down what the run depends on, or checks that it is as it was begun."""
    path = folder / "recipe.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(depends, indent=2))
    changed = _differences(json.loads(path.read_text()), depends)
    if changed:
        raise ValueError(
            f"{folder} was begun with another recipe: {', '.join(changed)} changed. "
            "Remove that folder, or give another one with --runs"
        )


def metrics(folder):
    """`{task: {metric: value}}` of a finished run, `None` of any other."""
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else None


def rows(method, seed, of_run):
    """A run's metrics as tidy rows."""
    return [
        Row(method, seed, task, metric, value)
        for task, values in of_run.items()
        for metric, value in values.items()
    ]


def write_csv(path, header, body):
    """Writes a CSV file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    with open(unfinished, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *body])
    os.replace(unfinished, path)


def write(path, text):
    unfinished = path.with_name(f"unfinished-{path.name}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _said(part: Any) -> Any:
    """A recipe's part as JSON, without what is as it is by default.

    So a setting that is new changes nothing for recipes that do not use it.
    """
    if not dataclasses.is_dataclass(part):
        return part
    return {
        field.name: _said(getattr(part, field.name))
        for field in dataclasses.fields(part)
        if getattr(part, field.name) != field.default
    }


def _differences(begun: Any, now: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, as `data.image_size`."""
    if isinstance(begun, dict) and isinstance(now, dict):
        return [
            place
            for key in {**begun, **now}
            for place in _differences(begun.get(key), now.get(key), f"{at}.{key}")
        ]
    if isinstance(begun, list) and isinstance(now, list) and len(begun) == len(now):
        return [
            place
            for index, (x, y) in enumerate(zip(begun, now, strict=True))
            for place in _differences(x, y, f"{at}[{index}]")
        ]
    return [] if begun == now else [at.strip(".")]
