"""The tasks: one file each, with its targets, loss, metrics and colours."""

from typing import Any, Protocol

from training.tasks.normals import Normals
from training.tasks.segmentation import Segmentation


class Task(Protocol):
    """What a task gives to the pipeline, to training and to the pictures."""

    feature: str  # of the data set's examples, in which the target is
    outputs: int  # channels of the tower's logits

    def target(self, encoded: Any) -> Any:
        """The stored feature as the target, (H, W, ...)."""

    def flip(self, target: Any) -> Any:
        """The target, (N, H, W, ...), of the horizontally flipped image."""

    def loss(self) -> Any:
        """The Keras loss of (target, logits)."""

    def answer(self, logits: Any, name: str) -> Any:
        """Layers from logits to what the model is asked for when served."""

    def metrics(self) -> list[Any]:
        """The Keras metrics of (target, answer)."""

    def draw(self, target_or_answer: Any) -> Any:
        """One target or answer, (H, W, ...), as an RGB image, uint8."""


TASKS = {"segmentation": Segmentation, "normals": Normals}

__all__ = ["TASKS", "Normals", "Segmentation", "Task"]
