"""Losses, answers and scores of detection and attributes, against other statements."""

import contextlib
import io
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from training.tasks import Attributes, Detection
from training.tasks.detection import VARIANCE, BoxPrecision, DetectionLoss

CLASSES = ("cat", "dog", "car")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_targets(rng, shape):
    classes = rng.integers(-1, 4, shape)
    deltas = rng.normal(0, 2, (*shape, 4)) * (classes > 0)[..., None]
    return np.concatenate([classes[..., None], deltas], -1).astype("float32")


def detection_loss(target, logits):
    """Fast R-CNN's equations, RoI by RoI, in float64."""
    values = np.zeros(target.shape[:-1])
    for index in np.ndindex(values.shape):
        label, z = int(target[index][0]), logits[index].astype("float64")
        if label < 0:
            continue
        scores = z[:4] - z[:4].max()
        values[index] = np.log(np.exp(scores).sum()) - scores[label]
        if label > 0:
            x = np.abs(z[4 * label : 4 * label + 4] - target[index][1:])
            values[index] += np.where(x < 1, x * x / 2, x - 0.5).sum()
    return values.mean()


def test_the_loss_is_fast_rcnns(rng):
    target = random_targets(rng, (3, 11))
    logits = rng.normal(0, 2, (3, 11, 16)).astype("float32")
    loss = Detection(CLASSES).loss()
    restored = DetectionLoss.from_config(loss.get_config())

    expected = detection_loss(target, logits)
    np.testing.assert_allclose(loss(target, logits), expected, rtol=1e-5)
    np.testing.assert_allclose(restored(target, logits), expected, rtol=1e-5)


def test_background_moves_no_box_and_no_label_moves_nothing(rng):
    target = random_targets(rng, (2, 9))
    logits = tf.constant(rng.normal(size=(2, 9, 16)), "float32")
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = Detection(CLASSES).loss()(target, logits)
    gradient = tape.gradient(value, logits).numpy()
    label = target[..., 0]

    assert not gradient[label < 0].any()
    assert not gradient[label <= 0][:, 4:].any()
    moved = gradient[..., 4:].reshape(2, 9, 3, 4).any(-1)
    np.testing.assert_array_equal(moved, label[..., None] == [1, 2, 3])


def test_the_attributes_loss_is_the_weighed_sum_on_objects_alone(rng):
    truth = rng.integers(0, 2, (2, 7, 64)).astype("float32")
    truth[rng.random((2, 7)) < 0.6] = np.nan
    logits = rng.normal(0, 2, (2, 7, 64)).astype("float32")
    on_object = ~np.isnan(truth[..., 0])
    z, y = logits[on_object].astype("float64"), truth[on_object]
    sums = (np.log1p(np.exp(z)) - y * z).sum(axis=-1)

    value = Attributes(tuple(map(str, range(64))), (0,) * 64).loss()(truth, logits)

    assert 0 < on_object.sum() < 14
    np.testing.assert_allclose(value, sums.mean() / 64, rtol=1e-5)


def served(task, logits, inputs):
    """The answer to logits, through a model; and the common answer to several."""
    given = {name: keras.Input(x.shape[1:], name=name) for name, x in inputs.items()}
    tensors = [keras.Input(x.shape[1:]) for x in logits]
    one = task.answer(tensors[0], "task", given)
    several = task.average(tensors, "several", given)
    model = keras.Model([given, tensors], [one, several])
    return model.predict([inputs, list(logits)], verbose=0)


