"""Units between maps of other channels and sizes, against NumPy and the towers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_cross_stitch import CrossStitch, alpha_table, export_saved_model, stitch
from keras_cross_stitch.projecting import ProjectedCrossStitch


def maps_of(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        task: rng.normal(size=shape).astype("float32")
        for task, shape in zip("abc", shapes, strict=False)
    }


def distinct(layer, seed=1):
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))
    return layer


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 4), (3, 7)],
        [(2, 5, 4), (2, 5, 3)],
        [(2, 5, 7, 4), (2, 5, 7, 6), (2, 5, 7, 1)],
        [(2, 3, 4, 5, 2), (2, 3, 4, 5, 3)],
    ],
)
def test_other_channels_are_projected_and_weighed_by_alpha(shapes):
    maps = maps_of(*shapes)
    unit = ProjectedCrossStitch(name="unit")
    unit(maps)
    distinct(unit)

    mixed = unit(maps)

    alpha = np.array(unit.alpha)
    assert alpha.shape == (len(maps), len(maps))
    for i, task in enumerate(maps):
        expected = alpha[i, i] * maps[task].astype("float64")
        for j, source in enumerate(maps):
            if i != j:
                kernel, bias = unit.projections[f"{task}_from_{source}"].get_weights()
                kernel = kernel.reshape(kernel.shape[-2:])
                expected += alpha[i, j] * (maps[source] @ kernel + bias)
        np.testing.assert_allclose(mixed[task], expected, rtol=1e-4, atol=1e-4)


# An image of one colour a row or column, of which a linear resize is known.
@pytest.mark.parametrize(
    ("rank", "axis"), [(3, 1), (4, 1), (4, 2), (5, 1), (5, 2), (5, 3)]
)
@pytest.mark.parametrize(("size", "other"), [(4, 8), (6, 3)])
def test_other_sizes_are_resized_linearly(axis, size, other, rank):
    shape, to = [2, *[4] * (rank - 2), 3], [2, *[4] * (rank - 2), 3]
    shape[axis], to[axis] = size, other
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, size, 3)).astype("float32")
    wide = x.reshape([2] + [size if n == axis else 1 for n in range(1, rank - 1)] + [3])
    maps = {"a": np.zeros(to, "f"), "b": np.broadcast_to(wide, shape).copy()}
    unit = ProjectedCrossStitch(per="channel", same_task=0.0)
    unit(maps)

    taken = np.moveaxis(ops.convert_to_numpy(unit(maps)["a"]), axis, 1)

    column = ops.image.resize(x[:, :, None], (other, 1), antialias=True)[:, :, 0]
    kernel, bias = unit.projections["a_from_b"].get_weights()
    expected = ops.convert_to_numpy(column) @ kernel.reshape(3, 3) + bias
    expected = expected.reshape(2, other, *[1] * (rank - 3), 3)
    np.testing.assert_allclose(
        taken, np.broadcast_to(expected, taken.shape), rtol=1e-4, atol=1e-5
    )
    assert unit.alpha.shape == (2, 2, 3)


def test_the_gradients_are_those_of_differences():
    maps = maps_of((2, 3, 5, 2), (2, 4, 2, 3))
    maps = {task: x.astype("float64") for task, x in maps.items()}
    unit = ProjectedCrossStitch(dtype="float64")
    unit(maps)
    distinct(unit)

    def loss():
        mixed = unit(maps)
        return ops.sum(mixed["a"] ** 2) + ops.sum(ops.sin(mixed["b"]))

    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, [v.value for v in unit.trainable_weights])

    rng = np.random.default_rng(3)
    for variable, gradient in zip(unit.trainable_weights, gradients, strict=True):
        along = rng.normal(size=variable.shape)
        before = np.array(variable)
        variable.assign(before + 1e-5 * along)
        above = float(loss())
        variable.assign(before - 1e-5 * along)
        below = float(loss())
        variable.assign(before)
        np.testing.assert_allclose(
            np.sum(gradient * along), (above - below) / 2e-5, rtol=1e-5, atol=1e-6
        )


# In towers


def tower(channels, strides, outputs, seed):
    keras.utils.set_random_seed(seed)
    x = image = keras.Input((16, 12, 3), name="image")
    for n, (units, stride) in enumerate(zip(channels, strides, strict=True), 1):
        x = layers.Conv2D(
            units, 3, stride, padding="same", activation="relu", name=f"conv{n}"
        )(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, layers.Dense(outputs, name="score")(x))


def towers():
    return {
        "kind": tower([4, 6, 8], [1, 2, 2], 5, seed=0),
        "age": tower([3, 6, 7], [2, 1, 1], 1, seed=1),
        "size": tower([4, 6, 8], [1, 2, 1], 2, seed=2),
    }


AT = ["conv1", "conv2", "conv3", "pool"]
IMAGES = np.random.default_rng(0).uniform(size=(3, 16, 12, 3)).astype("float32")


def assert_as_apart(model, towers):
    together = model(IMAGES)
    for task, one in towers.items():
        expected = ops.convert_to_numpy(one(IMAGES))
        np.testing.assert_array_equal(together[task], expected)
        assert expected.std() > 0


def test_with_identity_alpha_the_towers_are_as_apart_bit_for_bit():
    apart = towers()

    model = stitch(apart, AT, project=True, same_task=1.0)

    assert_as_apart(model, apart)
    mixed = stitch(apart, AT, project=True, same_task=0.5)(IMAGES)
    for task, one in apart.items():
        assert np.abs(mixed[task] - one(IMAGES)).max() > 1e-3


def test_where_shapes_are_equal_the_unit_is_the_same():
    alike = {task: tower([4, 6], [1, 1], 2, seed) for seed, task in enumerate("ab")}

    model = stitch(alike, ["conv1"], project=True)

    assert type(model.get_layer("cross_stitch_conv1")) is CrossStitch


def test_projections_are_trained_saved_and_marked(tmp_path):
    model = stitch(towers(), AT, project=True, per="channel")
    model.compile(keras.optimizers.SGD(0.1), loss="mse", run_eagerly=True)
    labels = {"kind": np.ones((3, 5)), "age": np.ones((3, 1)), "size": np.ones((3, 2))}
    before = {v.path: v.numpy() for v in model.trainable_variables}
    model.fit(IMAGES, labels, verbose=0)
    unmoved = [
        v.path
        for v in model.trainable_variables
        if "_from_" in v.path and np.array_equal(v.numpy(), before[v.path])
    ]
    assert unmoved == []

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")

    for task, output in model(IMAGES).items():
        np.testing.assert_array_equal(loaded(IMAGES)[task], output)
    for one in (model, loaded, keras.models.clone_model(model)):
        marked = {
            v.path
            for v in one.variables
            if getattr(v, "is_cross_stitch_projection", False)
        }
        # Six pairs at each of three taps, with a kernel and a bias; maps of conv2 are
        # equal.
        assert len(marked) == 3 * 6 * 2
        assert all("_from_" in path for path in marked)
        assert "cross_stitch_conv1/cross_stitch_conv1_kind_from_age/kernel" in marked
    # Where all have the same channels, alpha is per channel.
    assert model.get_layer("cross_stitch_conv2").alpha.shape == (3, 3, 6)
    assert model.get_layer("cross_stitch_conv1").alpha.shape == (3, 3)
    assert {row["unit"] for row in alpha_table(model)} == {
        f"cross_stitch_{name}" for name in AT
    }


def test_projections_are_served(tmp_path):
    model = stitch(towers(), AT[:1], project=True)

    path = export_saved_model(model, tmp_path)

    served = tf.saved_model.load(str(path)).signatures["age"](image=IMAGES)["age"]
    np.testing.assert_allclose(served, model(IMAGES)["age"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_projections_of_vectors_are_quantized_saved_and_served(mode, tmp_path):
    model = stitch(towers(), [*AT[:1], "pool"], project=True)
    images = np.repeat(IMAGES, 2, axis=0)
    before = model(images)
    model.quantize(mode)

    outputs = model(images)
    for unit, quantized in (("conv1", None), ("pool", mode)):
        layer = model.get_layer(f"cross_stitch_{unit}")
        modes = {x.quantization_mode for x in layer.projections.values()}
        assert modes == {quantized}
        assert layer.alpha.dtype == "float32"
    for task in outputs:
        assert 0 < np.abs(outputs[task] - before[task]).max() < 0.2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (loaded, cloned(loaded)):
        for task, output in one(images).items():
            np.testing.assert_allclose(output, outputs[task], rtol=1e-5, atol=1e-6)
    path = export_saved_model(loaded, tmp_path / "served")
    served = tf.saved_model.load(str(path)).signatures["age"](image=images)["age"]
    np.testing.assert_allclose(served, outputs["age"], rtol=1e-4, atol=1e-5)


def cloned(model):
    """A copy by Keras, with the weights."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def test_towers_that_are_quantized_are_projected_to_each_other():
    apart = {task: tower([4], [1], n, seed=n) for n, task in enumerate("abc", 1)}
    apart["c"] = tower([5], [2], 3, seed=3)
    for one in apart.values():
        with pytest.warns(UserWarning, match="does not have a `quantize`"):
            one.quantize("int8")

    model = stitch(apart, ["conv1", "pool"], project=True, same_task=1.0)

    assert_as_apart(model, apart)
    for projection in model.get_layer("cross_stitch_pool").projections.values():
        assert projection.dtype_policy.name == "float32"


