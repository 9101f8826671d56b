"""What the figures show; how they look was looked at."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scipy.stats import rankdata, ttest_1samp

from training.study import figures
from training.study.results import Row

BLUE, VERMILION = "#0072B2", "#D55E00"


def rows(method, values, task="segmentation", metric="miou"):
    return [Row(method, seed, task, metric, x) for seed, x in enumerate(values)]


def rgb(colour):
    return (255 * np.array(to_rgb(colour))).round()


def test_the_gallery_shows_the_given_pixels_under_their_titles():
    rng = np.random.default_rng(0)
    columns = {
        title: rng.integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
        for title in ("image", "truth", "single-task")
    }

    axes = np.reshape(figures.gallery(columns).axes, (2, 3))

    assert [cell.get_title() for cell in axes[0]] == list(columns)
    for column, images in zip(axes.T, columns.values(), strict=True):
        for cell, image in zip(column, images, strict=True):
            np.testing.assert_array_equal(cell.images[0].get_array(), image)


def test_titles_of_many_columns_do_not_overlap():
    long = [f"split at block{n} expand conv, alpha multiplier 2.0" for n in range(9)]
    images = [np.zeros((6, 8, 3), "uint8")]
    figure = figures.gallery({x: images for x in ("image", *long, "change")})
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]

    assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))
    assert max(box.y1 for box in boxes) <= figure.bbox.y1


def test_a_difference_map_tells_who_is_nearer_to_the_truth():
    truth = np.array([[[200, 0, 0]] * 4 + [[0, 0, 0]]], np.uint8)
    right, near, far = [200, 0, 0], [200, 16, 0], [0, 200, 0]
    before = np.array([[far, right, far, near, far]], np.uint8)
    after = np.array([[right, far, far, right, right]], np.uint8)

    (classes,) = figures.difference(truth, before, after, saturation=1)
    (colours,) = figures.difference(truth, before, after)

    white, grey = [255] * 3, [178] * 3  # neither is nearer; undefined
    expected = [rgb(BLUE), rgb(VERMILION), white, rgb(BLUE), grey]
    np.testing.assert_allclose(classes, expected, atol=1)
    quarter = 255 + 16 / 64 * (rgb(BLUE) - 255)
    np.testing.assert_allclose(colours[[0, 1, 2, 4]], classes[[0, 1, 2, 4]])
    np.testing.assert_allclose(colours[3], quarter, atol=1)


def test_learning_curves_go_on_where_the_single_task_networks_ended():
    losses = {
        "single_task": [{"a": [3.0, 2.0], "b": [5.0, 4.0]}, {"a": [3.5, 2.5]}],
        "cross_stitch": [{"a": [1.5], "b": [3.0]}],
    }

    validation = {"cross_stitch": [{"a": [1.7], "b": [3.1]}]}
    figure = figures.learning_curves(losses, {"cross_stitch": 2}, validation)

    first = figure.axes[0]
    drawn = [(list(x.get_xdata()), list(x.get_ydata())) for x in first.lines]
    assert drawn == [
        ([1, 2], [3.0, 2.0]),
        ([1, 2], [3.5, 2.5]),
        ([3], [1.5]),
        ([3], [1.7]),
    ]
    # One value is no line.
    markers = ["None", "None", "s", "s"]
    assert [line.get_marker() for line in first.lines] == markers
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["single-task", "cross-stitch", "cross-stitch, held out"]
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert first.get_ylabel() == "loss"


def test_alphas_of_one_epoch_are_points():
    def drawn(epochs):
        history = {("pool1", "a", x): [0.9] * epochs for x in ("a", "b")}
        axes = figures.alphas_by_epoch(history).axes[0]
        whole = [x for x in axes.get_xticks() if x == round(x)]
        assert whole == [*axes.get_xticks()]
        return [(line.get_marker(), line.get_fillstyle()) for line in axes.lines]

    assert drawn(1) == [("o", "full"), ("o", "none")]
    assert [marker for marker, _ in drawn(2)] == ["None", "None"]


def test_each_task_has_its_own_alphas():
    history = {
        ("pool1", task, source): [10.0 * i + j]
        for i, task in enumerate("ab")
        for j, source in enumerate("ab")
    }
    drawn = [
        [line.get_ydata()[0] for line in axes.lines]
        for axes in figures.alphas_by_epoch(history).axes
    ]
    assert drawn == [[0, 1], [10, 11]]


@pytest.mark.parametrize("shape", [(3, 3, 5), (2, 2)])
def test_alpha_is_drawn_from_what_a_run_has_saved(shape):
    rng = np.random.default_rng(0)
    units = {name: rng.normal(size=shape).astype("float32") for name in ("b1", "a2")}
    tasks = [f"task{i}" for i in range(shape[0])]

    figure = figures.alpha(units, tasks)

    axes = np.reshape(figure.axes, (shape[0], 2))
    assert [cell.get_title() for cell in axes[0]] == ["b1", "a2"]
    for column, alpha in zip(axes.T, units.values(), strict=True):
        for cell, of_task in zip(column, alpha, strict=True):
            for line, values in zip(cell.lines, of_task, strict=True):
                drawn = np.unique(line.get_ydata())
                np.testing.assert_array_equal(drawn, np.unique(values))


@pytest.mark.parametrize(
    ("task", "metric", "up"), [("a", "miou", 1), ("b", "mean_angle", -1)]
)
def test_splits_are_drawn_as_gains_over_their_baseline(task, metric, up):
    known = [
        *rows("single_task_as_long", [20, 21, 22], task, metric),
        *rows("split@conv2", [21, 22, 23], task, metric),
        *rows("split@score", [20, 19, 18], task, metric),
    ]

    figure = figures.splits(known, [(task, metric)], {(task, metric): {"score": -3.0}})

    (ours,) = (line for line in figure.axes[0].lines if line.get_marker() == "o")
    (paper,) = (line for line in figure.axes[0].lines if line.get_marker() == "s")
    np.testing.assert_allclose(ours.get_ydata(), [up, -2 * up])
    np.testing.assert_allclose(paper.get_ydata(), [np.nan, -3.0])


def test_classes_are_ordered_by_frequency_with_the_rank_correlation():
    rng = np.random.default_rng(0)
    gains, pixels = rng.normal(size=9), rng.integers(1, 10**6, 9)
    names = [f"class {i}" for i in range(9)]
    ranks = np.corrcoef(rankdata(gains), rankdata(pixels))[0, 1]

    deviations = rng.uniform(1, 2, 9)
    figure = figures.per_class("IoU", names, gains, pixels, deviations)
    above, below = figure.axes

    order = np.argsort(-pixels)
    assert [x.get_text() for x in below.get_xticklabels()] == [names[i] for i in order]
    np.testing.assert_allclose([x.get_height() for x in below.patches], gains[order])
    _, _, (bars,) = below.containers[0].lines
    ends = np.array(bars.get_segments())[..., 1]
    np.testing.assert_allclose(np.ptp(ends, axis=1), 2 * deviations[order])
    colours = [VERMILION if gain < 0 else BLUE for gain in gains[order]]
    assert [x.get_facecolor()[:3] for x in below.patches] == [*map(to_rgb, colours)]
    shares = [x.get_height() for x in above.patches]
    np.testing.assert_allclose(shares, 100 * pixels[order] / pixels.sum())
    assert f"frequency {ranks:+.2f} (p = " in above.get_title(loc="left")


def test_no_rank_correlation_where_all_classes_change_alike():
    above, _ = figures.per_class("IoU", ["a", "b"], [0.0, 0.0], [5, 6]).axes

    assert "undefined: all classes alike" in above.get_title(loc="left")


@pytest.mark.parametrize(
    ("task", "metric", "up"), [("a", "miou", 1), ("b", "mean_angle", -1)]
)
def test_label_fractions_show_the_paired_gain_of_each_method(task, metric, up):
    rng = np.random.default_rng(0)
    names = ("single_task_as_long", "hard_sharing", "cross_stitch_from_start")
    values = {
        (share, method): rng.normal(30, 3, seeds)
        for share, seeds in ((1.0, 1), (0.1, 5), (0.25, 2))
        for method in names
    }
    by_share = {
        share: [x for m in names for x in rows(m, values[share, m], task, metric)]
        for share in (1.0, 0.1, 0.25)
    }
    by_share[0.1] += rows("split@conv2", [1, 2], task, metric)  # one share alone

    figure = figures.label_fraction(by_share, [(task, metric)])

    (axes,) = figure.axes
    drawn = {bars.get_label(): bars.lines for bars in axes.containers}
    assert list(drawn) == ["cross-stitch from the start", "hard sharing"]
    for (line, _, (bars,)), method in zip(drawn.values(), names[:0:-1], strict=True):
        np.testing.assert_allclose(line.get_xdata(), [10, 25, 100], rtol=0.1)
        ends = [segment[:, 1] for segment in bars.get_segments()]
        for share, mean, end in zip(
            (0.1, 0.25, 1.0), line.get_ydata(), ends, strict=True
        ):
            gains = up * (values[share, method] - values[share, names[0]])
            np.testing.assert_allclose(mean, gains.mean())
            interval = [mean, mean]  # of one seed there is none
            if len(gains) > 1:
                interval = [*ttest_1samp(gains, 0).confidence_interval()]
            np.testing.assert_allclose(end, interval)
    unit = {"miou": "points", "mean_angle": "degrees"}[metric]
    assert axes.get_ylabel() == f"gain over the baseline, {unit}"
    assert axes.get_xlabel() == f"images with labels of {task}, %"
