"""From a recipe to one tower per task, and back from a trained model.

Every tower ends in a layer named `logits`, by which it is found in a joined model.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import keras

from keras_cross_stitch import RoIAlign, fcn_alexnet
from keras_cross_stitch.towers import BilinearUpsampling
from training import alexnet_weights, backbones
from training.recipes import (
    STRIDE,
    FastRcnnAlexNet,
    FastRcnnBackbone,
    FcnAlexNet,
    Recipe,
    SavedBackbone,
)


def build(
    recipe: Recipe, tasks: Mapping[str, Any], seed: int
) -> dict[str, keras.Model]:
    """The untrained towers, {task: model from image to logits}.

    All start from the same weights, so that channel k means the same in each.
    """
    keras.utils.set_random_seed(seed)
    towers = {}
    for name, task in tasks.items():
        if getattr(recipe.tower, "common_start", True):
            keras.utils.set_random_seed(seed)
        towers[name] = _KINDS[type(recipe.tower)](recipe, task.outputs)
    return towers


def take_out(model: keras.Model, task: str) -> keras.Model:
    """The tower of a task, as a model of its own, out of a model without units."""
    tower = keras.Model(model.input, model.get_layer(f"{task}_logits").output)

    def own_name(layer: keras.Layer) -> keras.Layer:
        prefix = task if layer.name.startswith(f"{task}_") else "shared"
        config = {**layer.get_config(), "name": layer.name.removeprefix(f"{prefix}_")}
        return type(layer).from_config(config)

    alone = keras.models.clone_model(tower, clone_function=own_name)
    alone.set_weights(tower.get_weights())
    return alone


def identity(tower: Any) -> dict[str, str]:
    """What a result depends on, of a recipe's tower: its files, not their paths."""
    files = {}
    if isinstance(tower, SavedBackbone):
        files["backbone"] = backbones.existing(tower.backbone)
    if getattr(tower, "weights", None) is not None:
        files["weights"] = tower.weights
    return {
        name: f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for name, path in files.items()
    }


# Each of these is for recipes with one kind of tower, see `_KINDS`.
def _fcn_alexnet(recipe: Any, outputs: int) -> keras.Model:
    with backbones.dtype_of(recipe):
        tower = fcn_alexnet(
            outputs,
            (*recipe.data.image_size, 3),
            width=recipe.tower.width,
            normalization=recipe.tower.normalization,
            dropout=recipe.tower.dropout,
            upsampling=_upsampling(recipe),
            # L2 adds the sum of squares, whose gradient is twice the weight.
            kernel_regularizer=keras.regularizers.L2(recipe.tower.weight_decay / 2),
        )
    return keras.Model(tower.input, _logits(tower.output))


def _saved_backbone(recipe: Any, outputs: int) -> keras.Model:
    backbone = backbones.build(recipe)
    with backbones.dtype_of(recipe):
        x = keras.layers.Dropout(recipe.tower.dropout, name="dropout")(backbone.output)
        x = keras.layers.Conv2D(outputs, 1, kernel_initializer="zeros", name="score")(x)
    factor = _upsampling(recipe)
    x = BilinearUpsampling(factor, dtype="float32", name="upsampling")(x)
    rows, columns = recipe.data.target_size
    surplus = ((0, x.shape[1] - rows), (0, x.shape[2] - columns))
    x = keras.layers.Cropping2D(surplus, dtype="float32", name="crop")(x)
    return keras.Model(backbone.input, _logits(x))


def _fast_rcnn_alexnet(recipe: Any, outputs: int) -> keras.Model:
    """RoIs are pooled from `conv5`, in the place of `pool5`, which has its name."""
    tower = recipe.tower
    decay = keras.regularizers.L2(tower.weight_decay / 2)
    with backbones.dtype_of(recipe):
        trunk = fcn_alexnet(
            1,
            (*recipe.data.image_size, 3),
            width=tower.width,
            normalization=tower.normalization,
            kernel_regularizer=decay,
        )
        rois = keras.Input((None, 4), name="rois")
        x = trunk.get_layer("conv5").output
        # Padded on one side, three times: not centred on pixel 8, but later.
        x = RoIAlign(6, 16, first=14.5, name="pool5")([x, rois])
        x = _per_region(
            x,
            outputs,
            # fc6 and fc7 are as wide as the convolutions that stand for them.
            trunk.get_layer("fc7").filters,
            tower.dropout,
            normalized=tower.normalization == "batch",
            kernel_regularizer=decay,
        )
    model = keras.Model({"image": trunk.input, "rois": rois}, x)
    if tower.weights is not None:
        alexnet_weights.load(model, tower.weights)
    return model


def _fast_rcnn_backbone(recipe: Any, outputs: int) -> keras.Model:
    """RoIs are pooled from several maps, which are put behind each other."""
    tower = recipe.tower
    backbone = backbones.build(recipe)
    with backbones.dtype_of(recipe):
        rois = keras.Input((None, 4), name="rois")
        pooled = []
        for name in tower.pooled:
            x = backbones.layer(backbone, name, recipe, "pools RoIs").output
            stride = round(recipe.data.image_size[0] / x.shape[1])
            align = RoIAlign(tower.pooled_size, stride, name=f"{name}_pooled")
            pooled.append(align([x, rois]))
        x = keras.layers.Concatenate(name="pooled")(pooled)
        x = _per_region(x, outputs, tower.fully_connected, tower.dropout)
    return keras.Model({"image": backbone.input, "rois": rois}, x)


def _per_region(
    x: keras.KerasTensor,
    outputs: int,
    units: int,
    dropout: float,
    normalized: bool = False,
    kernel_regularizer: keras.regularizers.Regularizer | None = None,
) -> keras.KerasTensor:
    """From pooled RoIs (N, R, size, size, C) through fc6 and fc7 to their logits."""
    of_region = math.prod(x.shape[2:])
    x = keras.layers.Reshape((-1, of_region), name="flatten")(x)
    for fc in ("fc6", "fc7"):
        x = keras.layers.Dense(
            units,
            activation="relu",
            kernel_initializer="he_normal",
            kernel_regularizer=kernel_regularizer,
            name=fc,
        )(x)
        if normalized:
            x = keras.layers.BatchNormalization(name=f"{fc}_norm")(x)
        x = keras.layers.Dropout(dropout, name=f"{fc}_dropout")(x)
    x = keras.layers.Dense(
        outputs,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        kernel_regularizer=kernel_regularizer,
        name="score",
    )(x)
    return _logits(x)


_KINDS = {
    FcnAlexNet: _fcn_alexnet,
    SavedBackbone: _saved_backbone,
    FastRcnnAlexNet: _fast_rcnn_alexnet,
    FastRcnnBackbone: _fast_rcnn_backbone,
}


def _upsampling(recipe: Any) -> int:
    return STRIDE * recipe.data.target_size[0] // recipe.data.image_size[0]


def _logits(x: keras.KerasTensor) -> keras.KerasTensor:
    return keras.layers.Identity(dtype="float32", name="logits")(x)


def has(model: keras.Model, kind: Any) -> bool:
    """Whether a layer of the model is of that class, or of one of a union."""
    return any(isinstance(layer, kind) for layer in model.layers)
