import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from training import recipes
from training.batches import dense
from training.methods import METHODS


@pytest.fixture
def builder(finished):
    return finished.builder


@pytest.fixture(scope="module")
def pass_(finished):
    """`pass_(**data)`: the batches of one pass over the train split, seed 1."""

    def batches(seed=1, steps=range(2), examples=None, **data):
        recipe = recipes.change(finished.recipe, "data", **data)
        if examples is None:
            examples = dense.load(
                finished.builder, "train", recipe.data, finished.tasks
            )
        return collect(
            dense.train_batches(examples, recipe, finished.tasks, seed, steps)
        )

    return batches


def stored(builder, split):
    return list(tfds.as_numpy(builder.as_dataset(split=split)))


def collect(batches):
    images, targets = zip(*batches.as_numpy_iterator(), strict=True)
    by_task = {name: np.concatenate([t[name] for t in targets]) for name in targets[0]}
    return np.concatenate(images), by_task


def test_test_batches_are_the_examples_in_order(tiny, builder, tasks):
    examples = stored(builder, "test")
    uneven = recipes.change(tiny, "training", batch_size=3)  # of 8
    images, targets = collect(dense.test_batches(builder, uneven, tasks))

    np.testing.assert_array_equal(images, [x["image"] for x in examples])
    np.testing.assert_array_equal(
        targets["segmentation"], [x["segmentation"][::2, ::2, 0] for x in examples]
    )
    encoded = np.stack([x["normals"][::2, ::2] for x in examples]).astype("float64")
    expected = np.where(encoded.any(-1, keepdims=True), encoded / 127.5 - 1, 0)
    np.testing.assert_allclose(targets["normals"], expected, atol=0.02)


def test_images_are_resized_to_the_recipe(tiny, builder, tasks):
    doubled = recipes.change(tiny, "data", image_size=(192, 256))
    images, _ = collect(dense.test_batches(builder, doubled, tasks))
    original, _ = collect(dense.test_batches(builder, tiny, tasks))

    assert images.shape[1:] == (192, 256, 3)
    means = images.reshape(len(images), 96, 2, 128, 2, 3).mean((2, 4))
    assert np.abs(means - original).mean() < 4


def test_what_is_made_smaller_is_a_mean_of_what_is_there(tiny, builder, tasks):
    quarter = recipes.change(tiny, "data", image_size=(24, 32))
    images, _ = collect(dense.test_batches(builder, quarter, tasks))
    original, _ = collect(dense.test_batches(builder, tiny, tasks))

    cells = original.reshape(len(original), 24, 4, 32, 4, 3)
    distance = np.abs(cells.mean((2, 4)) - images).mean()
    of_one_pixel = np.abs(cells.mean((2, 4)) - cells[:, :, 1, :, 1]).mean()
    assert distance < 0.5 * of_one_pixel


def found(images, examples):
    """Of each image, (the index of its example, whether it is mirrored)."""
    known = {}
    for index, example in enumerate(examples):
        known[example["image"].tobytes()] = index, False
        known[example["image"][:, ::-1].tobytes()] = index, True
    return [known[image.astype("uint8").tobytes()] for image in images]


def test_train_batches_hold_each_example_once_or_mirrored(builder, pass_):
    images, targets = pass_()
    indices, mirrored = zip(*found(images, stored(builder, "train")), strict=True)

    assert sorted(indices) == list(range(16))
    assert set(mirrored) == {False, True}
    as_they_are = targets["normals"][~np.array(mirrored)]
    assert (as_they_are[..., 0] > 0).any(axis=(1, 2)).all()


def test_targets_are_mirrored_with_their_image(builder, pass_):
    by_image = {
        x["image"].tobytes(): (x["segmentation"][..., 0], x["normals"])
        for x in stored(builder, "train")
    }
    images, targets = pass_(target_size=(96, 128))
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


def test_a_crop_takes_the_same_part_of_image_and_targets(pass_, monkeypatch):
    box = np.array([0.21, 0.13, 0.94, 0.86])  # top, left, bottom, right
    monkeypatch.setattr(
        dense, "_boxes", lambda count, *_: np.tile(box, (count, 1)).astype("float32")
    )
    whole = pass_()
    images, targets = pass_(smallest_crop=0.5)

    def nearest(maps):
        height, width = maps.shape[1:3]
        rows = np.linspace(box[0], box[2], height) * (height - 1)
        columns = np.linspace(box[1], box[3], width) * (width - 1)
        return maps[:, rows.round().astype(int)][:, :, columns.round().astype(int)]

    for name in targets:
        same = targets[name] == nearest(whole[1][name])
        assert same.mean() > 0.99  # all but halves that float32 rounds otherwise
    # Between pixels an image is a mean of them.
    assert 1 < np.abs(images - nearest(whole[0])).mean() < 4


