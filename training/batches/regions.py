"""Batches of (image and RoIs, {task: a row a RoI}), each determined by (seed, step).

Boxes are left, top, right, bottom in pixels. Where an image has fewer than another,
boxes without area fill it up. Fast R-CNN's sampling: all tasks of a step have the same
RoIs, a quarter at most on objects.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from training.batches.dense import check_batch, passes
from training.datasets import proposals
from training.recipes import RegionData

ON_OBJECT = 0.5  # the IoU from which a RoI is an object's


def features(tasks: Mapping[str, Any]) -> set[str]:
    """What is read of the stored examples."""
    return {"image", "objects"}


def check(builder: tfds.core.DatasetBuilder, recipe: Any) -> None:
    """Raises a ValueError for too few images; they may be of any size."""
    check_batch(builder, recipe)


def load(
    builder: tfds.core.DatasetBuilder,
    split: str,
    data: RegionData,
    tasks: Mapping[str, Any],
) -> tuple:
    """All examples of a split, small enough for memory.

    Returns:
        `(images, regions)`: a uint8 tensor (N, H, W, 3), and a dict of tensors: `boxes`
        (N, G, 4), `labels` (N, G), `attributes` (N, G, A), `difficult` (N, G),
        `proposals` (N, P, 4).
    """
    examples = _examples(builder, split, data)
    fill = {**dict.fromkeys(examples.element_spec[1]), "labels": -1}
    (loaded,) = examples.padded_batch(len(examples), padding_values=(None, fill))
    return loaded


def train_batches(
    examples: tuple,
    recipe: Any,
    tasks: Mapping[str, Any],
    seed: int,
    steps: range,
    rows: np.ndarray | None = None,
) -> tf.data.Dataset:
    """The batches of some steps: shuffled, mirrored and sampled at random.

    A batch depends on the seed and its step alone, so a resumed run goes on with
    those that it would have had.

    Args:
        examples: What `load` returned of the train split.
        recipe: The `Recipe`.
        tasks: Dict of task name to `RegionTask`.
        seed: Integer.
        steps: `range` of steps, counted from the start of the run.
        rows: Array of the rows of each batch that are wanted, by a worker that makes
            its part; `None` for all.

    Returns:
        A `tf.data.Dataset` of as many batches.
    """
    images, regions = examples
    size = recipe.training.batch_size
    rows = np.arange(size) if rows is None else rows
    items = list(range(len(images)))
    order = passes(items, steps.stop, size, [seed, 2])

    def batch(step: tf.Tensor) -> tuple:
        chosen = tf.gather(order, step)
        of_images = {name: tf.gather(x, chosen) for name, x in regions.items()}
        seeds = tf.stack([tf.constant(seed, "int64"), step])
        flip_seed, seed_of_rois = tf.unstack(
            tf.random.experimental.stateless_split(seeds, 2)
        )
        image, of_images = _mirror(tf.gather(images, chosen), of_images, flip_seed)
        rois, matched = sample(of_images, recipe.data.sampled, seed_of_rois)
        targets = {name: task.target(rois, matched) for name, task in tasks.items()}
        made = {"image": tf.cast(image, "float32"), "rois": rois}, targets
        # Drawn for the whole batch, so that a row's own do not depend on the others.
        return tf.nest.map_structure(lambda x: tf.gather(x, rows), made)

    return (
        tf.data.Dataset.range(steps.start, steps.stop)
        .map(batch, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


def test_batches(
    builder: tfds.core.DatasetBuilder, recipe: Any, tasks: Mapping[str, Any]
) -> tf.data.Dataset:
    """The test split, in order, every example once, for tasks of the same inputs."""
    data = recipe.data
    (inputs,) = {task.inputs for task in tasks.values()}
    void = {name: tf.constant(task.void, "float32") for name, task in tasks.items()}

    def parse(image: tf.Tensor, regions: dict[str, tf.Tensor]) -> tuple:
        rois = regions["boxes" if inputs == "objects" else inputs]
        truth = {name: task.truth(regions) for name, task in tasks.items()}
        return {"image": tf.cast(image, "float32"), "rois": rois}, truth

    return (
        _examples(builder, data.test_split, data)
        .map(parse, num_parallel_calls=tf.data.AUTOTUNE)
        .padded_batch(
            recipe.training.batch_size,
            padding_values=({"image": None, "rois": None}, void),
        )
        .prefetch(tf.data.AUTOTUNE)
    )


def labels(
    examples: tuple, recipe: Any, tasks: Mapping[str, Any], seed: int
) -> dict[str, dict[str, int]]:
    """{task: {class: labels}} of the train examples."""
    _, regions = examples
    return {name: task.labels(regions) for name, task in tasks.items()}


def sample(
    regions: dict[str, tf.Tensor], count: int, seed: tf.Tensor
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Some RoIs of each image, a quarter at most on objects, the rest on none.

    Where there are not enough without object, the others are on objects, too.

    Args:
        regions: Dict of tensors, as `load` returns them.
        count: Integer, how many RoIs of an image.
        seed: Seed of TensorFlow's stateless random numbers, (2,).

    Returns:
        `(rois, matched)`: the RoIs (N, count, 4), and what is known of the object that
        each overlaps most: its `boxes` (N, count, 4), `attributes` (N, count, A) and
        `classes` (N, count), which are 0 on no object, and -1 for a box that fills up.
    """
    enough = tf.zeros([tf.shape(regions["boxes"])[0], count, 4])
    candidates = tf.concat([regions["boxes"], regions["proposals"], enough], axis=1)
    overlaps = keras.utils.bounding_boxes.compute_iou(
        candidates, regions["boxes"], "xyxy"
    )
    there = _area(candidates) > 0
    on_object = tf.reduce_max(overlaps, axis=-1) >= ON_OBJECT
    chosen = _draw(there, there & on_object, count, seed)

    def gather(x: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
        return tf.gather(x, indices, batch_dims=1)

    best = gather(tf.argmax(overlaps, axis=-1, output_type="int32"), chosen)
    classes = tf.where(
        gather(on_object, chosen), gather(regions["labels"], best) + 1, 0
    )
    return gather(candidates, chosen), {
        "boxes": gather(regions["boxes"], best),
        "attributes": gather(regions["attributes"], best),
        "classes": tf.where(gather(there, chosen), classes, -1),
    }


def _draw(
    there: tf.Tensor, on_object: tf.Tensor, count: int, seed: tf.Tensor
) -> tf.Tensor:
    """The indices of random candidates, (N, count), of (N, P) bool."""
    chance = tf.random.stateless_uniform(tf.shape(there), seed)
    of_objects = tf.where(on_object, chance, -1.0)
    least = tf.math.top_k(of_objects, count // 4).values[:, -1:]
    rank = tf.where(on_object & (chance >= least), 2.0, tf.where(on_object, 0.0, 1.0))
    rank = tf.where(there, rank, -1.0)
    return tf.math.top_k(rank + chance, count).indices


def _mirror(
    image: tf.Tensor, regions: dict[str, tf.Tensor], seed: tf.Tensor
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Mirrors each example of the batch, by chance."""
    mirrored = tf.random.stateless_uniform([len(image)], seed) < 0.5
    image = tf.where(mirrored[:, None, None, None], tf.reverse(image, axis=[2]), image)
    width = tf.constant(image.shape[2], "float32")

    def flip(boxes: tf.Tensor) -> tf.Tensor:
        left, top, right, bottom = tf.unstack(boxes, axis=-1)
        flipped = tf.stack([width - right, top, width - left, bottom], axis=-1)
        return tf.where(mirrored[:, None, None], flipped, boxes)

    boxes = {name: flip(regions[name]) for name in ("boxes", "proposals")}
    return image, {**regions, **boxes}


def _examples(
    builder: tfds.core.DatasetBuilder, split: str, data: RegionData
) -> tf.data.Dataset:
    """(image uint8, regions) of each example, not yet in batches."""
    wanted = tfds.decode.PartialDecoding(dict.fromkeys(features({}), True))
    stored = builder.as_dataset(split=split, decoders=wanted)
    found = proposals.load(builder, split, data.proposals)

    def parse(
        example: dict[str, tf.Tensor], found: tf.Tensor
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        image, size = _fit(example["image"], data.image_size)
        found = tf.boolean_mask(found, _area(found) > 0)
        objects = example["objects"]
        return image, {
            "boxes": _pixels(objects["bbox"], size),
            "labels": tf.cast(objects["label"], "int32"),
            "attributes": objects["attributes"],
            # Where the data set does not say it, none is.
            "difficult": objects.get("difficult", tf.zeros_like(objects["label"])),
            "proposals": _pixels(found, size),
        }

    return tf.data.Dataset.zip(stored, tf.data.Dataset.from_tensor_slices(found)).map(
        parse, num_parallel_calls=tf.data.AUTOTUNE
    )


def _fit(image: tf.Tensor, size: tuple[int, int]) -> tuple[tf.Tensor, tf.Tensor]:
    """The image as large as fits, filled up below and right, and its own (H, W)."""
    own = tf.cast(tf.shape(image)[:2], "float32")
    own = tf.round(own * tf.reduce_min(tf.constant(size, "float32") / own))
    shape = tf.cast(own, "int32")
    if not tf.reduce_all(shape == tf.shape(image)[:2]):
        smaller = tf.image.resize(image, shape, antialias=True)
        image = tf.cast(tf.round(smaller), "uint8")
    return tf.image.pad_to_bounding_box(image, 0, 0, *size), own


def _pixels(boxes: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Top, left, bottom, right as shares, to left, top, right, bottom in pixels."""
    return tf.gather(boxes * tf.tile(size, [2]), [1, 0, 3, 2], axis=-1)


def _area(boxes: tf.Tensor) -> tf.Tensor:
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides[..., 0] * sides[..., 1]
