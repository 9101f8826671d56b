"""What one experiment is, as data, and which experiments there are."""

import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any, Literal

LossWeighting = Literal["uncertainty", "dynamic_average"]
Gradients = Literal["pcgrad"]
STRIDE = 32  # pixels of the image to a cell of a tower's last map


@dataclasses.dataclass(frozen=True)
class Data:
    """Which examples, at what size, and how they are varied."""

    dataset: str  # a module of training.datasets
    config: str  # of the data set's builder: "full" or "toy"
    train_split: str
    test_split: str
    # Names of features, each of its own kind; or of another: "parts:segmentation"
    tasks: tuple[str, ...]
    image_size: tuple[int, int]  # (H, W), resized to
    target_size: tuple[int, int]  # every so many-th pixel of the stored targets
    smallest_crop: float  # of a train image, by its side; 1.0 is the whole image
    colour: float  # how far brightness and tint of a train image vary, e.g. 0.2
    # The task that may lack labels, and the share of the train images that have them.
    # Below 1, half of each batch are images that have them.
    label_fraction: tuple[str, float]
    validation_split: str | None = None  # whose losses are told after each epoch


@dataclasses.dataclass(frozen=True)
class RegionData:
    """Which examples, at what size, and which of their boxes."""

    dataset: str  # a module of training.datasets
    config: str  # of the data set's builder: "full" or "toy"
    train_split: str
    test_split: str
    tasks: tuple[str, ...]
    image_size: tuple[int, int]  # (H, W), resized to, and filled up below and right
    proposals: int  # of an image, at most
    sampled: int  # boxes of a train image in a step, a quarter of them on objects


@dataclasses.dataclass(frozen=True)
class FcnAlexNet:
    """FCN-32s on AlexNet, from scratch."""

    width: float
    normalization: Literal["batch", "local_response"] | None
    dropout: float
    weight_decay: float
    common_start: bool  # all towers from one initialisation


@dataclasses.dataclass(frozen=True)
class SavedBackbone:
    """An FCN head on a saved Keras model; all towers start from its weights."""

    backbone: Path  # of the .keras file
    frozen_to: str  # the layer up to which nothing is trained
    dropout: float
    # The pixels that the saved model takes, such as (-1.0, 1.0); `None` where it has a
    # layer of its own that rescales them from [0, 255].
    pixel_range: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class FastRcnnAlexNet(FcnAlexNet):
    """Fast R-CNN on AlexNet, its boxes pooled to 6x6, from scratch or from weights."""

    weights: Path | None  # of conv1 to fc7: .npz, torchvision's names or Caffe's


@dataclasses.dataclass(frozen=True)
class FastRcnnBackbone(SavedBackbone):
    """Fast R-CNN on a saved Keras model; all towers start from its weights."""

    pooled: tuple[str, ...]  # layers whose maps are pooled in each box
    pooled_size: int  # cells of a side of a box
    fully_connected: int  # units of fc6 and fc7


@dataclasses.dataclass(frozen=True)
class Units:
    """Where the cross-stitch units stand, and how they start and learn."""

    at: tuple[str, ...]  # the taps
    per: str
    same_task: float
    # Alpha's own rate is this times a schedule's. Begin a recipe of yours at 0.1; those
    # here keep the multiplier that their published runs had.
    alpha_multiplier: float


@dataclasses.dataclass(frozen=True)
class Training:
    """SGD with momentum."""

    batch_size: int
    momentum: float
    # `None` for the sum of the tasks' losses, or how `weigh_losses` weighs them
    loss_weighting: LossWeighting | None
    dtype: str  # a Keras dtype policy; what is published is float32, on every machine
    # Of each task's loss, in the tasks' order, where nothing else weighs them
    loss_weights: tuple[float, ...] | None = None
    # Of each task's own layers, in the tasks' order; what is shared keeps the rate
    learning_rate_multipliers: tuple[float, ...] | None = None
    # How a step's are made of the tasks', `None` for their sum; see training.gradients
    gradients: Gradients | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long, and the rate that a cosine takes to zero in that time."""

    epochs: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One experiment. Every number that a result depends on stands here."""

    name: str
    data: Data | RegionData
    tower: FcnAlexNet | SavedBackbone | FastRcnnAlexNet | FastRcnnBackbone
    units: Units
    splits: tuple[str, ...]  # first own layers that `study splits` tries
    best_split: str  # the one of them that `study methods` compares
    training: Training
    single_task: Schedule
    finetuning: Schedule  # from the single-task networks on

    @property
    def from_start(self) -> Schedule:
        """As long as single-task and extra epochs, in one schedule from the start."""
        epochs = self.single_task.epochs + self.finetuning.epochs
        return Schedule(epochs, self.single_task.learning_rate)


