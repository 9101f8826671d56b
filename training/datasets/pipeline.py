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
    """The train split: cached, shuffled, flipped at random, in whole batches."""
    examples = _examples(builder, recipe.train_split, recipe, tasks).cache()
    batches = examples.shuffle(len(examples), seed=seed).batch(
        recipe.batch_size, drop_remainder=True
    )
    # Drawn apart from the maps, which run in parallel, in no fixed order.
    flip_seeds = tf.data.Dataset.random(seed, rerandomize_each_iteration=True).batch(2)
    return (
        tf.data.Dataset.zip(batches, flip_seeds)
        .map(
            lambda batch, flip_seed: _flip_some(*batch, tasks, flip_seed),
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


def _flip_some(image, targets, tasks, flip_seed):
    """Mirrors each example of the batch with probability one half."""
    mirrored = tf.random.stateless_uniform([tf.shape(image)[0]], flip_seed) < 0.5

    def choose(flipped, original):
        mask = tf.reshape(mirrored, [-1] + [1] * (len(original.shape) - 1))
        return tf.where(mask, flipped, original)

    image = choose(tf.reverse(image, axis=[2]), image)
    return tf.cast(image, "float32"), {
        name: choose(tasks[name].flip(target), target)
        for name, target in targets.items()
    }
