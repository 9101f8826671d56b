import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

from training import recipe
from training.datasets import pipeline


def stored(builder, split):
    return list(tfds.as_numpy(builder.as_dataset(split=split)))


def collect(batches):
    images, targets = zip(*batches.as_numpy_iterator(), strict=True)
    by_task = {name: np.concatenate([t[name] for t in targets]) for name in targets[0]}
    return np.concatenate(images), by_task


def test_test_batches_are_the_examples_in_order(tiny, builder, tasks):
    examples = stored(builder, "test")
    images, targets = collect(pipeline.test_batches(builder, tiny, tasks))

    np.testing.assert_array_equal(images, [x["image"] for x in examples])
    np.testing.assert_array_equal(
        targets["segmentation"], [x["segmentation"][::2, ::2, 0] for x in examples]
    )
    encoded = np.stack([x["normals"][::2, ::2] for x in examples]).astype("float64")
    expected = np.where(encoded.any(-1, keepdims=True), encoded / 127.5 - 1, 0)
    np.testing.assert_allclose(targets["normals"], expected, atol=0.02)


def test_images_are_resized_to_the_recipe(tiny, builder, tasks):
    doubled = dataclasses.replace(tiny, image_size=(192, 256))
    images, _ = collect(pipeline.test_batches(builder, doubled, tasks))
    original, _ = collect(pipeline.test_batches(builder, tiny, tasks))

    assert images.shape[1:] == (192, 256, 3)
    means = images.reshape(len(images), 96, 2, 128, 2, 3).mean((2, 4))
    assert np.abs(means - original).mean() < 4


def test_train_batches_hold_each_example_once_or_mirrored(tiny, builder, tasks):
    examples = stored(builder, "train")
    images, targets = collect(pipeline.train_batches(builder, tiny, tasks, seed=1))
    found = []
    for image, normals in zip(images, targets["normals"], strict=True):
        for index, example in enumerate(examples):
            if np.array_equal(image, example["image"]):
                found.append((index, "as it is"))
                assert (normals[..., 0] > 0).any()
            elif np.array_equal(image, example["image"][:, ::-1]):
                found.append((index, "mirrored"))

    assert sorted(index for index, _ in found) == list(range(16))
    assert {how for _, how in found} == {"as it is", "mirrored"}


def test_targets_are_mirrored_with_their_image(tiny, builder, tasks):
    full = dataclasses.replace(tiny, target_size=(96, 128))
    by_image = {
        x["image"].tobytes(): (x["segmentation"][..., 0], x["normals"])
        for x in stored(builder, "train")
    }
    images, targets = collect(pipeline.train_batches(builder, full, tasks, seed=1))
    mirrored = 0
    for image, classes, normals in zip(
        images.astype("uint8"), targets["segmentation"], targets["normals"], strict=True
    ):
        flip = image.tobytes() not in by_image
        if flip:
            mirrored += 1
            image, classes = image[:, ::-1], classes[:, ::-1]
            normals = normals[:, ::-1] * (-1, 1, 1)
        true_classes, encoded = by_image[image.tobytes()]
        np.testing.assert_array_equal(classes, true_classes)
        defined = encoded.any(-1)
        np.testing.assert_allclose(
            normals[defined], encoded[defined] / 127.5 - 1, atol=0.02
        )
    assert 0 < mirrored < 16


def test_every_epoch_has_another_order_and_a_seed_repeats_it(tiny, builder, tasks):
    batches = pipeline.train_batches(builder, tiny, tasks, seed=1)
    first, second = collect(batches)[0], collect(batches)[0]
    again = collect(pipeline.train_batches(builder, tiny, tasks, seed=1))[0]

    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)


def test_nyuv2_needs_a_folder(tmp_path):
    settings = recipe.find("nyuv2", toy=True)

    with pytest.raises(ValueError, match="give it with --data DIR"):
        pipeline.prepare(settings, None, tmp_path)
    with pytest.raises(ValueError, match=r"Missing: .*nowhere"):
        pipeline.prepare(settings, tmp_path / "nowhere", tmp_path)