def kinds(data: Data | RegionData) -> dict[str, str]:
    """{task: its kind, a file of `training.tasks`}, in order."""
    return {x.partition(":")[0]: x.partition(":")[2] or x for x in data.tasks}


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str, toy: bool = False, tasks: list[str] | None = None) -> Recipe:
    """The recipe of that name, or its toy size, which runs whole in seconds.

    `<recipe>-labels10` is the recipe with a label fraction of 10 %.

    Args:
        name: String.
        toy: Boolean.
        tasks: List of other tasks, see `with_tasks`; `None` for its own.
    """
    base, _, percent = name.partition("-labels")
    if base not in names():
        raise ValueError(f"There is no recipe '{base}'. There are: {names()}")
    recipe = importlib.import_module(f"training.recipes.{base}").RECIPE
    _check_name(recipe, base)
    _check_label_fraction(recipe)
    _check_epochs(recipe)
    _check_a_number_a_task(recipe)
    _check_sizes(recipe)
    if toy:
        recipe = _toy(recipe)
        _check_sizes(recipe)
    if tasks is not None:
        recipe = with_tasks(recipe, tasks)
    return recipe if name == base else with_labels(recipe, percent)


def whatever_labels(name: str) -> str:
    """The name that a recipe has with all labels: `scenes-a+b`, say."""
    return re.sub(r"-labels\d+", "", name)


def with_labels(recipe: Recipe, percent: int | str) -> Recipe:
    """The recipe with labels of its `label_fraction` task on so many per cent."""
    if not str(percent).isdecimal() or not 1 <= int(percent) <= 99:
        raise ValueError(
            "The label fraction must be a whole number of per cent, from 1 to 99, as "
            f"in '{recipe.name.removesuffix('-toy')}-labels10'. Received: {percent!r}"
        )
    if not isinstance(recipe.data, Data):
        raise ValueError(f"The recipe '{recipe.name}' has no label fraction")
    task, share = recipe.data.label_fraction
    if share < 1:
        raise ValueError(f"The recipe '{recipe.name}' has a label fraction already")
    changed = change(recipe, "data", label_fraction=(task, int(percent) / 100))
    parts = recipe.name.split("-")
    # Before the names of other tasks, see `with_tasks`: one recipe, one name.
    place = next((k for k, part in enumerate(parts) if "+" in part), len(parts))
    parts.insert(place, f"labels{int(percent)}")
    return dataclasses.replace(changed, name="-".join(parts))


def with_validation(recipe: Recipe) -> Recipe:
    """The recipe with a tenth of train held out, whose losses are told each epoch."""
    if not isinstance(recipe.data, Data):
        raise ValueError(
            f"The recipe '{recipe.name}' is of regions, whose tasks are not tested on "
            "the same ones: leave --validate"
        )
    rest, part = held_out(recipe, 10)
    changed = change(recipe, "data", train_split=rest, validation_split=part)
    return dataclasses.replace(changed, name=f"{recipe.name}-validated")


def held_out(recipe: Recipe, percent: int) -> tuple[str, str]:
    """The train split without its last per cent, and these."""
    split = recipe.data.train_split
    if "[" in split:
        raise ValueError(
            f"A part of the train split is held out, and '{split}' of the recipe "
            f"'{recipe.name}' is a part already. Name a whole one in the recipe"
        )
    return f"{split}[:{100 - percent}%]", f"{split}[{100 - percent}%:]"