def test_links_of_projections_are_left_out():
    model = stitch(
        {t: x for t, x in towers().items() if t != "size"},
        ["conv1"],
        project=True,
        same_task=0.7,
    )
    unit = model.get_layer("cross_stitch_conv1")
    maps = {
        task: keras.Input(model.get_layer(f"{task}_conv1").output.shape[1:], name=task)
        for task in ("kind", "age")
    }
    mixed = keras.Model(maps, unit.as_constants(maps, leave_out=[(0, 1)]))
    data = {
        task: np.random.default_rng(0).normal(size=(2, *x.shape[1:])).astype("f")
        for task, x in maps.items()
    }

    got, whole = mixed(data), unit(data)

    # Sorted, "age" is task 0.
    np.testing.assert_allclose(got["age"], 0.7 * data["age"], rtol=1e-5)
    np.testing.assert_allclose(got["kind"], whole["kind"], rtol=1e-4, atol=1e-5)


def test_links_cannot_be_left_out_where_sizes_are_unknown():
    unit = ProjectedCrossStitch(name="unit")
    unit(maps_of((1, 5, 4), (1, 3, 2)))
    maps = {task: keras.Input((None, n)) for task, n in (("a", 4), ("b", 2))}

    with pytest.raises(ValueError, match=r"'unit' resizes.* give the model's inputs"):
        unit.as_constants(maps, leave_out=[(0, 1)])