def test_a_target_as_answer_is_the_object_itself(rng):
    """What the targets say of perfect RoIs and of moved ones comes back as boxes."""
    task = Detection(CLASSES)
    objects = np.float32([[[10, 10, 60, 50], [70, 20, 90, 80]]])
    rois = objects + rng.uniform(-4, 4, objects.shape).astype("float32")
    matched = {"boxes": objects, "classes": np.int32([[2, 3]])}
    target = task.target(rois, matched).numpy()
    logits = np.zeros((1, 2, 16), "float32")
    for r, label in enumerate((2, 3)):
        logits[0, r, label] = 9
        logits[0, r, 4 * label : 4 * label + 4] = target[0, r, 1:]
    image = np.zeros((1, 96, 128, 3), "float32")
    answer, both = served(task, [logits, logits], {"image": image, "rois": rois})

    for found in (answer, both):
        assert found["classes"][0, :2].tolist() == [1, 2]
        np.testing.assert_allclose(found["boxes"][0, :2], objects[0], atol=1e-3)
        np.testing.assert_allclose(
            found["scores"][0, :2], np.exp(9) / (np.exp(9) + 3), rtol=1e-5
        )


def test_several_nets_answer_with_their_mean(rng):
    names = tuple("abcde")
    logits = rng.normal(size=(2, 1, 6, 5)).astype("float32")
    rois, image = np.zeros((1, 6, 4)), np.zeros((1, 32, 32, 3))
    one, both = served(
        Attributes(names, (3,) * len(names)), logits, {"image": image, "rois": rois}
    )

    sigmoids = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(one, sigmoids[0], rtol=1e-5)
    np.testing.assert_allclose(both, sigmoids.mean(0), rtol=1e-5)

    scores = rng.normal(size=(2, 1, 6, 16)).astype("float32")
    scores[..., 4:] = 0
    rois = np.float32([[[20 * k, 0, 20 * k + 15, 15] for k in range(6)]])
    image = np.zeros((1, 32, 128, 3))
    _, both = served(Detection(CLASSES), scores, {"image": image, "rois": rois})
    softmax = np.exp(scores[..., :4]) / np.exp(scores[..., :4]).sum(-1, keepdims=True)
    best = np.sort(softmax.mean(0)[0, :, 1:].ravel())[::-1]
    np.testing.assert_allclose(both["scores"][0, :18], best, rtol=1e-5)