def with_tasks(recipe: Recipe, tasks: list[str]) -> Recipe:
    """The recipe with other tasks of its data set, and their names behind its own."""
    from training.tasks import TASKS  # which import Keras

    dense = isinstance(recipe.data, Data)
    known = [x for x, task in TASKS.items() if hasattr(task, "feature") == dense]
    changed = change(recipe, "data", tasks=tuple(tasks))
    kind_of = kinds(changed.data)
    wrong = [x for x in kind_of.values() if x not in known]
    if wrong or len(tasks) < 2 or len(kind_of) < len(tasks):
        raise ValueError(
            f"Expected two or more tasks of {', '.join(known)}, which the data of the "
            f"recipe '{recipe.name}' can have, or as in parts:segmentation, of the "
            f"labels `parts`. Received: {','.join(tasks)}"
        )
    if tasks == list(recipe.data.tasks):
        return recipe
    _check_a_number_a_task(changed)
    if isinstance(recipe.data, Data):
        lacking, share = recipe.data.label_fraction
        if lacking not in kind_of and share < 1:
            raise ValueError(
                f"The recipe '{recipe.name}' has labels of {lacking} in part: name it "
                f"among the tasks. Received: {','.join(tasks)}"
            )
        lacking = lacking if lacking in kind_of else next(iter(kind_of))
        changed = change(changed, "data", label_fraction=(lacking, share))
    return dataclasses.replace(changed, name=f"{recipe.name}-{'+'.join(kind_of)}")


def change(recipe: Recipe, part: str, **values: Any) -> Recipe:
    """The recipe with other values in one of its parts."""
    changed = dataclasses.replace(getattr(recipe, part), **values)
    return dataclasses.replace(recipe, **{part: changed})


def _check_name(recipe: Recipe, file: str) -> None:
    """Runs are filed by the recipe's name, prepared data by that before a hyphen."""
    if recipe.name != file or "-" in file:
        raise ValueError(
            f"The recipe of training/recipes/{file}.py must have that file's name, and "
            "no hyphen in it, or its runs and data are filed under another recipe's. "
            f"Received: name={recipe.name!r}"
        )


def _check_label_fraction(recipe: Recipe) -> None:
    if not isinstance(recipe.data, Data):
        return
    task, _ = recipe.data.label_fraction
    if task not in kinds(recipe.data):
        raise ValueError(
            f"The label fraction of the recipe '{recipe.name}' must be of one of its "
            f"tasks, {', '.join(kinds(recipe.data))}. Received: {task!r}"
        )


def _check_a_number_a_task(recipe: Recipe) -> None:
    tasks = kinds(recipe.data)
    for name in ("loss_weights", "learning_rate_multipliers"):
        values = getattr(recipe.training, name)
        if values is not None and len(values) != len(tasks):
            raise ValueError(
                f"The {name} of the recipe '{recipe.name}' must be a number for each "
                f"of {', '.join(tasks)}. Received: {values}"
            )


def _check_epochs(recipe: Recipe) -> None:
    for schedule in ("single_task", "finetuning"):
        epochs = getattr(recipe, schedule).epochs
        if epochs < 1:
            raise ValueError(
                f"Expected an epoch or more of {schedule} in the recipe "
                f"'{recipe.name}'. Received: epochs={epochs}"
            )


def _check_sizes(recipe: Recipe) -> None:
    """A tower's last map, enlarged, must give a target of the recipe's size."""
    if not isinstance(recipe.data, Data):
        return
    (height, width), (rows, columns) = recipe.data.image_size, recipe.data.target_size
    if STRIDE * rows % height or rows * width != columns * height:
        raise ValueError(
            f"The recipe '{recipe.name}' has images of {height}x{width}: their targets "
            f"must be smaller by one factor on both sides, and {STRIDE} over that "
            f"factor whole, as of {height // 2}x{width // 2}. Received: target_size="
            f"{rows}x{columns}"
        )


def _half(recipe: Recipe, size: str) -> tuple[int, int]:
    height, width = getattr(recipe.data, size)
    if height % 2 or width % 2:
        raise ValueError(
            f"The toy size of the recipe '{recipe.name}' halves its {size}, which must "
            f"be even. Received: {height}x{width}"
        )
    return height // 2, width // 2


def _toy(recipe: Recipe) -> Recipe:
    halves = {"image_size": _half(recipe, "image_size")}
    if isinstance(recipe.data, Data):
        halves["target_size"] = _half(recipe, "target_size")
    recipe = change(recipe, "data", config="toy", **halves)
    recipe = change(recipe, "training", batch_size=4)
    recipe = change(recipe, "single_task", epochs=2)
    recipe = change(recipe, "finetuning", epochs=1)
    if hasattr(recipe.tower, "width"):
        recipe = change(recipe, "tower", width=1 / 32)
    return dataclasses.replace(recipe, name=f"{recipe.name}-toy")