def test_what_is_cropped_is_enlarged_by_its_share_of_the_image(tiny):
    data = recipes.change(tiny, "data", smallest_crop=0.5).data
    task = SimpleNamespace(flip=lambda x: x, enlarge=lambda target, shares: shares)
    image = tf.zeros((4, 8, 8, 3))
    draws = dense._draws(4, data, (1, 2))
    _, targets = dense._augment(image, {"x": image}, data, {"x": task}, draws)

    top, _, bottom, _ = draws[1].numpy().T
    np.testing.assert_array_equal(targets["x"], bottom - top)


def test_half_of_the_images_are_mirrored_and_tints_go_both_ways(tiny):
    data = recipes.change(tiny, "data", colour=0.2).data
    mirrored, _, tints = dense._draws(1000, data, (1, 2))

    assert 0.45 < np.mean(mirrored) < 0.55
    np.testing.assert_allclose(
        np.quantile(tints, [0, 0.5, 1]), [-0.2, 0, 0.2], atol=0.02
    )


def test_crops_lie_inside_the_image_and_keep_its_shape():
    top, left, bottom, right = dense._boxes(1000, 0.5, (1, 2)).numpy().T
    side = bottom - top

    np.testing.assert_allclose(right - left, side, atol=1e-6)
    assert 0.5 - 1e-6 <= side.min() < 0.51
    assert side.max() > 0.99
    assert min(top.min(), left.min()) >= 0
    assert max(bottom.max(), right.max()) <= 1 + 1e-6
    assert np.abs(np.corrcoef(top / (1 - side), left / (1 - side))[0, 1]) < 0.1


def test_colour_scales_each_channel_of_an_image(pass_):
    plain = pass_()
    images, targets = pass_(colour=0.2)

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


def test_each_pass_has_other_order_and_flips_and_a_seed_repeats_them(builder, pass_):
    examples = stored(builder, "train")

    def passes(seed):
        images, _ = pass_(seed, range(4))
        both = found(images, examples)
        return both[:16], both[16:]

    first, second = passes(seed=1)
    assert sorted(index for index, _ in second) == list(range(16))
    assert [index for index, _ in first] != [index for index, _ in second]
    assert [mirrored for _, mirrored in first] != [mirrored for _, mirrored in second]
    assert passes(seed=1) == (first, second)
    others, _ = passes(seed=2)
    assert [index for index, _ in others] != [index for index, _ in first]
    assert [mirrored for _, mirrored in others] != [mirrored for _, mirrored in first]


def test_a_batch_is_that_of_its_step_wherever_the_steps_begin(pass_):
    varied = {"smallest_crop": 0.8, "colour": 0.2, "label_fraction": ("normals", 0.5)}
    images, targets = pass_(steps=range(5), **varied)
    later_images, later_targets = pass_(steps=range(3, 5), **varied)

    np.testing.assert_array_equal(later_images, images[24:])
    for name in targets:
        np.testing.assert_array_equal(later_targets[name], targets[name][24:])


def test_half_of_each_batch_are_images_with_labels(builder, pass_, tiny):
    examples = stored(builder, "train")
    data = recipes.change(tiny, "data", label_fraction=("segmentation", 0.25)).data
    labelled = set(dense.labelled_images(data, 16, seed=1).nonzero()[0].tolist())
    images, targets = pass_(label_fraction=("segmentation", 0.25), steps=range(3))
    indices = [index for index, _ in found(images, examples)]

    assert len(labelled) == 4
    for index, classes in zip(indices, targets["segmentation"], strict=True):
        assert (classes != 255).any() == (index in labelled)
    for batch in np.reshape(indices, (3, 8)):
        assert sum(index in labelled for index in batch) == 4
    assert len(set(indices)) == 16
    assert targets["normals"].any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(("task", "void"), [("segmentation", 255), ("normals", 0)])
def test_images_without_labels_are_void(pass_, task, void):
    _, targets = pass_(label_fraction=(task, 0.25))

    share = np.mean([(target == void).all() for target in targets[task]])
    assert share == 0.5


