"""A saved Keras model as the trunk of towers, at the recipe's image size."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from keras_cross_stitch import common_taps
from training import recipes
from training.recipes import STRIDE, FastRcnnBackbone, Recipe

# A backbone without the layers that a recipe names is frozen up to maps of this stride.
FROZEN_STRIDE = 8


def build(recipe: Any) -> keras.Model:
    """The saved model at the recipe's image size, frozen as far as it says.

    Some models give a cell of their last map to what is left of 32 pixels, and others
    do not: for those the image is filled up, below and to the right.
    """
    height, width = recipe.data.image_size
    cells = -(-height // STRIDE), -(-width // STRIDE)
    backbone = _build(recipe, (0, 0))
    if backbone.output.shape[1:3] != cells:
        more = cells[0] * STRIDE - height, cells[1] * STRIDE - width
        backbone = _build(recipe, more)
    if backbone.output.shape[1:3] != cells:
        found = "x".join(map(str, backbone.output.shape[1:3]))
        raise ValueError(
            f"The backbone {recipe.tower.backbone} must have one cell for {STRIDE} "
            f"pixels. Received: {found} cells for an image of {height}x{width}"
        )
    return backbone


def _build(recipe: Any, more: tuple[int, int]) -> keras.Model:
    """As `build`, with so many more rows and columns of the image, which are black."""
    saved = _load(recipe.tower.backbone)
    frozen_to = layer(saved, recipe.tower.frozen_to, recipe, "is frozen up to it")
    frozen = {x.name for x in keras.Model(saved.inputs, frozen_to.output).layers}

    def as_in_recipe(layer: keras.Layer) -> keras.Layer:
        if not isinstance(layer, keras.Layer):  # an operation, such as `x + y`
            return type(layer).from_config(layer.get_config())
        config = {**layer.get_config(), "dtype": recipe.training.dtype}
        # Frozen batch normalisation keeps its statistics, too.
        return type(layer).from_config(
            {**config, "trainable": layer.name not in frozen}
        )

    image = keras.Input((*recipe.data.image_size, 3), name="image")
    with dtype_of(recipe):
        filled = image
        if any(more):
            below_right = [(0, size) for size in more]
            filled = keras.layers.ZeroPadding2D(below_right, name="filled")(image)
        pixels = _pixels(filled, saved, recipe.tower)

        def on_pixels(layer: keras.Layer, *inputs: Any, **options: Any) -> Any:
            return layer(*(pixels if x is image else x for x in inputs), **options)

        backbone = keras.models.clone_model(
            saved,
            input_tensors=_as_input(saved, image),
            clone_function=as_in_recipe,
            call_function=on_pixels,
        )
    backbone.set_weights(saved.get_weights())
    return backbone


def with_its_names(recipe: Recipe) -> Recipe:
    """The recipe with layers of its backbone, where that lacks the recipe's.

    All up to the end of the maps of stride 8 is frozen, and the units stand at the ends
    of those of larger strides, beside those of the recipe's head.

    Raises:
        ValueError: For a backbone without maps of these strides.
    """
    tower: Any = recipe.tower
    saved = _load(tower.backbone)
    own = {layer.name for layer in saved.layers}
    pooled = tower.pooled if isinstance(tower, FastRcnnBackbone) else ()
    of_head = {"fc6", "fc7", "score"}
    if own >= {tower.frozen_to, *pooled, *recipe.units.at} - of_head:
        return recipe
    height, width = recipe.data.image_size
    image = keras.Input((height, width, 3))
    sized = keras.models.clone_model(saved, input_tensors=_as_input(saved, image))
    sized.trainable = True
    names = [layer.name for layer in sized.layers]
    sized = keras.Model(image, keras.layers.Conv2D(1, 1)(sized.output))  # has a head
    ends = {
        round(height / sized.get_layer(tap["a"]).output.shape[1]): tap["a"]
        for tap in common_taps({"a": sized, "b": sized})
    }
    behind = [name for stride, name in ends.items() if stride > FROZEN_STRIDE]
    if FROZEN_STRIDE not in ends or not behind:
        raise ValueError(
            f"The backbone {tower.backbone} lacks layers that the recipe names, such "
            f"as '{tower.frozen_to}', and none can stand for them: expected ends of "
            f"maps of stride {FROZEN_STRIDE} and more. Found: {ends}"
        )
    # Of each task's own are the layers from the first with weights behind such an end.
    weighted = [x.name for x in sized.layers if x.weights]
    splits = [
        next(x for x in weighted if names.index(x) > names.index(end))
        for end in (ends[FROZEN_STRIDE], *behind[:-1])
    ]
    changed = dataclasses.replace(
        recipe,
        splits=(*splits, *(x for x in recipe.splits if x in of_head)),
        best_split=splits[-1],
    )
    at = (*behind, *(x for x in recipe.units.at if x in of_head))
    changed = recipes.change(changed, "units", at=at)
    found = {"pooled": tuple(behind[-2:])} if pooled else {}
    return recipes.change(changed, "tower", frozen_to=ends[FROZEN_STRIDE], **found)


def layer(backbone: keras.Model, name: str, recipe: Any, why: str) -> keras.Layer:
    names = [layer.name for layer in backbone.layers]
    if name not in names:
        raise ValueError(
            f"The backbone {recipe.tower.backbone} has no layer '{name}'; the recipe "
            f"{why}. It has: {', '.join(names)}"
        )
    return backbone.get_layer(name)


def existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(
            f"There is no backbone {path}. Give a saved Keras model with --backbone "
            "FILE; where there is internet, keras.applications."
            'EfficientNetV2B0(include_top=False).save("backbone.keras") makes one'
        )
    return path


@contextlib.contextmanager
def dtype_of(recipe: Any) -> Iterator[None]:
    """The layers that are made meanwhile have the recipe's dtype policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(recipe.training.dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _load(path: Path) -> keras.Model:
    return keras.models.load_model(existing(path), compile=False)


def _as_input(saved: keras.Model, image: keras.KerasTensor) -> Any:
    """The image, in the list or dict that the saved model takes."""
    return keras.tree.pack_sequence_as(saved.input, [image])


def _pixels(
    image: keras.KerasTensor, saved: keras.Model, tower: Any
) -> keras.KerasTensor:
    """The image, in [0, 255], as the saved model expects it."""
    if tower.pixel_range is not None:
        low, high = tower.pixel_range
        return keras.layers.Rescaling((high - low) / 255, low, name="pixels")(image)
    rescaling = (keras.layers.Rescaling, keras.layers.Normalization)
    if not any(isinstance(layer, rescaling) for layer in saved.layers):
        raise ValueError(
            f"The backbone {tower.backbone} has no layer that rescales pixels from "
            "[0, 255], and the recipe does not say what it expects. Give one that has "
            "such a layer, or the recipe's tower a `pixel_range`: (-1.0, 1.0) for "
            "MobileNetV2, (0.0, 255.0) for pixels as they are"
        )
    return image
