"""Alpha read from models whose units are set by hand."""

import csv
import itertools
import math
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keras_cross_stitch import AlphaHistory, CrossStitch, alpha_table, plot_alpha

# (T, T, C) with the tasks in sorted order: depth, kind.
ALPHA = np.array([[[0.5, 0.9, 0.7], [0.0, 0.2, 0.4]], [[0.1, 0.1, 0.1], [2, 0, 1]]])


def stitched(tasks=("kind", "depth"), units=("first", "second"), **unit):
    inputs = {task: keras.Input((3,), name=task) for task in tasks}
    x = inputs
    for name in units:
        x = {task: keras.layers.Dense(3)(x[task]) for task in tasks}
        x = CrossStitch(name=f"cross_stitch_{name}", **unit)(x)
    model = keras.Model(inputs, x)
    model.compile("sgd", dict.fromkeys(tasks, "mse"))
    return model


def with_known_alpha():
    model = stitched()
    model.get_layer("cross_stitch_second").alpha.assign(ALPHA)
    return model


def fit(model, callbacks, **kwargs):
    x = {name: np.ones((2, 3), "float32") for name in model.input}
    return model.fit(x, x, callbacks=callbacks, **{"verbose": 0, **kwargs})


def keys(units, tasks):
    return [
        f"alpha/cross_stitch_{unit}/{task}_from_{source}"
        for unit in units
        for task in tasks
        for source in tasks
    ]


def test_table_has_a_row_per_unit_task_and_source_in_the_order_of_the_graph():
    table = alpha_table(stitched())
    assert [(row["unit"], row["task"], row["source"]) for row in table] == [
        (unit, task, source)
        for unit in ("cross_stitch_first", "cross_stitch_second")
        for task in ("depth", "kind")
        for source in ("depth", "kind")
    ]


@pytest.mark.parametrize(
    ("task", "source", "mean", "std", "low", "high"),
    [
        ("depth", "depth", 0.7, math.sqrt(0.08 / 3), 0.5, 0.9),
        ("depth", "kind", 0.2, math.sqrt(0.08 / 3), 0.0, 0.4),
        ("kind", "depth", 0.1, 0.0, 0.1, 0.1),
        ("kind", "kind", 1.0, math.sqrt(2 / 3), 0.0, 2.0),
    ],
)
def test_table_summarises_over_channels(task, source, mean, std, low, high):
    (row,) = (
        row
        for row in alpha_table(with_known_alpha())[4:]
        if (row["task"], row["source"]) == (task, source)
    )
    summary = [row["mean"], row["std"], row["min"], row["max"]]
    assert summary == pytest.approx([mean, std, low, high], abs=1e-6)


def test_table_of_units_per_layer():
    row = alpha_table(stitched(per="layer", same_task=0.75))[1]
    assert row == {
        "unit": "cross_stitch_first",
        "task": "depth",
        "source": "kind",
        "mean": 0.25,
        "std": 0.0,
        "min": 0.25,
        "max": 0.25,
    }


def test_table_looks_into_nested_models():
    inner = stitched()
    outer = keras.Model(inner.input, inner(inner.input))
    assert alpha_table(outer) == alpha_table(inner)


def test_units_of_one_name_in_two_nested_models_stay_apart():
    one, two = stitched(), stitched()
    one.name, two.name = "one", "two"
    given = one.input
    outer = keras.Model(given, {**one(given), "of_two": two(given)["depth"]})
    names = list(dict.fromkeys(row["unit"] for row in alpha_table(outer)))
    units = dict.fromkeys(row["unit"] for row in alpha_table(one))
    assert names == [f"{model}/{unit}" for model in ("one", "two") for unit in units]

    logs = {}
    history = AlphaHistory()
    history.set_model(outer)
    history.set_params({"verbose": 0, "epochs": 1, "steps": 1})
    history.on_train_begin()
    history.on_epoch_begin(0)
    history.on_epoch_end(0, logs)
    assert len(logs) == 2 * len(alpha_table(one))


