"""AlexNet towers with named layers to stitch at; knows nothing of tasks.

Stitch at `pool1`, `pool2`, `pool5`, `fc6` and `fc7`, as the paper does: each is
the output that the next layer of the original AlexNet reads.
"""

from typing import Any, Literal

import keras
import numpy as np
from keras import layers, ops

# Layer, filters at width 1.0, kernel, stride, and the pooling that follows.
_CONVOLUTIONS = (
    ("conv1", 96, 11, 4, "pool1"),
    ("conv2", 256, 5, 1, "pool2"),
    ("conv3", 384, 3, 1, None),
    ("conv4", 384, 3, 1, None),
    ("conv5", 256, 3, 1, "pool5"),
)
_FULLY_CONNECTED = 4096
_NORMALIZATIONS = ("batch", "local_response", None)
_Normalization = Literal["batch", "local_response"] | None


def alexnet(
    outputs: int,
    input_shape: tuple[int, int, int] = (227, 227, 3),
    *,
    width: float = 1.0,
    normalization: _Normalization = "batch",
    dropout: float = 0.5,
    kernel_regularizer: keras.regularizers.Regularizer | str | None = None,
    name: str = "alexnet",
) -> keras.Model:
    """AlexNet for classification.

    Args:
        outputs: Integer, the number of classes (units of the layer `score`).
        input_shape: Tuple `(H, W, C)`. The original's is `(227, 227, 3)`; H and W
            must be known, and at least 67.
        width: Float, multiplies the number of filters of every layer but the
            last. 1.0 is the paper's 96-256-384-384-256-4096-4096.
        normalization: `"batch"` (after every layer), `"local_response"` (after
            `pool1` and `pool2`, as the original) or `None`.
        dropout: Float, the rate after `fc6` and `fc7`.
        kernel_regularizer: Regularizer of all kernels. The paper's weight decay
            of 5e-4 is `keras.regularizers.L2(2.5e-4)`.
        name: String, the model's name.

    Input shape:
        `(N, H, W, C)`, RGB in [0, 255]: the model rescales.

    Output shape:
        `(N, outputs)`, logits.

    Raises:
        ValueError: For `outputs` below 1, a `width` that is not above 0, an unknown
            `normalization`, or a side of the image that is unknown or below 67.

    Example:

    >>> model = alexnet(10, width=0.125)
    >>> model.get_layer("pool5").output.shape
    (None, 6, 6, 32)

    Reference:

    - [Krizhevsky et al., 2012](https://papers.nips.cc/paper/4824), without the
      two groups, which were there to fit two GPUs
    """
    _check(outputs, width, normalization)
    if any(side is None or side < 67 for side in input_shape[:2]):
        raise ValueError(
            "AlexNet's images must have known sides of at least 67 pixels; "
            f"`fcn_alexnet` takes any. Received: input_shape={input_shape}"
        )
    image = keras.Input(input_shape, name="image")
    x = _trunk(image, "valid", width, normalization, kernel_regularizer)
    x = layers.Flatten(name="flatten")(x)
    for fc in ("fc6", "fc7"):
        x = layers.Dense(
            _scaled(_FULLY_CONNECTED, width),
            activation="relu",
            kernel_initializer="he_normal",
            kernel_regularizer=kernel_regularizer,
            name=fc,
        )(x)
        if normalization == "batch":
            x = layers.BatchNormalization(name=f"{fc}_norm")(x)
        x = layers.Dropout(dropout, name=f"{fc}_dropout")(x)
    x = layers.Dense(
        outputs, kernel_regularizer=kernel_regularizer, dtype="float32", name="score"
    )(x)
    return keras.Model(image, x, name=name)


