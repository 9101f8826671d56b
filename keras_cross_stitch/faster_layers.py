"""Two layers of Keras by faster operations of TensorFlow: batch norm and cropping.

Only what `call` does is exchanged: the layers, their weights and a saved file stay
Keras's. TensorFlow is imported inside the functions, as in the export.
"""

import functools
from collections.abc import Iterable
from typing import Any

import keras

_DTYPES = ("float32", "bfloat16", "float16")


def exchange(layers: Iterable[Any]) -> list[Any]:
    """Lets batch normalisation and cropping call faster operations.

    Keras's batch normalisation takes ten passes over a map and its gradient, and
    TensorFlow's two; without training TensorFlow joins it to the convolution before.
    The gradient of `x[:, a:b]` runs in one thread, and that of `tf.slice` in all.

    Args:
        layers: Layers, of which all others stay as they are.

    Returns:
        List of the layers that are exchanged.
    """
    exchanged = []
    for layer in layers:
        if "call" in vars(layer):  # somebody's own
            continue
        if _is_normalization_of_maps(layer):
            layer.call = functools.partial(_normalized, layer)
        elif _is_cropping(layer):
            layer.call = functools.partial(_cropped, layer)
        else:
            continue
        exchanged.append(layer)
    return exchanged


def put_back(layers: Iterable[Any]) -> None:
    """Lets exchanged layers call Keras's own operations again."""
    for layer in layers:
        vars(layer).pop("call", None)  # another thread may have done so


def _is_normalization_of_maps(layer: Any) -> bool:
    """Whether TensorFlow's operation does what the layer does."""
    return (
        type(layer) is keras.layers.BatchNormalization
        and layer.built
        and layer.input_spec.ndim == 4
        and layer.axis in (-1, 3)
        and layer.scale
        and layer.center
        and not layer.renorm
        and not layer.synchronized
    )


def _is_cropping(layer: Any) -> bool:
    return (
        type(layer) is keras.layers.Cropping2D and layer.data_format == "channels_last"
    )


def _normalized(
    layer: keras.layers.BatchNormalization,
    inputs: Any,
    training: bool | None = None,
    mask: Any = None,
) -> Any:
    import tensorflow as tf

    dtype = keras.backend.standardize_dtype(inputs.dtype)
    if mask is not None or dtype != layer.compute_dtype or dtype not in _DTYPES:
        return keras.layers.BatchNormalization.call(layer, inputs, training, mask)
    # float32 also where the maps are in bfloat16, as in Keras.
    known = (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
    gamma, beta, mean, variance = (keras.ops.cast(x, "float32") for x in known)
    by_batch = bool(training and layer.trainable)
    normalized, batch_mean, batch_variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs,
        scale=gamma,
        offset=beta,
        mean=tf.zeros(0) if by_batch else mean,
        variance=tf.zeros(0) if by_batch else variance,
        epsilon=layer.epsilon,
        is_training=by_batch,
    )
    if by_batch:
        # TensorFlow divides by n - 1, Keras by n.
        n = tf.cast(tf.size(inputs) / tf.size(batch_mean), "float32")
        batch_variance *= (n - 1) / n
        m = layer.momentum
        layer.moving_mean.assign(mean * m + batch_mean * (1 - m))
        layer.moving_variance.assign(variance * m + batch_variance * (1 - m))
    return normalized


def _cropped(layer: keras.layers.Cropping2D, inputs: Any) -> Any:
    import tensorflow as tf

    (top, bottom), (left, right) = layer.cropping
    batch, height, width, channels = keras.ops.shape(inputs)
    size = (batch, height - top - bottom, width - left - right, channels)
    return tf.slice(inputs, (0, top, left, 0), size)