def made_up(rng, images=12, side=200, hard=0.0):
    """Objects that do not overlap, and detections near them, doubled, and elsewhere."""
    target, answers = [], []
    for _ in range(images):
        cells = rng.permutation(16)[: rng.integers(0, 7)]
        corner = np.stack([cells % 4, cells // 4], 1) * 50.0
        sizes = rng.uniform(20, 48, (len(cells), 2))
        boxes = np.concatenate([corner, corner + sizes], 1)
        labels = rng.integers(0, len(CLASSES), len(cells))
        difficult = rng.random(len(cells)) < hard
        target.append(np.concatenate([boxes, labels[:, None], difficult[:, None]], 1))
        near = np.repeat(boxes, 2, 0) + rng.normal(0, 5, (2 * len(boxes), 4))
        far = np.sort(rng.uniform(0, side, (9, 2, 2)), 1).reshape(9, 4)
        wrong = rng.random(2 * len(boxes)) < 0.2
        classes = np.where(wrong, rng.integers(0, 3, len(near)), np.repeat(labels, 2))
        classes = np.concatenate([classes, rng.integers(0, 3, 9)])
        answers.append((np.concatenate([near, far]), classes, rng.random(len(classes))))
    return target, answers


def padded(target, answers, most=40):
    truth = np.full((len(target), most, 6), -1, "float32")
    found = {
        "boxes": np.zeros((len(target), most, 4), "float32"),
        "classes": np.full((len(target), most), -1),
        "scores": np.zeros((len(target), most)),
        "num_detections": np.array([len(x[2]) for x in answers]),
    }
    for n, (objects, answer) in enumerate(zip(target, answers, strict=True)):
        truth[n, : len(objects)] = objects
        order = np.argsort(-answer[2])
        for name, x in zip(("boxes", "classes", "scores"), answer, strict=True):
            found[name][n, : len(order)] = x[order]
    return truth, found


def as_coco(target, answers):
    """The average precision of each class as pycocotools finds it, at IoU 0.5."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")

    def box(x):
        return [*map(float, x[:2]), *map(float, x[2:] - x[:2])]

    truth = [
        {"image_id": n, "bbox": box(x[:4]), "category_id": int(x[4])}
        for n, objects in enumerate(target)
        for x in objects
    ]
    for k, x in enumerate(truth, 1):
        x |= {"id": k, "iscrowd": 0, "area": x["bbox"][2] * x["bbox"][3]}
    found = [
        {"image_id": n, "bbox": box(b), "category_id": int(c), "score": float(s)}
        for n, answer in enumerate(answers)
        for b, c, s in zip(*answer, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco.COCO()
        known.dataset = {
            "images": [{"id": n} for n in range(len(target))],
            "categories": [{"id": c} for c in range(len(CLASSES))],
            "annotations": truth,
        }
        known.createIndex()
        evaluation = cocoeval.COCOeval(known, known.loadRes(found), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        # COCO samples the precision at 101 recalls; so many give the area.
        evaluation.params.recThrs = np.linspace(0, 1, 20001)
        evaluation.evaluate()
        evaluation.accumulate()
    return 100 * evaluation.eval["precision"][0, :, :, 0, -1].mean(axis=0)


def test_mean_average_precision_agrees_with_keras_cv(rng):
    keras_cv = pytest.importorskip("keras_cv")
    target, answers = made_up(rng)
    truth, found = padded(target, answers)
    scores = Detection(CLASSES).scores()
    scores.update(truth, found)

    metric = keras_cv.metrics.BoxCOCOMetrics("xyxy", evaluate_freq=1)
    there = np.arange(found["scores"].shape[1]) < found["num_detections"][:, None]
    metric.update_state(
        {"boxes": truth[..., :4], "classes": truth[..., 4]},
        {
            "boxes": found["boxes"],
            "classes": np.where(there, found["classes"], -1),
            "confidence": found["scores"],
        },
    )
    expected = 100 * float(metric.result()["MaP@[IoU=50]"])

    assert 20 < expected < 90
    # COCO samples the precision at 101 recalls; ours is the area.
    assert scores.result()["mean_ap"] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_agrees_with_pycocotools(seed):
    target, answers = made_up(np.random.default_rng(seed))
    scores = Detection(CLASSES).scores()
    truth, found = padded(target, answers)
    for part in (slice(0, 5), slice(5, 12)):  # in batches
        scores.update(truth[part], {name: x[part] for name, x in found.items()})
    expected = as_coco(target, answers)
    by_class = scores.per_class()

    values = [by_class[name]["ap"] for name in CLASSES]
    np.testing.assert_allclose(values, expected, atol=0.02)
    assert 20 < np.mean(values) < 90
    assert scores.result()["mean_ap"] == pytest.approx(np.mean(values))
    labels = np.concatenate([x[:, 4] for x in target])
    assert [by_class[name]["objects"] for name in CLASSES] == [
        np.sum(labels == c) for c in range(3)
    ]


def test_a_second_detection_of_an_object_is_wrong():
    """By hand: right, a duplicate, and the other object: precisions 1, 1/2, 2/3."""
    truth = np.float32([[[0, 0, 10, 10, 1, 0], [50, 50, 60, 60, 1, 0], [-1] * 6]])
    boxes = np.float32([[[0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 59]]])
    found = {
        "boxes": boxes,
        "classes": np.array([[1, 1, 1]]),
        "scores": np.array([[0.9, 0.8, 0.7]]),
        "num_detections": np.array([3]),
    }
    scores = BoxPrecision(CLASSES)
    scores.update(truth, found)

    assert scores.per_class() == {
        "dog": {
            "ap": pytest.approx(250 / 3),
            # 1 at the recalls up to 0.5, 2/3 at the five above
            "ap_voc2008": pytest.approx(100 * (6 + 5 * 2 / 3) / 11),
            "objects": 2,
        }
    }
    # Nothing found, and a class that is not there, are no errors.
    scores.update(truth, {**found, "num_detections": np.array([0])})
    scores.update(np.full((1, 1, 6), -1), {**found, "classes": np.array([[0, 0, 2]])})
    assert list(scores.per_class()) == ["dog"]
    assert scores.result()["mean_ap"] == pytest.approx(125 / 3)


@pytest.mark.parametrize(("bottom", "ap"), [(5.0, 100), (4.9, 0)])
def test_an_overlap_of_half_is_enough_and_of_the_devkit_with_its_last_pixels(
    bottom, ap
):
    scores = BoxPrecision(CLASSES)
    found = {
        "boxes": np.float32([[[0, 0, 10, bottom]]]),
        "classes": np.array([[1]]),
        "scores": np.array([[0.9]]),
        "num_detections": np.array([1]),
    }
    scores.update(np.float32([[[0, 0, 10, 10, 1, 0]]]), found)

    assert scores.per_class() == {
        "dog": {"ap": ap, "ap_voc2008": pytest.approx(100), "objects": 1}
    }


def devkits_ap(target, answers, c):
    """VOCevaldet.m and VOCap of the devkit of 2008, line by line, at IoU 0.5."""
    rows = [
        (score, n, box)
        for n, (boxes, classes, scores) in enumerate(answers)
        for box, of, score in zip(boxes, classes, scores, strict=True)
        if of == c
    ]
    truth = {
        n: [[*x[:4], bool(x[5]), False] for x in objects if x[4] == c]
        for n, objects in enumerate(target)
    }
    positives = sum(not x[4] for of_image in truth.values() for x in of_image)
    tp, fp = [], []
    for _, n, bb in sorted(rows, key=lambda row: -row[0]):
        ovmax, jmax = -np.inf, None
        for j, gt in enumerate(truth[n]):
            bi = [
                max(bb[0], gt[0]),
                max(bb[1], gt[1]),
                min(bb[2], gt[2]),
                min(bb[3], gt[3]),
            ]
            iw, ih = bi[2] - bi[0] + 1, bi[3] - bi[1] + 1
            if iw > 0 and ih > 0:
                area = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1)
                area += (gt[2] - gt[0] + 1) * (gt[3] - gt[1] + 1) - iw * ih
                if iw * ih / area > ovmax:
                    ovmax, jmax = iw * ih / area, j
        right = wrong = 0
        if ovmax >= 0.5:
            gt = truth[n][jmax]
            if not gt[4]:
                right, wrong = (0, 1) if gt[5] else (1, 0)
                gt[5] = True
        else:
            wrong = 1
        tp.append(right)
        fp.append(wrong)
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    recall = tp / positives
    precision = tp / np.maximum(tp + fp, 1e-12)
    best = [max(precision[recall >= t - 1e-12], default=0) for t in np.arange(11) / 10]
    return 100 * np.mean(best)


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_of_2008_is_the_devkits(seed):
    target, answers = made_up(np.random.default_rng(seed), hard=0.3 * (seed % 2))
    scores = Detection(CLASSES).scores()
    scores.update(*padded(target, answers))
    by_class = scores.per_class()

    for c, name in enumerate(CLASSES):
        expected = devkits_ap(target, answers, c)
        assert by_class[name]["ap_voc2008"] == pytest.approx(expected)
        assert by_class[name]["objects"] == sum(
            ((x[:, 4] == c) & (x[:, 5] == 0)).sum() for x in target
        )
    assert scores.result()["mean_ap_voc2008"] == pytest.approx(
        np.mean([x["ap_voc2008"] for x in by_class.values()])
    )


def test_difficult_objects_count_neither_as_found_nor_as_missed():
    truth = np.float32([[[0, 0, 10, 10, 1, 0], [50, 50, 60, 60, 1, 1]]])
    found = {
        "boxes": np.float32([[[50, 50, 60, 60], [0, 0, 10, 10], [51, 50, 60, 60]]]),
        "classes": np.array([[1, 1, 1]]),
        "scores": np.array([[0.9, 0.8, 0.7]]),
        "num_detections": np.array([3]),
    }
    scores = BoxPrecision(CLASSES)
    scores.update(truth, found)

    assert scores.per_class() == {
        "dog": {"ap": 100.0, "ap_voc2008": pytest.approx(100.0), "objects": 1}
    }


def average_precision(truth, scores):
    """The mean of the precision at each right answer."""
    right = truth[np.argsort(-scores)]
    return np.mean((right.cumsum() / np.arange(1, len(right) + 1))[right > 0])


def test_attributes_are_judged_one_by_one_on_true_boxes(rng):
    names = tuple(f"a{k}" for k in range(23))
    truth = (rng.random((4, 9, 23)) < np.linspace(0.1, 0.6, 23)).astype("float32")
    answer = rng.random((4, 9, 23)) + 0.3 * truth
    truth[..., 5] = 0  # which nothing has
    truth[rng.random((4, 9)) < 0.3] = np.nan
    of_train = tuple(rng.permutation(23).tolist())
    scores = Attributes(names, of_train).scores()
    scores.update(truth[:1], answer[:1])
    scores.update(truth[1:], answer[1:])
    there = ~np.isnan(truth[..., 0])
    flat, answers = truth[there], answer[there]
    values = {
        k: 100 * average_precision(flat[:, k], answers[:, k])
        for k in range(23)
        if k != 5
    }
    rare = sorted(values, key=lambda k: of_train[k])
    result, by_attribute = scores.result(), scores.per_class()

    assert list(by_attribute) == [name for name in names if name != "a5"]
    for k, value in values.items():
        assert by_attribute[names[k]]["ap"] == pytest.approx(value)
        assert by_attribute[names[k]]["objects"] == flat[:, k].sum()
    assert result["mean_ap"] == pytest.approx(np.mean(list(values.values())))
    for count in (10, 20):
        expected = np.mean([values[k] for k in rare[:count]])
        assert result[f"mean_ap_rarest_{count}"] == pytest.approx(expected)


@pytest.mark.parametrize("task", [Detection(CLASSES), Attributes(CLASSES, (1, 2, 3))])
def test_without_an_object_no_score_is_a_number(task):
    assert np.isnan(list(task.scores().result().values())).all()


@pytest.mark.parametrize(
    ("task", "more"),
    [(Detection(CLASSES), {"drawn_from": 0.3}), (Attributes(CLASSES, (1, 2, 3)), {})],
)
def test_what_answers_mean_is_said_in_json(task, more):
    said = json.loads(json.dumps(task.describe()))

    assert set(said) == {"kind", "names", "colours", "units", "description", *more}
    assert said["names"] == list(CLASSES)
    assert said.items() >= more.items()


def test_boxes_are_drawn_where_they_are():
    image = np.full((60, 80, 3), 100.0)
    rois = np.float32([[10, 20, 50, 50], [0, 0, 0, 0]])
    inputs = {"image": image, "rois": rois}
    answer = {
        "boxes": rois[:1].repeat(2, 0),
        "classes": np.array([1, 2]),
        "scores": np.array([0.9, 0.1]),  # the second is not sure enough
        "num_detections": 2,
    }
    truth = np.float32([[10, 20, 50, 50, 1, 0], [0, 0, 0, 0, -1, -1]])
    drawn = Detection(CLASSES).draw(answer, inputs)

    np.testing.assert_array_equal(drawn, Detection(CLASSES).draw(truth, inputs))
    assert drawn.shape == (120, 160, 3)
    changed = (drawn != 100).any(-1)
    assert changed[40, 20:100].all()
    assert changed[40:100, 100].all()
    assert not changed[60:90, 30:90].any()
    told = Attributes(CLASSES, (1, 2, 3)).draw(
        np.array([[0.9, 0.2, 0.6], [0, 0, 0]]), inputs
    )
    assert (told != 100).any(-1)[100, 20:100].all()
    assert len(VARIANCE) == 4
    silent = Attributes(CLASSES, (1, 2, 3)).draw(np.full((2, 3), 0.1), inputs)
    assert (told != silent).any()  # "cat, car"