def test_table_names_the_tasks_of_a_list_by_position():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    table = alpha_table(keras.Model(inputs, CrossStitch()(inputs)))
    assert [(row["task"], row["source"]) for row in table] == [
        ("0", "0"),
        ("0", "1"),
        ("1", "0"),
        ("1", "1"),
    ]


def test_table_is_the_same_after_saving_and_loading(tmp_path):
    model = with_known_alpha()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert alpha_table(loaded) == alpha_table(model)


def without_units():
    image = keras.Input((3,), name="x")
    return keras.Model(image, {"x": keras.layers.Dense(3)(image)})


def test_a_model_without_units_has_no_alpha():
    assert alpha_table(without_units()) == []
    with pytest.raises(ValueError, match=r"no CrossStitch layer; `stitch\(\)` makes"):
        plot_alpha(without_units())


def test_history_of_a_model_without_units_is_the_plain_one():
    model = without_units()
    model.compile("sgd", {"x": "mse"})
    x = np.ones((2, 3))
    assert list(model.fit(x, x, callbacks=[AlphaHistory()], verbose=0).history) == [
        "loss"
    ]


def test_a_model_without_weights_is_an_error():
    class Unbuilt(keras.Model):
        def __init__(self):
            super().__init__()
            self.unit = CrossStitch()

    with pytest.raises(ValueError, match="no weights yet: call it"):
        alpha_table(Unbuilt())


@pytest.mark.slow
def test_history_has_the_mean_alpha_at_the_end_of_each_epoch():
    model = stitched()
    means = []
    after = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: means.append(
            [row["mean"] for row in alpha_table(model)]
        )
    )
    history = fit(model, [AlphaHistory(), after], epochs=2).history
    logged = [history[key] for key in keys(("first", "second"), ("depth", "kind"))]
    assert means[0] != means[1]  # it trains
    np.testing.assert_array_equal(np.transpose(logged), means)


@pytest.mark.slow
def test_csv_logger_after_it_writes_alpha(tmp_path):
    model = stitched(units=["only"])
    logger = keras.callbacks.CSVLogger(tmp_path / "history.csv")
    fit(model, [AlphaHistory(), logger], epochs=2)
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    last = [float(rows[-1][key]) for key in keys(["only"], ("depth", "kind"))]
    assert last == [row["mean"] for row in alpha_table(model)]


@pytest.mark.slow
def test_csv_is_continued_when_training_resumes(tmp_path):
    for epochs in (1, 3):  # the second time, as if the first had been cut off
        model = stitched(units=["only"])
        callbacks = [
            keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=0),
            AlphaHistory(),
            keras.callbacks.CSVLogger(tmp_path / "history.csv", append=True),
        ]
        fit(model, callbacks, epochs=epochs)
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    alphas = [row["alpha/cross_stitch_only/depth_from_kind"] for row in rows]
    assert len({float(alpha) for alpha in alphas}) == 3


@pytest.mark.slow
def test_tensorboard_after_it_writes_alpha(tmp_path):
    model = stitched(units=["only"])
    board = keras.callbacks.TensorBoard(tmp_path, write_graph=False)
    fit(model, [AlphaHistory(), board], epochs=2)
    events = EventAccumulator(str(tmp_path / "train"), size_guidance={"tensors": 0})
    events.Reload()
    last = [
        events.Tensors(f"epoch_{key}")[-1] for key in keys(["only"], ("depth", "kind"))
    ]
    assert {event.step for event in last} == {1}
    written = [tf.make_ndarray(event.tensor_proto).item() for event in last]
    assert written == pytest.approx([row["mean"] for row in alpha_table(model)])


@pytest.mark.parametrize("verbose", [1, 2])
def test_the_progress_bar_has_one_number_a_unit(verbose, capsys):
    model = with_known_alpha()
    model.compile(keras.optimizers.SGD(0.0), dict.fromkeys(("kind", "depth"), "mse"))
    history = fit(model, [AlphaHistory()], verbose=verbose).history
    printed = re.sub(r"\x1b\[\d*m|\x08|\r", "", capsys.readouterr().out)
    line = printed.splitlines()[-1]
    shown = dict(re.findall(r" - (alpha/\S+): (\S+)", line))
    # What depth takes from kind is 0.2 in the mean; what kind takes from depth, 0.1.
    assert shown == {
        "alpha/cross_stitch_first": "0.1000",
        "alpha/cross_stitch_second": "0.1500",
    }
    assert printed.count("cross_stitch_first") == 1
    alphas = keys(("first", "second"), ("depth", "kind"))
    assert [key for key in history if key.startswith("alpha")] == alphas


