"""The paper's tables and figures, each as a set of runs."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from training import methods, recipes
from training.files import read_csv
from training.runs import Experiment
from training.study import delta_m
from training.study.recorded import Run

LABEL_FRACTIONS = (5, 10, 25, 50)  # per cent, and all
# Of a search, as multiples of the recipe's: learning rate and epochs of the baseline.
SCHEDULES_TRIED = (
    *((1, 1), (0.5, 1), (2, 1), (4, 1), (1, 2), (0.5, 2), (0.25, 1), (2, 2), (4, 2)),
    (0.25, 2),
)
# Of cross-stitch, beside the recipe's own: alpha's own rate, multiples as above, and
# what the units have other than `same_task=0.9`, per channel.
UNITS_TRIED: tuple[tuple[float, tuple[float, int], dict[str, Any]], ...] = (
    (0.1, (1, 1), {}),
    (0.02, (1, 1), {}),
    (0.5, (1, 1), {}),
    (2, (1, 1), {}),
    (5, (1, 1), {}),
    (0.1, (1, 1), {"same_task": 1.0}),
    (0.1, (1, 1), {"per": "layer"}),
    (0.1, (2, 1), {}),
    (0.1, (1, 2), {}),
)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run that a study asks for."""

    study: str
    experiment: Experiment
    method: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.experiment.folder(self.method, self.seed)

    @property
    def finished(self) -> bool:
        return Run(self.folder).finished


DEMO = ("single_task_as_long", "hard_sharing", "cross_stitch_from_start")


def _demo(recipe: recipes.Recipe) -> Sequence[str]:
    """What `python -m training` compares, all of it trained from the start."""
    return DEMO


def _methods(recipe: recipes.Recipe) -> Sequence[str]:
    """Table 5, with the two baselines that the paper lacks."""
    return [
        "single_task",
        "ensemble",
        "single_task_longer",
        "cross_stitch",
        "single_task_as_long",
        "hard_sharing",
        f"split@{recipe.best_split}",
        "cross_stitch_from_start",
    ]


def _init(recipe: recipes.Recipe) -> Sequence[str]:
    """Table 1: alpha starts at same_task, and the rest from the other tasks."""
    starts = (0.1, 0.5, 0.7, 0.9)
    swept = [methods.spell("cross_stitch", recipe, same_task=x) for x in starts]
    return ["single_task_longer", *swept]


def _alpha_rate(recipe: recipes.Recipe) -> Sequence[str]:
    """Table 2: alpha learns so many times as fast as the towers."""
    rates = (1, 10, 100, 1000)
    swept = [methods.spell("cross_stitch", recipe, alpha_multiplier=x) for x in rates]
    return ["single_task_longer", *swept]


def _tower_init(recipe: recipes.Recipe) -> Sequence[str]:
    """Table 3: stitched from single-task networks, or from the start.

    From the start, all towers start alike, or each has its own start.

    A saved backbone is always a common start.
    """
    name = "cross_stitch_from_start"
    fresh = []
    if hasattr(recipe.tower, "common_start"):
        fresh = [methods.spell(name, recipe, common_start=False)]
    return ["single_task_longer", "cross_stitch", "single_task_as_long", name, *fresh]


def _alpha(recipe: recipes.Recipe) -> Sequence[str]:
    """Table 4: what the units learn, from three starts."""
    starts = (0.9, 0.5, 0.1)
    return [methods.spell("cross_stitch", recipe, same_task=x) for x in starts]


def _splits(recipe: recipes.Recipe) -> Sequence[str]:
    """Figure 2b: which layers are each task's own."""
    return ["single_task_as_long", *(f"split@{layer}" for layer in recipe.splits)]


def _per_class(recipe: recipes.Recipe) -> Sequence[str]:
    """Figure 6: which classes gain."""
    return ["single_task", "single_task_longer", "cross_stitch"]


def _label_fraction(recipe: recipes.Recipe) -> Sequence[str]:
    """Beyond the paper: labels of one task on a part of the images."""
    return [
        "single_task_as_long",
        "hard_sharing",
        f"split@{recipe.best_split}",
        "cross_stitch",
        "cross_stitch_from_start",
    ]


def _weightings(recipe: recipes.Recipe) -> Sequence[str]:
    """Beyond the paper: how tasks are weighed against each other that share layers.

    By their losses, or by their gradients.
    """
    ways: list[dict[str, str]] = [
        {},
        *({"loss_weighting": by} for by in get_args(recipes.LossWeighting)),
        *({"gradients": by} for by in get_args(recipes.Gradients)),
    ]
    return [
        "single_task_as_long",
        *(
            methods.spell(name, recipe, **way)
            for name in ("hard_sharing", "cross_stitch_from_start")
            for way in ways
        ),
    ]


def _search(recipe: recipes.Recipe) -> Sequence[str]:
    """Settings, tried on a part of train: as many of a baseline as of cross-stitch.

    The recipe's own come first. Of the baseline its learning rate and epochs; of
    cross-stitch these too, alpha's own rate, `same_task`, and units per layer.
    """
    spelled = []
    for baseline, name, schedule in (
        ("single_task_as_long", "cross_stitch_from_start", recipe.from_start),
        ("single_task_longer", "cross_stitch", recipe.finetuning),
    ):
        stitched = [name]
        for of_alpha, times, units in UNITS_TRIED:
            changed = _changed(schedule, *times)
            rate = changed.get("learning_rate", schedule.learning_rate)
            known = {"same_task": 0.9, "per": "channel", **units}
            known["alpha_multiplier"] = _rounded(of_alpha / rate)
            stitched.append(methods.spell(name, recipe, **changed, **known))
        stitched = list(dict.fromkeys(stitched))  # the recipe's own may be among them
        for times, of_method in zip(SCHEDULES_TRIED, stitched, strict=False):
            changed = _changed(schedule, *times)
            spelled += [methods.spell(baseline, recipe, **changed), of_method]
    return spelled


