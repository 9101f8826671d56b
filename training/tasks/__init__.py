"""The tasks: one file each, with its targets, loss, answer, scores and colours."""

from collections.abc import Mapping
from typing import Any, Protocol, Self

import tensorflow_datasets as tfds

from training.metric import Metric
from training.tasks.attributes import Attributes
from training.tasks.depth import Depth
from training.tasks.detection import Detection
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

    inputs: str  # what it is tested on: an "image", or its "proposals" or "objects"
    outputs: int  # channels of the tower's logits
    void: float  # what a target holds where there is no label
    metrics: Mapping[str, Metric]  # what its scores give, and in which direction

    @classmethod
    def for_dataset(
        cls, builder: tfds.core.DatasetBuilder, split: str, feature: str
    ) -> Self:
        """The task of a data set's feature; what is learned of it, of that split.

        Raises a ValueError where the feature is of another kind.
        """

    def loss(self) -> Any:
        """The Keras loss of (target, logits)."""

    def answer(self, logits: Any, name: str, inputs: Any) -> Any:
        """Layers from logits (and inputs) to what the model gives when served."""

    def average(self, logits: list[Any], name: str, inputs: Any) -> Any:
        """Layers from several models' logits to their common answer."""

    def describe(self) -> dict[str, Any]:
        """What the answers mean: kind, names, colours, units, description."""

    def labels(self, train: Any) -> dict[str, int]:
        """How many train labels each class has, where the task has classes.

        `train` are targets, (N, H, W, ...), or the regions that `batches` has loaded.
        """

    def scores(self) -> Scores:
        """New scores, to which test batches are added."""

    def draw(self, target_or_answer: Any, inputs: Any) -> Any:
        """One target or answer, and the inputs it belongs to, as RGB, uint8."""


class DenseTask(Task, Protocol):
    """A task with an answer for each pixel."""

    feature: str  # of the data set's examples, in which the target is

    def target(self, example: Any) -> Any:
        """The target of a stored example."""

    def flip(self, target: Any) -> Any:
        """The target, (N, H, W, ...), of the horizontally flipped image."""

    def enlarge(self, target: Any, shares: Any) -> Any:
        """The target of parts of images, enlarged to the size of the whole.

        `shares`, (N,), are the sides of the parts, as shares of the images'.
        """


class RegionTask(Task, Protocol):
    """A task with an answer for each RoI."""

    def target(self, rois: Any, matched: dict[str, Any]) -> Any:
        """The target of RoIs (N, R, 4), see `batches.regions.sample`."""

    def truth(self, objects: dict[str, Any]) -> Any:
        """What the answers for an image are compared with: a row an object."""


TASKS: dict[str, type[Any]] = {
    "segmentation": Segmentation,
    "normals": Normals,
    "depth": Depth,
    "detection": Detection,
    "attributes": Attributes,
}
