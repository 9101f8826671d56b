"""The unit against Eq. 1 and its derivatives, written out in NumPy float64."""

import collections
import importlib.util
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cross_stitch import CrossStitch, LearningRateGroups, OwnMapsOnly

# Axes of the maps with the channels last: N, then space, then C.
SHAPES = {
    "NC": (3, 5),
    "NLC": (2, 7, 3),
    "NHWC": (3, 5, 7, 4),
    "NDHWC": (2, 3, 5, 3, 2),
    "one channel": (3, 5, 3, 1),
    "one of each": (1, 1, 1, 1),
}


def _maps(tasks, shape, seed=0):
    rng = np.random.default_rng([seed, tasks, *shape])
    return [rng.normal(size=shape) for _ in range(tasks)]


def _random_alpha(layer, seed=1):
    """Gives a built layer an alpha with no zero and no two entries equal."""
    alpha = np.random.default_rng(seed).normal(size=layer.alpha.shape) + 0.1
    layer.alpha.assign(alpha)
    return alpha


def _reference(alpha, maps, upstreams):
    """Eq. 1, Eq. 2 and dL/dalpha in float64, for maps with the channels last."""
    x, g = np.stack(maps), np.stack(upstreams)
    if alpha.ndim == 2:
        return (
            np.einsum("ij,j...->i...", alpha, x),
            np.einsum("ij,i...->j...", alpha, g),
            np.einsum("ik,jk->ij", g.reshape(len(g), -1), x.reshape(len(x), -1)),
        )
    return (
        np.einsum("ijc,j...c->i...c", alpha, x),
        np.einsum("ijc,i...c->j...c", alpha, g),
        np.einsum(
            "inc,jnc->ijc",
            g.reshape(len(g), -1, g.shape[-1]),
            x.reshape(len(x), -1, x.shape[-1]),
        ),
    )


def _run(layer, maps, upstreams, jit_compile=False):
    """Outputs, dL/dx of each input and dL/dalpha, of L = sum_i outputs_i * g_i."""
    dtype = layer.compute_dtype
    maps = [tf.constant(x, dtype) for x in maps]
    upstreams = [tf.constant(g, dtype) for g in upstreams]

    def step(maps, upstreams):
        with tf.GradientTape() as tape:
            tape.watch(maps)
            outputs = layer(maps)
        alpha = layer.alpha.value
        return outputs, tape.gradient(outputs, [maps, alpha], upstreams)

    if jit_compile:
        step = tf.function(step, jit_compile=True)
    outputs, (d_maps, d_alpha) = step(maps, upstreams)
    return np.stack(outputs), np.stack(d_maps), d_alpha.numpy()


def _channels_first(maps):
    return [np.moveaxis(x, -1, 1) for x in maps]


