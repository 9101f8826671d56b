"""A run, (recipe, method, seed), and its folder.

`<runs>/<recipe>/<method>/seed<seed>/` holds

    recipe.json    what the result depends on, and no more
    history.csv    losses, mean alphas and seconds by epoch
    alpha.npz      the units' alphas, where there are units
    made_by.json   commit, versions and processor that made it
    costs.json     parameters and multiply-adds of the model
    answers.json   what each task's answers mean: names, colours, units
    model.keras    the trained model, which answers as it does when served
    per_class.csv  scores by class, of the tasks that have classes
    metrics.json   {task: {metric: value}} on the test split; written last
    full_resolution.json    the same as papers score NYUv2, where `evaluate` was asked
    .lock          who trains it, or did

and, while the run is going on, `backup/`, from which it resumes.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from training import batches, methods, provenance, towers
from training.datasets import prepared, proposals
from training.files import read_json, write_json
from training.recipes import Recipe, RegionData, change, find, kinds
from training.tasks import TASKS, Task


@dataclasses.dataclass(eq=False)
class Experiment:
    """A recipe on its prepared data, and where its runs are kept."""

    recipe: Recipe
    builder: tfds.core.DatasetBuilder | None  # `None` to look at its runs alone
    runs: Path

    @functools.cached_property
    def tasks(self) -> dict[str, Task]:
        data = self.recipe.data
        return {
            name: TASKS[kind].for_dataset(self.builder, data.train_split, name)
            for name, kind in kinds(data).items()
        }

    @functools.cached_property
    def train_examples(self) -> tuple:
        data = self.recipe.data
        kind = batches.pipeline(self.recipe)
        return kind.load(self.builder, data.train_split, data, self.tasks)

    @functools.cached_property
    def _data(self) -> dict[str, Any]:
        """What identifies the prepared data, and what the tasks took from them."""
        data = self.recipe.data
        features = batches.pipeline(self.recipe).features(self.tasks)
        found: dict[str, Any] = {
            "examples": prepared.digest(self.builder, features),
            "tasks": {name: _digest(task) for name, task in self.tasks.items()},
        }
        if isinstance(data, RegionData):
            splits = (data.train_split, data.test_split)
            found["proposals"] = proposals.digest(self.builder, splits)
        return found

    @property
    def digest(self) -> str:
        """What tells the recipe from any other, but for names, its own and files'."""
        content = _said(self.recipe)
        del content["name"]
        content["tower"] |= towers.identity(self.recipe.tower)
        return provenance.digest(content)

    @functools.cached_property
    def data_digest(self) -> str:
        """What tells the examples from those of other files.

        Unknown where none are read: the recipe tells what is rendered.
        """
        if not prepared.read_files(self.builder):
            return provenance.UNKNOWN
        return provenance.digest(self._data["examples"])

    def folder(self, method: str, seed: int) -> Path:
        return self.runs / self.recipe.name / method / f"seed{seed}"

    def depends_on(self, method: str, seed: int) -> dict[str, Any]:
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

    def claim(self, method: str, seed: int) -> None:
        """Checks that the run is of this recipe, see `claim`."""
        claim(self.folder(method, seed), self.depends_on(method, seed))


def open_experiment(recipe: Recipe, data: Path | None, runs: Path) -> Experiment:
    """The recipe with its data prepared under `<runs>/datasets`, once.

    Args:
        recipe: The `Recipe`.
        data: Path of the folder with the original files, or `None`.
        runs: Path of all runs.
    """
    if unknown := set(kinds(recipe.data).values()) - TASKS.keys():
        raise ValueError(
            f"There is no task '{min(unknown)}', which the recipe '{recipe.name}' "
            f"names. There are: {', '.join(TASKS)}"
        )
    directory = runs / "datasets"
    builder = prepared.prepare(recipe, data, directory)
    features = list(builder.info.features)
    for name, kind in kinds(recipe.data).items():
        if (name if hasattr(TASKS[kind], "feature") else "objects") not in features:
            raise ValueError(
                f"The data set '{recipe.data.dataset}' has no labels of {name}. Each "
                f"example has: {', '.join(features)}. Name tasks that it has, with "
                "--tasks or in the recipe"
            )
    train, test = recipe.data.train_split, recipe.data.test_split
    # Of two processes the second waits, and finds what the first has made.
    with prepared.locked(recipe, directory):
        if isinstance(recipe.data, RegionData):
            proposals.prepare(builder, (train, test))
        for name, kind in kinds(recipe.data).items():
            if hasattr(TASKS[kind], "prepare"):
                TASKS[kind].prepare(builder, train, name)
    return Experiment(recipe, builder, runs)


def of_run(run: Path) -> Experiment:
    """The experiment of a finished run, as its folder says, on its prepared data.

    Args:
        run: The run's folder, `<runs>/<recipe>/<method>/seed<seed>`.
    """
    run = run.resolve()  # "." has no parents
    if metrics(run) is None:
        raise ValueError(
            "Expected the folder of a finished run, RUNS/RECIPE/METHOD/seedS, as `fit` "
            f"leaves it. Received: {run}"
        )
    name, said = run.parents[1].name, read_json(run / "recipe.json")
    while "data" not in said:  # an ensemble's, of the networks that it averages
        said = said["starts_from"][0]
    values = {
        k: tuple(v) if isinstance(v, list) else v for k, v in said["data"].items()
    }
    recipe = change(find(name.partition("-")[0]), "data", **values)
    return open_experiment(dataclasses.replace(recipe, name=name), None, run.parents[2])


def claim(
    folder: Path,
    depends: Mapping[str, Any],
    made_with: Mapping[str, Any] | None = None,
) -> None:
    """Writes down what the run depends on, or checks that it is as it was begun.

    Args:
        folder: The run's folder.
        depends: What its result depends on, see `Experiment.depends_on`.
        made_with: With what it is trained: a run that goes on must go on with the
            same. `None` for a finished run, which keeps what it was made with.
    """
    path = folder / "recipe.json"
    if not path.exists():
        write_json(path, {**depends, "made_with": made_with})
    begun, now = read_json(path), {**depends, "made_with": made_with}
    if made_with is None:
        begun["made_with"] = None
    changed = _differences(begun, now)
    if changed:
        raise ValueError(
            f"{folder} was begun with another recipe: {', '.join(changed)} changed. "
            "Remove that folder, or give another one with --runs"
        )


def metrics(folder: Path) -> dict[str, dict[str, float]] | None:
    """`{task: {metric: value}}` of a finished run, `None` of any other."""
    path = folder / "metrics.json"
    return read_json(path) if path.exists() else None


def _digest(task: Any) -> str:
    """What identifies a task's classes, codewords or whatever else it has."""
    said = {
        field.name: getattr(task, field.name)
        for field in dataclasses.fields(task)
        if field.default is dataclasses.MISSING
        or getattr(task, field.name) != field.default
    }
    fields = json.dumps(said, default=lambda array: array.tolist())
    return hashlib.sha256(fields.encode()).hexdigest()


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
