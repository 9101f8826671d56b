"""plot_network and network_table: what stands where, read off the figure."""

import itertools

import keras
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from keras_cross_stitch import (
    CrossStitch,
    network_table,
    plot_network,
    split,
    stitch,
)


def tower(units, frozen=False):
    image = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(4, 3, name="stem")(image)
    for k in (1, 2):
        x = keras.layers.Conv2D(4, 3, padding="same", name=f"block_{k}_conv")(x)
        x = keras.layers.BatchNormalization(name=f"block_{k}_project_BN")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, keras.layers.Dense(units, name="score")(x))
    model.set_weights([np.ones(w.shape) for w in model.get_weights()])
    model.get_layer("stem").trainable = not frozen
    return model


def stitched(tasks=("semantic_segmentation", "surface_normals", "depth"), frozen=True):
    towers = {task: tower(k + 1, frozen) for k, task in enumerate(tasks)}
    return stitch(towers, at=["block_1_project_BN", "block_2_project_BN"])


def texts(figure):
    return [x.get_text().replace("\n", " ") for x in figure.axes[0].texts]


def test_the_table_has_stages_and_what_units_take():
    model = stitched(("kind", "age"))
    alpha = np.zeros((2, 2, 4))
    alpha[0, 0], alpha[0, 1], alpha[1, 1] = 0.5, [-1.5, 1.5, -1.5, 1.5], 2
    model.get_layer("cross_stitch_block_1_project_BN").alpha.assign(alpha)
    assert network_table(model).splitlines()[:6] == [
        "shared    stem (1 layer, 6 x 6 x 4, frozen)",
        "kind      block_1_conv … block_1_project_BN (2 layers, 6 x 6 x 4)",
        "age       block_1_conv … block_1_project_BN (2 layers, 6 x 6 x 4)",
        "  unit block_1_project_BN: age takes 0.25 from age, 0.75 from kind",
        "  unit block_1_project_BN: kind takes 0.00 from age, 1.00 from kind",
        "kind      block_2_conv … block_2_project_BN (2 layers, 6 x 6 x 4)",
    ]


def test_split_models_have_a_trunk():
    towers = {"kind": tower(5), "age": tower(1)}
    lines = network_table(split(towers, at="block_2_conv")).splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "shared    stem … block_1_project_BN",
        "kind      block_2_conv … score",
        "age       block_2_conv … score",
    ]
    figure = plot_network(split(towers, at="block_2_conv"))
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == pytest.approx([1.9, 0.9, 0.9])


def test_a_link_is_as_wide_as_the_part_that_is_taken():
    model = stitched(("kind", "age"))
    alpha = np.zeros((2, 2, 4))
    alpha[0, 0], alpha[0, 1], alpha[1, 1] = 0.5, 1.5, 2
    model.get_layer("cross_stitch_block_1_project_BN").alpha.assign(alpha)
    lines = plot_network(model).axes[0].lines[:4]
    # Age from age, age from kind, kind from age, kind from kind; kind stands first.
    assert [line.get_linewidth() for line in lines] == [3, 9, 0.3, 12]
    assert [list(line.get_xdata()) for line in lines] == [
        [1, 1],
        [0, 0.88],
        [1, 0.12],
        [0, 0],
    ]
    age, kind = lines[0].get_color(), lines[1].get_color()
    assert [line.get_color() for line in lines] == [age, kind, age, kind]
    assert age != kind


def test_frozen_parts_are_hatched():
    patches = plot_network(stitched()).axes[0].patches
    assert [bool(patch.get_hatch()) for patch in patches] == [True] + [False] * 9


@pytest.mark.parametrize("tasks", [2, 3])
def test_every_text_is_within_its_box_and_none_overlaps(tasks):
    names = ("semantic_segmentation", "surface_normals", "depth")[:tasks]
    figure = plot_network(stitched(names))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    axes = figure.axes[0]
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    for box, other in itertools.combinations(boxes, 2):
        assert not box.overlaps(other)
    stages = [text for text in axes.texts if "layer" in text.get_text()]
    assert len(stages) == len(axes.patches) == 1 + 3 * tasks
    for text, patch in zip(stages, axes.patches, strict=True):
        inside, outside = (
            text.get_window_extent(renderer),
            patch.get_window_extent(renderer),
        )
        assert outside.x0 <= inside.x0 < inside.x1 <= outside.x1
        assert outside.y0 <= inside.y0 < inside.y1 <= outside.y1


def test_units_of_some_tasks_leave_the_others_alone():
    inputs = {t: keras.Input((4,), name=t) for t in "abc"}
    x = {t: keras.layers.Dense(3, name=f"{t}_one")(inputs[t]) for t in "abc"}
    x |= CrossStitch(name="cross_stitch_one")({t: x[t] for t in "ab"})
    outputs = {t: keras.layers.Dense(1, name=f"{t}_two")(x[t]) for t in "abc"}
    model = keras.Model(inputs, outputs)
    lines = network_table(model).splitlines()
    assert "  unit one: a takes 0.90 from a, 0.10 from b" in lines
    assert not any("takes" in line and "c" in line.split(":")[1] for line in lines)
    plot_network(model)


@pytest.mark.parametrize("inputs", [1, 3])
def test_inputs_are_no_layers_of_a_tower(inputs):
    def tower(units):
        xs = [keras.Input((2,), name=f"x{k}") for k in range(inputs)]
        x = keras.layers.Dense(4, name="first")(sum(xs))
        return keras.Model(xs, keras.layers.Dense(units, name="score")(x))

    towers = {task: tower(k) for k, task in enumerate(("kind", "kind_b", "age"), 1)}
    table = network_table(stitch(towers, ["first"], shared_input=False))

    stages = [line for line in table.splitlines() if " … " in line or "layer" in line]
    assert [line.split(" (")[1][:2] for line in stages] == ["1 "] * 6


def test_units_that_project_say_so():
    towers = {"kind": tower(5), "age": tower(1)}
    at = [{"kind": "stem", "age": "block_1_conv"}, {"kind": "pool", "age": "score"}]
    model = stitch(towers, at, project=True)
    lines = network_table(model).splitlines()
    # Maps of one shape; and Dense layers from 4 to 1 and from 1 to 4.
    assert not any("stem: what" in line for line in lines)
    assert "  unit pool: what is taken is projected, 2 layers of 13 weights" in lines
    assert "pool projected" in texts(plot_network(model))


def test_units_of_other_tasks_are_refused():
    inputs = [keras.Input((4,), name=task) for task in "ab"]
    a, b = CrossStitch()([keras.layers.Dense(4)(x) for x in inputs])
    model = keras.Model(inputs, {"a": a, "b": b})
    for draw in (network_table, plot_network):
        with pytest.raises(ValueError, match=r"units of its tasks .* of \['0', '1'\]"):
            draw(model)


def test_other_models_are_refused():
    x = keras.Input((4,))
    for outputs in (keras.layers.Dense(1)(x), {"a": keras.layers.Dense(1)(x)}):
        with pytest.raises(ValueError, match="one that `stitch` or `split` has made"):
            plot_network(keras.Model(x, outputs))
