"""Batches of (image, {task: map}), each determined by (seed, step)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from training.methods import SECOND_NETWORK
from training.recipes import Data, Recipe


def features(tasks: Mapping[str, Any]) -> set[str]:
    """What is read of the stored examples."""
    return {"image", *(task.feature for task in tasks.values())}


def check(builder: tfds.core.DatasetBuilder, recipe: Any) -> None:
    """Raises a ValueError for a recipe's data that the prepared ones cannot give."""
    data: Data = recipe.data
    height, width = builder.info.features["image"].shape[:2]
    rows, columns = data.target_size
    if height % rows or width % columns:
        raise ValueError(
            f"The targets of '{data.dataset}' are stored at {height}x{width}, of which "
            "the recipe's must be every so many-th pixel, as of "
            f"{height // 2}x{width // 2}. Received: target_size={rows}x{columns}"
        )
    count = check_batch(builder, recipe)
    labelled = labelled_images(data, count, seed=0)
    if recipe.training.batch_size < 2 and not labelled.all():
        raise ValueError(
            f"Half of each batch of the recipe '{recipe.name}' are images with labels "
            f"of {data.label_fraction[0]}. Received: batch_size=1. Give it 2 or more"
        )


def check_batch(builder: tfds.core.DatasetBuilder, recipe: Recipe) -> int:
    """The number of train images, of which there must be enough for a batch.

    And one at least wherever an answer is scored.
    """
    data, size = recipe.data, recipe.training.batch_size
    split = data.train_split
    for scored in (data.test_split, getattr(data, "validation_split", None)):
        if scored and not builder.info.splits[scored].num_examples:
            raise ValueError(
                f"The recipe '{recipe.name}' has no image in its split '{scored}', of "
                f"'{split}' and it together. Give it more images"
            )
    count = builder.info.splits[split].num_examples
    if count < size:
        raise ValueError(
            f"The recipe '{recipe.name}' trains on batches of {size} images, and its "
            f"split '{split}' has {count}. Give it a batch_size of {count} or less, or "
            "more images"
        )
    return count


def load(
    builder: tfds.core.DatasetBuilder, split: str, data: Data, tasks: Mapping[str, Any]
) -> tuple:
    """All examples of a split, small enough for memory.

    Returns:
        `(images, {task: targets})`: a uint8 tensor (N, H, W, 3) and tensors (N, ...).
    """
    examples = _examples(builder, split, data, tasks)
    (loaded,) = examples.batch(len(examples))
    return loaded


