import json
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from training.tasks import Normals, Segmentation, normals
from training.tasks.segmentation import VOID

CLASSES = tuple(f"class{i}" for i in range(7))
SHAPE = (3, 5, 9)  # two batches of it make an odd number of pixels


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_normals(rng, shape):
    normals = rng.normal(size=(*shape, 3))
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True)


def some_codewords(rng):
    return random_normals(rng, (20,)).astype("float32")


def results(task, batches):
    scores = task.scores()
    for truth, answer in batches:
        scores.update(truth, answer)
    return scores.result()


@pytest.fixture
def classified(rng):
    """Two batches of (classes with void, probabilities); class 6 is nowhere."""
    batches = []
    for _ in range(2):
        truth = rng.integers(0, 6, SHAPE).astype("int32")
        truth[rng.random(SHAPE) < 0.2] = VOID
        scores = rng.normal(size=(*SHAPE, 7))
        np.put_along_axis(
            scores, np.minimum(truth, 5)[..., None], rng.normal(1, 1, (*SHAPE, 1)), -1
        )
        scores[..., 6] = -100
        batches.append((truth, tf.nn.softmax(scores).numpy().astype("float32")))
    return batches


def test_segmentation_metrics_agree_with_counting_pixels(classified):
    truth = np.concatenate([t.ravel() for t, _ in classified])
    predicted = np.concatenate([p.argmax(-1).ravel() for _, p in classified])
    truth, predicted = truth[truth != VOID], predicted[truth != VOID]
    ious, shares = [], []
    for c in range(7):
        union = np.sum((truth == c) | (predicted == c))
        if union:
            ious.append(np.sum((truth == c) & (predicted == c)) / union)
            shares.append(np.mean(truth == c))

    values = results(Segmentation(CLASSES), classified)

    assert len(ious) == 6  # a class that never occurs does not count as 0
    assert values["pixel_accuracy"] == pytest.approx(100 * np.mean(truth == predicted))
    assert values["miou"] == pytest.approx(100 * np.mean(ious))
    assert values["fwiou"] == pytest.approx(100 * np.dot(ious, shares))


def test_the_scores_of_a_class_are_its_iu_and_its_true_pixels(classified):
    scores = Segmentation(CLASSES).scores()
    for truth, answer in classified:
        scores.update(truth, answer)
    truth = np.concatenate([t.ravel() for t, _ in classified])
    predicted = np.concatenate([p.argmax(-1).ravel() for _, p in classified])
    true, answered = truth == 2, (predicted == 2) & (truth != VOID)
    by_class = scores.per_class()

    assert list(by_class) == [f"class{i}" for i in range(6)]  # 6 is nowhere
    assert by_class["class2"]["pixels"] == true.sum()
    assert by_class["class2"]["iou"] == pytest.approx(
        100 * (true & answered).sum() / (true | answered).sum()
    )


def test_the_labels_of_a_class_are_its_pixels(classified):
    truth = np.concatenate([truth for truth, _ in classified])

    counts = Segmentation(CLASSES).labels(truth)

    expected = {name: np.sum(truth == i) for i, name in enumerate(CLASSES)}
    assert counts == expected
    assert sum(counts.values()) == np.sum(truth != VOID)


def test_without_a_labelled_pixel_no_score_is_a_number(classified, rng):
    truth, answer = classified[0]
    nothing = results(Segmentation(CLASSES), [(np.full_like(truth, VOID), answer)])

    assert nothing.keys() == Segmentation.metrics.keys()
    assert np.isnan(list(nothing.values())).all()


def test_segmentation_metrics_do_not_see_void(classified, rng):
    task = Segmentation(CLASSES)
    elsewhere = []
    for truth, answer in classified:
        answer = answer.copy()
        answer[truth == VOID] = np.roll(answer[truth == VOID], 1, axis=-1)
        elsewhere.append((truth, answer))

    assert results(task, elsewhere) == results(task, classified)


def test_segmentation_loss_is_the_mean_over_labelled_pixels(classified, rng):
    truth, _ = classified[0]
    logits = rng.normal(size=(*SHAPE, 7)).astype("float32")
    log_p = logits - np.log(np.exp(logits.astype("float64")).sum(-1, keepdims=True))
    valid = truth != VOID
    expected = -np.mean(log_p[valid][np.arange(valid.sum()), truth[valid]])

    assert float(Segmentation(CLASSES).loss()(truth, logits)) == pytest.approx(
        expected, rel=1e-5
    )


def test_segmentation_loss_has_no_gradient_in_void(classified, rng):
    truth, _ = classified[0]
    logits = tf.Variable(rng.normal(size=(*SHAPE, 7)).astype("float32"))
    with tf.GradientTape() as tape:
        loss = Segmentation(CLASSES).loss()(truth, logits)
    gradient = tape.gradient(loss, logits).numpy()

    assert np.all(gradient[truth == VOID] == 0)
    assert np.all(np.any(gradient[truth != VOID] != 0, axis=-1))