def _changed(schedule: recipes.Schedule, faster: float, longer: int) -> dict[str, Any]:
    """What is other than in the schedule."""
    changed: dict[str, Any] = {}
    if faster != 1:
        changed["learning_rate"] = _rounded(schedule.learning_rate * faster)
    if longer != 1:
        changed["epochs"] = schedule.epochs * longer
    return changed


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


STUDIES: dict[str, Callable[[recipes.Recipe], Sequence[str]]] = {
    "demo": _demo,
    "methods": _methods,
    "init": _init,
    "alpha-rate": _alpha_rate,
    "tower-init": _tower_init,
    "alpha": _alpha,
    "splits": _splits,
    "per-class": _per_class,
    "label-fraction": _label_fraction,
    "weightings": _weightings,
    "search": _search,
}


def plan(
    experiment: Experiment,
    study: str,
    seeds: Iterable[int],
    more: Iterable[str] = (),
) -> list[Planned]:
    """The runs of a study, or of `all`: seed by seed, so that each is whole early.

    Args:
        experiment: The `Experiment`.
        study: Name of a study, or `all`.
        seeds: The seeds.
        more: Methods, spelled as in `fit`, beside those of the study.

    Raises:
        ValueError: For a study that there is not.
    """
    if study not in (*STUDIES, "all"):
        raise ValueError(
            f"There is no study '{study}'. There are: {', '.join(STUDIES)}, all"
        )
    names = [study]
    if study == "all":
        _, share = getattr(experiment.recipe.data, "label_fraction", (None, 0))
        others = {"search"} if share == 1 else {"search", "label-fraction"}
        names = [x for x in STUDIES if x not in others]
    experiments = {name: _experiments(experiment, name) for name in names}
    return [
        Planned(name, one, method, seed)
        for name in names
        for seed in seeds
        for one in experiments[name]
        for method in dict.fromkeys([*STUDIES[name](one.recipe), *more])
    ]


def shard(planned: Sequence[Planned], part: str) -> list[Planned]:
    """The k-th of n parts, `"k/n"`, of the runs and of those that they start from.

    Dealt out like cards, those that others start from first: so all n machines have
    work, and whoever needs what another trains waits for it the least.
    """
    k, slash, n = part.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise ValueError(f"--shard must be k/n, as in 1/4. Received: {part!r}")
    starts = {run.folder: run for of in planned for run in _starts(of)}
    return list((starts | _by_folder(planned)).values())[int(k) - 1 :: int(n)]


def missing(planned: Iterable[Planned]) -> list[Planned]:
    """The runs that are not finished, those that others start from among them."""
    wanted = itertools.chain.from_iterable((*_starts(run), run) for run in planned)
    return [run for run in _by_folder(wanted).values() if not run.finished]


def _by_folder(wanted: Iterable[Planned]) -> dict[Path, Planned]:
    """Each run once: two studies may have it."""
    return {run.folder: run for run in wanted}


def duration(run: Planned) -> float | None:
    """About how many seconds the run takes, `None` if nothing like it has run here."""
    schedule = methods.plan(run.method, run.experiment.recipe).schedule
    if schedule is None:
        return 0.0
    alike = recipes.whatever_labels(run.experiment.recipe.name)
    seconds = [
        float(row["seconds"])
        for path in run.experiment.runs.glob("*/*/seed*/history.csv")
        if recipes.whatever_labels(path.parents[2].name) == alike
        for row in read_csv(path)
    ]
    return schedule.epochs * float(np.median(seconds)) if seconds else None


def _experiments(experiment: Experiment, study: str) -> list[Experiment]:
    """The experiment itself, or its variants: label fractions, or a part of train."""
    if study == "search":
        return [dataclasses.replace(experiment, recipe=_on_train(experiment.recipe))]
    if study != "label-fraction":
        return [experiment]
    variants = [
        dataclasses.replace(
            experiment, recipe=recipes.with_labels(experiment.recipe, percent)
        )
        for percent in LABEL_FRACTIONS
    ]
    return [*variants, experiment]


def _on_train(recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe that is trained on four fifths of train, and judged on the last."""
    rest, part = recipes.held_out(recipe, 20)
    changed = recipes.change(recipe, "data", train_split=rest, test_split=part)
    return dataclasses.replace(changed, name=f"{recipe.name}-search")


def best_first(planned: Sequence[Planned]) -> list[tuple[str, float]]:
    """What was tried of finished runs, as (method and settings, Delta_m), best first.

    Delta_m is the mean over the seeds of that against the first method that was
    planned, the baseline with the recipe's own settings.
    """
    known = [row for run in planned if run.finished for row in Run(run.folder).rows]
    own = planned[0].method
    changes: dict[str, list[float]] = {}
    for row in delta_m.rows(known, against=lambda method: own):
        changes.setdefault(row.method, []).append(row.value)
    means = {method: float(np.mean(x)) for method, x in changes.items()}
    return sorted(means.items(), key=lambda x: -x[1])


def _starts(run: Planned) -> list[Planned]:
    method = methods.plan(run.method, run.experiment.recipe).method
    if not method.start:
        return []
    return [
        dataclasses.replace(run, method=method.start, seed=run.seed + offset)
        for offset in method.seeds
    ]