def fcn_alexnet(
    outputs: int,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    *,
    width: float = 1.0,
    normalization: _Normalization = "batch",
    dropout: float = 0.5,
    upsampling: int = 32,
    kernel_regularizer: keras.regularizers.Regularizer | str | None = None,
    name: str = "fcn_alexnet",
) -> keras.Model:
    """FCN-32s on AlexNet: one prediction a pixel.

    `fc6` and `fc7` are convolutions, and bilinear upsampling takes the map of `score`,
    of one cell per 32 pixels, back to the image.

    Args:
        outputs: Integer, channels of the prediction.
        input_shape: Tuple `(H, W, C)`. With unknown H and W the output is that
            of the next multiples of 32; with known ones it is cropped to fit.
        width: Float, multiplies the number of filters of every layer but the
            last. 1.0 is the paper's 96-256-384-384-256-4096-4096.
        normalization: `"batch"` (after every layer), `"local_response"` (after
            `pool1` and `pool2`, as the original) or `None`.
        dropout: Float, the rate after `fc6` and `fc7`.
        upsampling: Integer, 32 for an output of the input's size, 16 for one of
            half of it, and so on.
        kernel_regularizer: Regularizer of all kernels. The paper's weight decay
            of 5e-4 is `keras.regularizers.L2(2.5e-4)`.
        name: String, the model's name.

    Input shape:
        `(N, H, W, C)`, RGB in [0, 255]: the model rescales.

    Output shape:
        `(N, H * upsampling / 32, W * upsampling / 32, outputs)`, logits, float32.

    Raises:
        ValueError: For `outputs` or `upsampling` below 1, a `width` that is not above
            0, an unknown `normalization`.

    Example:

    >>> model = fcn_alexnet(40, (240, 320, 3), width=0.125, upsampling=16)
    >>> model.get_layer("score").output.shape, model.output.shape
    ((None, 8, 10, 40), (None, 120, 160, 40))

    Reference:

    - [Long et al., 2015](https://arxiv.org/abs/1411.4038)
    """
    _check(outputs, width, normalization)
    if not isinstance(upsampling, int) or upsampling < 1:
        raise ValueError(
            "`upsampling` must be a whole number, 1 or more. Received: "
            f"upsampling={upsampling!r}"
        )
    image = keras.Input(input_shape, name="image")
    x = _trunk(image, "same", width, normalization, kernel_regularizer)
    # The kernel of fc6 is even, so half a cell, 16 pixels, off centre: to the left
    # with this padding. So `score` sees what lies where upsampling puts it.
    x = layers.ZeroPadding2D(((3, 2), (3, 2)), name="fc6_padding")(x)
    for fc, kernel in (("fc6", 6), ("fc7", 1)):
        filters = _scaled(_FULLY_CONNECTED, width)
        x = _convolution(x, fc, filters, kernel, 1, "valid", kernel_regularizer)
        if normalization == "batch":
            x = layers.BatchNormalization(name=f"{fc}_norm")(x)
        x = layers.Dropout(dropout, name=f"{fc}_dropout")(x)
    x = layers.Conv2D(
        outputs,
        1,
        # Long et al. start it at zero and found random as good. Losses that normalise,
        # such as the cosine, have a gradient of 1e7 at zero, and throw it off.
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        kernel_regularizer=kernel_regularizer,
        name="score",
    )(x)
    x = BilinearUpsampling(upsampling, dtype="float32", name="upsampling")(x)
    height, width_ = input_shape[:2]
    if height is not None and width_ is not None:
        surplus = (
            x.shape[1] - height * upsampling // 32,
            x.shape[2] - width_ * upsampling // 32,
        )
        x = layers.Cropping2D(
            ((0, surplus[0]), (0, surplus[1])), dtype="float32", name="crop"
        )(x)
    return keras.Model(image, x, name=name)


