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


def found(images, examples):
    """Of each image, (the index of its example, whether it is mirrored)."""
    known = {}
    for index, example in enumerate(examples):
        known[example["image"].tobytes()] = index, False
        known[example["image"][:, ::-1].tobytes()] = index, True
    return [known[image.astype("uint8").tobytes()] for image in images]


def test_train_batches_hold_each_example_once_or_mirrored(tiny, builder, tasks):
    images, targets = collect(pipeline.train_batches(builder, tiny, tasks, seed=1))
    indices, mirrored = zip(*found(images, stored(builder, "train")), strict=True)

    assert sorted(indices) == list(range(16))
    assert set(mirrored) == {False, True}
    as_they_are = targets["normals"][~np.array(mirrored)]
    assert (as_they_are[..., 0] > 0).any(axis=(1, 2)).all()


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


def test_a_crop_takes_the_same_part_of_image_and_targets(
    tiny, builder, tasks, monkeypatch
):
    box = np.array([0.21, 0.13, 0.94, 0.86])  # top, left, bottom, right
    monkeypatch.setattr(
        pipeline, "_boxes", lambda count, *_: np.tile(box, (count, 1)).astype("float32")
    )
    whole = collect(pipeline.train_batches(builder, tiny, tasks, seed=1))
    cropping = dataclasses.replace(tiny, smallest_crop=0.5)
    images, targets = collect(pipeline.train_batches(builder, cropping, tasks, seed=1))

    def nearest(maps):
        height, width = maps.shape[1:3]
        rows = np.linspace(box[0], box[2], height) * (height - 1)
        columns = np.linspace(box[1], box[3], width) * (width - 1)
        return maps[:, rows.round().astype(int)][:, :, columns.round().astype(int)]

    for name in targets:
        same = targets[name] == nearest(whole[1][name])
        assert same.mean() > 0.99  # all but halves that float32 rounds otherwise
    assert np.abs(images - nearest(whole[0])).mean() < 4


def test_crops_lie_inside_the_image_and_keep_its_shape():
    top, left, bottom, right = pipeline._boxes(1000, 0.5, (1, 2)).numpy().T
    side = bottom - top

    np.testing.assert_allclose(right - left, side, atol=1e-6)
    assert 0.5 - 1e-6 <= side.min() < 0.51
    assert side.max() > 0.99
    assert min(top.min(), left.min()) >= 0
    assert max(bottom.max(), right.max()) <= 1 + 1e-6
    assert np.abs(np.corrcoef(top / (1 - side), left / (1 - side))[0, 1]) < 0.1


def test_colour_scales_each_channel_of_an_image(tiny, builder, tasks):
    plain = collect(pipeline.train_batches(builder, tiny, tasks, seed=1))
    coloured = dataclasses.replace(tiny, colour=0.2)
    images, targets = collect(pipeline.train_batches(builder, coloured, tasks, seed=1))

    inside = (images > 0) & (images < 255)
    gains = np.where(inside, images / np.maximum(plain[0], 1), np.nan)
    low, high = np.nanmin(gains, axis=(1, 2)), np.nanmax(gains, axis=(1, 2))
    np.testing.assert_allclose(low, high, rtol=1e-5)
    assert low.min() > 0.8**2
    assert high.max() < 1.2**2
    assert len(np.unique(low.round(4))) == low.size  # every image and channel its own
    assert images.max() <= 255
    for name in targets:
        np.testing.assert_array_equal(targets[name], plain[1][name])


def test_every_epoch_has_other_order_and_flips_and_a_seed_repeats_them(
    tiny, builder, tasks
):
    examples = stored(builder, "train")

    def epochs(seed):
        batches = pipeline.train_batches(builder, tiny, tasks, seed)
        return [found(collect(batches)[0], examples) for _ in range(2)]

    first, second = epochs(seed=1)
    assert [index for index, _ in first] != [index for index, _ in second]
    assert [mirrored for _, mirrored in first] != [mirrored for _, mirrored in second]
    assert epochs(seed=1) == [first, second]
    assert epochs(seed=2) != [first, second]


def test_nyuv2_needs_a_folder(tmp_path):
    settings = recipe.find("nyuv2", toy=True)

    with pytest.raises(ValueError, match="give it with --data DIR"):
        pipeline.prepare(settings, None, tmp_path)
    with pytest.raises(ValueError, match=r"Missing: .*nowhere"):
        pipeline.prepare(settings, tmp_path / "nowhere", tmp_path)
