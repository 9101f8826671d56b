"""From a TFDS builder to batches of (image, {task: target})."""

import tensorflow as tf
import tensorflow_datasets as tfds

from training.datasets.nyuv2 import Nyuv2, check_folder
from training.datasets.scenes import Scenes

BUILDERS = {"nyuv2": Nyuv2, "scenes": Scenes}


def prepare(recipe, data, runs):
    """Builds the recipe's data set under `<runs>/datasets`, once.

    Args:
        recipe: The `Recipe`.
        data: Path of the folder with the original files, or `None` for a data
            set that needs none.
        runs: Path of the runs.

    Returns:
        The TFDS builder, its data prepared.
    """
    builder = BUILDERS[recipe.dataset](
        config=recipe.config, data_dir=str(runs / "datasets")
    )
    if recipe.dataset == "nyuv2" and not builder.data_path.exists():
        if data is None:
            raise ValueError(
                f"The recipe '{recipe.name}' needs the folder with the data set's "
                "files: give it with --data DIR"
            )
        check_folder(data)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            manual_dir=str(data) if data else None
        )
    )
    return builder


def train_batches(builder, recipe, tasks, seed):
    """The train split: cached, shuffled, augmented at random, in whole batches."""
    examples = _examples(builder, recipe.train_split, recipe, tasks).cache()
    batches = examples.shuffle(len(examples), seed=seed).batch(
        recipe.batch_size, drop_remainder=True
    )
    # Drawn apart from the maps, which run in parallel, in no fixed order.
    seeds = tf.data.Dataset.random(seed, rerandomize_each_iteration=True).batch(2)
    return (
        tf.data.Dataset.zip(batches, seeds)
        .map(
            lambda batch, seed: _augment(*batch, recipe, tasks, seed),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        .prefetch(tf.data.AUTOTUNE)
    )


def test_batches(builder, recipe, tasks):
    """The test split, in order, every example once."""
    return (
        _examples(builder, recipe.test_split, recipe, tasks)
        .batch(recipe.batch_size)
        .map(lambda image, targets: (tf.cast(image, "float32"), targets))
        .prefetch(tf.data.AUTOTUNE)
    )


def _examples(builder, split, recipe, tasks):
    """(image uint8, {task: target}) of each example, not yet in batches."""
    wanted = {"image", *(task.feature for task in tasks.values())}
    height, width = builder.info.features["image"].shape[:2]
    steps = height // recipe.target_size[0], width // recipe.target_size[1]

    def parse(example):
        image = example["image"]
        if recipe.image_size != (height, width):
            image = tf.image.resize(image, recipe.image_size)
            image = tf.cast(tf.round(image), "uint8")
        targets = {
            name: task.target(example[task.feature][:: steps[0], :: steps[1]])
            for name, task in tasks.items()
        }
        return image, targets

    return builder.as_dataset(
        split=split,
        decoders=tfds.decode.PartialDecoding(dict.fromkeys(wanted, True)),
    ).map(parse, num_parallel_calls=tf.data.AUTOTUNE)


def _augment(image, targets, recipe, tasks, seed):
    """Flips, crops and tints each example of the batch, by chance."""
    flip_seed, crop_seed, tint_seed = tf.unstack(
        tf.random.experimental.stateless_split(seed, 3)
    )
    mirrored = tf.random.stateless_uniform([len(image)], flip_seed) < 0.5
    image = _choose(mirrored, tf.reverse(image, axis=[2]), image)
    targets = {
        name: _choose(mirrored, tasks[name].flip(target), target)
        for name, target in targets.items()
    }
    if recipe.smallest_crop < 1:
        boxes = _boxes(len(image), recipe.smallest_crop, crop_seed)
        image = _crop(image, boxes, "bilinear")
        targets = {
            name: tf.cast(_crop(target, boxes, "nearest"), target.dtype)
            for name, target in targets.items()
        }
    image = tf.cast(image, "float32")
    if recipe.colour:
        image = _tint(image, recipe.colour, tint_seed)
    return image, targets


def _choose(chosen, one, other):
    """For each example of the batch, the one where chosen, else the other."""
    return tf.where(tf.reshape(chosen, [-1] + [1] * (len(one.shape) - 1)), one, other)


def _boxes(count, smallest, seed):
    """Random boxes of the image's shape, (N, 4): top, left, bottom, right in [0, 1]."""
    side, top, left = tf.unstack(tf.random.stateless_uniform([3, count], seed))
    side = smallest + (1 - smallest) * side
    top, left = (1 - side) * top, (1 - side) * left
    return tf.stack([top, left, top + side, left + side], axis=1)


def _crop(maps, boxes, method):
    """Each map's part in its box, enlarged to the size of the map; float32."""
    channels = maps if len(maps.shape) == 4 else maps[..., None]
    parts = tf.image.crop_and_resize(
        channels, boxes, tf.range(len(boxes)), maps.shape[1:3], method
    )
    return tf.reshape(parts, tf.shape(maps))


def _tint(image, strength, seed):
    """Each image brighter or darker, and so again each of its channels."""
    draws = tf.random.stateless_uniform(
        [len(image), 1, 1, 4], seed, -strength, strength
    )
    gain = (1 + draws[..., :1]) * (1 + draws[..., 1:])
    return tf.clip_by_value(image * gain, 0.0, 255.0)
