"""Detection: Fast R-CNN's softmax over classes and background, and box regression.

Boxes are left, top, right, bottom in pixels. A target has a row for each RoI: its
class (0 is background, -1 counts nowhere) and the deltas that move it to its object.
The truth of a test image has a row for each object: its box and its class.
"""

import dataclasses
import types

import keras
import numpy as np
import tensorflow as tf
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
            # By class:
            "ap": Metric("AP", "%", True),
            "objects": Metric("true objects", "", None),
        }
    )

    @classmethod
    def for_dataset(cls, builder):
        """The task as the data set defines it."""
        return cls(tuple(builder.info.features["objects"]["label"].names))

    @property
    def outputs(self):
        return 1 + 5 * len(self.classes)  # of each class, a score and four deltas

    def target(self, rois, matched):
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

    def truth(self, objects):
        labels = tf.cast(objects["labels"], "float32")
        return tf.concat([objects["boxes"], labels[..., None]], axis=-1)

    def loss(self):
        return DetectionLoss(len(self.classes), name="detection_loss")

    def answer(self, logits, name, inputs):
        return self.average([logits], name, inputs)

    def average(self, logits, name, inputs):
        """Probabilities and deltas are averaged, and duplicates suppressed once."""
        scores = 1 + len(self.classes)
        softmax = keras.layers.Softmax(name=f"{name}_probabilities", dtype="float32")
        probabilities = sum(softmax(x[..., :scores]) for x in logits) / len(logits)
        deltas = sum(x[..., scores:] for x in logits) / len(logits)
        detections = Detections(
            inputs["image"].shape[1:3], VARIANCE, name=f"{name}_detections"
        )
        return detections([probabilities, deltas, inputs["rois"]])

    def describe(self):
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

    def scores(self):
        return BoxPrecision(self.classes)

    def draw(self, target_or_answer, inputs):
        x = target_or_answer
        if isinstance(x, dict):
            classes = np.where(x["scores"] >= DRAWN, x["classes"], -1)
            return draw_boxes(inputs["image"], x["boxes"], classes, self.classes)
        return draw_boxes(inputs["image"], x[:, :4], x[:, 4], self.classes)


def draw_boxes(image, boxes, labels, names):
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

    def __init__(self, classes, name="detection_loss", **kwargs):
        super().__init__(name=name, **kwargs)
        self.classes = classes

    def call(self, y_true, y_pred):
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

    def get_config(self):
        return {**super().get_config(), "classes": self.classes}


class BoxPrecision:
    """Average precision of each class at IoU 0.5, as VOC's devkit judges detections.

    A detection is right if the object that it overlaps most, by half at least, is not
    taken by a likelier one; AP is the area under precision's envelope over recall.
    """

    def __init__(self, classes):
        self.classes = classes
        self.objects = np.zeros(len(classes), "int64")
        # Of each class, arrays of scores and of whether they are right.
        self.found = [[(np.zeros(0), np.zeros(0, bool))] for _ in classes]

    def update(self, target, answer):
        """Adds a batch: objects (N, G, 5), and detections as `Detections` gives."""
        for n, objects in enumerate(target):
            objects = objects[objects[:, 4] >= 0]
            self.objects += np.bincount(
                objects[:, 4].astype(int), minlength=len(self.classes)
            )
            count = answer["num_detections"][n]
            classes = answer["classes"][n, :count]
            for c in np.unique(classes):
                mine = classes == c
                boxes = answer["boxes"][n, :count][mine]
                scores = answer["scores"][n, :count][mine]
                right = _right(boxes, scores, objects[objects[:, 4] == c, :4])
                self.found[c].append((scores, right))

    def result(self):
        """In percent. Classes without an object do not count."""
        values = [x["ap"] for x in self.per_class().values()]
        return {"mean_ap": np.mean(values) if values else 0.0}

    def per_class(self):
        """{class: {"ap": percent, "objects": in the truth}} of those that occur."""
        return {
            name: {"ap": 100 * self._ap(c), "objects": int(self.objects[c])}
            for c, name in enumerate(self.classes)
            if self.objects[c]
        }

    def _ap(self, c):
        scores, right = map(np.concatenate, zip(*self.found[c], strict=True))
        right = right[np.argsort(-scores, kind="stable")].cumsum()
        precision = right / np.arange(1, len(right) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        return np.sum(np.diff(right, prepend=0) * envelope) / self.objects[c]


def _right(boxes, scores, objects):
    """Whether each of an image's detections of a class is right, (D,) bool."""
    right = np.zeros(len(boxes), bool)
    if not len(objects):
        return right
    overlaps = keras.utils.bounding_boxes.compute_iou(boxes, objects, "xyxy")
    overlaps = ops.convert_to_numpy(overlaps)
    taken = set()
    for d in np.argsort(-scores, kind="stable"):
        best = overlaps[d].argmax()
        right[d] = overlaps[d, best] >= 0.5 and best not in taken
        taken |= {best} if right[d] else set()
    return right
