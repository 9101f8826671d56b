"""Surface normals: softmax over 20 codewords, as in the paper.

A target is a map of unit normals, (H, W, 3), in camera coordinates (x right, y
down, z away from the camera); (0, 0, 0) is undefined and counts nowhere.
"""

import dataclasses
import types
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import ops
from sklearn.cluster import KMeans

from training.files import kept_with, unfinished
from training.metric import Metric

CODEWORDS = 20  # as in the paper
_UNDEFINED = 255  # as a codeword's number
_METRICS = types.MappingProxyType(
    {
        "mean_angle": Metric("mean angle", "degrees", False),
        "median_angle": Metric("median angle", "degrees", False),
        "within_11_25": Metric("pixels within 11.25°", "%", True),
        "within_22_5": Metric("pixels within 22.5°", "%", True),
        "within_30": Metric("pixels within 30°", "%", True),
    }
)


@dataclasses.dataclass(frozen=True)
class Normals:
    """Classification into codewords; the answer is their mean under the softmax."""

    codewords: np.ndarray  # (K, 3), unit length
    feature: str = "normals"
    inputs = "image"
    void = 0.0
    metrics = _METRICS

    @classmethod
    def prepare(
        cls, builder: tfds.core.DatasetBuilder, split: str, feature: str
    ) -> None:
        """Clusters a split's normals, once; the codewords are kept with the data."""
        path = cls._kept(builder, split, feature)
        if not path.exists():
            with unfinished(path) as temporary:
                np.save(temporary, cluster(builder, split, feature))

    @classmethod
    def for_dataset(
        cls, builder: tfds.core.DatasetBuilder, split: str, feature: str
    ) -> Self:
        """The task with the codewords of the images that it is trained on."""
        return cls(np.load(cls._kept(builder, split, feature)), feature)

    @classmethod
    def _kept(cls, builder: tfds.core.DatasetBuilder, split: str, feature: str) -> Path:
        name = "codewords" if feature == cls.feature else f"codewords-{feature}"
        return kept_with(builder.data_path, name, split)

    @property
    def outputs(self) -> int:
        return len(self.codewords)

    def target(self, example: dict[str, tf.Tensor]) -> tf.Tensor:
        return decode(example[self.feature])

    def flip(self, target: tf.Tensor) -> tf.Tensor:
        """Mirrors the map and, with it, the x axis that the normals refer to."""
        return tf.reverse(target, axis=[2]) * tf.constant([-1.0, 1.0, 1.0])

    def enlarge(self, target: tf.Tensor, shares: tf.Tensor) -> tf.Tensor:
        """As they are: as a longer lens would see them."""
        return target

    def loss(self) -> keras.losses.Loss:
        return CodewordCrossentropy(self.codewords, name="normals_loss")

    def answer(self, logits: Any, name: str, inputs: Any = None) -> Any:
        """The unit vector along the codewords' mean under the softmax.

        Of Keras's own layers only, so that the saved model needs none of ours.
        """
        probabilities = keras.layers.Softmax(
            name=f"{name}_probabilities", dtype="float32"
        )(logits)
        mean = keras.layers.Conv2D(
            3,
            1,
            use_bias=False,
            trainable=False,
            dtype="float32",
            name=f"{name}_codewords",
        )
        mean_normal = mean(probabilities)
        mean.set_weights([self.codewords[None, None]])
        return keras.layers.UnitNormalization(
            axis=-1, dtype="float32", name=f"{name}_unit"
        )(mean_normal)

    def average(self, logits: list[Any], name: str, inputs: Any = None) -> Any:
        answers = [self.answer(x, f"{name}_{k}", inputs) for k, x in enumerate(logits)]
        total = keras.layers.Add(name=f"{name}_sum", dtype="float32")(answers)
        return keras.layers.UnitNormalization(
            axis=-1, dtype="float32", name=f"{name}_average"
        )(total)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "normals",
            "names": ["x", "y", "z"],
            "colours": [],
            "units": "unit vector",
            "description": (
                "The surface normal at each pixel in camera coordinates: x right, y "
                "down, z away from the camera, pointing to the camera's side"
            ),
        }

    def labels(self, train: Any) -> dict[str, int]:
        return {}

    def scores(self) -> "AngleHistogram":
        return AngleHistogram()

    def draw(self, target_or_answer: Any, inputs: Any = None) -> np.ndarray:
        normals = np.asarray(target_or_answer)
        # The customary colours: red is right, green is up, blue is to the camera.
        image = (normals * (1, -1, -1) + 1) / 2 * 255
        image[~normals.any(axis=-1)] = 0
        return image.round().clip(0, 255).astype("uint8")