def test_without_verbosity_there_is_no_progress_bar(capsys):
    fit(stitched(), [AlphaHistory()], verbose=0)
    assert capsys.readouterr().out == ""


def test_plot_has_a_panel_per_task_and_unit():
    figure = plot_alpha(stitched(("a", "b", "c"), ("pool1", "pool2")))
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes[:2]] == ["pool1", "pool2"]
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == [
        r"$\alpha$ of a",
        r"$\alpha$ of b",
        r"$\alpha$ of c",
    ]


def test_long_names_of_units_and_tasks_do_not_overlap():
    names = [f"block_{k}_project_BN" for k in (1, 3, 13, 16)]
    tasks = ("semantic_segmentation", "surface_normals", "a")
    for units in (names, ["conv_pw_13_relu"]):
        figure = plot_alpha(stitched(tasks, units))
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        texts = [axes.title for axes in figure.axes]
        texts += [axes.yaxis.label for axes in figure.axes]
        boxes = [x.get_window_extent(renderer) for x in texts if x.get_text()]
        boxes += [figure.legends[0].get_window_extent(renderer)]
        assert len(boxes) == len(units) + len(tasks) + 1
        for box, other in itertools.combinations(boxes, 2):
            assert not box.overlaps(other)
        for box in boxes:
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1


def test_plot_draws_alpha_sorted_over_the_channels():
    figure = plot_alpha(with_known_alpha())
    depth, kind = figure.axes[1], figure.axes[3]
    drawn = [[line.get_ydata() for line in axes.lines] for axes in (depth, kind)]
    expected = [[[0.5, 0.7, 0.9], [0, 0.2, 0.4]], [[0.1, 0.1, 0.1], [0, 1, 2]]]
    np.testing.assert_allclose(drawn, expected)


def test_plot_has_a_color_per_source_and_is_solid_for_the_task_itself():
    figure = plot_alpha(stitched(("a", "b", "c"), ["pool1"]))
    legend = [
        (text.get_text(), handle.get_color())
        for text, handle in zip(
            figure.legends[0].get_texts(),
            figure.legends[0].legend_handles,
            strict=True,
        )
    ]
    (_, a), (_, b), (_, c) = legend[:3]
    assert [label for label, _ in legend[:3]] == ["from a", "from b", "from c"]
    assert len({a, b, c}) == 3
    drawn = [(line.get_color(), line.get_linestyle()) for line in figure.axes[1].lines]
    assert drawn == [(a, "--"), (b, "-"), (c, "--")]


def test_plot_has_one_y_axis_as_wide_as_the_papers_or_wider():
    model = stitched()
    assert {axes.get_ylim() for axes in plot_alpha(model).axes} == {(-0.5, 1.5)}
    model.get_layer("cross_stitch_first").alpha.assign(np.full((2, 2, 3), 3.0))
    (limits,) = {axes.get_ylim() for axes in plot_alpha(model).axes}
    assert limits[0] == -0.5
    assert limits[1] > 3


def test_plot_of_units_per_layer_is_flat():
    axes = plot_alpha(stitched(per="layer")).axes[0]
    drawn = [line.get_ydata() for line in axes.lines]
    np.testing.assert_allclose(drawn, [[0.9, 0.9], [0.1, 0.1]], atol=1e-6)
    assert [line.get_xdata() for line in axes.lines] == [[0, 1], [0, 1]]


def test_plot_of_diverged_units_is_drawn_too(tmp_path):
    model = stitched()
    model.get_layer("cross_stitch_first").alpha.assign(np.full((2, 2, 3), np.nan))
    plot_alpha(model).savefig(tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").stat().st_size > 0


def test_plot_without_matplotlib_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="draws with matplotlib: `pip install"):
        plot_alpha(stitched())
