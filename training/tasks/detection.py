"""Detection: Fast R-CNN's softmax over classes and background, and box regression.

Boxes are left, top, right, bottom in pixels. A target has a row for each RoI: its
class (0 is background, -1 counts nowhere) and the deltas that move it to its object.
The truth of a test image has a row for each object: its box, its class, and 1 where it
is difficult.
"""

import dataclasses
import types
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import ops

from keras_cross_stitch import Detections
from training.metric import Metric

VARIANCE = (0.1, 0.1, 0.2, 0.2)  # deltas are divided by it, so that they are about 1
DRAWN = 0.3  # the score from which an answer is drawn


@dataclasses.dataclass(frozen=True)
class Detection:
    """Softmax over classes and smooth L1 on deltas; mean average precision."""

    classes: tuple[str, ...]
    inputs = "proposals"
    void = -1.0
    metrics = types.MappingProxyType(
        {
            "mean_ap": Metric("mean AP", "%", True),
            "mean_ap_voc2008": Metric("mean AP as VOC 2008's devkit", "%", True),
            # By class:
            "ap": Metric("AP", "%", True),
            "ap_voc2008": Metric("AP as VOC 2008's devkit", "%", True),
            "objects": Metric("true objects", "", None),
            "labels": Metric("train labels", "", None),
        }
    )

    @classmethod
    def for_dataset(
        cls, builder: tfds.core.DatasetBuilder, split: str, feature: str
    ) -> Self:
        """The task as the data set defines it."""
        return cls(tuple(builder.info.features["objects"]["label"].names))

    @property
    def outputs(self) -> int:
        return 1 + 5 * len(self.classes)  # of each class, a score and four deltas

    def target(self, rois: tf.Tensor, matched: dict[str, tf.Tensor]) -> tf.Tensor:
        deltas = keras.utils.bounding_boxes.encode_box_to_deltas(
            rois,
            matched["boxes"],
            anchor_format="xyxy",
            box_format="xyxy",
            encoding_format="center_xywh",
            variance=VARIANCE,
        )
        classes = matched["classes"][..., None]
        deltas = tf.where(classes > 0, deltas, 0.0)
        return tf.concat([tf.cast(classes, "float32"), deltas], axis=-1)

    def truth(self, objects: dict[str, tf.Tensor]) -> tf.Tensor:
        columns = [objects["boxes"]]
        for name in ("labels", "difficult"):
            columns.append(tf.cast(objects[name], "float32")[..., None])
        return tf.concat(columns, axis=-1)

    def loss(self) -> keras.losses.Loss:
        return DetectionLoss(len(self.classes), name="detection_loss")

    def answer(self, logits: Any, name: str, inputs: Any) -> Any:
        return self.average([logits], name, inputs)

    def average(self, logits: list[Any], name: str, inputs: Any) -> Any:
        """Probabilities and deltas are averaged, and duplicates suppressed once."""
        scores = 1 + len(self.classes)
        softmax = keras.layers.Softmax(name=f"{name}_probabilities", dtype="float32")
        probabilities = sum(softmax(x[..., :scores]) for x in logits) / len(logits)
        deltas = sum(x[..., scores:] for x in logits) / len(logits)
        detections = Detections(
            inputs["image"].shape[1:3], VARIANCE, name=f"{name}_detections"
        )
        return detections([probabilities, deltas, inputs["rois"]])

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "detection",
            "names": list(self.classes),
            "colours": [],
            "units": "pixels",
            "drawn_from": DRAWN,
            "description": (
                "The objects in an image, the likeliest first: their boxes (left, top, "
                "right, bottom), classes (numbers of names) and scores; "
                "num_detections says how many"
            ),
        }

    def labels(self, train: dict[str, Any]) -> dict[str, int]:
        labels = np.asarray(train["labels"])  # -1 is none
        counts = np.bincount(labels[labels >= 0], minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def scores(self) -> "BoxPrecision":
        return BoxPrecision(self.classes)

    def draw(self, target_or_answer: Any, inputs: Any) -> np.ndarray:
        x = target_or_answer
        if isinstance(x, dict):
            classes = np.where(x["scores"] >= DRAWN, x["classes"], -1)
            return draw_boxes(inputs["image"], x["boxes"], classes, self.classes)
        return draw_boxes(inputs["image"], x[:, :4], x[:, 4], self.classes)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """The image, twice as large, with labelled boxes; those of label -1 are left out.

    Args:
        image: Array (H, W, 3) in [0, 255].
        boxes: Array (B, 4): left, top, right, bottom in pixels.
        labels: Array (B,), numbers of names.
        names: List of strings.
    """
    image = np.asarray(image).round().astype("uint8").repeat(2, 0).repeat(2, 1)
    of_image = {
        "boxes": 2 * np.asarray(boxes)[None],
        "labels": np.asarray(labels)[None],
    }
    (drawn,) = keras.visualization.draw_bounding_boxes(
        image[None],
        of_image,
        "xyxy",
        class_mapping=dict(enumerate(names)),
        color=(0, 255, 0),
        font_scale=0.5,
    )
    return drawn


@keras.saving.register_keras_serializable("training")
class DetectionLoss(keras.losses.Loss):
    """Cross-entropy of the class, and smooth L1 of the true class's deltas.

    Args:
        classes: Integer, classes without the background.
        name: String.

    Input shape:
        `y_true`: `(N, R, 5)`, the class, 0 being the background and -1 no label, and 4
        deltas. `y_pred`: `(N, R, 1 + classes + 4 * classes)`.

    The mean is over all RoIs, as Fast R-CNN has it: the deltas of background count 0.
    """

    def __init__(
        self, classes: int, name: str = "detection_loss", **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.classes = classes

    def call(self, y_true: Any, y_pred: Any) -> Any:
        label = ops.cast(y_true[..., 0], "int32")
        score = keras.losses.sparse_categorical_crossentropy(
            ops.maximum(label, 0), y_pred[..., : 1 + self.classes], from_logits=True
        )
        of_classes = ops.reshape(
            y_pred[..., 1 + self.classes :], (*ops.shape(label), self.classes, 4)
        )
        own = ops.one_hot(label - 1, self.classes, dtype=y_pred.dtype)  # 0: nobody's
        deltas = ops.sum(of_classes * own[..., None], axis=-2)
        box = 4 * keras.losses.huber(y_true[..., 1:], deltas, delta=1.0)
        return ops.where(label < 0, 0.0, score + ops.where(label > 0, box, 0.0))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "classes": self.classes}


class BoxPrecision:
    """Average precision of each class at IoU 0.5, as VOC's devkit judges detections.

    A detection is right if the object that it overlaps most, by half at least, is not
    taken by a likelier one; where that object is difficult, it is neither right nor
    wrong. Taken twice: `ap` is the area under precision's envelope over recall, of
    boxes as they are; `ap_voc2008` is that of VOC's devkit of 2008: the mean of the
    envelope at the recalls 0, 0.1 ... 1, with an IoU of boxes that hold their last
    pixels. Published figures of 2008 are of the second kind.
    """

    # How many pixels longer than right - left a box's side is taken to be
    SURPLUS: ClassVar = {"ap": 0.0, "ap_voc2008": 1.0}

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.objects = np.zeros(len(classes), "int64")
        # Of each way and class, arrays of scores and of whether they are right.
        self.found = {
            name: [[(np.zeros(0), np.zeros(0, bool))] for _ in classes]
            for name in self.SURPLUS
        }

    def update(self, target: np.ndarray, answer: dict[str, np.ndarray]) -> None:
        """Adds a batch: objects (N, G, 6), and detections as `Detections` gives."""
        for n, objects in enumerate(target):
            objects = objects[objects[:, 4] >= 0]
            counted = objects[objects[:, 5] == 0]
            self.objects += np.bincount(
                counted[:, 4].astype(int), minlength=len(self.classes)
            )
            count = answer["num_detections"][n]
            classes = answer["classes"][n, :count]
            for c in np.unique(classes):
                mine = classes == c
                boxes = answer["boxes"][n, :count][mine]
                scores = answer["scores"][n, :count][mine]
                of_class = objects[objects[:, 4] == c]
                for name, surplus in self.SURPLUS.items():
                    right, counts = _judged(boxes, scores, of_class, surplus)
                    self.found[name][c].append((scores[counts], right[counts]))

    def result(self) -> dict[str, Any]:
        """In percent; NaN without an object. Classes without one do not count."""
        by_class = self.per_class().values()
        return {
            f"mean_{name}": np.mean([x[name] for x in by_class] or [np.nan])
            for name in self.SURPLUS
        }

    def per_class(self) -> dict[str, dict[str, float]]:
        """{class: {"ap", "ap_voc2008": percent, "objects": in the truth}}."""
        return {
            name: {
                "ap": 100 * self._area(c),
                "ap_voc2008": 100 * self._at_11_recalls(c),
                "objects": int(self.objects[c]),
            }
            for c, name in enumerate(self.classes)
            if self.objects[c]
        }

    def _area(self, c: int) -> float:
        right, envelope = self._curve("ap", c)
        return np.sum(np.diff(right, prepend=0) * envelope) / self.objects[c]

    def _at_11_recalls(self, c: int) -> float:
        right, envelope = self._curve("ap_voc2008", c)
        # The first detection at which the recall is reached; beyond the last it is 0.
        # In tenths of an object, which are whole numbers: 0.3 as a float is not.
        first = np.searchsorted(10 * right, np.arange(11) * self.objects[c])
        return np.append(envelope, 0.0)[first].sum() / 11

    def _curve(self, name: str, c: int) -> tuple[np.ndarray, np.ndarray]:
        """Right ones among the likeliest, and the best precision from there on."""
        scores, right = map(np.concatenate, zip(*self.found[name][c], strict=True))
        right = right[np.argsort(-scores, kind="stable")].cumsum()
        precision = right / np.arange(1, len(right) + 1)
        return right, np.maximum.accumulate(precision[::-1])[::-1]


def _judged(
    boxes: np.ndarray, scores: np.ndarray, objects: np.ndarray, surplus: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of an image's detections of a class, which are right, and which count: (D,)."""
    right, counts = np.zeros(len(boxes), bool), np.ones(len(boxes), bool)
    if not len(objects):
        return right, counts
    longer = np.array([0, 0, surplus, surplus])
    overlaps = keras.utils.bounding_boxes.compute_iou(
        boxes + longer, objects[:, :4] + longer, "xyxy"
    )
    overlaps = ops.convert_to_numpy(overlaps)
    difficult = objects[:, 5] > 0
    taken = set()
    for d in np.argsort(-scores, kind="stable"):
        best = overlaps[d].argmax()
        overlapping = overlaps[d, best] >= 0.5
        counts[d] = not (overlapping and difficult[best])
        right[d] = counts[d] and overlapping and best not in taken
        taken |= {best} if right[d] else set()
    return right, counts