def cluster(builder: tfds.core.DatasetBuilder, split: str, feature: str) -> np.ndarray:
    """Twenty codewords: k-means of a split's normals, (20, 3), unit length."""
    stored = builder.info.features[feature]
    if (stored.shape[-1], stored.np_dtype) != (3, np.uint8):
        raise ValueError(
            f"Expected normals, as RGB in 8 bits, in '{feature}' of the data in "
            f"{builder.data_path}. Received: {stored}. Name another kind of task"
        )
    sampled = []
    # Sixty-four pixels of each of up to 1000 images are 64000 normals.
    examples = builder.as_dataset(
        split=split, decoders=tfds.decode.PartialDecoding({feature: True})
    )
    for example in examples.take(1000):
        normals = decode(example[feature]).numpy().reshape(-1, 3)
        normals = normals[normals.any(axis=-1)]
        sampled.append(normals[:: max(1, len(normals) // 64)][:64])
    count = sum(map(len, sampled))
    if count < CODEWORDS:
        raise ValueError(
            f"Expected at least {CODEWORDS} pixels with a normal in '{split}' of the "
            f"data in {builder.data_path}. Received: {count}"
        )
    kmeans = KMeans(CODEWORDS, n_init=3, random_state=0).fit(np.concatenate(sampled))
    centers = kmeans.cluster_centers_
    centers /= np.linalg.norm(centers, axis=-1, keepdims=True)
    return centers.astype("float32")


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Stored normals (uint8, n = v / 127.5 - 1, zero undefined) as unit vectors."""
    normals = tf.math.l2_normalize(tf.cast(encoded, "float32") / 127.5 - 1.0, axis=-1)
    defined = tf.reduce_any(encoded > 0, axis=-1, keepdims=True)
    return tf.where(defined, normals, 0.0)


@keras.saving.register_keras_serializable("training")
class CodewordCrossentropy(keras.losses.Loss):
    """Softmax cross-entropy with the codeword nearest to the true normal.

    Args:
        codewords: Array `(K, 3)` of unit vectors.
        name: String.

    The mean is over the pixels whose normal is defined.
    """

    def __init__(
        self, codewords: Any, name: str = "codeword_crossentropy", **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.codewords = np.asarray(codewords, "float32")

    def call(self, y_true: Any, y_pred: Any) -> Any:
        nearest = ops.argmax(ops.matmul(y_true, self.codewords.T), axis=-1)
        defined = ops.any(ops.not_equal(y_true, 0.0), axis=-1)
        return keras.losses.sparse_categorical_crossentropy(
            ops.where(defined, nearest, _UNDEFINED),
            y_pred,
            from_logits=True,
            ignore_class=_UNDEFINED,
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "codewords": self.codewords.tolist()}


class AngleHistogram:
    """Counts the angles between true and predicted normals, over the whole data set.

    In steps of 0.01 degrees, so the median needs no list of all pixels.
    """

    BINS_PER_DEGREE = 100

    def __init__(self) -> None:
        self.counts = np.zeros(180 * self.BINS_PER_DEGREE + 1, "int64")

    def update(self, target: np.ndarray, answer: np.ndarray) -> None:
        """Adds a batch of normals, both (N, H, W, 3)."""
        defined = target.any(axis=-1)
        cosine = (target[defined].astype("float64") * answer[defined]).sum(axis=-1)
        angle = np.degrees(np.arccos(cosine.clip(-1, 1)))
        bins = (angle * self.BINS_PER_DEGREE).astype("int64")
        self.counts += np.bincount(bins, minlength=len(self.counts))

    def result(self) -> dict[str, float]:
        """Mean and median in degrees, and the percentage within some degrees."""
        total = self.counts.sum()
        if not total:  # no normal is defined: no angle is
            return dict.fromkeys(_METRICS, np.nan)
        centres = (np.arange(len(self.counts)) + 0.5) / self.BINS_PER_DEGREE
        below = self.counts.cumsum()
        within = {
            f"within_{t}".replace(".", "_"): 100
            * below[round(t * self.BINS_PER_DEGREE) - 1]
            / total
            for t in (11.25, 22.5, 30)
        }
        return {
            "mean_angle": (self.counts * centres).sum() / total,
            "median_angle": centres[np.searchsorted(below, total / 2)],
            **within,
        }

    def per_class(self) -> dict[str, dict[str, float]]:
        return {}