def test_sizes_that_are_known_when_run_are_resized():
    def build(strides, outputs):
        image = keras.Input((None, None, 3), name="image")
        x = layers.Conv2D(4, 3, strides, name="conv")(image)
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(image, layers.Dense(outputs, name="score")(x))

    apart = {"kind": build(1, 2), "age": build(2, 3)}
    model = stitch(apart, ["conv"], project=True, same_task=1.0)

    assert_as_apart(model, apart)
    model.compile("sgd", "mse")
    model.fit(IMAGES, {"kind": np.ones((3, 2)), "age": np.ones((3, 3))}, verbose=0)


def test_sequences_of_any_length_are_served(tmp_path):
    def build(units):
        words = keras.Input((None,), dtype="int32", name="words")
        x = layers.Embedding(9, units, name="embedding")(words)
        x = layers.Conv1D(units, 3, padding="same", name="conv")(x)
        return keras.Model(words, layers.Dense(2, name="score")(x))

    model = stitch({"a": build(4), "b": build(6)}, ["conv"], project=True)
    words = np.random.default_rng(0).integers(0, 9, (3, 7)).astype("int32")

    path = export_saved_model(model, tmp_path)

    served = tf.saved_model.load(str(path)).signatures["a"](words=words)["a"]
    np.testing.assert_allclose(served, model(words)["a"], rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_alpha_in_float32():
    unit = ProjectedCrossStitch(dtype="mixed_bfloat16")

    mixed = unit(maps_of((2, 5, 7, 4), (2, 3, 4, 6)))

    assert unit.alpha.dtype == "float32"
    assert mixed["a"].dtype == mixed["b"].dtype == "bfloat16"
    assert unit.projections["a_from_b"].kernel.dtype == "float32"


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(None, 4, 4, 3), (None, 3)], r"other ranks.*\(None, 4, 4, 3\)"),
        ([(None, 4, None), (None, 4, 3)], r"unknown number of channels"),
    ],
)
def test_maps_that_cannot_be_projected_are_an_error(shapes, words):
    inputs = {t: keras.Input(s[1:]) for t, s in zip("ab", shapes, strict=True)}

    with pytest.raises(ValueError, match=words):
        ProjectedCrossStitch()(inputs)


def test_taps_that_cannot_be_projected_name_towers_layers_and_which_would_do():
    words = (
        r"At the tap 'conv1'.*other ranks.*Tapped are 'conv1' of the tower of 'kind', "
        r"'pool' of the tower of 'age'\. Layers of the rank of the first, "
        r"\(16, 12, 4\), are, in the tower of 'age': \['conv1', 'conv2', 'conv3'\]$"
    )
    apart = {task: one for task, one in towers().items() if task != "size"}

    with pytest.raises(ValueError, match=words):
        stitch(apart, [{"kind": "conv1", "age": "pool"}], project=True)


def test_a_tower_may_have_values_without_axes_beside_its_maps():
    def tower(units):
        x = keras.Input((7,), name="x")
        y = keras.layers.Dense(5, name="first")(x)
        y = y / keras.ops.max(keras.ops.abs(y))
        return keras.Model(x, keras.layers.Dense(units, name="score")(y))

    image = keras.Input((7,), name="x")
    maps = keras.layers.Reshape((7, 1), name="maps")(image)
    other = keras.Model(image, keras.layers.Flatten()(maps))

    towers = {"a": tower(2), "b": tower(3), "c": other}

    with pytest.raises(ValueError, match=r"tower of 'b': \['first', .*'score'\]; 'c'"):
        stitch(towers, [{"a": "first", "b": "first", "c": "maps"}], project=True)


@pytest.mark.parametrize(("tap", "helps"), [("conv1", True), ("pool", False)])
def test_projection_is_a_remedy_where_it_helps(tap, helps):
    with pytest.raises(ValueError, match="Tapped are") as caught:
        stitch(towers(), [{"kind": "conv1", "age": tap}])

    assert ("stitch(..., project=True)" in str(caught.value)) == helps