def train_batches(
    examples: tuple,
    recipe: Any,
    tasks: Mapping[str, Any],
    seed: int,
    steps: range,
    rows: np.ndarray | None = None,
) -> tf.data.Dataset:
    """The batches of some steps: shuffled, and augmented at random.

    A batch depends on the seed and its step alone, so a resumed run goes on with
    those that it would have had.

    Args:
        examples: What `load` returned of the train split.
        recipe: The `Recipe`.
        tasks: Dict of task name to `Task`.
        seed: Integer.
        steps: `range` of steps, counted from the start of the run.
        rows: Array of the rows of each batch that are wanted, by a worker that makes
            its part; `None` for all.

    Returns:
        A `tf.data.Dataset` of as many batches.
    """
    images, targets = examples
    starved, share = recipe.data.label_fraction
    labelled = labelled_images(recipe.data, len(images), seed)
    size = recipe.training.batch_size
    rows = np.arange(size) if rows is None else rows
    order = _order(labelled, size, steps.stop, seed)[:, rows]

    def batch(step: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        chosen = tf.gather(order, step)
        chosen_targets = {
            name: tf.gather(target, chosen) for name, target in targets.items()
        }
        if share < 1:
            target = chosen_targets[starved]
            void = tf.cast(tasks[starved].void, target.dtype)
            has_labels = tf.gather(labelled, chosen)
            chosen_targets[starved] = _choose(has_labels, target, void)
        seeds = tf.stack([tf.constant(seed, "int64"), step])
        # Drawn for the whole batch, so that a row's own do not depend on the others.
        draws = [tf.gather(x, rows) for x in _draws(size, recipe.data, seeds)]
        return _augment(
            tf.gather(images, chosen), chosen_targets, recipe.data, tasks, draws
        )

    return (
        tf.data.Dataset.range(steps.start, steps.stop)
        .map(batch, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


def test_batches(
    builder: tfds.core.DatasetBuilder, recipe: Any, tasks: Mapping[str, Any]
) -> tf.data.Dataset:
    """The test split, in order, every example once."""
    data = recipe.data
    return (
        _examples(builder, data.test_split, data, tasks)
        .batch(recipe.training.batch_size)
        .map(lambda image, targets: (tf.cast(image, "float32"), targets))
        .prefetch(tf.data.AUTOTUNE)
    )


def labels(
    examples: tuple, recipe: Any, tasks: Mapping[str, Any], seed: int
) -> dict[str, dict[str, int]]:
    """{task: {class: labels}} of the train examples that a run of the seed has."""
    images, targets = examples
    chosen = {name: target.numpy() for name, target in targets.items()}
    starved, _ = recipe.data.label_fraction
    labelled = labelled_images(recipe.data, len(images), seed)
    chosen[starved] = chosen[starved][labelled]
    return {name: task.labels(chosen[name]) for name, task in tasks.items()}


def labelled_images(data: Data, count: int, seed: int) -> np.ndarray:
    """Which train images have the labels of the `label_fraction` task, (N,) bool.

    Those of a small fraction are among those of any larger one, and an ensemble's two
    networks have the same.
    """
    task, share = data.label_fraction
    rank = np.random.default_rng([seed % SECOND_NETWORK, 1]).permutation(count)
    labelled = rank < round(share * count)
    if not labelled.any():
        raise ValueError(
            f"Labels of {task} on {100 * share:g} % of {count} train images are on "
            "none: give a larger label fraction"
        )
    return labelled


def _order(labelled: np.ndarray, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """The examples of each step's batch, (steps, batch size)."""
    (with_labels,), (without,) = labelled.nonzero(), (~labelled).nonzero()
    if not len(without):
        return passes(with_labels, steps, batch_size, [seed, 2])
    half = batch_size // 2
    return np.concatenate(
        [
            passes(with_labels, steps, half, [seed, 2]),
            passes(without, steps, batch_size - half, [seed, 3]),
        ],
        axis=1,
    )


def passes(
    items: Sequence[int] | np.ndarray, steps: int, size: int, seed: list[int]
) -> np.ndarray:
    """The items in a random order, then in another one, and so on: (steps, size)."""
    count = -(-steps * size // len(items))
    orders = [
        np.random.default_rng([*seed, k]).permutation(items) for k in range(count)
    ]
    return np.concatenate(orders)[: steps * size].reshape(steps, size)


def _examples(
    builder: tfds.core.DatasetBuilder, split: str, data: Data, tasks: Mapping[str, Any]
) -> tf.data.Dataset:
    """(image uint8, {task: target}) of each example, not yet in batches."""
    height, width = builder.info.features["image"].shape[:2]
    rows, columns = height // data.target_size[0], width // data.target_size[1]
    # The middle of each cell, so that a mirrored target is of a mirrored image. A cell
    # of even size has none: mirrored, its target is a pixel of the stored map off.
    top, left = (rows - 1) // 2, (columns - 1) // 2

    def parse(example: dict[str, tf.Tensor]) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        image = example["image"]
        if data.image_size != (height, width):
            image = tf.image.resize(image, data.image_size, antialias=True)
            image = tf.cast(tf.round(image), "uint8")
        targets = {
            name: task.target(example)[top::rows, left::columns]
            for name, task in tasks.items()
        }
        return image, targets

    return builder.as_dataset(
        split=split,
        decoders=tfds.decode.PartialDecoding(dict.fromkeys(features(tasks), True)),
    ).map(parse, num_parallel_calls=tf.data.AUTOTUNE)


def _draws(
    count: int, data: Data, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """By chance, for each example: whether mirrored, (N,), its box and its tint."""
    flip_seed, crop_seed, tint_seed = tf.unstack(
        tf.random.experimental.stateless_split(seed, 3)
    )
    mirrored = tf.random.stateless_uniform([count], flip_seed) < 0.5
    tints = tf.random.stateless_uniform(
        [count, 1, 1, 4], tint_seed, -data.colour, data.colour
    )
    return mirrored, _boxes(count, data.smallest_crop, crop_seed), tints


def _augment(
    image: tf.Tensor,
    targets: dict[str, tf.Tensor],
    data: Data,
    tasks: Mapping[str, Any],
    draws: list[tf.Tensor],
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Flips, crops and tints each example of the batch, as was drawn."""
    mirrored, boxes, tints = draws
    image = _choose(mirrored, tf.reverse(image, axis=[2]), image)
    targets = {
        name: _choose(mirrored, tasks[name].flip(target), target)
        for name, target in targets.items()
    }
    if data.smallest_crop < 1:
        image = _crop(image, boxes, "bilinear")
        shares = boxes[:, 2] - boxes[:, 0]
        for name, target in targets.items():
            cropped = tf.cast(_crop(target, boxes, "nearest"), target.dtype)
            targets[name] = tasks[name].enlarge(cropped, shares)
    image = tf.cast(image, "float32")
    if data.colour:
        image = _tint(image, tints)
    return image, targets


def _choose(chosen: tf.Tensor, one: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """For each example of the batch, the one where chosen, else the other."""
    return tf.where(tf.reshape(chosen, [-1] + [1] * (len(one.shape) - 1)), one, other)


def _boxes(count: int, smallest: float, seed: tf.Tensor) -> tf.Tensor:
    """Random boxes of the image's shape, (N, 4): top, left, bottom, right in [0, 1]."""
    side, top, left = tf.unstack(tf.random.stateless_uniform([3, count], seed))
    side = smallest + (1 - smallest) * side
    top, left = (1 - side) * top, (1 - side) * left
    return tf.stack([top, left, top + side, left + side], axis=1)


def _crop(maps: tf.Tensor, boxes: tf.Tensor, method: str) -> tf.Tensor:
    """Each map's part in its box, enlarged to the size of the map; float32."""
    channels = maps if len(maps.shape) == 4 else maps[..., None]
    parts = tf.image.crop_and_resize(
        channels, boxes, tf.range(len(boxes)), maps.shape[1:3], method
    )
    return tf.reshape(parts, tf.shape(maps))


def _tint(image: tf.Tensor, tints: tf.Tensor) -> tf.Tensor:
    """Each image brighter or darker, and so again each of its channels."""
    gain = (1 + tints[..., :1]) * (1 + tints[..., 1:])
    return tf.clip_by_value(image * gain, 0.0, 255.0)
