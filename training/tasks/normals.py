"""Surface normals: softmax over 20 codewords, as in the paper.

A target is a map of unit normals, (H, W, 3), in camera coordinates (x right, y
down, z away from the camera); (0, 0, 0) is undefined and counts nowhere.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import ops
from sklearn.cluster import KMeans

_UNDEFINED = 255  # as a codeword's number


@dataclasses.dataclass(frozen=True)
class Normals:
    """Classification into codewords; the answer is their mean under the softmax."""

    codewords: np.ndarray  # (K, 3), unit length
    feature = "normals"

    @classmethod
    def of(cls, builder):
        """The task with 20 codewords, k-means of the train split's normals."""
        sampled = []
        # Sixty-four pixels of each of up to 1000 images are 64000 normals.
        train = builder.as_dataset(
            split="train", decoders=tfds.decode.PartialDecoding({"normals": True})
        )
        for example in train.take(1000):
            normals = decode(example["normals"]).numpy().reshape(-1, 3)
            normals = normals[normals.any(axis=-1)]
            sampled.append(normals[:: max(1, len(normals) // 64)][:64])
        kmeans = KMeans(20, n_init=3, random_state=0).fit(np.concatenate(sampled))
        centers = kmeans.cluster_centers_
        centers /= np.linalg.norm(centers, axis=-1, keepdims=True)
        return cls(centers.astype("float32"))

    @property
    def outputs(self):
        return len(self.codewords)

    def target(self, encoded):
        return decode(encoded)

    def flip(self, target):
        """Mirrors the map and, with it, the x axis that the normals refer to."""
        return tf.reverse(target, axis=[2]) * tf.constant([-1.0, 1.0, 1.0])

    def loss(self):
        return CodewordCrossentropy(self.codewords, name="normals_loss")

    def answer(self, logits, name):
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

    def metrics(self):
        return [
            AngularError("mean", name="mean_angle"),
            AngularError("median", name="median_angle"),
            *(AngularError(t, name=f"within_{t}") for t in (11.25, 22.5, 30)),
        ]

    def draw(self, target_or_answer):
        normals = np.asarray(target_or_answer)
        # The customary colours: red is right, green is up, blue is to the camera.
        image = (normals * (1, -1, -1) + 1) / 2 * 255
        image[~normals.any(axis=-1)] = 0
        return image.round().clip(0, 255).astype("uint8")


def decode(encoded):
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

    def __init__(self, codewords, name="codeword_crossentropy", **kwargs):
        super().__init__(name=name, **kwargs)
        self.codewords = np.asarray(codewords, "float32")

    def call(self, y_true, y_pred):
        nearest = ops.argmax(ops.matmul(y_true, self.codewords.T), axis=-1)
        defined = ops.any(ops.not_equal(y_true, 0.0), axis=-1)
        return keras.losses.sparse_categorical_crossentropy(
            ops.where(defined, nearest, _UNDEFINED),
            y_pred,
            from_logits=True,
            ignore_class=_UNDEFINED,
        )

    def get_config(self):
        return {**super().get_config(), "codewords": self.codewords.tolist()}


@keras.saving.register_keras_serializable("training")
class AngularError(keras.metrics.Metric):
    """A statistic of the angle between true and predicted normals, over all pixels.

    It is read from a histogram in steps of 0.01 degrees, so the median needs no
    list of all pixels.

    Args:
        statistic: `"mean"` or `"median"`, in degrees, or a number of degrees,
            for the percentage of the pixels within it.
    """

    BINS_PER_DEGREE = 100

    def __init__(self, statistic, name=None, dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.statistic = statistic
        self.bins = 180 * self.BINS_PER_DEGREE + 1
        self.counts = self.add_variable((self.bins,), initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true = ops.cast(y_true, "float32")
        cosine = ops.sum(y_true * ops.cast(y_pred, "float32"), axis=-1)
        angle = ops.arccos(ops.clip(cosine, -1.0, 1.0)) * (180.0 / np.pi)
        weight = ops.cast(ops.any(ops.not_equal(y_true, 0.0), axis=-1), "float32")
        if sample_weight is not None:
            weight = weight * ops.cast(sample_weight, "float32")
        counts = ops.bincount(
            ops.reshape(ops.cast(angle * self.BINS_PER_DEGREE, "int32"), [-1]),
            weights=ops.reshape(weight, [-1]),
            minlength=self.bins,
        )
        self.counts.assign_add(counts)

    def result(self):
        total = ops.sum(self.counts)
        if self.statistic == "mean":
            centres = (np.arange(self.bins) + 0.5) / self.BINS_PER_DEGREE
            return ops.divide_no_nan(ops.sum(self.counts * centres), total)
        below = ops.cumsum(self.counts)
        if self.statistic == "median":
            passed = ops.cast(ops.sum(ops.cast(below < total / 2, "int32")), "float32")
            return (passed + 0.5) / self.BINS_PER_DEGREE
        within = below[round(self.statistic * self.BINS_PER_DEGREE) - 1]
        return 100.0 * ops.divide_no_nan(within, total)

    def get_config(self):
        return {**super().get_config(), "statistic": self.statistic}
