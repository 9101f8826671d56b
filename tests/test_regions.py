import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cross_stitch import CrossStitch, Detections, RoIAlign


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_boxes(rng, *shape, side=64):
    x, y = np.sort(rng.uniform(0, side, (2, *shape, 2)), axis=-1)
    return np.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1).astype("float32")


def pooled(features, box, size, stride, first):
    """RoIAlign stated point by point: the mean of 4 bilinear samples a cell."""
    height, width, channels = features.shape
    out = np.zeros((size, size, channels))
    left, top, right, bottom = box.astype("float64")
    for i, j, a, b in np.ndindex(size, size, 2, 2):
        y = top + (bottom - top) * (2 * i + a + 0.5) / (2 * size)
        x = left + (right - left) * (2 * j + b + 0.5) / (2 * size)
        y = np.clip((y - first) / stride, 0, height - 1)
        x = np.clip((x - first) / stride, 0, width - 1)
        y0, x0 = min(int(y), height - 2), min(int(x), width - 2)
        dy, dx = y - y0, x - x0
        corners = features[y0 : y0 + 2, x0 : x0 + 2].astype("float64")
        rows = (1 - dy) * corners[0] + dy * corners[1]
        out[i, j] += ((1 - dx) * rows[0] + dx * rows[1]) / 4
    return out


@pytest.mark.parametrize(("size", "first"), [(3, None), (6, 14.5), (1, 0.0)])
def test_roi_align_is_the_mean_of_bilinear_samples(rng, size, first):
    features = rng.normal(size=(2, 5, 7, 3)).astype("float32")
    boxes = random_boxes(rng, 2, 9, side=100)  # some reach beyond the map
    layer = RoIAlign(size, 16, first)

    result = keras.ops.convert_to_numpy(layer([features, boxes]))

    assert result.shape == (2, 9, size, size, 3)
    assert layer.compute_output_shape([(2, 5, 7, 3), (2, 9, 4)]) == result.shape
    for n, r in np.ndindex(2, 9):
        expected = pooled(
            features[n], boxes[n, r], size, 16, 8 if first is None else first
        )
        np.testing.assert_allclose(result[n, r], expected, atol=1e-5)


def test_the_gradient_of_roi_align_is_its_transpose(rng):
    features = tf.constant(rng.normal(size=(1, 4, 5, 2)), "float32")
    boxes = random_boxes(rng, 1, 3)
    layer = RoIAlign(2, 16)
    with tf.GradientTape() as tape:
        tape.watch(features)
        upstream = rng.normal(size=(1, 3, 2, 2, 2)).astype("float32")
        total = tf.reduce_sum(layer([features, boxes]) * upstream)
    gradient = tape.gradient(total, features).numpy()
    step = rng.normal(size=features.shape).astype("float32")
    moved = tf.reduce_sum(layer([features + step, boxes]) * upstream)

    # The layer is linear in the map.
    np.testing.assert_allclose(moved - total, np.sum(gradient * step), rtol=1e-4)


def test_coordinates_are_exact_under_mixed_precision(rng):
    columns = np.broadcast_to(np.arange(16.0)[:, None], (1, 16, 16, 1))
    box = np.float32([[[201, 0, 205, 256]]])
    layer = RoIAlign(1, 16, dtype="mixed_bfloat16")
    result = layer([keras.ops.cast(columns, "bfloat16"), box])

    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    np.testing.assert_allclose(float(result[0, 0, 0, 0, 0]), 203 / 16 - 0.5, rtol=4e-3)


