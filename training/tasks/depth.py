"""Depth: a number for each pixel, in metres along the camera's axis.

A target is a map (H, W, 1), stored in millimetres; NaN where there is no depth, which
counts nowhere.
"""

import dataclasses
import types
from typing import Any, Self

import keras
import matplotlib
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from keras_cross_stitch import MaskedLoss
from training.metric import Metric

FARTHEST = 10.0  # metres, where the colours end
THRESHOLDS = {"delta_1": 1.25, "delta_2": 1.25**2, "delta_3": 1.25**3}
_COLOURS = matplotlib.colormaps["viridis_r"]  # near is bright


@dataclasses.dataclass(frozen=True)
class Depth:
    """The absolute error of metres; the metrics of Eigen et al. (2014)."""

    feature: str = "depth"
    inputs = "image"
    void = np.nan
    outputs = 1
    metrics = types.MappingProxyType(
        {
            "abs_error": Metric("absolute error", "m", False, 3),
            "rel_error": Metric("relative error", "", False, 3),
            "rmse": Metric("RMSE", "m", False, 3),
            "delta_1": Metric("pixels with δ < 1.25", "%", True),
            "delta_2": Metric("pixels with δ < 1.25²", "%", True),
            "delta_3": Metric("pixels with δ < 1.25³", "%", True),
        }
    )

    @classmethod
    def for_dataset(
        cls, builder: tfds.core.DatasetBuilder, split: str, feature: str
    ) -> Self:
        """The task as the data set defines it."""
        stored = builder.info.features[feature]
        if (stored.shape[-1], stored.np_dtype) != (1, np.uint16):
            raise ValueError(
                f"Expected millimetres, in 16 bits, in '{feature}' of the data in "
                f"{builder.data_path}. Received: {stored}. Name another kind of task"
            )
        return cls(feature)

    def target(self, example: dict[str, tf.Tensor]) -> tf.Tensor:
        metres = tf.cast(example[self.feature], "float32") / 1000
        return tf.where(metres > 0, metres, self.void)

    def flip(self, target: tf.Tensor) -> tf.Tensor:
        return tf.reverse(target, axis=[2])

    def enlarge(self, target: tf.Tensor, shares: tf.Tensor) -> tf.Tensor:
        """Nearer by the share of its side that the crop is of the image.

        So one camera would see it: the part is as large as what is nearer. As MTAN has
        it (Liu et al., 2019).
        """
        return target * tf.reshape(shares, (-1, 1, 1, 1))

    def loss(self) -> keras.losses.Loss:
        return MaskedLoss(keras.losses.MeanAbsoluteError(), name="depth_loss")

    def answer(self, logits: Any, name: str, inputs: Any = None) -> Any:
        return keras.layers.ReLU(name=f"{name}_metres", dtype="float32")(logits)

    def average(self, logits: list[Any], name: str, inputs: Any = None) -> Any:
        answers = [self.answer(x, f"{name}_{k}", inputs) for k, x in enumerate(logits)]
        return keras.layers.Average(name=f"{name}_average", dtype="float32")(answers)

    def describe(self) -> dict[str, Any]:
        steps = _COLOURS(np.linspace(0, 1, 16))[:, :3]
        return {
            "kind": "depth",
            "names": [],
            "colours": (255 * steps).round().astype(int).tolist(),
            "range": [0.0, FARTHEST],  # from the first colour to the last
            "units": "metres",
            "description": "The depth of each pixel along the camera's axis",
        }

    def labels(self, train: Any) -> dict[str, int]:
        return {}

    def scores(self) -> "DepthErrors":
        return DepthErrors()

    def draw(self, target_or_answer: Any, inputs: Any = None) -> np.ndarray:
        """Near is bright, what is 10 m away dark; black is missing."""
        metres = np.asarray(target_or_answer)[..., 0]
        there = np.isfinite(metres)
        image = _COLOURS(np.where(there, metres, 0) / FARTHEST, bytes=True)[..., :3]
        return np.where(there[..., None], image, np.uint8(0))


class DepthErrors:
    """Sums the errors of depth over all pixels of the data set that have one."""

    def __init__(self) -> None:
        self.count = 0
        # |y - d|, |y - d| / d, (y - d)^2, and how many have max(y / d, d / y) < t
        self.sums = np.zeros(3 + len(THRESHOLDS))

    def update(self, target: np.ndarray, answer: np.ndarray) -> None:
        """Adds a batch, both (N, H, W, 1) in metres, NaN where there is no depth."""
        there = np.isfinite(target)
        d, y = target[there].astype("float64"), answer[there].astype("float64")
        error = np.abs(y - d)
        # An answer of 0 is beyond every threshold.
        ratio = np.maximum(y / d, d / np.maximum(y, 1e-9))
        below = [(ratio < t).sum() for t in THRESHOLDS.values()]
        self.sums += [error.sum(), (error / d).sum(), np.square(error).sum(), *below]
        self.count += there.sum()

    def result(self) -> dict[str, float]:
        """Metres, a ratio, and shares in percent; NaN without a pixel with depth."""
        if not self.count:
            return dict.fromkeys(Depth.metrics, np.nan)
        absolute, relative, squared, *below = self.sums / self.count
        within = dict(zip(THRESHOLDS, np.multiply(100, below), strict=True))
        return {
            "abs_error": absolute,
            "rel_error": relative,
            "rmse": np.sqrt(squared),
            **within,
        }

    def per_class(self) -> dict[str, dict[str, float]]:
        return {}