@pytest.fixture
def oriented(rng):
    """Two batches of (normals with undefined ones, predictions some degrees off)."""
    batches = []
    for _ in range(2):
        truth = random_normals(rng, SHAPE)
        answer = truth + rng.normal(size=(*SHAPE, 3)) * rng.uniform(0, 1, (*SHAPE, 1))
        answer /= np.linalg.norm(answer, axis=-1, keepdims=True)
        truth[rng.random(SHAPE) < 0.2] = 0
        batches.append((truth.astype("float32"), answer.astype("float32")))
    if sum(truth.any(-1).sum() for truth, _ in batches) % 2 == 0:
        first = np.argwhere(batches[0][0].any(-1))[0]
        batches[0][0][tuple(first)] = 0  # so that the median is one of the angles
    return batches


def angles(batches):
    truth = np.concatenate([t.reshape(-1, 3) for t, _ in batches]).astype("float64")
    answer = np.concatenate([a.reshape(-1, 3) for _, a in batches]).astype("float64")
    valid = truth.any(-1)
    sine = np.linalg.norm(np.cross(truth[valid], answer[valid]), axis=-1)
    return np.degrees(np.arctan2(sine, np.sum(truth[valid] * answer[valid], -1)))


def test_normals_metrics_agree_with_all_the_angles(oriented, rng):
    values = results(Normals(some_codewords(rng)), oriented)
    expected = angles(oriented)

    assert values["mean_angle"] == pytest.approx(expected.mean(), abs=0.01)
    assert values["median_angle"] == pytest.approx(np.median(expected), abs=0.02)
    for threshold in (11.25, 22.5, 30):
        assert values[f"within_{threshold}".replace(".", "_")] == pytest.approx(
            100 * np.mean(expected < threshold), abs=0.01
        )


def test_an_angle_counts_to_a_hundredth_of_a_degree(rng):
    angles = np.radians([11.245, 11.255])
    answer = np.stack([np.sin(angles), 0 * angles, -np.cos(angles)], -1)[None, None]
    values = results(
        Normals(some_codewords(rng)), [(np.full_like(answer, [0, 0, -1]), answer)]
    )

    assert values["within_11_25"] == 50
    assert values["mean_angle"] == pytest.approx(11.25, abs=1e-3)


def test_normals_metrics_do_not_see_undefined_normals(oriented, rng):
    task = Normals(some_codewords(rng))
    elsewhere = [
        (truth, np.where(truth.any(-1, keepdims=True), answer, -answer))
        for truth, answer in oriented
    ]

    assert results(task, elsewhere) == results(task, oriented)


def test_normals_loss_is_cross_entropy_with_the_nearest_codeword(oriented, rng):
    codewords = some_codewords(rng)
    truth, _ = oriented[0]
    logits = rng.normal(size=(*SHAPE, 20)).astype("float32")
    distance = np.linalg.norm(truth[..., None, :] - codewords, axis=-1)
    log_p = logits - np.log(np.exp(logits.astype("float64")).sum(-1, keepdims=True))
    nearest = np.take_along_axis(log_p, distance.argmin(-1)[..., None], -1)[..., 0]

    assert float(Normals(codewords).loss()(truth, logits)) == pytest.approx(
        -nearest[truth.any(-1)].mean(), rel=1e-5
    )


def test_normals_loss_has_no_gradient_where_undefined(oriented, rng):
    truth, _ = oriented[0]
    logits = tf.Variable(rng.normal(size=(*SHAPE, 20)).astype("float32"))
    with tf.GradientTape() as tape:
        loss = Normals(some_codewords(rng)).loss()(truth, logits)
    gradient = tape.gradient(loss, logits).numpy()

    assert np.all(gradient[~truth.any(-1)] == 0)
    assert np.all(np.any(gradient[truth.any(-1)] != 0, axis=-1))


def test_normals_answer_is_the_unit_mean_of_the_codewords(rng):
    codewords = some_codewords(rng)
    logits = keras.Input((5, 9, 20))
    model = keras.Model(logits, Normals(codewords).answer(logits, "normals"))
    x = rng.normal(size=(2, 5, 9, 20))
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    mean = p @ codewords

    np.testing.assert_allclose(
        model.predict(x, verbose=0),
        mean / np.linalg.norm(mean, axis=-1, keepdims=True),
        atol=1e-5,
    )
    assert not model.trainable_variables


def test_flipping_normals_mirrors_the_map_and_negates_x(rng):
    normals = random_normals(rng, SHAPE).astype("float32")
    flipped = Normals(some_codewords(rng)).flip(tf.constant(normals)).numpy()

    np.testing.assert_array_equal(flipped[:, :, 0, 0], -normals[:, :, -1, 0])
    np.testing.assert_array_equal(flipped[:, :, 0, 1:], normals[:, :, -1, 1:])