def test_a_tower_with_both_layers_is_saved_and_takes_any_number_of_regions(
    rng, tmp_path
):
    image = keras.Input((64, 64, 3), name="image")
    rois = keras.Input((None, 4), name="rois")
    x = keras.layers.Conv2D(4, 3, 16, padding="same")(image)
    pool = RoIAlign(2, 16)([x, rois])
    a, b = CrossStitch(per="layer")([pool, pool])
    x = keras.layers.Reshape((-1, 16))(keras.layers.Add()([a, b]))
    scores = keras.layers.Dense(4, activation="softmax")(x)
    deltas = keras.layers.Dense(12)(x)
    found = Detections((64, 64), max_detections=7)([scores, deltas, rois])
    model = keras.Model({"image": image, "rois": rois}, found)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)

    for count in (0, 3, 40):
        given = {
            "image": rng.uniform(0, 255, (2, 64, 64, 3)),
            "rois": random_boxes(rng, 2, count),
        }
        answer, again = (
            model.predict(given, verbose=0),
            loaded.predict(given, verbose=0),
        )
        assert {k: x.shape for k, x in answer.items()} == {
            k: (2, *x.shape[1:]) for k, x in model.output.items()
        }
        for key in answer:
            np.testing.assert_array_equal(answer[key], again[key])


def greedy(boxes, threshold):
    """Non-maximum suppression as it is told: the likeliest first, one by one."""
    kept = []
    for i, box in enumerate(boxes.astype("float64")):
        if all(overlap(box, boxes[k].astype("float64")) <= threshold for k in kept):
            kept.append(i)
    return kept


def overlap(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = np.prod(sides.clip(0))
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared + 1e-7)


def detections(boxes, scores, **arguments):
    """What `Detections` finds, of regions (N, R, 4) of one class that do not move."""
    probabilities = np.stack([1 - scores, scores], axis=-1).astype("float32")
    layer = Detections((64, 64), **arguments)
    found = layer([probabilities, np.zeros_like(boxes), boxes.astype("float32")])
    return {key: keras.ops.convert_to_numpy(x) for key, x in found.items()}


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_what_is_kept_is_what_the_greedy_way_keeps(rng, threshold):
    boxes = random_boxes(rng, 4, 60)
    scores = np.tile(np.linspace(1, 0.1, 60), (4, 1))  # the likeliest first
    found = detections(boxes, scores, iou_threshold=threshold)

    assert 0 < found["num_detections"].mean() < 60
    for n, count in enumerate(found["num_detections"]):
        kept = boxes[n, greedy(boxes[n], threshold)]
        np.testing.assert_allclose(found["boxes"][n, :count], kept, atol=1e-4)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_the_limit_is_of_objects_not_of_boxes(rng, most):
    """Four objects with 120 boxes each, of which the likeliest 100 are one object's."""
    objects = [[2.0, 2, 22, 22], [40, 2, 60, 22], [2, 40, 22, 60], [40, 40, 60, 60]]
    boxes = np.repeat(objects, 120, axis=0)[None] + rng.uniform(-1, 1, (1, 480, 4))
    scores = np.linspace(0.9, 0.1, 480)[None]
    found = detections(boxes, scores, max_detections=most)

    count = min(most, 4)
    assert found["num_detections"] == [count]
    np.testing.assert_allclose(found["boxes"][0, :count], objects[:count], atol=1)
    np.testing.assert_allclose(
        found["scores"][0, :count], scores[0, ::120][:count], rtol=1e-6
    )


def test_without_a_threshold_what_is_dropped_stays_dropped(rng):
    boxes = np.array([[[10, 10, 50, 50], [12, 10, 52, 50], [0, 0, 0, 0], [0, 0, 9, 9]]])
    scores = np.array([[0.9, 0.8, 0.7, 0.0]])  # 0 is a score like others
    found = detections(boxes, scores, score_threshold=0)

    assert found["num_detections"] == [2]
    np.testing.assert_allclose(found["boxes"][0, :2], boxes[0, [0, 3]])
    np.testing.assert_array_equal(found["classes"][0, :4], [0, 0, -1, -1])


def test_a_score_that_is_no_number_drops_its_region_alone(rng):
    boxes = np.array([[[10, 10, 20, 20], [30, 10, 40, 20], [10, 30, 20, 40]]])
    found = detections(boxes, np.array([[0.9, np.nan, 0.8]]))

    assert found["num_detections"] == [2]
    np.testing.assert_allclose(found["boxes"][0, :2], boxes[0, [0, 2]])


