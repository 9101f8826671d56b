"""Semantic segmentation: one class per pixel; 255 is void and counts nowhere."""

import dataclasses
import types
from typing import Any, Self

import keras
import matplotlib
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from training.metric import Metric

VOID = 255


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """Softmax over classes, with the metrics of Long et al. in percent."""

    classes: tuple[str, ...]
    feature: str = "segmentation"
    inputs = "image"
    void = VOID
    metrics = types.MappingProxyType(
        {
            "pixel_accuracy": Metric("pixel accuracy", "%", True),
            "miou": Metric("mIoU", "%", True),
            "fwiou": Metric("fwIoU", "%", True),
            # By class:
            "iou": Metric("IoU", "%", True),
            "pixels": Metric("true pixels", "", None),
            "labels": Metric("train labels", "", None),
        }
    )

    @classmethod
    def for_dataset(
        cls, builder: tfds.core.DatasetBuilder, split: str, feature: str
    ) -> Self:
        """The task as the data set defines it."""
        stored = builder.info.features[feature]
        if not isinstance(stored, tfds.features.LabeledImage):
            raise ValueError(
                f"Expected classes, with their names, in '{feature}' of the data in "
                f"{builder.data_path}. Received: {stored}. Name another kind of task"
            )
        return cls(tuple(stored.names), feature)

    @property
    def outputs(self) -> int:
        return len(self.classes)

    def target(self, example: dict[str, tf.Tensor]) -> tf.Tensor:
        return tf.cast(example[self.feature][..., 0], "int32")

    def flip(self, target: tf.Tensor) -> tf.Tensor:
        return tf.reverse(target, axis=[2])

    def enlarge(self, target: tf.Tensor, shares: tf.Tensor) -> tf.Tensor:
        return target

    def loss(self) -> keras.losses.Loss:
        return keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=VOID, name="segmentation_loss"
        )

    def answer(self, logits: Any, name: str, inputs: Any = None) -> Any:
        return keras.layers.Softmax(name=f"{name}_probabilities", dtype="float32")(
            logits
        )

    def average(self, logits: list[Any], name: str, inputs: Any = None) -> Any:
        answers = [self.answer(x, f"{name}_{k}", inputs) for k, x in enumerate(logits)]
        return keras.layers.Average(name=f"{name}_average", dtype="float32")(answers)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "classes",
            "names": list(self.classes),
            "colours": self._colours().tolist(),
            "units": "probability",
            "description": "The probability of each class at each pixel",
        }

    def labels(self, train: Any) -> dict[str, int]:
        classes = np.asarray(train)
        counts = np.bincount(classes[classes != VOID], minlength=self.outputs)
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def scores(self) -> "ConfusionMatrix":
        return ConfusionMatrix(self.classes)

    def draw(self, target_or_answer: Any, inputs: Any = None) -> np.ndarray:
        classes = np.asarray(target_or_answer)
        if classes.ndim == 3:
            classes = classes.argmax(axis=-1)
        image = self._colours()[np.where(classes == VOID, 0, classes)]
        image[classes == VOID] = 0
        return image

    def _colours(self) -> np.ndarray:
        maps = ("tab20b", "tab20c", "tab20")
        colours = np.concatenate([matplotlib.color_sequences[x] for x in maps])
        # Neighbours in these maps are shades of one hue; steps of 7 part them.
        steps = 7 * np.arange(self.outputs) % len(colours)
        return (255 * colours[steps]).round().astype("uint8")  # (classes, 3)


class ConfusionMatrix:
    """Counts pixels by (true class, predicted class), over the whole data set."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.counts = np.zeros((len(classes), len(classes)), "int64")

    def update(self, target: np.ndarray, answer: np.ndarray) -> None:
        """Adds a batch: classes (N, H, W) and probabilities (N, H, W, classes)."""
        labelled = target != VOID
        pairs = target[labelled] * len(self.classes) + answer.argmax(-1)[labelled]
        added = np.bincount(pairs, minlength=self.counts.size)
        self.counts += added.reshape(self.counts.shape)

    def result(self) -> dict[str, float]:
        """In percent; NaN without a labelled pixel.

        Classes neither in the truth nor in the answers do not count.
        """
        true, right, union = self._pixels()
        if not true.any():
            return dict.fromkeys(Segmentation.metrics, np.nan)
        occurs = union > 0
        iou = right[occurs] / union[occurs]
        return {
            "pixel_accuracy": 100 * right.sum() / true.sum(),
            "miou": 100 * iou.mean(),
            "fwiou": 100 * (true[occurs] * iou).sum() / true.sum(),
        }

    def per_class(self) -> dict[str, dict[str, float]]:
        """{class: {"iou": percent, "pixels": in the truth}} of those that occur."""
        true, right, union = self._pixels()
        return {
            name: {"iou": 100 * right[i] / union[i], "pixels": int(true[i])}
            for i, name in enumerate(self.classes)
            if union[i]
        }

    def _pixels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        true, right = self.counts.sum(axis=1), self.counts.diagonal()
        return true, right, true + self.counts.sum(axis=0) - right
