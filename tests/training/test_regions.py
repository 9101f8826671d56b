"""Batches of regions, from boxes that are made up here and from the rendered rooms."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from training import batches, recipes
from training.batches import regions
from training.runs import open_experiment
from training.tasks import Attributes, Detection


@pytest.fixture(scope="module")
def rooms(finished):
    """The rooms with proposals, in the folder of the other runs."""
    recipe = recipes.find("scenes_detection", toy=True)
    return open_experiment(recipe, None, finished.runs)


@pytest.fixture(scope="module")
def two_passes(rooms):
    return collect(
        regions.train_batches(
            rooms.train_examples, rooms.recipe, rooms.tasks, 3, range(8)
        )
    )


def collect(of_steps):
    inputs, targets = zip(*of_steps.as_numpy_iterator(), strict=True)

    def together(dicts):
        return {name: np.concatenate([x[name] for x in dicts]) for name in dicts[0]}

    return together(inputs), together(targets)


def iou(a, b):
    """The overlaps of boxes (..., 4), one by one."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.prod(sides.clip(0), -1)
    areas = [np.prod(x[..., 2:] - x[..., :2], -1) for x in (a, b)]
    return shared / (areas[0] + areas[1] - shared)


def objects(rng, images, most=5, attributes=3):
    """Random objects, as `load` gives them; the last image has none."""
    counts = [*rng.integers(1, most + 1, images - 1), 0]
    there = np.arange(most) < np.array(counts)[:, None]
    corners = np.sort(rng.uniform(0, 100, (images, most, 2, 2)), axis=2)
    boxes = corners.reshape(images, most, 4) * there[..., None]
    return {
        "boxes": boxes.astype("float32"),
        "labels": np.where(there, rng.integers(0, 7, there.shape), -1).astype("int32"),
        "attributes": rng.integers(0, 2, (*there.shape, attributes), dtype="uint8"),
    }