def test_boxes_of_an_iou_of_the_threshold_are_no_duplicates():
    boxes = np.array([[[0, 0, 10, 10], [20, 0, 30, 10]]])
    found = detections(boxes, np.array([[0.9, 0.8]]), iou_threshold=0.0)

    assert found["num_detections"] == [2]


def test_a_region_that_is_inside_out_has_no_area():
    boxes = np.array([[[10, 10, 50, 50], [9, 9, 3, 3]]])
    found = detections(boxes, np.array([[0.9, 0.8]]))

    assert found["num_detections"] == [1]


def test_boxes_are_exact_under_mixed_precision():
    box = np.float32([[[301, 11, 449, 403]]])
    scores, deltas = np.float32([[[0.1, 0.9]]]), np.zeros((1, 1, 4), "float32")
    found = Detections((512, 512), dtype="mixed_bfloat16")([scores, deltas, box])

    np.testing.assert_array_equal(found["boxes"][0, 0], box[0, 0])


def test_what_is_kept_is_what_keras_cv_keeps(rng):
    keras_cv = pytest.importorskip("keras_cv")
    rois = random_boxes(rng, 2, 40)
    score = rng.uniform(0.1, 1, (2, 40)).astype("float32")
    suppress = keras_cv.layers.NonMaxSuppression(
        "xyxy", from_logits=False, iou_threshold=0.4, confidence_threshold=0.5
    )
    expected = suppress(rois, score[..., None])

    scores = np.stack([1 - score, score], axis=-1)
    nothing_moves = np.zeros((2, 40, 4), "float32")
    found = Detections((64, 64), iou_threshold=0.4, score_threshold=0.5)(
        [scores, nothing_moves, rois]
    )

    counts = keras.ops.convert_to_numpy(found["num_detections"])
    np.testing.assert_array_equal(counts, expected["num_detections"])
    for n, count in enumerate(counts):
        assert 0 < count < 40
        actual = keras.ops.convert_to_numpy(found["boxes"])[n, :count]
        np.testing.assert_allclose(actual, expected["boxes"][n, :count], atol=1e-3)


def test_a_chain_of_overlaps_is_settled_from_its_start(rng):
    """Each box overlaps the next alone: every other one stays."""
    left = 2.0 * np.arange(20)
    boxes = np.stack([left, 0 * left, left + 3, 0 * left + 10], 1)[None]
    found = detections(boxes, np.linspace(1, 0.1, 20)[None], iou_threshold=0.15)

    assert found["num_detections"] == [10]
    np.testing.assert_array_equal(found["boxes"][0, :10], boxes[0, ::2])


