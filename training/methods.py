"""What each method starts from, how it joins the towers, and how long it trains.

A method is spelled `cross_stitch`, `split@conv4`, or, with other values of the
recipe's units or tower, `cross_stitch@same_task=0.5,per=layer`.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from keras_cross_stitch import split, stitch
from training import recipe as recipes


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train the towers of all tasks."""

    says: str  # what it is, in a sentence
    # (towers, recipe, layer after the @) -> model; `None` for answers averaged
    join: Callable | None
    schedule: str | None  # the recipe's, by name; `None` where nothing is trained
    start: str | None = None  # the method whose trained towers it starts from
    seeds: tuple[int, ...] = (0,)  # of the runs that it starts from, added to its own
    parts: tuple[str, ...] = ()  # of the recipe that only this method depends on
    control: str | None = None  # as long, and nothing shared: what it is compared with


def side_by_side(towers, recipe, layer):
    """Towers that share nothing, which is each net trained alone."""
    return stitch(towers, at=())


def stitched(towers, recipe, layer):
    units = recipe.units
    return stitch(towers, at=units.at, per=units.per, same_task=units.same_task)


def split_at(towers, recipe, layer):
    return split(towers, at=layer)


def shared(towers, recipe, layer):
    """All but the last layer."""
    return split(towers, at="score")


METHODS = {
    "one_task": Method(
        "A network for each task, trained alone.", side_by_side, "one_task"
    ),
    "one_task_longer": Method(
        "The one-task networks, trained on alone for as long as cross stitch is: its "
        "control.",
        side_by_side,
        "extra",
        "one_task",
    ),
    "ensemble": Method(
        "Two one-task networks for each task, their answers averaged.",
        None,
        None,
        "one_task",
        seeds=(0, 1000),  # nobody asks for a thousand seeds
        control="one_task",
    ),
    "cross_stitch": Method(
        "The one-task networks, joined by cross-stitch units and trained on.",
        stitched,
        "extra",
        "one_task",
        parts=("units",),
        control="one_task_longer",
    ),
    "one_task_whole": Method(
        "A network for each task, trained alone for all epochs in one schedule: the "
        "control of all that is joined from the start.",
        side_by_side,
        "whole",
    ),
    "shared": Method(
        "One network, of which each task has but its last layer to itself.",
        shared,
        "whole",
        control="one_task_whole",
    ),
    "split": Method(
        "One network up to a layer; that layer and all above are each task's own.",
        split_at,
        "whole",
        control="one_task_whole",
    ),
    "cross_stitch_from_start": Method(
        "Untrained networks, joined by cross-stitch units from the first step.",
        stitched,
        "whole",
        parts=("units",),
        control="one_task_whole",
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A method as it is spelled, with the recipe that it asks for."""

    spelled: str
    method: Method
    recipe: recipes.Recipe
    layer: str | None

    def join(self, towers):
        return self.method.join(towers, self.recipe, self.layer)

    @property
    def schedule(self):
        name = self.method.schedule
        return getattr(self.recipe, name) if name else None

    @property
    def depends_on(self):
        """The parts of the recipe that the result depends on, JSON-like.

        What the runs that it starts from depend on comes to it.
        """
        recipe = self.recipe
        depends: dict[str, Any] = {"method": self.spelled.partition("@")[0]}
        if self.schedule:
            parts = ["data", "training", *self.method.parts]
            if not self.method.start:
                parts.append("tower")
            depends |= {x: dataclasses.asdict(getattr(recipe, x)) for x in parts}
            depends["schedule"] = dataclasses.asdict(self.schedule)
        if self.layer:
            depends["layer"] = self.layer
        return depends


def plan(spelled, recipe):
    """What a spelled method is in a recipe; a ValueError if it is none."""
    name, at, options = spelled.partition("@")
    if name not in METHODS:
        raise ValueError(
            f"There is no method '{name}'. There are: {', '.join(METHODS)}"
        )
    method = METHODS[name]
    if name == "split":
        if not options:
            raise ValueError(
                "`split` needs the first layer that is not shared, as in 'split@"
                f"{recipe.best_split}'. Received: '{spelled}'"
            )
        return Plan(spelled, method, recipe, options)
    for option in options.split(",") if at else ():
        recipe = _with_option(recipe, method, option, spelled)
    return Plan(spelled, method, recipe, None)


def spell(name, recipe, **options):
    """How the method is spelled with these options; the recipe's own go unsaid."""
    other = {
        key: value
        for key, value in options.items()
        if value not in [getattr(x, key, None) for x in (recipe.units, recipe.tower)]
    }
    text = ",".join(f"{key}={json.dumps(value)}" for key, value in other.items())
    return f"{name}@{text}" if other else name


def _with_option(recipe, method, option, spelled):
    key, _, text = option.partition("=")
    # A method that goes on from trained towers cannot have others.
    parts = [*method.parts, *([] if method.start else ["tower"])]
    known = {
        field.name: part
        for part in parts
        for field in dataclasses.fields(getattr(recipe, part))
    }
    if key not in known:
        raise ValueError(
            f"There is no option '{key}' in '{spelled}'. There are: {', '.join(known)}"
        )
    now = getattr(getattr(recipe, known[key]), key)
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if _kind(value) != _kind(now):
        raise ValueError(
            f"Expected another {key} like {now!r} in '{spelled}'. Received: {text!r}"
        )
    return recipes.change(recipe, known[key], **{key: value})


def _kind(value):
    return "number" if type(value) in (int, float) else type(value)
