"""The tasks: one file each, with its targets, loss, answer, scores and colours."""

from collections.abc import Mapping
from typing import Any, Protocol

from training.metric import Metric
from training.tasks.normals import Normals
from training.tasks.segmentation import Segmentation


class Scores(Protocol):
    """What becomes of a test split's answers, added batch by batch."""

    def update(self, target: Any, answer: Any) -> None:
        """Adds a batch: NumPy arrays of targets and answers."""

    def result(self) -> dict[str, float]:
        """The value of each metric."""

    def per_class(self) -> dict[str, dict[str, float]]:
        """The values of each class, where the task has classes."""


class Task(Protocol):
    """What a task gives to the batches, to training and to the pictures."""

    feature: str  # of the data set's examples, in which the target is
    outputs: int  # channels of the tower's logits
    void: float  # what a target holds where there is no label
    metrics: Mapping[str, Metric]  # what its scores give, and in which direction

    def target(self, example: Any) -> Any:
        """The target of a stored example."""

    def flip(self, target: Any) -> Any:
        """The target, (N, H, W, ...), of the horizontally flipped image."""

    def loss(self) -> Any:
        """The Keras loss of (target, logits)."""

    def answer(self, logits: Any, name: str) -> Any:
        """Layers from logits to what the model is asked for when served."""

    def average(self, answers: Any, name: str) -> Any:
        """Layers from several models' answers to their average."""

    def describe(self) -> dict[str, Any]:
        """What the answers mean: kind, names, colours, units, description."""

    def scores(self) -> Scores:
        """New scores, to which test batches are added."""

    def draw(self, target_or_answer: Any) -> Any:
        """One target or answer, (H, W, ...), as an RGB image, uint8."""


TASKS: dict[str, type[Any]] = {"segmentation": Segmentation, "normals": Normals}

__all__ = ["TASKS", "Normals", "Scores", "Segmentation", "Task"]