def test_detections_are_the_moved_boxes_of_each_class_without_duplicates(rng):
    rois = random_boxes(rng, 2, 50)
    rois[1, 30:] = 0  # the second image has fewer
    logits = rng.normal(size=(2, 50, 4)) * 2
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    deltas = rng.normal(size=(2, 50, 12)).astype("float32")
    variance = (0.2, 0.1, 0.3, 0.4)
    layer = Detections((48, 64), variance, 0.4, 0.05, max_detections=60)
    found = {
        key: keras.ops.convert_to_numpy(x)
        for key, x in layer([scores.astype("float32"), deltas, rois]).items()
    }

    for n, real in enumerate((50, 30)):
        expected = []
        for c in range(3):
            left, top, right, bottom = rois[n, :real].T
            width, height = right - left, bottom - top
            dx, dy, dw, dh = (
                deltas[n, :real, 4 * c : 4 * c + 4].T * np.c_[list(variance)]
            )
            x, y = left + width / 2 + dx * width, top + height / 2 + dy * height
            half_w, half_h = width * np.exp(dw) / 2, height * np.exp(dh) / 2
            boxes = np.stack([x - half_w, y - half_h, x + half_w, y + half_h], 1)
            boxes = boxes.clip(0, [64, 48, 64, 48])
            order = np.argsort(-scores[n, :real, 1 + c])
            for k in greedy(boxes[order], 0.4):
                score = scores[n, order[k], 1 + c]
                if score >= 0.05:
                    expected.append((-score, c, boxes[order[k]]))
        expected = sorted(expected, key=lambda row: row[0])[:60]
        count = found["num_detections"][n]

        assert count == len(expected)
        assert found["classes"][n, :count].tolist() == [c for _, c, _ in expected]
        np.testing.assert_allclose(
            found["boxes"][n, :count], [box for _, _, box in expected], atol=1e-3
        )
        np.testing.assert_allclose(
            found["scores"][n, :count], [-s for s, _, _ in expected], rtol=1e-5
        )
        assert (found["classes"][n, count:] == -1).all()
        assert not found["scores"][n, count:].any()
        assert not found["boxes"][n, count:].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RoIAlign(0, 16), "positive integers. Received: size=0, stride=16"),
        (
            lambda: RoIAlign(2, 16)([np.zeros((1, 8, 8)), np.zeros((1, 3, 4))]),
            r"a map \(N, H, W, C\) and regions \(N, R, 4\). Received",
        ),
        (
            lambda: RoIAlign(2, 16)([np.zeros((1, 8, 8, 2)), np.zeros((1, 3, 5))]),
            r"Received: shapes=.*\(1, 3, 5\)",
        ),
        (
            lambda: Detections((9, 9))(
                [np.zeros((1, 3, 5)), np.zeros((1, 3, 20)), np.zeros((1, 3, 4))]
            ),
            r"deltas \(N, R, 4 \* classes\).*Received: shapes=.*\(1, 3, 20\)",
        ),
        (
            lambda: Detections((9, 9))(
                [np.zeros((1, 3, 5)), np.zeros((1, 3, 16)), np.zeros((3, 4))]
            ),
            r"regions \(N, R, 4\)\. Received: shapes=.*\(3, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ON_ANOTHER_BACKEND = """
import sys
import keras
import numpy as np
from keras_cross_stitch import Detections, RoIAlign

given = np.load(sys.argv[1])
maps, rois, scores, deltas = (given[f"arr_{k}"] for k in range(4))
layer = RoIAlign(3, 16)
inputs = [keras.Input(maps.shape[1:]), keras.Input((None, 4))]
pooled = keras.Model(inputs, layer(inputs)).predict([maps, rois], verbose=0)
found = Detections((64, 64), max_detections=20)([scores, deltas, rois])
found = {name: keras.ops.convert_to_numpy(x) for name, x in found.items()}
np.savez(sys.argv[2], pooled=pooled, **found)
print(keras.backend.backend())
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_give_the_same(rng, tmp_path, backend):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"needs {backend}, which is not installed")
    rois = random_boxes(rng, 2, 9)
    maps = rng.normal(size=(2, 4, 5, 3)).astype("float32")
    scores = rng.dirichlet(np.ones(4), (2, 9)).astype("float32")
    deltas = rng.normal(size=(2, 9, 12)).astype("float32")
    np.savez(tmp_path / "given.npz", maps, rois, scores, deltas)
    run = subprocess.run(
        [
            *(sys.executable, "-c", ON_ANOTHER_BACKEND),
            *(tmp_path / "given.npz", tmp_path / "result.npz"),
        ],
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )

    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == backend
    result = np.load(tmp_path / "result.npz")
    pooled = RoIAlign(3, 16)([maps, rois])
    np.testing.assert_allclose(result["pooled"], pooled, atol=1e-5)
    found = Detections((64, 64), max_detections=20)([scores, deltas, rois])
    for name, x in found.items():
        np.testing.assert_allclose(result[name], x, rtol=1e-4, atol=1e-3)
