"""From a recipe to one tower per task, and back from a trained model.

Every tower ends in a layer named `logits`, by which it is found in a joined model.
"""

import contextlib
import hashlib

import keras

from keras_cross_stitch import fcn_alexnet
from keras_cross_stitch.towers import BilinearUpsampling
from training.recipe import FcnAlexNet, SavedBackbone

STRIDE = 32  # pixels of the image to a cell of the last map, in both kinds of tower


def build(recipe, tasks, seed):
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


def take_out(model, task):
    """The tower of a task, as a model of its own, out of a model without units."""
    tower = keras.Model(model.inputs, model.get_layer(f"{task}_logits").output)

    def own_name(layer):
        prefix = task if layer.name.startswith(f"{task}_") else "shared"
        config = {**layer.get_config(), "name": layer.name.removeprefix(f"{prefix}_")}
        return type(layer).from_config(config)

    alone = keras.models.clone_model(tower, clone_function=own_name)
    alone.set_weights(tower.get_weights())
    return alone


def identity(tower):
    """What a result depends on, of a recipe's tower: the backbone, not its path."""
    if not isinstance(tower, SavedBackbone):
        return {}
    digest = hashlib.sha256(_existing(tower.backbone).read_bytes()).hexdigest()
    return {"backbone": f"sha256 {digest}"}


def _fcn_alexnet(recipe, outputs):
    with _dtype(recipe):
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


def _saved_backbone(recipe, outputs):
    path = _existing(recipe.tower.backbone)
    saved = keras.models.load_model(path, compile=False)
    names = [layer.name for layer in saved.layers]
    if recipe.tower.frozen_to not in names:
        raise ValueError(
            f"The backbone {path} has no layer '{recipe.tower.frozen_to}', up to which "
            f"the recipe '{recipe.name}' freezes it. It has: {', '.join(names)}"
        )
    frozen_to = saved.get_layer(recipe.tower.frozen_to).output
    frozen = {layer.name for layer in keras.Model(saved.inputs, frozen_to).layers}

    def as_in_recipe(layer):
        config = {**layer.get_config(), "dtype": recipe.training.dtype}
        # Frozen batch normalisation keeps its statistics, too.
        return type(layer).from_config(
            {**config, "trainable": layer.name not in frozen}
        )

    height, width = recipe.data.image_size
    image = keras.Input((height, width, 3), name="image")
    with _dtype(recipe):
        backbone = keras.models.clone_model(
            saved, input_tensors=image, clone_function=as_in_recipe
        )
        backbone.set_weights(saved.get_weights())
        x = keras.layers.Dropout(recipe.tower.dropout, name="dropout")(backbone.output)
        x = keras.layers.Conv2D(outputs, 1, kernel_initializer="zeros", name="score")(x)
    if x.shape[1:3] != (-(-height // STRIDE), -(-width // STRIDE)):
        raise ValueError(
            f"The backbone {path} must have one cell for {STRIDE} pixels. Received: "
            f"{x.shape[1]}x{x.shape[2]} cells for an image of {height}x{width}"
        )
    factor = _upsampling(recipe)
    x = BilinearUpsampling(factor, dtype="float32", name="upsampling")(x)
    rows, columns = recipe.data.target_size
    surplus = ((0, x.shape[1] - rows), (0, x.shape[2] - columns))
    x = keras.layers.Cropping2D(surplus, dtype="float32", name="crop")(x)
    return keras.Model(image, _logits(x))


_KINDS = {FcnAlexNet: _fcn_alexnet, SavedBackbone: _saved_backbone}


def _upsampling(recipe):
    return STRIDE * recipe.data.target_size[0] // recipe.data.image_size[0]


def _logits(x):
    return keras.layers.Identity(dtype="float32", name="logits")(x)


@contextlib.contextmanager
def _dtype(recipe):
    """The layers that are made meanwhile have the recipe's dtype policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(recipe.training.dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _existing(path):
    if not path.is_file():
        raise ValueError(
            f"There is no backbone {path}. Give a saved Keras model with --backbone "
            "FILE; where there is internet, keras.applications.MobileNetV2("
            'include_top=False).save("backbone.keras") makes one'
        )
    return path