def near(rng, boxes, count):
    """Random boxes, and some close to the objects; a tenth without area."""
    corners = np.sort(rng.uniform(0, 100, (len(boxes), count, 2, 2)), axis=2)
    found = corners.reshape(len(boxes), count, 4)
    picked = boxes[:, rng.integers(0, boxes.shape[1], count // 2)]
    found[:, : count // 2] = picked + rng.normal(0, 2, picked.shape)
    found[:, rng.random(count) < 0.1] = 0
    return found.astype("float32")


def test_a_sample_is_a_quarter_on_objects_and_says_what_they_are():
    rng = np.random.default_rng(0)
    known = objects(rng, images=4)
    known["proposals"] = near(rng, known["boxes"], 80)
    rois, matched = keras.tree.map_structure(
        lambda x: x.numpy(), regions.sample(known, 32, (1, 2))
    )

    assert rois.shape == (4, 32, 4)
    for n in range(4):
        there = known["labels"][n] >= 0
        boxes = known["boxes"][n][there]
        for r in range(32):
            overlaps = iou(rois[n, r], boxes)
            if len(boxes) and overlaps.max() >= 0.5:
                best = overlaps.argmax()
                assert matched["classes"][n, r] == known["labels"][n][best] + 1
                np.testing.assert_array_equal(matched["boxes"][n, r], boxes[best])
                np.testing.assert_array_equal(
                    matched["attributes"][n, r], known["attributes"][n][best]
                )
            else:
                assert matched["classes"][n, r] == 0
    on_object = (matched["classes"] > 0).sum(axis=1)
    assert (on_object[:3] == 8).all()
    assert on_object[3] == 0  # the image without objects is all background
    assert len(np.unique(rois[0], axis=0)) == 32


def test_another_seed_draws_another_sample():
    rng = np.random.default_rng(0)
    known = objects(rng, images=2)
    known["proposals"] = near(rng, known["boxes"], 200)
    one, again, other = (regions.sample(known, 16, (1, s))[0] for s in (2, 2, 3))

    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_where_there_are_too_few_boxes_the_rest_counts_nowhere():
    box = np.float32([[[10, 10, 50, 50]]])
    known = {
        "boxes": box,
        "labels": np.int32([[2]]),
        "attributes": np.uint8([[[1, 0]]]),
        "proposals": np.float32([[[60, 60, 90, 90], [11, 10, 50, 50], [0, 0, 0, 0]]]),
    }
    rois, matched = regions.sample(known, 8, (0, 0))
    classes = matched["classes"].numpy()[0]

    assert sorted(classes) == [-1, -1, -1, -1, -1, 0, 3, 3]
    target = Detection(("x",) * 7).target(rois, matched).numpy()
    assert np.isfinite(target).all()
    attributes = Attributes(("a", "b"), (3, 5)).target(rois, matched).numpy()
    np.testing.assert_array_equal(np.isnan(attributes).any(-1)[0], classes <= 0)


def test_deltas_move_a_roi_to_its_object():
    rois = np.float32([[[10, 20, 50, 80], [10, 20, 50, 80]]])
    matched = {
        "boxes": np.float32([[[20, 20, 40, 50], [20, 20, 40, 50]]]),
        "classes": np.int32([[3, 0]]),
    }
    target = Detection(("x",) * 7).target(rois, matched).numpy()[0]

    # The centre moves from (30, 50) to (30, 35), the size from 40x60 to 20x30.
    expected = [3, 0, (35 - 50) / 60 / 0.1, np.log(0.5) / 0.2, np.log(0.5) / 0.2]
    np.testing.assert_allclose(target[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(target[1], np.zeros(5))


def found_in(rooms, inputs):
    """Of each image of batches, (the number of its example, whether it is mirrored)."""
    by_image = {}
    for n, image in enumerate(rooms.train_examples[0].numpy()):
        by_image[image.tobytes()] = n, False
        by_image[image[:, ::-1].tobytes()] = n, True
    return [by_image[x.astype("uint8").tobytes()] for x in inputs["image"]]


def test_each_seed_and_each_pass_has_its_own_order_and_flips(rooms, two_passes):
    with_other_seed = regions.train_batches(
        rooms.train_examples, rooms.recipe, rooms.tasks, 4, range(4)
    )
    found = found_in(rooms, two_passes[0]), found_in(rooms, collect(with_other_seed)[0])
    first, second, other = found[0][:16], found[0][16:], found[1]

    for part in (0, 1):  # the number, and whether it is mirrored
        parts = {tuple(x[part] for x in of) for of in (first, second, other)}
        assert len(parts) == 3


def test_half_of_the_images_are_mirrored():
    image = tf.tile(tf.reshape([0.0, 1.0], (1, 1, 2, 1)), (1000, 1, 1, 1))
    none = dict.fromkeys(("boxes", "proposals"), tf.zeros((1000, 0, 4)))
    mirrored, _ = regions._mirror(image, none, (1, 2))

    assert 0.45 < np.mean(mirrored[:, 0, 0, 0]) < 0.55


def test_train_batches_are_the_images_and_boxes_mirrored_together(rooms, two_passes):
    _, known = rooms.train_examples
    known = {k: v.numpy() for k, v in known.items()}
    inputs, targets = two_passes
    found = found_in(rooms, inputs)

    assert sorted(n for n, _ in found[:16]) == list(range(16))
    assert {mirrored for _, mirrored in found} == {False, True}
    for (n, mirrored), rois, target in zip(
        found, inputs["rois"], targets["detection"], strict=True
    ):
        candidates = np.concatenate([known["boxes"][n], known["proposals"][n]])
        if mirrored:
            rois = rois * (-1, 1, -1, 1) + (128, 0, 128, 0)
            rois = rois[:, [2, 1, 0, 3]]
        assert np.abs(rois[:, None] - candidates).max(-1).min(-1).max() < 1e-3
        for roi, row in zip(rois, target, strict=True):
            overlaps = iou(roi, known["boxes"][n][known["labels"][n] >= 0])
            assert (row[0] > 0) == (overlaps.max(initial=0) >= 0.5)


def test_a_batch_is_that_of_its_step_wherever_the_steps_begin(rooms, two_passes):
    inputs, targets = two_passes
    later = collect(
        regions.train_batches(
            rooms.train_examples, rooms.recipe, rooms.tasks, 3, range(6, 8)
        )
    )

    np.testing.assert_array_equal(later[0]["rois"], inputs["rois"][24:])
    for name in targets:
        np.testing.assert_array_equal(later[1][name], targets[name][24:])


def test_the_rows_of_a_worker_are_those_of_the_whole_batch(rooms, two_passes):
    rows = np.array([3, 1])
    of_worker = collect(
        regions.train_batches(
            rooms.train_examples, rooms.recipe, rooms.tasks, 3, range(7, 8), rows
        )
    )
    for parts, wholes in zip(of_worker, two_passes, strict=True):
        for name, part in parts.items():
            np.testing.assert_array_equal(part, wholes[name][28:][rows])


def test_each_task_is_tested_on_the_boxes_that_it_asks_for(rooms):
    stored = list(tfds.as_numpy(rooms.builder.as_dataset(split="test")))
    uneven = recipes.change(rooms.recipe, "training", batch_size=3)  # of 8
    passes = batches.test_passes(rooms.builder, uneven, rooms.tasks)
    (detection, on_proposals), (attributes, on_objects) = passes

    assert (list(detection), list(attributes)) == (["detection"], ["attributes"])
    scale = [128, 96, 128, 96]
    for pass_ in (on_proposals, on_objects):
        for (inputs, truth), example in zip(pass_.unbatch(), stored, strict=True):
            np.testing.assert_array_equal(inputs["image"], example["image"])
            things = example["objects"]
            boxes = things["bbox"][:, [1, 0, 3, 2]] * scale
            count = len(boxes)
            if "detection" in truth:
                of_image = truth["detection"].numpy()
                np.testing.assert_allclose(of_image[:count, :4], boxes, atol=1e-3)
                assert of_image[:count, 4].tolist() == things["label"].tolist()
                assert (of_image[count:, 4] == -1).all()
                assert len(inputs["rois"]) > 30
            else:
                of_image = truth["attributes"].numpy()
                np.testing.assert_allclose(inputs["rois"][:count], boxes, atol=1e-3)
                np.testing.assert_array_equal(of_image[:count], things["attributes"])
                assert np.isnan(of_image[count:]).all()


def test_the_train_objects_of_each_attribute_are_counted(rooms):
    train = tfds.as_numpy(rooms.builder.as_dataset(split="train"))
    of_all = np.concatenate([x["objects"]["attributes"] for x in train])
    task = Attributes.for_dataset(rooms.builder, "train", "attributes")

    assert task.train_objects == tuple(of_all.sum(axis=0, dtype=int))


def test_images_are_fitted_into_the_recipes_size_with_their_boxes():
    image = np.random.default_rng(0).integers(0, 255, (60, 100, 3), "uint8")
    fitted, size = regions._fit(tf.constant(image), (80, 128))
    boxes = regions._pixels(tf.constant([[0.5, 0.1, 1.0, 0.9]]), size)

    assert fitted.shape == (80, 128, 3)
    assert size.numpy().tolist() == [77, 128]
    assert not fitted[77:].numpy().any()
    assert fitted[:77].numpy().any(-1).mean() > 0.99
    np.testing.assert_allclose(boxes, [[12.8, 38.5, 115.2, 77]], rtol=1e-5)
    as_it_is, _ = regions._fit(tf.constant(image), (60, 100))
    np.testing.assert_array_equal(as_it_is, image)


def test_images_without_an_object_are_loaded(rooms, monkeypatch):
    """VOC has none, but a data set may: one image's objects are taken away here."""
    builder = rooms.builder
    whole = builder.as_dataset

    def with_an_empty_one(**options):
        def clear(n, example):
            cut = {
                name: x[: tf.where(n == 2, 0, len(x))]
                for name, x in example["objects"].items()
            }
            return {**example, "objects": cut}

        return whole(**options).enumerate().map(clear)

    monkeypatch.setattr(builder, "as_dataset", with_an_empty_one)
    data = dataclasses.replace(rooms.recipe.data)
    _, known = regions.load(builder, "train", data, rooms.tasks)

    assert (known["labels"][2].numpy() == -1).all()
    assert not known["boxes"][2].numpy().any()
    assert (known["labels"].numpy() >= 0).any(axis=1).sum() == 15


def test_fewer_images_than_a_batch_are_refused(rooms):
    many = recipes.change(rooms.recipe, "training", batch_size=17)
    regions.check(rooms.builder, recipes.change(many, "training", batch_size=16))

    with pytest.raises(ValueError, match=r"of 17 images, and its split 'train' has 16"):
        regions.check(rooms.builder, many)
