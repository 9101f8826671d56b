"""What each method starts from, how it joins the towers, and how long it trains.

A method is spelled `cross_stitch`, `split@conv4`, or, with other values of the
recipe's units or tower, `cross_stitch@same_task=0.5,per=layer,at=pool1+pool5` and
`split@conv4,dropout=0.5`. All that is trained takes `epochs=10`, `learning_rate=0.01`,
`loss_weighting=uncertainty`, `gradients=pcgrad`, and, a number for each task,
`loss_weights=1+0.5` and `learning_rate_multipliers=1+0.5`.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from training import recipes

# `--help` says what methods there are without Keras, which takes seconds to import.
# What joins towers imports it.
if TYPE_CHECKING:
    import keras

Towers = dict[str, "keras.Model"]

# What an ensemble's second network adds to the seed: nobody asks for as many seeds.
SECOND_NETWORK = 1000

# Options of which the recipe's own value, `None`, does not tell the others.
_CHOICES = {
    "loss_weighting": get_args(recipes.LossWeighting),
    "gradients": get_args(recipes.Gradients),
}
_OF_TASKS = ("loss_weights", "learning_rate_multipliers")


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train the towers of all tasks."""

    label: str  # how tables and figures name it
    says: str  # what it is, in a sentence
    # (towers, recipe, layer after the @) -> model; `None` for answers averaged
    join: Callable | None
    schedule: str | None  # the recipe's, by name; `None` where nothing is trained
    start: str | None = None  # the method whose trained towers it starts from
    seeds: tuple[int, ...] = (0,)  # of the runs that it starts from, added to its own
    parts: tuple[str, ...] = ()  # of the recipe that only this method depends on
    without: tuple[str, ...] = ()  # what of these parts it has no use for
    # What it is compared with: nothing shared, and where it trains trained as long.
    baseline: str | None = None


def side_by_side(towers: Towers, recipe: recipes.Recipe, layer: str) -> "keras.Model":
    """Towers that share nothing, which is each network trained alone."""
    from keras_cross_stitch import stitch

    return stitch(towers, at=())


def stitched(
    towers: Towers, recipe: recipes.Recipe, layer: str, **arguments: Any
) -> "keras.Model":
    from keras_cross_stitch import stitch

    units = recipe.units
    return stitch(
        towers, at=units.at, per=units.per, same_task=units.same_task, **arguments
    )


def of_own_maps(towers: Towers, recipe: recipes.Recipe, layer: str) -> "keras.Model":
    """Units that scale each task's own maps: all of cross-stitch but the sharing."""
    from keras_cross_stitch import OwnMapsOnly

    apart = recipes.change(recipe, "units", same_task=1.0)
    return stitched(towers, apart, layer, alpha_constraint=OwnMapsOnly())


def by_nddr(towers: Towers, recipe: recipes.Recipe, layer: str) -> "keras.Model":
    """NDDR's units where the cross-stitch units stand, decayed as the towers are."""
    import keras

    from keras_cross_stitch import NDDR, stitch

    units = recipe.units
    decay = keras.regularizers.L2(getattr(recipe.tower, "weight_decay", 0.0) / 2)
    return stitch(
        towers,
        at=units.at,
        unit=NDDR,
        same_task=units.same_task,
        kernel_regularizer=decay,
    )


def split_at(towers: Towers, recipe: recipes.Recipe, layer: str) -> "keras.Model":
    from keras_cross_stitch import split

    return split(towers, at=layer)


def hard_sharing(towers: Towers, recipe: recipes.Recipe, layer: str) -> "keras.Model":
    """All but the last layer, `score`."""
    return split_at(towers, recipe, "score")