@pytest.mark.parametrize("every", [1, 3, 2, 4])
def test_a_mirrored_target_is_of_the_mirrored_image(finished, every):
    """To the pixel where each cell has a middle, and to the one beside it else."""

    class Places:  # a map of 1000 times a row's number, and its column's
        feature = "x"
        flip = staticmethod(lambda target: tf.reverse(target, [2]))

        def target(self, example):
            size = tf.shape(example["image"])
            return 1000 * tf.range(size[0])[:, None] + tf.range(size[1])

    width = 12 * every
    examples = [{"image": np.zeros((2 * every, width, 3), np.uint8)}] * 2
    builder = SimpleNamespace(
        info=SimpleNamespace(features={"image": examples[0]["image"]}),
        as_dataset=lambda **_: tf.data.Dataset.from_generator(
            lambda: examples,
            output_signature={"image": tf.TensorSpec(examples[0]["image"].shape)},
        ),
    )
    data = dataclasses.replace(
        finished.recipe.data, image_size=(2 * every, width), target_size=(2, 12)
    )
    ((_, maps),) = dense._examples(builder, "train", data, {"x": Places()}).batch(2)
    rows, columns = np.divmod(maps["x"].numpy()[0], 1000)
    mirrored = Places.flip(maps["x"]).numpy()[0, 0] % 1000
    off = mirrored - (width - 1 - columns[0])
    assert set(off) == {0 if every % 2 else -1}
    np.testing.assert_array_equal(rows[:, 0] % every, columns[0, :2] % every)


def test_labels_on_no_image_at_all_are_refused(tiny):
    data = recipes.change(tiny, "data", label_fraction=("normals", 0.05)).data
    message = r"Labels of normals on 5 % of 8 train images are on none"
    with pytest.raises(ValueError, match=message):
        dense.labelled_images(data, 8, seed=0)


def test_a_target_that_is_not_every_so_many_th_pixel_is_refused(finished):
    recipe = recipes.change(finished.recipe, "data", target_size=(75, 100))
    message = r"'scenes' are stored at 96x128, .* target_size=75x100"
    with pytest.raises(ValueError, match=message):
        dense.check(finished.builder, recipe)


def test_a_batch_that_no_step_could_have_is_refused(finished):
    def check(batch_size, **data):
        recipe = recipes.change(finished.recipe, "training", batch_size=batch_size)
        dense.check(finished.builder, recipes.change(recipe, "data", **data))

    check(16)
    with pytest.raises(ValueError, match=r"of 17 images, .* 'train' has 16\. .* of 16"):
        check(17)
    with pytest.raises(ValueError, match=r"of 16 images, .* 'train\[:50%\]' has 8\."):
        check(16, train_split="train[:50%]")
    check(1)
    half = {"label_fraction": ("normals", 0.5)}
    check(2, **half)
    with pytest.raises(ValueError, match=r"Half of .* of normals\. .*batch_size=1\. "):
        check(1, **half)


def test_labels_are_counted_on_the_images_that_have_them(tiny, finished):
    recipe = recipes.change(tiny, "data", label_fraction=("segmentation", 0.25))
    maps = finished.train_examples[1]["segmentation"].numpy()
    chosen = maps[dense.labelled_images(recipe.data, len(maps), seed=3)]
    names = finished.tasks["segmentation"].classes

    counts = dense.labels(finished.train_examples, recipe, finished.tasks, seed=3)

    expected = {name: int((chosen == i).sum()) for i, name in enumerate(names)}
    assert counts == {"segmentation": expected, "normals": {}}
    whole = dense.labels(finished.train_examples, tiny, finished.tasks, seed=3)
    assert sum(whole["segmentation"].values()) == (maps != 255).sum()


def test_a_small_label_fraction_is_part_of_a_larger_one(tiny):
    def chosen(share, seed):
        data = recipes.change(tiny, "data", label_fraction=("normals", share)).data
        return dense.labelled_images(data, 795, seed)

    for small, large in ((0.05, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 1.0)):
        assert chosen(small, 0).sum() == round(small * 795)
        assert not (chosen(small, 0) & ~chosen(large, 0)).any()
    assert (chosen(0.1, 0) != chosen(0.1, 1)).any()
    first, second = METHODS["ensemble"].seeds
    for seed in range(3):  # two networks together have no more labels than one
        of_both = (chosen(0.1, seed + x) for x in (first, second))
        np.testing.assert_array_equal(*of_both)
