"""Cross-stitch networks for Keras: T models that learn what to share."""

from keras_cross_stitch.alpha import AlphaHistory, alpha_table, plot_alpha
from keras_cross_stitch.cross_stitch import CrossStitch, OwnMapsOnly
from keras_cross_stitch.learning_rate_groups import LearningRateGroups
from keras_cross_stitch.loss_weighting import DynamicWeightAverage, weigh_losses
from keras_cross_stitch.missing_labels import MaskedLoss, MaskedMetric
from keras_cross_stitch.nddr import NDDR
from keras_cross_stitch.network_plot import network_table, plot_network
from keras_cross_stitch.networks import split, stitch
from keras_cross_stitch.proposals import selective_search
from keras_cross_stitch.regions import Detections, RoIAlign
from keras_cross_stitch.saved_model import export_saved_model
from keras_cross_stitch.taps import common_taps
from keras_cross_stitch.towers import alexnet, fcn_alexnet
from keras_cross_stitch.what_is_shared import sharing

__version__ = "0.1.0"

__all__ = [
    "NDDR",
    "AlphaHistory",
    "CrossStitch",
    "Detections",
    "DynamicWeightAverage",
    "LearningRateGroups",
    "MaskedLoss",
    "MaskedMetric",
    "OwnMapsOnly",
    "RoIAlign",
    "alexnet",
    "alpha_table",
    "common_taps",
    "export_saved_model",
    "fcn_alexnet",
    "network_table",
    "plot_alpha",
    "plot_network",
    "selective_search",
    "sharing",
    "split",
    "stitch",
    "weigh_losses",
]
