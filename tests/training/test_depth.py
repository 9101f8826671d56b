"""Depth against other statements of its scores, and against files of truth."""

import json

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn.metrics import (
    mean_absolute_error,
    mean_absolute_percentage_error,
    root_mean_squared_error,
)

from training import fitting
from training.datasets import nyuv2, rendering, scenes
from training.tasks.depth import FARTHEST, Depth

SHAPE = (3, 5, 9, 1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def measured(rng):
    """Two batches of (metres with NaN, answers), one answer being 0."""
    batches = []
    for _ in range(2):
        truth = rng.uniform(0.5, 10, SHAPE)
        answer = truth * np.exp(rng.normal(0, 0.4, SHAPE))
        answer[0, 0, 0] = 0
        truth[rng.random(SHAPE) < 0.2] = np.nan
        batches.append((truth.astype("float32"), answer.astype("float32")))
    return batches


def results(batches):
    scores = Depth().scores()
    for truth, answer in batches:
        scores.update(truth, answer)
    return scores.result()


def test_metres_are_kept_with_more_digits_than_per_cent(measured):
    scores = Depth().scores()
    scores.update(*measured[0])
    exact, kept = scores.result(), fitting.rounded({"d": scores}, {"d": Depth()})["d"]

    assert kept["rel_error"] == round(exact["rel_error"], 5)
    assert kept["delta_1"] == round(exact["delta_1"], 3)


def test_the_scores_agree_with_scikit_learn(measured):
    truth = np.concatenate([x.ravel() for x, _ in measured]).astype("float64")
    answer = np.concatenate([x.ravel() for _, x in measured]).astype("float64")
    truth, answer = truth[~np.isnan(truth)], answer[~np.isnan(truth)]
    with np.errstate(divide="ignore"):
        ratio = np.maximum(truth / answer, answer / truth)

    values = results(measured)

    assert list(values) == list(Depth.metrics)
    assert values["abs_error"] == pytest.approx(mean_absolute_error(truth, answer))
    assert values["rel_error"] == pytest.approx(
        mean_absolute_percentage_error(truth, answer)
    )
    assert values["rmse"] == pytest.approx(root_mean_squared_error(truth, answer))
    for name, power in (("delta_1", 1), ("delta_2", 2), ("delta_3", 3)):
        share = 100 * np.mean(ratio < 1.25**power)
        assert values[name] == pytest.approx(share)
        assert 10 < share < 99


def test_scores_worked_out_by_hand():
    truth = np.array([1.0, 2.0, 4.0, np.nan]).reshape(1, 1, 4, 1)
    answer = np.array([1.2, 3.0, 2.0, 7.0]).reshape(1, 1, 4, 1)

    values = results([(truth, answer)])

    assert values == {
        "abs_error": pytest.approx(3.2 / 3),
        "rel_error": pytest.approx((0.2 + 0.5 + 0.5) / 3),
        "rmse": pytest.approx(np.sqrt(5.04 / 3)),
        "delta_1": pytest.approx(100 / 3),
        "delta_2": pytest.approx(200 / 3),  # 1.5 is below 1.5625
        "delta_3": pytest.approx(200 / 3),  # 2 is not below 1.953
    }


def test_without_a_pixel_that_has_depth_no_score_is_a_number(measured):
    """An error of 0 m would be the best of all."""
    truth, answer = measured[0]
    found = results([(np.full_like(truth, np.nan), answer)])
    assert found.keys() == Depth.metrics.keys()
    assert all(np.isnan(x) for x in found.values())


def test_the_loss_is_the_mean_over_pixels_with_depth(measured, rng):
    truth, answer = measured[0]
    there = ~np.isnan(truth)
    logits = tf.Variable(answer)
    with tf.GradientTape() as tape:
        loss = Depth().loss()(truth, logits)
    gradient = tape.gradient(loss, logits).numpy()

    expected = np.abs(answer[there].astype("float64") - truth[there]).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(gradient != 0, there)


def test_millimetres_become_metres_and_none_is_nan():
    stored = np.array([[[1500], [0]], [[65535], [1]]], np.uint16)
    target = Depth().target({"depth": tf.constant(stored)}).numpy()

    np.testing.assert_allclose(
        target[..., 0], [[1.5, np.nan], [65.535, 0.001]], rtol=1e-6
    )


def test_a_mirrored_image_has_mirrored_depth(rng):
    target = rng.uniform(1, 9, SHAPE).astype("float32")
    np.testing.assert_array_equal(Depth().flip(target), target[:, :, ::-1])


def test_an_enlarged_part_is_as_near_as_one_camera_would_see_it():
    """A wall at 4 m: the half of its picture, enlarged, is a wall at 2 m."""
    focal, wall = 100.0, 4.0
    across = 0.4 / wall * focal  # pixels of a poster of 0.4 m
    enlarged = across / 0.5
    nearer = Depth().enlarge(tf.fill((1, 2, 2, 1), wall), tf.constant([0.5])).numpy()

    np.testing.assert_allclose(0.4 * focal / enlarged, nearer.ravel())


def test_the_answer_is_metres_and_of_several_nets_their_mean(rng):
    task = Depth()
    tensors = [keras.Input((4, 6, 1)) for _ in range(2)]
    model = keras.Model(
        tensors, [task.answer(tensors[0], "one"), task.average(tensors, "both")]
    )
    logits = [rng.normal(size=(2, 4, 6, 1)).astype("float32") for _ in range(2)]
    one, both = model.predict(logits, verbose=0)

    np.testing.assert_allclose(one, np.maximum(logits[0], 0), rtol=1e-6)
    np.testing.assert_allclose(both, np.maximum(logits, 0).mean(0), rtol=1e-5)


def test_depth_is_drawn_from_near_to_far_as_it_is_described():
    task = Depth()
    metres = np.array([0.0, FARTHEST, 99.0, np.nan]).reshape(1, 4, 1)
    drawn = task.draw(metres)
    said = json.loads(json.dumps(task.describe()))

    assert (drawn.dtype, drawn.shape) == (np.uint8, (1, 4, 3))
    assert said["range"] == [0, FARTHEST]
    np.testing.assert_allclose(drawn[0, 0], said["colours"][0], atol=1)
    np.testing.assert_allclose(drawn[0, 1], said["colours"][-1], atol=1)
    np.testing.assert_array_equal(drawn[0, 2], drawn[0, 1])
    assert not drawn[0, 3].any()
    assert drawn[0, 0].sum() > 2 * drawn[0, 1].sum()


def test_scenes_hold_the_depth_that_was_rendered(tmp_path):
    """A plane's points, from the stored depth, lie on it to half a millimetre."""
    builder = scenes.Scenes(config="toy", data_dir=str(tmp_path))
    builder.download_and_prepare()
    for example in tfds.as_numpy(builder.as_dataset(split="test")):
        metres = Depth().target(example).numpy()
        index = int(example["id"].decode().rpartition("_")[2])
        seed = [scenes.zlib.crc32(b"test"), index]
        truth = scenes.render(np.random.default_rng(seed))
        assert metres.shape == (rendering.HEIGHT, rendering.WIDTH, 1)
        np.testing.assert_allclose(metres[..., 0], truth["depth"], atol=0.0005001)


def test_a_held_out_image_of_nyuv2_has_the_depth_of_its_file(nyuv2_folder):
    image_id = nyuv2.check_folder(nyuv2_folder)["test"][0]
    example = nyuv2.read_example(nyuv2_folder, image_id)
    stored = tf.io.decode_png(example["depth"], dtype=tf.uint16)
    metres = Depth().target({"depth": stored}).numpy()[..., 0]
    path = nyuv2_folder / f"depth/{image_id}.png"
    truth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) / 1000

    inside = np.zeros(truth.shape, bool)
    inside[4:-4, 4:-4] = True
    np.testing.assert_allclose(metres[inside], truth[inside], rtol=1e-6)
    assert np.isnan(metres[~inside]).all()  # the white frame
    assert 0.5 < np.median(truth) < 10
