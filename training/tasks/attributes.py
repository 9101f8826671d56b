"""Attributes of objects: independent sigmoids on the RoIs that lie on an object.

A target has a row for each RoI: 0 or 1 of each attribute, NaN where there is no object.
They are tested on the true boxes.
"""

import dataclasses
import types
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn.metrics import average_precision_score

from keras_cross_stitch import MaskedLoss
from training.metric import Metric
from training.tasks.detection import draw_boxes

RAREST = (10, 20)  # figure 5: the attributes that the fewest train objects have
DRAWN = 3  # boxes of an image, and attributes of a box


@dataclasses.dataclass(frozen=True)
class Attributes:
    """A sigmoid for each attribute; mean average precision."""

    names: tuple[str, ...]
    train_objects: tuple[int, ...]  # that have each of them
    inputs = "objects"
    void = np.nan
    metrics = types.MappingProxyType(
        {
            "mean_ap": Metric("mean AP", "%", True),
            **{
                f"mean_ap_rarest_{k}": Metric(f"mean AP, {k} rarest", "%", True)
                for k in RAREST
            },
            # By attribute:
            "ap": Metric("AP", "%", True),
            "objects": Metric("true objects", "", None),
            "labels": Metric("train labels", "", None),
        }
    )

    @classmethod
    def for_dataset(
        cls, builder: tfds.core.DatasetBuilder, split: str, feature: str
    ) -> Self:
        """The task as the data set defines it, and how many objects it has of each."""
        read = tfds.decode.PartialDecoding({"objects": {"attributes": True}})
        counts = np.zeros(len(builder.attribute_names), "int64")
        for example in builder.as_dataset(split=split, decoders=read):
            counts += example["objects"]["attributes"].numpy().sum(axis=0, dtype=int)
        return cls(tuple(builder.attribute_names), tuple(counts.tolist()))

    @property
    def outputs(self) -> int:
        return len(self.names)

    def target(self, rois: tf.Tensor, matched: dict[str, tf.Tensor]) -> tf.Tensor:
        on_object = matched["classes"][..., None] > 0
        attributes = tf.cast(matched["attributes"], "float32")
        return tf.where(on_object, attributes, self.void)

    def truth(self, objects: dict[str, tf.Tensor]) -> tf.Tensor:
        return tf.cast(objects["attributes"], "float32")

    def loss(self) -> keras.losses.Loss:
        # The mean over 64 attributes is their sum with the paper's weight of 1/64.
        crossentropy = keras.losses.BinaryCrossentropy(from_logits=True)
        return MaskedLoss(crossentropy, name="attributes_loss")

    def answer(self, logits: Any, name: str, inputs: Any) -> Any:
        return keras.layers.Activation(
            "sigmoid", name=f"{name}_probabilities", dtype="float32"
        )(logits)

    def average(self, logits: list[Any], name: str, inputs: Any) -> Any:
        answers = [self.answer(x, f"{name}_{k}", inputs) for k, x in enumerate(logits)]
        return keras.layers.Average(name=f"{name}_average", dtype="float32")(answers)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "attributes",
            "names": list(self.names),
            "colours": [],
            "units": "probability",
            "description": (
                "The probability of each attribute of what is in each of the boxes "
                "`rois` (left, top, right, bottom in pixels)"
            ),
        }

    def labels(self, train: dict[str, Any]) -> dict[str, int]:
        return dict(zip(self.names, self.train_objects, strict=True))

    def scores(self) -> "AttributePrecision":
        return AttributePrecision(self.names, self.train_objects)

    def draw(self, target_or_answer: Any, inputs: Any) -> np.ndarray:
        boxes = np.asarray(inputs["rois"])
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        largest = [k for k in np.argsort(-areas)[:DRAWN] if areas[k] > 0]
        texts = [self._told(target_or_answer[k]) for k in largest]
        return draw_boxes(inputs["image"], boxes[largest], np.arange(len(texts)), texts)

    def _told(self, probabilities: np.ndarray) -> str:
        likeliest = np.argsort(-probabilities, kind="stable")[:DRAWN]
        return ", ".join(self.names[a] for a in likeliest if probabilities[a] >= 0.5)


class AttributePrecision:
    """Average precision of each attribute, over all objects."""

    def __init__(self, names: tuple[str, ...], train_objects: tuple[int, ...]) -> None:
        self.names = names
        self.train_objects = train_objects
        self.truth = [np.zeros((0, len(names)))]
        self.answers = [np.zeros((0, len(names)))]

    def update(self, target: np.ndarray, answer: np.ndarray) -> None:
        """Adds a batch: 0, 1 or NaN, and probabilities, both (N, R, attributes)."""
        there = ~np.isnan(target).any(axis=-1)
        self.truth.append(target[there])
        self.answers.append(answer[there])

    def result(self) -> dict[str, Any]:
        """In percent; NaN without an object. Attributes that none has do not count."""
        counts = dict(zip(self.names, self.train_objects, strict=True))
        by_count = sorted(self.per_class().items(), key=lambda x: counts[x[0]])
        values = [x["ap"] for _, x in by_count] or [np.nan]
        rarest = {f"mean_ap_rarest_{k}": np.mean(values[:k]) for k in RAREST}
        return {"mean_ap": np.mean(values), **rarest}

    def per_class(self) -> dict[str, dict[str, float]]:
        """{attribute: {"ap": percent, "objects": that have it}} of those that occur."""
        truth, answers = np.concatenate(self.truth), np.concatenate(self.answers)
        return {
            name: {
                "ap": 100 * average_precision_score(truth[:, a], answers[:, a]),
                "objects": int(truth[:, a].sum()),
            }
            for a, name in enumerate(self.names)
            if truth[:, a].any()
        }
