"""What one experiment is, as data, and which experiments there are."""

import dataclasses
import importlib
import pkgutil

from training import recipes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One experiment. Every number that a result depends on stands here."""

    name: str

    # Input
    dataset: str
    config: str  # of the data set's builder: "full" or "toy"
    train_split: str
    test_split: str
    tasks: tuple[str, ...]
    image_size: tuple[int, int]  # (H, W), resized to
    target_size: tuple[int, int]  # every so many-th pixel of the stored targets
    smallest_crop: float  # of a train image, by its side; 1.0 is the whole image
    colour: float  # how far brightness and tint of a train image vary, e.g. 0.2

    # Model
    width: float
    normalization: str | None
    dropout: float
    at: tuple[str, ...]  # the taps
    per: str
    same_task: float

    # Optimization: SGD with momentum, cosine decay to zero
    batch_size: int
    momentum: float
    weight_decay: float
    epochs: int  # one-task nets
    learning_rate: float
    extra_epochs: int  # cross-stitch from the one-task nets, and the control
    extra_learning_rate: float
    alpha_multiplier: float


def names():
    """The names of all recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def find(name, toy=False):
    """The recipe of that name, or its toy size, which runs whole in seconds."""
    if name not in names():
        raise ValueError(f"There is no recipe '{name}'. There are: {names()}")
    recipe = importlib.import_module(f"training.recipes.{name}").RECIPE
    if not toy:
        return recipe
    return dataclasses.replace(
        recipe,
        name=f"{name}-toy",
        config="toy",
        width=1 / 32,
        batch_size=4,
        epochs=2,
        extra_epochs=1,
    )