def test_flipped_normals_are_those_of_the_mirrored_scene():
    """A sphere's right half points right; mirrored, the left one points left."""
    y, x = np.mgrid[-0.9:0.9:9j, -0.2:0.9:9j]
    z = -np.sqrt(np.maximum(0, 1 - x**2 - y**2))
    sphere = np.where((x**2 + y**2 < 1)[..., None], np.stack([x, y, z], -1), 0)
    mirrored = np.where(
        (x[:, ::-1] ** 2 + y**2 < 1)[..., None],
        np.stack([-x[:, ::-1], y, z[:, ::-1]], -1),
        0,
    )
    task = Normals(np.eye(3, dtype="float32"))

    np.testing.assert_allclose(
        task.flip(tf.constant(sphere[None], "float32"))[0], mirrored, atol=1e-6
    )


def test_flipping_classes_mirrors_the_map(rng):
    classes = rng.integers(0, 7, SHAPE)
    flipped = Segmentation(CLASSES).flip(tf.constant(classes)).numpy()

    np.testing.assert_array_equal(flipped, classes[:, :, ::-1])


def test_normals_decode_to_unit_vectors_and_undefined_ones_to_zero(rng):
    normals = random_normals(rng, (4, 5))
    stored = np.round((normals + 1) * 127.5).astype("uint8")
    stored[0, 0] = 0
    decoded = (
        Normals(some_codewords(rng)).target({"normals": tf.constant(stored)}).numpy()
    )

    assert not decoded[0, 0].any()
    np.testing.assert_allclose(np.linalg.norm(decoded[1:], axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(decoded[1:], normals[1:], atol=0.01)


def test_the_codewords_are_unit_directions_spread_over_the_data(finished, rng):
    codewords = Normals.for_dataset(finished.builder, "train", "normals").codewords
    train = finished.builder.as_dataset(split="train")
    stored = next(iter(train))["normals"].numpy()
    normals = stored[stored.any(-1)] / 127.5 - 1
    nearest = (normals @ codewords.T).max(axis=-1)
    at_random = (normals @ some_codewords(rng).T).max(axis=-1)

    assert codewords.shape == (20, 3)
    np.testing.assert_allclose(np.linalg.norm(codewords, axis=-1), 1, rtol=1e-5)
    assert nearest.mean() > max(0.95, at_random.mean())


def test_the_codewords_are_of_the_split_and_kept_with_the_data(finished, monkeypatch):
    first = Normals.for_dataset(finished.builder, "train", "normals").codewords
    Normals.prepare(finished.builder, "train[:50%]", "normals")
    part = Normals.for_dataset(finished.builder, "train[:50%]", "normals").codewords
    assert np.abs(part - first).max() > 0.01
    monkeypatch.setattr(normals, "cluster", None)
    Normals.prepare(finished.builder, "train", "normals")

    np.testing.assert_array_equal(
        Normals.for_dataset(finished.builder, "train", "normals").codewords, first
    )


def test_codewords_are_of_normals_that_are_defined(rng):
    directions = random_normals(rng, (20,))
    stored = np.round((directions + 1) * 127.5).astype("uint8")
    stored = np.tile(stored, (1, 30, 2, 1))
    stored[:, ::2] = 0
    feature = types.SimpleNamespace(shape=stored.shape[1:], np_dtype=np.uint8)
    builder = types.SimpleNamespace(
        info=types.SimpleNamespace(features={"normals": feature}),
        as_dataset=lambda **_: tf.data.Dataset.from_tensor_slices({"normals": stored}),
    )
    codewords = normals.cluster(builder, "train", "normals")

    assert (directions @ codewords.T).max(axis=1).min() > 0.999


def test_angles_are_undefined_where_no_normal_is(rng):
    nowhere = [(np.zeros((2, 5, 9, 3)), rng.normal(size=(2, 5, 9, 3)))]
    values = results(Normals(some_codewords(rng)), nowhere)

    assert set(values) == set(Normals.metrics)
    assert all(np.isnan(x) for x in values.values())


@pytest.mark.parametrize("name", ["segmentation", "normals"])
def test_what_answers_mean_is_said_in_json(tasks, name):
    said = json.loads(json.dumps(tasks[name].describe()))

    assert set(said) == {"kind", "names", "colours", "units", "description"}
    if name == "segmentation":
        picture = tasks[name].draw(np.arange(19)[None])
        np.testing.assert_array_equal(picture[0], said["colours"])


def test_drawings_are_rgb_images(classified, oriented, rng):
    segmentation, normals = Segmentation(CLASSES), Normals(some_codewords(rng))
    truth, answer = classified[0]

    for image in (
        segmentation.draw(truth[0]),
        segmentation.draw(answer[0]),
        normals.draw(oriented[0][0][0]),
    ):
        assert image.shape == (5, 9, 3)
        assert image.dtype == np.uint8
    assert not segmentation.draw(truth[0])[truth[0] == VOID].any()
    # What faces the camera is blue, in the customary colours.
    assert normals.draw(np.array([[[0.0, 0.0, -1.0]]])).argmax() == 2