@keras.saving.register_keras_serializable("keras_cross_stitch")
class LocalResponseNormalization(layers.Layer):
    """Divides by the energy of the 5 neighbouring channels, as AlexNet does.

    `y[c] = x[c] / (1 + 1e-4 / 5 * sum_{|k - c| <= 2} x[k]^2) ** 0.75`, with the
    constants of CaffeNet, which the paper's towers are.

    Input shape:
        `(N, ..., C)`

    Output shape:
        The same.

    Reference:

    - [Krizhevsky et al., 2012](https://papers.nips.cc/paper/4824), section 3.3
    """

    def call(self, inputs: Any) -> Any:
        channels = inputs.shape[-1]
        # The squares of float16 maps overflow.
        x = ops.cast(inputs, "float32")
        padding = [(0, 0)] * (len(x.shape) - 1) + [(2, 2)]
        squares = ops.pad(ops.square(x), padding)
        energy = sum(squares[..., k : k + channels] for k in range(5))
        scale = ops.power(1.0 + 1e-4 / 5 * energy, -0.75)
        return ops.cast(x * scale, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


@keras.saving.register_keras_serializable("keras_cross_stitch")
class BilinearUpsampling(layers.Layer):
    """Enlarges maps bilinearly, of known or unknown height and width.

    Gives what `keras.layers.UpSampling2D(factor, interpolation="bilinear")` gives,
    which cannot be exported where height or width is unknown.

    Args:
        factor: Integer, how many times as high and as wide.

    Input shape:
        `(N, H, W, C)`

    Output shape:
        `(N, H * factor, W * factor, C)`
    """

    def __init__(self, factor: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factor = factor
        # Where each new cell's centre lies, in old cells, from that of its own.
        offset = (np.arange(factor) + 0.5) / factor - 0.5
        before, after = np.maximum(-offset, 0), np.maximum(offset, 0)
        # (factor, 3): the weights of the cell before, the own and the one after
        self.weights_of_neighbours = np.stack([before, 1 - before - after, after], 1)

    def call(self, inputs: Any) -> Any:
        _, height, width, channels = ops.shape(inputs)
        x = ops.reshape(inputs, (-1, width, channels))
        x = self._enlarge(x, width, channels)
        row = width * self.factor * channels
        x = self._enlarge(ops.reshape(x, (-1, height, row)), height, row)
        return ops.reshape(x, (-1, height * self.factor, width * self.factor, channels))

    def _enlarge(self, x: Any, length: int, depth: int) -> Any:
        """(M, length, depth) to (M, length * factor, depth)."""
        before = ops.concatenate([x[:, :1], x[:, :-1]], axis=1)
        after = ops.concatenate([x[:, 1:], x[:, -1:]], axis=1)
        neighbours = ops.stack([before, x, after], axis=2)  # (M, length, 3, depth)
        weights = ops.convert_to_tensor(self.weights_of_neighbours, x.dtype)
        enlarged = ops.matmul(weights, neighbours)  # (M, length, factor, depth)
        return ops.reshape(enlarged, (-1, length * self.factor, depth))

    def compute_output_shape(self, input_shape: Any) -> Any:
        batch, height, width, channels = input_shape
        height, width = (n and n * self.factor for n in (height, width))
        return batch, height, width, channels

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "factor": self.factor}


def _trunk(
    image: Any,
    padding: str,
    width: float,
    normalization: _Normalization,
    kernel_regularizer: Any,
) -> Any:
    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling")(image)
    for name, filters, kernel, stride, pool in _CONVOLUTIONS:
        filters = _scaled(filters, width)
        # The original pads all convolutions but the first.
        conv_padding = padding if name == "conv1" else "same"
        x = _convolution(
            x, name, filters, kernel, stride, conv_padding, kernel_regularizer
        )
        if pool == "pool5" and padding == "same":
            # Padded on one side, cell i is centred on pixel 32 i + 30, whether
            # the map's size is odd or even; `fc6` takes it back to 32 i + 14.
            x = layers.ZeroPadding2D(((0, 2), (0, 2)), name="pool5_padding")(x)
            x = layers.MaxPooling2D(3, 2, name=pool)(x)
        elif pool:
            x = layers.MaxPooling2D(3, 2, padding=padding, name=pool)(x)
        if normalization == "batch":
            x = layers.BatchNormalization(name=f"{name}_norm")(x)
        elif normalization == "local_response" and pool in ("pool1", "pool2"):
            x = LocalResponseNormalization(name=f"{name}_norm")(x)
    return x


def _convolution(
    x: Any,
    name: str,
    filters: int,
    kernel: int,
    stride: int,
    padding: str,
    kernel_regularizer: Any,
) -> Any:
    return layers.Conv2D(
        filters,
        kernel,
        stride,
        padding=padding,
        activation="relu",
        kernel_initializer="he_normal",
        kernel_regularizer=kernel_regularizer,
        name=name,
    )(x)


def _scaled(filters: int, width: float) -> int:
    return max(1, round(filters * width))


def _check(outputs: int, width: float, normalization: _Normalization) -> None:
    if not isinstance(outputs, int) or outputs < 1:
        raise ValueError(
            f"`outputs` must be a positive integer. Received: outputs={outputs!r}"
        )
    if not width > 0:
        raise ValueError(f"`width` must be above 0. Received: width={width!r}")
    if normalization not in _NORMALIZATIONS:
        raise ValueError(
            f"`normalization` must be one of {_NORMALIZATIONS}. "
            f"Received: normalization={normalization!r}"
        )