METHODS = {
    "single_task": Method(
        "single-task",
        "A network for each task, trained alone.",
        side_by_side,
        "single_task",
    ),
    "single_task_longer": Method(
        "single-task, trained on",
        "The single-task networks, trained on alone for as long as cross-stitch is: "
        "its compute-matched baseline.",
        side_by_side,
        "finetuning",
        "single_task",
    ),
    "ensemble": Method(
        "ensemble",
        "Two single-task networks for each task, their answers averaged.",
        None,
        None,
        "single_task",
        seeds=(0, SECOND_NETWORK),
        baseline="single_task",
    ),
    "cross_stitch": Method(
        "cross-stitch",
        "The single-task networks, joined by cross-stitch units and trained on.",
        stitched,
        "finetuning",
        "single_task",
        parts=("units",),
        baseline="single_task_longer",
    ),
    "nddr": Method(
        "NDDR",
        "The single-task networks, joined by 1x1 convolutions over the channels of all "
        "tasks (NDDR-CNN) and trained on.",
        by_nddr,
        "finetuning",
        "single_task",
        parts=("units",),
        without=("per",),
        baseline="single_task_longer",
    ),
    "single_task_as_long": Method(
        "single-task, as long",
        "A network for each task, trained alone for all epochs in one schedule: the "
        "compute-matched baseline of all that is joined from the start.",
        side_by_side,
        "from_start",
    ),
    "hard_sharing": Method(
        "hard sharing",
        "One network, of which each task has but its last layer to itself.",
        hard_sharing,
        "from_start",
        baseline="single_task_as_long",
    ),
    "split": Method(
        "split",
        "One network up to a layer; that layer and all above are each task's own.",
        split_at,
        "from_start",
        baseline="single_task_as_long",
    ),
    "cross_stitch_from_start": Method(
        "cross-stitch from the start",
        "Untrained networks, joined by cross-stitch units from the first step.",
        stitched,
        "from_start",
        parts=("units",),
        baseline="single_task_as_long",
    ),
    "own_maps_from_start": Method(
        "units that share nothing",
        "Untrained networks with units that scale a task's own maps and take nothing "
        "from the others: what of a gain is not sharing.",
        of_own_maps,
        "from_start",
        parts=("units",),
        without=("same_task",),
        baseline="single_task_as_long",
    ),
    "nddr_from_start": Method(
        "NDDR from the start",
        "Untrained networks, joined by NDDR's units from the first step.",
        by_nddr,
        "from_start",
        parts=("units",),
        without=("per",),
        baseline="single_task_as_long",
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A method as it is spelled, with the recipe that it asks for."""

    spelled: str
    method: Method
    recipe: recipes.Recipe
    layer: str  # behind the @, of `split`

    def join(self, towers: Towers) -> "keras.Model":
        if self.method.join is None:
            raise ValueError(f"'{self.spelled}' trains nothing: there are no towers")
        return self.method.join(towers, self.recipe, self.layer)

    @property
    def schedule(self) -> recipes.Schedule | None:
        name = self.method.schedule
        return getattr(self.recipe, name) if name else None

    @property
    def depends_on(self) -> dict[str, Any]:
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


def plan(spelled: str, recipe: recipes.Recipe) -> Plan:
    """What a spelled method is in a recipe; a ValueError if it is none."""
    name, at, options = spelled.partition("@")
    if name not in METHODS:
        raise ValueError(
            f"There is no method '{name}'. There are: {', '.join(METHODS)}"
        )
    method = METHODS[name]
    layer = ""
    if name == "split":
        layer, at, options = options.partition(",")
        if not layer or "=" in layer:
            raise ValueError(
                "`split` needs the first layer that is not shared, as in 'split@"
                f"{recipe.best_split}'. Received: '{spelled}'"
            )
    for option in options.split(",") if at else ():
        recipe = _with_option(recipe, method, option, spelled)
    return Plan(spelled, method, recipe, layer)


def spell(name: str, recipe: recipes.Recipe, **options: Any) -> str:
    """How the method is spelled with these options; the recipe's own go unsaid."""
    other = {
        key: value
        for key, value in options.items()
        if value not in [getattr(x, key, None) for x in (recipe.units, recipe.tower)]
    }
    text = ",".join(f"{key}={_text(value)}" for key, value in other.items())
    return f"{name}@{text}" if other else name


def _text(value: Any) -> str:
    """As a user types it: a method with two spellings would be trained twice."""
    if isinstance(value, tuple):
        return "+".join(map(_text, value))
    if isinstance(value, str) and _value(value) == value:
        return value
    return json.dumps(value)


def _value(text: str) -> Any:
    """What `_text` has written: only a string that looks like a number has quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _with_option(
    recipe: recipes.Recipe, method: Method, option: str, spelled: str
) -> recipes.Recipe:
    key, _, text = option.partition("=")
    # A method that goes on from trained towers cannot have others.
    parts = [*method.parts, *([] if method.start else ["tower"])]
    known = {
        field.name: part
        for part in parts
        for field in dataclasses.fields(getattr(recipe, part))
        if field.name not in method.without
        # Files are options of the command line, and pixels are as they want them.
        and not isinstance(getattr(getattr(recipe, part), field.name), Path | None)
        and field.name != "pixel_range"
    }
    if method.schedule:
        # All that is trained from the start learns at the single-task networks' rate.
        fine = method.schedule == "finetuning"
        schedule = "finetuning" if fine else "single_task"
        known |= {"learning_rate": schedule, "epochs": schedule}
        known |= dict.fromkeys((*_CHOICES, *_OF_TASKS), "training")
    if key not in known:
        raise ValueError(
            f"There is no option '{key}' in '{spelled}'. There are: {', '.join(known)}"
        )
    if key in _OF_TASKS:
        values = _of_tasks(recipe, key, text, spelled)
        return recipes.change(recipe, "training", **{key: values})
    now = getattr(getattr(recipe, known[key]), key)
    value = _value(text)
    if isinstance(now, tuple):  # names, as in at=pool1+pool5
        value = tuple(text.split("+"))
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise ValueError(
                f"Expected one of {', '.join(_CHOICES[key])} as the {key} in "
                f"'{spelled}'. Received: {text!r}"
            )
    elif _kind(value) != _kind(now):
        raise ValueError(
            f"Expected another {key} like {now!r} in '{spelled}'. Received: {text!r}"
        )
    if _kind(value) == "number" and not math.isfinite(value):
        raise ValueError(f"Expected a finite {key} in '{spelled}'. Received: {text!r}")
    if key == "learning_rate" and not value > 0:
        raise ValueError(
            f"Expected a learning rate above 0 in '{spelled}'. Received: {text!r}"
        )
    if key == "epochs":
        if type(value) is not int or value < 1:
            raise ValueError(
                f"Expected a whole number of epochs in '{spelled}'. Received: {text!r}"
            )
        if method.schedule == "from_start":  # all of them in one schedule
            recipe = recipes.change(recipe, "finetuning", epochs=0)
    return recipes.change(recipe, known[key], **{key: value})


def _of_tasks(
    recipe: recipes.Recipe, key: str, text: str, spelled: str
) -> tuple[float, ...]:
    """A number for each task, as in 1+0.5."""
    tasks = recipes.kinds(recipe.data)
    try:
        weights = tuple(float(part) for part in text.split("+"))
    except ValueError:
        weights = ()
    if len(weights) != len(tasks) or not all(0 < x < math.inf for x in weights):
        raise ValueError(
            f"Expected a positive number for each of {', '.join(tasks)} in "
            f"'{spelled}', as in {key}={'+'.join('1' * len(tasks))}. "
            f"Received: {text!r}"
        )
    if key == "loss_weights" and recipe.training.loss_weighting:
        raise ValueError(
            f"The losses in '{spelled}' are weighed as they train, by "
            f"{recipe.training.loss_weighting}: leave loss_weights"
        )
    return weights


def _kind(value: Any) -> object:
    return "number" if type(value) in (int, float) else type(value)