def _assert_all_close(actual, expected, **tolerance):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, **tolerance)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("per", ["channel", "layer"])
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_outputs_and_gradients_are_those_of_the_paper(tasks, per, shape, data_format):
    maps, upstreams = _maps(tasks, shape), _maps(tasks, shape, seed=7)
    layer = CrossStitch(per=per, data_format=data_format)
    as_given = _channels_first if data_format == "channels_first" else list
    layer.build([x.shape for x in as_given(maps)])
    alpha = _random_alpha(layer)

    outputs, d_maps, d_alpha = _run(layer, as_given(maps), as_given(upstreams))

    expected_outputs, expected_d_maps, expected_d_alpha = _reference(
        alpha, maps, upstreams
    )
    np.testing.assert_allclose(
        outputs, as_given(expected_outputs), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(d_maps, as_given(expected_d_maps), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_alpha, expected_d_alpha, rtol=1e-4, atol=1e-4)
    assert (np.abs(d_alpha) > 1e-5).all()


@pytest.mark.slow
@pytest.mark.parametrize("per", ["channel", "layer"])
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_gradients_are_the_finite_differences_of_the_outputs(tasks, per):
    shape = (2, 2)
    maps, upstreams = _maps(tasks, shape), np.stack(_maps(tasks, shape, seed=7))
    layer = CrossStitch(per=per, dtype="float64")
    layer.build([shape] * tasks)
    alpha = _random_alpha(layer)

    def loss(alpha, maps):
        layer.alpha.assign(alpha)
        return np.sum(np.stack(layer(list(maps))) * upstreams)

    def differences(f, at):
        slopes = np.empty_like(at)
        for index in np.ndindex(at.shape):
            step = np.zeros_like(at)
            step[index] = 1e-4
            slopes[index] = (f(at + step) - f(at - step)) / 2e-4
        return slopes

    _, d_maps, d_alpha = _run(layer, maps, upstreams)

    stacked = np.stack(maps)
    expected_d_maps = differences(lambda x: loss(alpha, x), stacked)
    expected_d_alpha = differences(lambda a: loss(a, stacked), alpha)
    np.testing.assert_allclose(d_maps, expected_d_maps, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(d_alpha, expected_d_alpha, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("per", ["channel", "layer"])
def test_compiling_with_xla_changes_nothing(per, dtype):
    maps, upstreams = _maps(3, (3, 5, 7, 4)), _maps(3, (3, 5, 7, 4), seed=7)
    layer = CrossStitch(per=per, dtype=dtype)
    layer.build([(3, 5, 7, 4)] * 3)
    _random_alpha(layer)

    plain = _run(layer, maps, upstreams)
    compiled = _run(layer, maps, upstreams, jit_compile=True)

    # XLA may keep sums of half-precision products in float32.
    rounding = {"float32": 1e-5, "mixed_float16": 4e-3, "mixed_bfloat16": 4e-2}[dtype]
    _assert_all_close(
        [x.astype("float32") for x in compiled],
        [x.astype("float32") for x in plain],
        rtol=rounding,
        atol=rounding,
    )


def test_a_gradient_passes_through_two_units_in_a_row():
    maps, upstreams = _maps(2, (3, 5)), _maps(2, (3, 5), seed=7)
    first, second = CrossStitch(dtype="float64"), CrossStitch(dtype="float64")
    for seed, layer in enumerate((first, second)):
        layer.build([(3, 5)] * 2)
        _random_alpha(layer, seed)
    a, b = np.array(first.alpha), np.array(second.alpha)

    with tf.GradientTape() as tape:
        outputs = second(first([tf.constant(x) for x in maps]))
    d_first = tape.gradient(
        outputs, first.alpha.value, [tf.constant(g) for g in upstreams]
    )

    mixed = np.einsum("ijc,jnc->inc", a, np.stack(maps))
    np.testing.assert_allclose(
        np.stack(outputs), np.einsum("ijc,jnc->inc", b, mixed), rtol=1e-12
    )
    _, d_mixed, _ = _reference(b, list(mixed), upstreams)
    np.testing.assert_allclose(
        d_first, _reference(a, maps, list(d_mixed))[2], rtol=1e-12
    )


def test_a_list_a_tuple_and_a_dict_come_out_as_they_went_in():
    a, b, c = (x.astype("float32") for x in _maps(3, (2, 5)))
    layer = CrossStitch(same_task=0.6)

    as_list, as_tuple = layer([a, b, c]), layer((a, b, c))
    as_dict = layer({"a": a, "b": b, "c": c})

    assert type(as_list) is list
    assert type(as_tuple) is tuple
    assert type(as_dict) is dict
    assert set(as_dict) == {"a", "b", "c"}
    _assert_all_close(as_tuple, as_list, rtol=0)
    _assert_all_close([as_dict[task] for task in "abc"], as_list, rtol=0)


def test_tasks_of_a_dict_stand_in_alpha_by_their_sorted_keys():
    x = {"normals": np.ones((1, 3), "f"), "depth": np.zeros((1, 3), "f")}
    layer = CrossStitch()
    layer.build({task: (1, 3) for task in x})
    layer.alpha.assign(np.reshape([1.0, 2.0, 3.0, 4.0], (2, 2, 1)) * np.ones(3))

    mixed = layer(x)

    # depth is task 0, so it takes alpha[0, 1] = 2 of normals' ones.
    np.testing.assert_array_equal(mixed["depth"], np.full((1, 3), 2.0))
    np.testing.assert_array_equal(mixed["normals"], np.full((1, 3), 4.0))
    assert layer.tasks == ("depth", "normals")


@pytest.mark.parametrize("structure", ["list", "dict"])
def test_batch_and_space_may_be_unknown_in_a_functional_model(structure):
    inputs = [keras.Input((None, None, 3), name=name) for name in ("a", "b")]
    unit = CrossStitch(name="unit")
    if structure == "dict":
        mixed = unit({"a": inputs[0], "b": inputs[1]})
        model = keras.Model(inputs, [mixed["a"], mixed["b"]])
    else:
        model = keras.Model(inputs, unit(inputs))
    alpha = _random_alpha(unit)
    assert [x.shape for x in model.outputs] == [(None, None, None, 3)] * 2

    for size in ((2, 5, 7, 3), (1, 3, 1, 3)):
        maps = _maps(2, size)
        outputs = model([x.astype("float32") for x in maps])
        np.testing.assert_allclose(
            np.stack(outputs), _reference(alpha, maps, maps)[0], rtol=1e-4, atol=1e-5
        )


def test_channels_may_be_unknown_per_layer():
    inputs = [keras.Input((7, None)), keras.Input((7, None))]

    model = keras.Model(inputs, CrossStitch(per="layer")(inputs))

    assert [x.shape for x in model.outputs] == [(None, 7, None)] * 2
    assert [x.shape for x in model([np.ones((2, 7, 3), "f")] * 2)] == [(2, 7, 3)] * 2


@pytest.mark.parametrize(
    ("shapes", "axis"),
    [
        ([(None, None, 8), (None, 1, 8)], 1),
        ([(None, 7, None, 8), (None, 7, 7, 8)], 2),
        ([(None, 4), (None, None)], 1),
        ([(None, None, 5, 8), (None, None, 5, 8), (None, 6, 5, 8)], 1),
    ],
)
def test_a_size_that_is_known_of_one_input_alone_is_an_error(shapes, axis):
    inputs = [keras.Input(batch_shape=shape) for shape in shapes]

    with pytest.raises(ValueError, match=rf"'mid'.*may differ.*axis {axis}"):
        CrossStitch(per="layer", name="mid")(inputs)


def test_the_batch_may_be_known_of_one_input_alone():
    CrossStitch()([keras.Input((3,)), keras.Input(batch_shape=(2, 3))])


def _of_any_size():
    """Two convolutions, a unit, and the mean over the map of each."""
    inputs = {task: keras.Input((None, None, 3), name=task) for task in "ab"}
    maps = {task: keras.layers.Conv2D(4, 3)(x) for task, x in inputs.items()}
    mixed = CrossStitch(name="cross_stitch_mid")(maps)
    pool = keras.layers.GlobalAveragePooling2D
    return keras.Model(inputs, {task: pool()(x) for task, x in mixed.items()})


# The maps of the last hold as many values as those of the other task.
@pytest.mark.parametrize("size", [(3, 3), (10, 3), (18, 4)])
@pytest.mark.parametrize("eager", [False, True])
def test_unequal_sizes_while_it_trains_are_an_error_that_names_the_unit(size, eager):
    model = _of_any_size()
    model.compile("sgd", "mse", run_eagerly=eager)
    images = {"a": np.ones((2, 10, 6, 3), "f"), "b": np.ones((2, 10, 6, 3), "f")}
    labels = {task: np.ones((2, 4), "f") for task in "ab"}
    model.fit(images, labels, verbose=0)

    images["b"] = np.ones((2, *size, 3), "f")
    with pytest.raises(
        (ValueError, tf.errors.InvalidArgumentError),
        match=r"(?s)cross_stitch_mid.*(one_size|one shape)",
    ):
        model.fit(images, labels, verbose=0)


def test_sizes_that_are_known_when_run_change_no_values():
    model = _of_any_size()
    alpha = _random_alpha(model.get_layer("cross_stitch_mid"))
    images = {task: np.random.default_rng(0).normal(size=(2, 9, 7, 3)) for task in "ab"}

    mixed = model.predict(images, verbose=0)

    convolutions = [x for x in model.layers if isinstance(x, keras.layers.Conv2D)]
    maps = [x(images[x.input.name]) for x in convolutions]
    expected = _reference(alpha, maps, maps)[0].mean(axis=(2, 3))
    np.testing.assert_allclose(mixed["a"], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed["b"], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_alpha_is_float32_in_a_layer_of_half_precision(policy):
    unit = CrossStitch(dtype=policy)

    mixed = unit([np.ones((2, 4), "f")] * 2)

    assert unit.alpha.dtype == "float32"
    assert mixed[0].dtype == policy


def test_alpha_is_told_from_other_variables_after_loading_and_cloning(tmp_path):
    inputs = [keras.Input((3,)), keras.Input((3,))]
    prelu = keras.layers.PReLU(name="prelu")
    model = keras.Model(inputs, prelu(CrossStitch(name="unit")(inputs)[0]))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    rebuilt = keras.Model.from_config(model.get_config())

    for one in (model, loaded, rebuilt, keras.models.clone_model(model)):
        marked = [
            v.path for v in one.variables if getattr(v, "is_cross_stitch_alpha", False)
        ]
        assert marked == ["unit/alpha"]


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("per", ["channel", "layer"])
def test_alpha_and_its_gradient_are_float32_under_mixed_precision(per, half):
    maps, upstreams = _maps(2, (3, 5, 7, 4)), _maps(2, (3, 5, 7, 4), seed=7)
    layer = CrossStitch(per=per, dtype=f"mixed_{half}")
    layer.build([(3, 5, 7, 4)] * 2)
    alpha = _random_alpha(layer)

    outputs, d_maps, d_alpha = _run(layer, maps, upstreams)

    assert layer.alpha.dtype == "float32"
    assert outputs.dtype == d_maps.dtype == half
    assert d_alpha.dtype == "float32"
    rounding = {"float16": 1e-2, "bfloat16": 1e-1}[half]
    _assert_all_close(
        [x.astype("float64") for x in (outputs, d_maps, d_alpha)],
        _reference(alpha, maps, upstreams),
        rtol=rounding,
        atol=rounding,
    )


@pytest.mark.parametrize("per", ["channel", "layer"])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_the_gradient_of_alpha_is_summed_in_float32(half, per):
    # Given 150 * 150 products of 8: a float16 sum overflows at 65 504, and a
    # bfloat16 sum in order stops growing at 2 048.
    shape = (1, 150, 150, 1)
    layer = CrossStitch(per=per, dtype=f"mixed_{half}")
    layer.build([shape] * 2)

    _, _, d_alpha = _run(layer, [np.full(shape, 4.0)] * 2, [np.full(shape, 2.0)] * 2)

    np.testing.assert_allclose(d_alpha, np.full(d_alpha.shape, 180_000.0), rtol=1e-5)


def test_the_products_in_the_gradient_of_alpha_are_float32():
    # Given products of 90 000, above float16's 65 504.
    layer = CrossStitch(dtype="mixed_float16")
    layer.build([(1, 3)] * 2)

    _, _, d_alpha = _run(
        layer, [np.full((1, 3), 300.0)] * 2, [np.full((1, 3), 300.0)] * 2
    )

    np.testing.assert_allclose(d_alpha, np.full((2, 2, 3), 90_000.0))


@pytest.mark.parametrize("same_task", [0.1, 0.5, 0.7, 0.9, 1, 1.5])
@pytest.mark.parametrize("per", ["channel", "layer"])
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_rows_of_alpha_start_at_same_task_and_sum_to_1(tasks, per, same_task):
    layer = CrossStitch(per=per, same_task=same_task)

    layer.build([(None, 5, 3)] * tasks)

    alpha = np.array(layer.alpha)
    assert alpha.shape == {"channel": (tasks, tasks, 3), "layer": (tasks, tasks)}[per]
    different_task = (1 - same_task) / (tasks - 1)
    for i, j in np.ndindex(tasks, tasks):
        expected = same_task if i == j else different_task
        np.testing.assert_allclose(alpha[i, j], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(alpha.sum(axis=1), 1.0, rtol=1e-6)


def test_identity_alpha_gives_the_inputs_bit_for_bit():
    maps = [x.astype("float32") for x in _maps(3, (3, 5, 7, 4))]

    mixed = CrossStitch(same_task=1.0)(maps)

    _assert_all_close(mixed, maps, rtol=0)


def test_an_initializer_takes_the_place_of_same_task():
    layer = CrossStitch(alpha_initializer=keras.initializers.Constant(0.3))

    layer.build([(None, 4)] * 2)

    np.testing.assert_allclose(layer.alpha, np.full((2, 2, 4), 0.3), rtol=1e-6)


@pytest.mark.parametrize("per", ["channel", "layer"])
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_the_identity_initializer_is_that_of_every_channel(tasks, per):
    layer = CrossStitch(per=per, alpha_initializer="identity")
    halves = CrossStitch(per=per, alpha_initializer=keras.initializers.Identity(0.5))

    for unit in (layer, CrossStitch.from_config(layer.get_config()), halves):
        unit.build([(None, 7, 4)] * tasks)

    identity = np.eye(tasks).reshape(
        (tasks, tasks, 1) if per == "channel" else (tasks,) * 2
    )
    shape = (tasks, tasks, 4) if per == "channel" else (tasks, tasks)
    expected = identity * np.ones(shape)
    np.testing.assert_array_equal(layer.alpha, expected)
    np.testing.assert_array_equal(unit.alpha, expected / 2)


def test_the_identity_initializer_is_serialized(tmp_path):
    inputs = [keras.Input((3,)), keras.Input((3,))]
    unit = CrossStitch(alpha_initializer="identity", name="unit")
    model = keras.Model(inputs, unit(inputs))
    _random_alpha(unit)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").get_layer("unit")

    assert isinstance(loaded.alpha_initializer, keras.initializers.Identity)
    np.testing.assert_array_equal(loaded.alpha, unit.alpha)


def test_an_initializer_that_does_not_fit_is_kerass_error():
    too_few = np.zeros((2, 2, 3))

    with pytest.raises(ValueError, match="shape"):
        CrossStitch(alpha_initializer=too_few).build([(None, 4)] * 2)


def test_a_regularizer_adds_its_loss_of_alpha():
    layer = CrossStitch(per="layer", alpha_regularizer=keras.regularizers.L2(0.5))

    layer([np.ones((1, 4), "f")] * 2)

    # 0.5 * (2 * 0.9^2 + 2 * 0.1^2)
    np.testing.assert_allclose(sum(layer.losses), 0.82, rtol=1e-6)


def test_a_constraint_holds_after_a_step():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    unit = CrossStitch(same_task=0.1, alpha_constraint="non_neg")
    model = keras.Model(inputs, unit(inputs))
    model.compile(keras.optimizers.SGD(1.0), loss=["mse", "mse"])
    ones = np.ones((2, 3), "f")

    model.fit([ones, ones], [-ones, -ones], verbose=0)

    assert np.array(unit.alpha).min() == 0.0


@pytest.mark.parametrize("per", ["channel", "layer"])
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_units_of_own_maps_scale_and_share_nothing(tmp_path, per, tasks):
    random = np.random.default_rng(tasks)
    inputs = {task: keras.Input((5, 3), name=task) for task in "abcde"[:tasks]}
    unit = CrossStitch(per, 1.0, alpha_constraint=OwnMapsOnly(), name="unit")
    model = keras.Model(inputs, unit(inputs))
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(LearningRateGroups(optimizer, alpha=2), dict.fromkeys(inputs, "mse"))
    x, y = (
        {task: random.normal(size=(7, 5, 3)).astype("f") for task in inputs}
        for _ in range(2)
    )

    model.fit(x, y, epochs=4, batch_size=3, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.fit(x, y, batch_size=3, verbose=0)

    alpha = keras.ops.convert_to_numpy(loaded.get_layer("unit").alpha)
    assert isinstance(loaded.get_layer("unit").alpha_constraint, OwnMapsOnly)
    for i in range(tasks):
        for j in range(tasks):
            assert np.all(alpha[i, j] == 0) == (i != j)
    assert not np.allclose(alpha[0, 0], 1, atol=1e-3)
    answers = loaded.predict(x, verbose=0)
    for i, task in enumerate(inputs):
        expected = alpha[i, i].astype("float64") * x[task]
        np.testing.assert_allclose(answers[task], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_alpha_is_trained():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    unit = CrossStitch()
    model = keras.Model(inputs, unit(inputs))
    model.compile(keras.optimizers.SGD(0.2), loss=["mse", "mse"])
    a, b = (x.astype("float32") for x in _maps(2, (64, 3)))

    # Given targets that are the other task's map.
    model.fit([a, b], [b, a], epochs=30, batch_size=64, verbose=0)

    swap = np.repeat([[[0.0], [1.0]], [[1.0], [0.0]]], 3, axis=-1)
    np.testing.assert_allclose(unit.alpha, swap, atol=0.05)


def test_the_config_holds_every_argument():
    layer = CrossStitch(
        per="layer",
        same_task=0.7,
        alpha_initializer=keras.initializers.RandomNormal(0.5, 0.1, seed=3),
        alpha_regularizer=keras.regularizers.L1(0.01),
        alpha_constraint="non_neg",
        data_format="channels_first",
        name="unit",
        dtype="mixed_bfloat16",
    )

    copy = CrossStitch.from_config(layer.get_config())

    assert copy.get_config() == layer.get_config()
    assert (copy.per, copy.same_task, copy.name) == ("layer", 0.7, "unit")
    assert copy.data_format == "channels_first"
    assert copy.alpha_initializer.mean == 0.5
    assert copy.alpha_regularizer.l1 == 0.01
    assert isinstance(copy.alpha_constraint, keras.constraints.NonNeg)
    assert copy.dtype_policy.name == "mixed_bfloat16"


@pytest.mark.parametrize("structure", ["list", "dict"])
@pytest.mark.parametrize("per", ["channel", "layer"])
def test_a_saved_model_loads_with_its_alpha(tmp_path, per, structure):
    inputs = [keras.Input((None, 5, 3), name=name) for name in ("a", "b")]
    unit = CrossStitch(
        per=per, alpha_initializer="he_normal", alpha_regularizer="l2", name="unit"
    )
    named = {"a": inputs[0], "b": inputs[1]}
    model = keras.Model(inputs, unit(named if structure == "dict" else inputs))
    _random_alpha(unit)
    maps = [x.astype("float32") for x in _maps(2, (2, 3, 5, 3))]

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")

    np.testing.assert_array_equal(loaded.get_layer("unit").alpha, unit.alpha)
    before, after = (keras.tree.flatten(m(maps)) for m in (model, loaded))
    _assert_all_close(after, before, rtol=0)


def test_a_saved_model_with_the_default_alpha_loads(tmp_path):
    inputs = [keras.Input((3,)), keras.Input((3,))]
    model = keras.Model(inputs, CrossStitch(same_task=0.75, name="unit")(inputs))

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")

    assert loaded.get_layer("unit").alpha_initializer is None
    assert loaded.get_layer("unit").same_task == 0.75


def test_a_saved_model_for_serving_gives_the_same(tmp_path):
    inputs = [keras.Input((None, None, 3), name=name) for name in ("a", "b")]
    unit = CrossStitch()
    mixed = unit({"a": inputs[0], "b": inputs[1]})
    model = keras.Model(inputs, mixed)
    alpha = _random_alpha(unit)
    maps = _maps(2, (2, 5, 3, 3))

    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    outputs = served.serve([tf.constant(x, "float32") for x in maps])

    expected = _reference(alpha, maps, maps)[0]
    _assert_all_close([outputs["a"], outputs["b"]], expected, rtol=1e-4, atol=1e-5)


def test_masks_pass_through():
    words = np.array([[1, 2, 0, 0], [3, 4, 5, 0]])
    a, b = (keras.layers.Embedding(7, 3, mask_zero=True)(words) for _ in range(2))

    mixed = CrossStitch()([a, b])

    for x in mixed:
        np.testing.assert_array_equal(x._keras_mask, words != 0)


def test_masks_pass_through_a_dict_in_a_functional_model():
    words = keras.Input((4,), dtype="int32")
    embedded = {
        task: keras.layers.Embedding(7, 3, mask_zero=True)(words) for task in ("a", "b")
    }
    mixed = CrossStitch(same_task=1.0)(embedded)
    lstm = keras.layers.LSTM(2)
    model = keras.Model(words, [lstm(embedded["a"]), lstm(mixed["a"])])

    # A mask that is lost lets the padding into the LSTM's state.
    without, with_unit = model(np.array([[1, 2, 0, 0], [3, 4, 5, 0]]))

    np.testing.assert_allclose(with_unit, without, rtol=1e-5)


def _shapes(*shapes):
    return [np.zeros(shape, "f") for shape in shapes]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (_shapes((2, 3)), "at least two tensors.*Received one.*2, 3"),
        ({"a": np.zeros((2, 3), "f")}, "at least two tensors.*'a'.*2, 3"),
        (np.zeros((2, 3), "f"), r"list, tuple or dict.*Received: \(2, 3\)"),
        ([], "at least two tensors"),
        (_shapes((2, 3), (2, 4)), r"one shape.*\{0: \(2, 3\), 1: \(2, 4\)\}"),
        (
            {"a": np.zeros((2, 3), "f"), "b": np.zeros((2, 4), "f")},
            r"one shape.*\{'a': \(2, 3\), 'b': \(2, 4\)\}",
        ),
        (_shapes((8, 5), (8, 8, 8, 5)), r"one shape.*1: \(8, 8, 8, 5\)"),
        (_shapes((5, 5), (5, 5, 5, 5)), r"one shape.*1: \(5, 5, 5, 5\)"),
        (_shapes((2, 8, 8, 5), (2, 1, 1, 5)), r"one shape.*1: \(2, 1, 1, 5\)"),
        (_shapes((2, 8, 8, 5), (2, 8, 8, 1)), r"one shape.*1: \(2, 8, 8, 1\)"),
        (_shapes((2, 8, 8, 5), (1, 8, 8, 5)), r"one shape.*1: \(1, 8, 8, 5\)"),
        (_shapes((2, 3), (2, 3), (2, 1)), r"one shape.*2: \(2, 1\)"),
        (
            {"a": np.zeros((2, 3), "int32"), "b": np.zeros((2, 3), "f")},
            r"maps of floats.*\{'a': 'int32', 'b': 'float32'\}",
        ),
        (_shapes((1,), (1,)), r"rank 2, \(N, C\), to 5.*\(1,\)"),
        (_shapes((1,) * 6, (1,) * 6), r"rank 2, \(N, C\), to 5.*1, 1, 1, 1, 1, 1"),
    ],
)
def test_inputs_that_cannot_be_mixed_are_an_error(inputs, words):
    with pytest.raises(ValueError, match=words):
        CrossStitch()(inputs)


@pytest.mark.parametrize(
    ("later", "words"),
    [
        (_shapes((2, 8, 8, 5), (2, 1, 1, 5)), "'unit'.*one shape"),
        (_shapes((5, 5), (5, 5, 5, 5)), "one shape"),
        (_shapes((2, 8, 8, 1), (2, 8, 8, 1)), r"(?s)axis -1.*5.*\(2, 8, 8, 1\)"),
        (_shapes(*[(2, 8, 8, 5)] * 3), r"expects 2 input\(s\).*3 input tensors"),
    ],
)
def test_a_later_call_with_other_shapes_is_an_error(later, words):
    unit = CrossStitch(name="unit")
    unit(_shapes((2, 8, 8, 5), (2, 8, 8, 5)))

    with pytest.raises(ValueError, match=words):
        unit(later)


def test_integers_are_refused_when_they_are_joined():
    with pytest.raises(ValueError, match="maps of floats"):
        CrossStitch()([keras.Input((3,), dtype="int32")] * 2)


def test_same_task_of_numpy_is_saved():
    unit = CrossStitch(same_task=np.linspace(0, 1, 5, dtype="f")[3])
    assert json.loads(json.dumps(unit.get_config()["same_task"])) == 0.75


def test_a_named_tuple_stays_one():
    Pair = collections.namedtuple("Pair", ["depth", "kind"])
    mixed = CrossStitch(same_task=0.5)(Pair(np.zeros((2, 3), "f"), np.ones((2, 3))))
    assert isinstance(mixed, Pair)
    np.testing.assert_allclose(mixed.depth, 0.5)


def test_four_tasks_do_not_fit_the_alpha_of_two():
    # Given 2 * 2 * 4 weights, which are as many as 4 * 4 * 1.
    unit = CrossStitch()
    unit(_shapes((2, 4), (2, 4)))

    with pytest.raises(ValueError, match=r"expects 2 input\(s\).*4 input tensors"):
        unit(_shapes(*[(2, 4)] * 4))


def test_unknown_channels_per_channel_are_an_error():
    inputs = [keras.Input((7, None)), keras.Input((7, None))]

    with pytest.raises(ValueError, match=r"known number of channels.*per='layer'"):
        CrossStitch()(inputs)


def test_unknown_channels_that_stand_first_are_an_error():
    inputs = [keras.Input((None, 7)), keras.Input((None, 7))]

    with pytest.raises(ValueError, match=r"known number of channels.*channels_first"):
        CrossStitch(data_format="channels_first")(inputs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"per": "pixel"}, "`per` must be 'channel' or 'layer'.*'pixel'"),
        ({"per": None}, "`per` must be .*None"),
        ({"data_format": "NCHW"}, "`data_format` must be 'channels_last'.*'NCHW'"),
        ({"same_task": "0.9"}, "`same_task` must be a number.*'0.9'"),
        ({"same_task": True}, "`same_task` must be a number.*True"),
    ],
)
def test_bad_arguments_are_an_error(arguments, words):
    with pytest.raises(ValueError, match=words):
        CrossStitch(**arguments)


# Run in a process of its own, since a process has one Keras backend.
RUN = {
    "jax": """
import jax

def run(layer, alpha, maps, upstreams):
    def loss(alpha, maps):
        outputs, _ = layer.stateless_call([alpha], [], list(maps))
        return sum((o * u).sum() for o, u in zip(outputs, upstreams)), outputs

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, outputs), (d_alpha, d_maps) = gradient(alpha, tuple(maps))
    return outputs, d_maps, d_alpha
""",
    "torch": """
import torch

def run(layer, alpha, maps, upstreams):
    layer.alpha.assign(alpha)
    maps = [torch.tensor(x, requires_grad=True) for x in maps]
    outputs = layer(maps)
    sum((o * torch.tensor(u)).sum() for o, u in zip(outputs, upstreams)).backward()
    gradients = [x.grad for x in maps], layer.alpha.value.grad
    return [o.detach() for o in outputs], *gradients
""",
}
COMPARE = """
import keras, numpy as np
from keras_cross_stitch import CrossStitch

rng = np.random.default_rng(0)
for per, tasks, shape, forward in (
    ("channel", 2, (3, 5), "ijc,jnc->inc"),
    ("channel", 3, (2, 5, 3, 4), "ijc,jnhwc->inhwc"),
    ("layer", 5, (2, 3, 1), "ij,jnlc->inlc"),
):
    x, g = rng.normal(size=(2, tasks, *shape)).astype("float32")
    layer = CrossStitch(per=per)
    layer.build([shape] * tasks)
    alpha = rng.normal(size=layer.alpha.shape).astype("float32")

    outputs, d_x, d_alpha = run(layer, alpha, x, g)

    inputs, given = forward.split("->")
    weights, taken = inputs.split(",")
    exact = [array.astype("float64") for array in (alpha, x, g)]
    for actual, expected in (
        (outputs, np.einsum(forward, exact[0], exact[1])),
        (d_x, np.einsum(f"{weights},{given}->{taken}", exact[0], exact[2])),
        (d_alpha, np.einsum(f"{given},{taken}->{weights}", exact[2], exact[1])),
    ):
        np.testing.assert_allclose(np.array(actual), expected, rtol=1e-4, atol=1e-4)
print(keras.backend.backend())
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_give_the_same(backend):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"needs {backend}, which is not installed")
    run = subprocess.run(
        [sys.executable, "-c", RUN[backend] + COMPARE],
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )

    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == backend


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("per", ["channel", "layer"])
def test_as_constants_is_the_same_mix_without_what_is_left_out(per, data_format):
    rng = np.random.default_rng(0)
    maps = {task: rng.normal(size=(2, 3, 5, 7)) for task in "bca"}
    unit = CrossStitch(per, data_format=data_format)
    mixed = unit(maps)
    unit.alpha.assign(rng.normal(size=unit.alpha.shape))
    mixed = unit(maps)
    for task, value in unit.as_constants(maps).items():
        np.testing.assert_allclose(value, mixed[task], rtol=1e-5, atol=1e-5)

    alpha = np.array(unit.alpha, "float64")
    alpha[0, 1] = alpha[2, 0] = alpha[2, 1] = 0
    if per == "channel":
        shape = (7,) if data_format == "channels_last" else (3, 1, 1)
        alpha = alpha.reshape(3, 3, *shape)
    without = unit.as_constants(maps, [(0, 1), (2, 0), (2, 1)])
    for i, task in enumerate("abc"):
        expected = sum(alpha[i, j] * maps[source] for j, source in enumerate("abc"))
        np.testing.assert_allclose(without[task], expected, rtol=1e-5, atol=1e-5)
    assert isinstance(unit.as_constants([*maps.values()]), list)


def test_as_constants_has_the_dtype_of_the_layer():
    unit = CrossStitch(dtype="mixed_float16")
    maps = [x.astype("float32") for x in _maps(2, (3, 4))]
    mixed = unit(maps)
    for constant, x in zip(unit.as_constants(maps), mixed, strict=True):
        assert constant.dtype == x.dtype
