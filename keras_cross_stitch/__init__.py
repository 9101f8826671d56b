"""Cross-stitch networks for Keras: T models that learn what to share."""

from keras_cross_stitch.cross_stitch import CrossStitch
from keras_cross_stitch.networks import split, stitch
from keras_cross_stitch.towers import alexnet, fcn_alexnet

__all__ = [
    "CrossStitch",
    "alexnet",
    "fcn_alexnet",
    "split",
    "stitch",
]
