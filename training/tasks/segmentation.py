"""Semantic segmentation: one class per pixel; 255 is void and counts nowhere."""

import dataclasses

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from keras import ops

VOID = 255


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """Softmax over classes, with the metrics of Long et al. in percent."""

    classes: tuple[str, ...]
    feature = "segmentation"

    @classmethod
    def of(cls, builder):
        """The task as the data set defines it."""
        return cls(tuple(builder.info.features["segmentation"].names))

    @property
    def outputs(self):
        return len(self.classes)

    def target(self, encoded):
        return tf.cast(encoded[..., 0], "int32")

    def flip(self, target):
        return tf.reverse(target, axis=[2])

    def loss(self):
        return keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=VOID, name="segmentation_loss"
        )

    def answer(self, logits, name):
        return keras.layers.Softmax(name=f"{name}_probabilities", dtype="float32")(
            logits
        )

    def metrics(self):
        return [
            PixelAccuracy(len(self.classes), name="pixel_accuracy"),
            MeanIU(len(self.classes), name="mean_iu"),
            FrequencyWeightedIU(len(self.classes), name="fw_iu"),
        ]

    def draw(self, target_or_answer):
        classes = np.asarray(target_or_answer)
        if classes.ndim == 3:
            classes = classes.argmax(axis=-1)
        colours = np.array(
            matplotlib.colormaps["tab20b"].colors
            + matplotlib.colormaps["tab20c"].colors
            + matplotlib.colormaps["tab20"].colors
        )
        # Neighbours in these maps are shades of one hue; steps of 7 part them.
        image = 255 * colours[7 * classes.astype(int) % len(colours)]
        image[classes == VOID] = 0
        return image.round().astype("uint8")


@keras.saving.register_keras_serializable("training")
class MeanIU(keras.metrics.MeanIoU):
    """Mean over the classes of intersection over union, in percent.

    Classes that are neither in the truth nor in the predictions do not count.
    All sums run over the whole data set, so it is not a mean over images.
    """

    def __init__(self, num_classes, name=None, dtype=None):
        super().__init__(
            num_classes,
            name=name,
            dtype=dtype,
            ignore_class=VOID,
            sparse_y_pred=False,
        )

    def get_config(self):
        config = super().get_config()
        return {key: config[key] for key in ("num_classes", "name", "dtype")}

    def result(self):
        return 100.0 * super().result()


@keras.saving.register_keras_serializable("training")
class PixelAccuracy(MeanIU):
    """Share of the pixels whose class is right, in percent."""

    def result(self):
        confusion = ops.cast(self.total_cm, "float32")
        return 100.0 * ops.divide_no_nan(ops.trace(confusion), ops.sum(confusion))


@keras.saving.register_keras_serializable("training")
class FrequencyWeightedIU(MeanIU):
    """Intersection over union, weighted by the class's true pixels, in percent."""

    def result(self):
        # (true class, predicted class), in whole pixels
        confusion = ops.cast(self.total_cm, "float32")
        true = ops.sum(confusion, axis=1)
        right = ops.diagonal(confusion)
        union = true + ops.sum(confusion, axis=0) - right
        return 100.0 * ops.divide_no_nan(
            ops.sum(true * ops.divide_no_nan(right, union)), ops.sum(true)
        )
