"""Towers joined into one model: what it computes, holds, and leaves alone."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_cross_stitch import CrossStitch, alexnet, fcn_alexnet, split, stitch
from keras_cross_stitch.opening import check_task_names

FCN_TAPS = ["pool1", "pool2", "pool5", "fc6", "fc7"]


# Towers


def _fcn(outputs, size=(33, 65), **arguments):
    return fcn_alexnet(outputs, (*size, 3), width=0.02, **arguments)


def _alexnet(outputs):
    return alexnet(outputs, (67, 67, 3), width=0.02)


def _dense_tower(outputs, *, units=4, prefix="", name=None):
    """x -> one -> two -> score, without activations: three matrices."""
    x = inputs = keras.Input((5,), name="features")
    for layer, size in (("one", units), ("two", units), ("score", outputs)):
        x = layers.Dense(size, name=prefix + layer)(x)
    return keras.Model(inputs, x, name=name)


def _sequential(outputs):
    return keras.Sequential(
        [
            keras.Input((9, 7, 3), name="image"),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Dense(outputs, name="score"),
        ]
    )


def _unet(outputs):
    """Its skips go round the tap `bottom`, and start at the tap `down`."""
    image = keras.Input((12, 8, 3), name="image")
    down = layers.Conv2D(3, 3, padding="same", activation="relu", name="down")(image)
    pooled = layers.MaxPooling2D(name="pooled")(down)
    bottom = layers.Conv2D(6, 3, padding="same", activation="relu", name="bottom")
    up = layers.UpSampling2D(name="up")(bottom(pooled))
    merged = layers.Concatenate(name="merged")([up, down])
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="merge")(merged)
    return keras.Model(image, layers.Conv2D(outputs, 1, name="score")(x))


def _application(build, last, **arguments):
    """A model of keras.applications as far as one layer, with a head for a task."""
    backbone = build(
        input_shape=(32, 32, 3), include_top=False, weights=None, **arguments
    )
    x = layers.GlobalAveragePooling2D(name="pooled")(backbone.get_layer(last).output)
    return keras.Model(backbone.input, layers.Dense(2, name="score")(x))


def _mobilenet_v2():
    return _application(keras.applications.MobileNetV2, "block_5_add", alpha=0.35)


def _with_operators(outputs):
    image = keras.Input((6, 5, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="conv1")(image)
    y = layers.Conv2D(4, 3, padding="same", name="conv2")(ops.relu(x))
    y = (y + x) * 0.5 - ops.mean(x, axis=(1, 2), keepdims=True)
    y = ops.concatenate([y[:, 1:, :, :2], y[:, :-1, :, 2:]], axis=-1)
    y = ops.reshape(y, (-1, 5 * 5 * 4))
    return keras.Model(image, layers.Dense(outputs, name="score")(y))


def _nested(outputs):
    """Two nested models, one in a Sequential, with equal names inside."""

    def block(name):
        inputs = keras.Input((5,))
        return keras.Model(inputs, layers.Dense(5, name="inner")(inputs), name=name)

    inputs = keras.Input((5,), name="features")
    x = block("first")(inputs)
    x = layers.Dense(5, activation="relu", name="tap")(x)
    wrapped = keras.Sequential([keras.Input((5,)), block("second")], name="wrapped")
    return keras.Model(inputs, layers.Dense(outputs, name="score")(wrapped(x)))


def _recurrent(outputs):
    words = keras.Input((6,), dtype="int32", name="words")
    x = layers.Embedding(9, 4, mask_zero=True, name="embedding")(words)
    inner = layers.LSTM(3, return_sequences=True, name="inner")
    x = layers.Bidirectional(inner, name="lstm")(x)
    x = layers.TimeDistributed(layers.Dense(4, name="inner"), name="each")(x)
    x = layers.LSTM(3, name="last")(x)
    return keras.Model(words, layers.Dense(outputs, name="score")(x))


def _two_inputs(outputs):
    image = keras.Input((5, 5, 3), name="image")
    depth = keras.Input((5, 5, 1), name="depth")
    x = layers.Conv2D(4, 3, name="conv1")(image) - layers.Conv2D(4, 3, name="conv2")(
        depth
    )
    x = layers.Activation("relu", name="tap")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model([image, depth], layers.Dense(outputs, name="score")(x))


def _data(model, n=3, seed=0):
    """Random inputs for a model, in the structure that it takes."""
    rng = np.random.default_rng(seed)

    def random(x):
        shape = (n, *x.shape[1:])
        if "int" in x.dtype:
            return np.sort(rng.integers(0, 9, shape))[:, ::-1].astype(x.dtype)
        return rng.uniform(0, 1, shape).astype(x.dtype)

    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(random, inputs)


def _distinct(*models):
    """Gives every variable of the models values that no other has."""
    for seed, variable in enumerate(v for model in models for v in model.weights):
        rng = np.random.default_rng([seed, 99])
        low = 0.5 if "variance" in variable.path else -0.5
        value = rng.uniform(low, low + 1, variable.shape)
        variable.assign(value / max(1, np.prod(variable.shape[:-1])) ** 0.5)
    return models if len(models) > 1 else models[0]


def _towers(build, outputs=(3, 2)):
    """Two (or more) towers of one kind, no two of their variables alike."""
    towers = [build(n) for n in outputs]
    _distinct(*towers)
    return dict(zip(("seg", "normals", "depth"), towers, strict=False))


def _arrays(outputs):
    return [ops.convert_to_numpy(x) for x in keras.tree.flatten(outputs)]


def _assert_same(actual, expected):
    for a, e in zip(_arrays(actual), _arrays(expected), strict=True):
        np.testing.assert_array_equal(a, e)
        assert np.isfinite(a).all()
        assert a.std() > 0


def _assert_outputs_are_those_apart(model, towers):
    data = _data(model)
    together = model(data)
    assert list(together) == list(towers)
    for task, tower in towers.items():
        _assert_same(together[task], tower(data))


def _random_alphas(model, seed=5):
    rng = np.random.default_rng(seed)
    alphas = {}
    for layer in model.layers:
        if isinstance(layer, CrossStitch):
            alphas[layer.name] = rng.normal(size=layer.alpha.shape)
            layer.alpha.assign(alphas[layer.name])
    return alphas


# stitch: identity alpha

KINDS = {
    "fcn_alexnet": (_fcn, FCN_TAPS),
    "alexnet": (_alexnet, FCN_TAPS),
    "matrices": (_dense_tower, ["one", "two", "score"]),
    "sequential": (_sequential, ["conv", "pool"]),
    "unet": (_unet, ["down", "bottom", "merge"]),
    "operators": (_with_operators, ["conv1", "conv2"]),
    "nested": (_nested, ["tap"]),
    "recurrent": (_recurrent, ["embedding", "lstm", "last"]),
    "two inputs": (_two_inputs, ["tap"]),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    return request.param


def _same_outputs(build):
    """Equal output sizes where the last layer is a tap, else unequal ones."""
    return (2, 2) if build is _dense_tower else (3, 2)


@pytest.mark.slow
def test_with_identity_alpha_the_towers_run_as_if_apart(kind):
    build, at = kind
    towers = _towers(build, _same_outputs(build))

    model = stitch(towers, at, same_task=1.0)

    _assert_outputs_are_those_apart(model, towers)
    units = [x.name for x in model.layers if isinstance(x, CrossStitch)]
    assert units == [f"cross_stitch_{name}" for name in at]


@pytest.mark.slow
def test_with_mixing_alpha_they_do_not(kind):
    build, at = kind
    towers = _towers(build, _same_outputs(build))

    model = stitch(towers, at, same_task=0.5)

    data = _data(model)
    for task, output in model(data).items():
        assert np.abs(_arrays(output)[0] - _arrays(towers[task](data))[0]).max() > 1e-4


def test_variable_paths_and_layer_names_are_unique_and_say_the_task(kind):
    build, at = kind
    towers = _towers(build, _same_outputs(build))

    model = stitch(towers, at)

    paths = [v.path for v in model.weights]
    assert len(set(paths)) == len(paths)
    names = {x.name for x in model.layers if x.weights}
    expected = {
        f"{task}_{name}" for task, t in towers.items() for name in _with_weights(t)
    }
    assert names == expected | {f"cross_stitch_{name}" for name in at}
    assert all(p.startswith(("seg_", "normals_", "cross_stitch_")) for p in paths)


@pytest.mark.slow
def test_every_weight_is_carried_over(kind):
    build, at = kind
    towers = _towers(build, _same_outputs(build))

    model = stitch(towers, at)

    for task, tower in towers.items():
        for name, layer in _with_weights(tower).items():
            copy = model.get_layer(f"{task}_{name}")
            assert copy is not layer
            _assert_lists_equal(copy.get_weights(), layer.get_weights())


def _with_weights(tower, prefix=""):
    """{name in the joined model, less the task: layer}, nested models opened."""
    found = {}
    for layer in tower.layers:
        if isinstance(layer, keras.Model):
            found |= _with_weights(layer, f"{prefix}{layer.name}_")
        elif layer.weights:
            found[prefix + layer.name] = layer
    return found


def _assert_lists_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def _nodes(tower):
    return {
        layer.name: (len(layer._inbound_nodes), len(layer._outbound_nodes))
        for layer in tower._flatten_layers()
    }


@pytest.mark.slow
@pytest.mark.parametrize("join", ["stitch", "split"])
def test_the_towers_stay_as_they_are(tmp_path, kind, join):
    build, at = kind
    tower, _ = towers = _distinct(build(2), build(2))
    data = _data(tower)
    tower.compile("sgd", "mse")
    before = _arrays(tower(data)), tower.get_weights(), _nodes(tower)
    config = tower.get_config()

    joined = dict(zip("ab", towers, strict=True))
    model = stitch(joined, at) if join == "stitch" else split(joined, at[-1])
    for variable in model.trainable_variables:
        variable.assign_add(ops.ones_like(variable))

    _assert_lists_equal(_arrays(tower(data)), before[0])
    _assert_lists_equal(tower.get_weights(), before[1])
    assert _nodes(tower) == before[2]
    assert tower.get_config() == config
    assert tower.compiled
    tower.save(tmp_path / "tower.keras")
    loaded = keras.saving.load_model(tmp_path / "tower.keras")
    _assert_same(loaded(data), tower(data))


@pytest.mark.slow
def test_a_saved_model_loads_and_predicts_the_same(tmp_path, kind):
    build, at = kind
    model = stitch(_towers(build, _same_outputs(build)), at)
    _random_alphas(model)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")

    data = _data(model)
    before, after = model(data), loaded(data)
    assert set(after) == set(before)
    for task in before:
        _assert_same(after[task], before[task])
    assert [x.name for x in loaded.layers] == [x.name for x in model.layers]


# stitch: other alphas, by hand


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("per", ["channel", "layer"])
def test_a_stitched_model_is_the_towers_composed_by_hand(tasks, per):
    names = [f"task_{n}" for n in range(tasks)]
    towers = {name: _dense_tower(n + 1) for n, name in enumerate(names)}
    _distinct(*towers.values())

    model = stitch(towers, ["one", "two"], per=per)
    alphas = _random_alphas(model)
    data = np.random.default_rng(0).normal(size=(7, 5))
    together = model(data.astype("float32"))

    def dense(name, xs):
        weights = [tower.get_layer(name).get_weights() for tower in towers.values()]
        return [
            x @ kernel + bias for x, (kernel, bias) in zip(xs, weights, strict=True)
        ]

    def mix(name, xs):
        formula = "ijc,jnc->inc" if per == "channel" else "ij,jnc->inc"
        return np.einsum(formula, alphas[f"cross_stitch_{name}"], np.stack(xs))

    one = mix("one", dense("one", [data] * tasks))
    two = mix("two", dense("two", one))
    for name, expected in zip(names, dense("score", two), strict=True):
        np.testing.assert_allclose(together[name], expected, rtol=1e-4, atol=1e-5)


def test_alpha_rows_are_in_the_sorted_order_of_the_tasks():
    towers = {"seg": _dense_tower(2), "depth": _dense_tower(3)}

    model = stitch(towers, ["one"])

    assert model.get_layer("cross_stitch_one").tasks == ("depth", "seg")


def test_skip_connections_read_the_mix():
    towers = _towers(_unet)
    model = stitch(towers, ["down"], per="layer")
    # Given that each task takes the map of the other.
    model.get_layer("cross_stitch_down").alpha.assign([[0.0, 1.0], [1.0, 0.0]])
    data = _data(model)

    together = model(data)

    # A tower whose first layer is the other's gets it at the skip, too.
    for task, other in (("seg", "normals"), ("normals", "seg")):
        tower = keras.models.clone_model(towers[task])
        tower.set_weights(towers[task].get_weights())
        tower.get_layer("down").set_weights(
            towers[other].get_layer("down").get_weights()
        )
        _assert_same(together[task], tower(data))


def test_skip_connections_go_round_a_tap_that_they_do_not_start_at():
    towers = _towers(_unet)
    model = stitch(towers, ["bottom"], per="layer")
    model.get_layer("cross_stitch_bottom").alpha.assign(np.zeros((2, 2)))
    data = _data(model)

    together = model(data)

    for task, tower in towers.items():
        expected = keras.models.clone_model(tower)
        expected.set_weights(tower.get_weights())
        bottom = expected.get_layer("bottom")
        bottom.set_weights([np.zeros_like(w) for w in bottom.get_weights()])
        _assert_same(together[task], expected(data))


def test_taps_may_have_other_names_in_each_tower():
    towers = {"a": _dense_tower(3), "b": _dense_tower(2, prefix="other_")}
    _distinct(*towers.values())

    model = stitch(
        towers,
        [{"a": "one", "b": "other_one"}, {"b": "other_two", "a": "two"}],
        same_task=1.0,
    )

    _assert_outputs_are_those_apart(model, towers)
    assert model.get_layer("cross_stitch_one").alpha.shape == (2, 2, 4)
    assert model.get_layer("cross_stitch_two").alpha.shape == (2, 2, 4)
    assert model.get_layer("b_other_one") is not None


def test_towers_of_different_kinds_are_stitched_where_shapes_agree():
    def deep(outputs):
        image = keras.Input((9, 7, 3), name="image")
        x = layers.Conv2D(8, 1, activation="relu", name="first")(image)
        x = layers.DepthwiseConv2D(3, name="depthwise")(x)
        x = layers.Conv2D(4, 1, activation="relu", name="block")(x)
        x = layers.Flatten(name="flatten")(x)
        return keras.Model(image, layers.Dense(outputs, name="score")(x))

    towers = {"a": _sequential(3), "b": deep(2)}
    _distinct(*towers.values())

    model = stitch(towers, [{"a": "conv", "b": "block"}], same_task=1.0)

    _assert_outputs_are_those_apart(model, towers)


@pytest.mark.slow
def test_a_keras_application_built_twice_is_stitched_at_its_blocks():
    towers = {"a": _mobilenet_v2(), "b": _mobilenet_v2()}
    _distinct(*towers.values())

    model = stitch(towers, ["expanded_conv_project_BN", "block_2_add"], same_task=1.0)

    _assert_outputs_are_those_apart(model, towers)
    paths = [v.path for v in model.variables]
    assert len(set(paths)) == len(paths)


@pytest.mark.slow
def test_two_keras_applications_of_different_kinds_are_stitched():
    v1 = _application(keras.applications.MobileNet, "conv_pw_3_relu", alpha=0.75)
    towers = {"v2": _mobilenet_v2(), "v1": v1}
    _distinct(*towers.values())

    # Given a tap with maps of (8, 8, 48) in both.
    at = [{"v2": "block_2_expand_relu", "v1": "conv_dw_2_relu"}]
    model = stitch(towers, at, same_task=1.0)

    _assert_outputs_are_those_apart(model, towers)


@pytest.mark.slow
def test_three_towers_are_stitched():
    towers = _towers(_fcn, (3, 2, 5))

    model = stitch(towers, FCN_TAPS, same_task=1.0)

    _assert_outputs_are_those_apart(model, towers)
    assert model.get_layer("cross_stitch_pool1").alpha.shape == (3, 3, 2)


def test_one_model_may_be_the_tower_of_two_tasks():
    tower = _distinct(_dense_tower(3))

    model = stitch({"a": tower, "b": tower}, ["one"])

    # 0.9 x + 0.1 x is x within rounding only: some processors fuse the sum.
    data = _data(model)
    for output in model(data).values():
        np.testing.assert_allclose(output, tower(data), rtol=1e-5)
    assert len(model.weights) == 2 * len(tower.weights) + 1


def test_towers_may_share_layers_that_become_each_one_s_own():
    backbone = _distinct(_sequential(4))
    towers = {
        task: keras.Model(
            backbone.inputs[0], layers.Dense(n, name="own")(backbone.outputs[0])
        )
        for task, n in (("a", 3), ("b", 2))
    }

    model = stitch(towers, ["conv"], same_task=1.0)

    _assert_outputs_are_those_apart(model, towers)
    assert len(model.weights) == sum(len(t.weights) for t in towers.values()) + 1


@pytest.mark.parametrize("elsewhere", ["the tower's input", "another input"])
def test_a_tap_may_have_been_called_elsewhere_before(elsewhere):
    inputs, other = keras.Input((5,), name="features"), keras.Input((5,))
    one = layers.Dense(4, name="one")
    one(inputs if elsewhere == "the tower's input" else other)
    tower = keras.Model(inputs, layers.Dense(2, name="two")(one(inputs * 2.0)))
    towers = {"a": tower, "b": _dense_tower(3)}
    _distinct(*towers.values())

    model = stitch(towers, ["one"], same_task=1.0)

    _assert_outputs_are_those_apart(model, towers)


@pytest.mark.slow
def test_without_taps_the_towers_stand_side_by_side():
    towers = _towers(_fcn)

    model = stitch(towers, at=[])

    _assert_outputs_are_those_apart(model, towers)
    assert len(model.weights) == sum(len(t.weights) for t in towers.values())


def test_units_take_their_arguments_from_stitch():
    model = stitch(
        _towers(_dense_tower),
        ["one", "two"],
        name="joined",
        per="layer",
        alpha_initializer="ones",
        alpha_regularizer="l2",
        dtype="float64",
    )

    assert model.name == "joined"
    for name in ("cross_stitch_one", "cross_stitch_two"):
        unit = model.get_layer(name)
        np.testing.assert_array_equal(unit.alpha, np.ones((2, 2)))
        assert unit.alpha_regularizer is not None
        assert unit.compute_dtype == "float64"


# stitch: inputs and outputs


def test_a_shared_input_keeps_its_name():
    model = stitch(_towers(_fcn), ["pool1"])

    assert model.input.name == "image"
    assert model.input_shape == (None, 33, 65, 3)


def test_towers_may_have_inputs_of_their_own():
    towers = {"a": _dense_tower(3), "b": _sequential(2)}
    _distinct(*towers.values())
    data = {
        "a": np.random.default_rng(0).normal(size=(3, 5)).astype("float32"),
        "b": np.random.default_rng(1).normal(size=(3, 9, 7, 3)).astype("float32"),
    }

    model = stitch(
        towers, [{"a": "one", "b": "pool"}], shared_input=False, same_task=1.0
    )

    assert set(model.input) == {"a", "b"}
    for task, output in model(data).items():
        _assert_same(output, towers[task](data[task]))


def test_what_one_tower_is_given_reaches_the_other_through_the_tap_alone():
    towers = _towers(_dense_tower)
    model = stitch(towers, ["one"], shared_input=False)
    zeros, ones = np.zeros((1, 5), "f"), np.ones((1, 5), "f")

    before = model({"seg": zeros, "normals": zeros})
    mixed = model({"seg": zeros, "normals": ones})
    model.get_layer("cross_stitch_one").alpha.assign(np.eye(2)[..., None] * np.ones(4))
    apart = model({"seg": zeros, "normals": ones})

    assert np.abs(mixed["seg"] - before["seg"]).max() > 1e-3
    _assert_same(apart["seg"], towers["seg"](zeros))


def test_towers_of_several_inputs_may_have_their_own():
    towers = _towers(_two_inputs)

    model = stitch(towers, ["tap"], shared_input=False, same_task=1.0)

    assert set(model.input) == {
        "seg_image",
        "seg_depth",
        "normals_image",
        "normals_depth",
    }
    data = _data(model)
    together = model(data)
    for task, tower in towers.items():
        _assert_same(
            together[task], tower([data[f"{task}_image"], data[f"{task}_depth"]])
        )


def test_towers_of_several_inputs_may_share_them():
    towers = _towers(_two_inputs)

    model = stitch(towers, ["tap"], same_task=1.0)

    assert [x.name for x in model.input] == ["image", "depth"]
    _assert_outputs_are_those_apart(model, towers)


def test_shared_inputs_keep_the_structure_that_the_first_tower_has():
    def build(outputs):
        inputs = {name: keras.Input((5,), name=name) for name in ("b", "a")}
        x = layers.Dense(4, name="one")(inputs["a"] - 2.0 * inputs["b"])
        return keras.Model(inputs, layers.Dense(outputs, name="two")(x))

    b, a = keras.Input((5,), name="b"), keras.Input((5,), name="a")
    x = layers.Dense(4, name="one")(a - 2.0 * b)
    towers = {"x": build(3), "y": keras.Model([b, a], layers.Dense(2, name="two")(x))}
    _distinct(*towers.values())

    for order in (["x", "y"], ["y", "x"]):
        model = stitch({task: towers[task] for task in order}, ["one"], same_task=1.0)

        data = _data(model)
        named = data if order[0] == "x" else dict(zip("ba", data, strict=True))
        together = model(data)
        _assert_same(together["x"], towers["x"](named))
        _assert_same(together["y"], towers["y"]([named["b"], named["a"]]))


@pytest.mark.parametrize("names", ["x", "yx"])
def test_nested_dicts_of_inputs_stay_nested(names, tmp_path):
    def build(outputs):
        within = {name: keras.Input((n,), name=name) for n, name in enumerate(names, 2)}
        q = keras.Input((4,), name="q")
        both = layers.Concatenate()([*within.values(), q * 3.0])
        score = layers.Dense(outputs, name="score")(layers.Dense(4, name="one")(both))
        return keras.Model({"q": q, "p": within}, score)

    towers = _towers(build, (3, 2, 2))
    model = stitch(towers, ["one"], same_task=1.0)

    _assert_outputs_are_those_apart(model, towers)
    model.compile("sgd", loss="mse")
    data = _data(towers["seg"])
    logs = model.fit(data, model.predict(data, verbose=0), verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    _assert_same(loaded(data), model(data))


def test_several_inputs_of_other_names_cannot_be_shared():
    def build(names):
        inputs = [keras.Input((5,), name=name) for name in names]
        x = layers.Dense(4, name="one")(inputs[0] - inputs[1])
        return keras.Model(inputs, layers.Dense(2, name="two")(x))

    with pytest.raises(ValueError, match=r"several inputs the same names.*rgb"):
        stitch({"a": build(["left", "right"]), "b": build(["rgb", "depth"])}, ["one"])


def _two_heads(structure):
    inputs = keras.Input((5,), name="features")
    x = layers.Dense(4, name="one")(inputs)
    logits = layers.Dense(3, name="logits")(x)
    boxes = layers.Dense(4, name="boxes")(layers.Activation("relu", name="r")(x))
    outputs = [logits, boxes]
    if structure == "dict":
        outputs = {"logits": logits, "boxes": boxes}
    return keras.Model(inputs, outputs)


def test_towers_may_have_several_outputs_in_a_dict():
    towers = {"detection": _two_heads("dict"), "attributes": _dense_tower(2)}
    _distinct(*towers.values())
    data = _data(towers["attributes"])

    model = stitch(towers, ["one"], same_task=1.0)

    together = model(data)
    assert list(together) == ["detection", "attributes"]
    expected = towers["detection"](data)
    keras.tree.assert_same_structure(together["detection"], expected)
    _assert_same(together["detection"], expected)
    _assert_same(together["attributes"], towers["attributes"](data))


def _last(join):
    """Sequential or functional, a layer of three outputs, made anew at each call."""
    inputs = keras.Input((6, 5), name="features")
    last = layers.LSTM(4, return_state=True, name="lstm")
    if join == "sequential":
        return keras.Sequential([inputs, last])
    return keras.Model(inputs, last(inputs))


@pytest.mark.parametrize(
    ("tower", "names"),
    [
        (lambda: _two_heads("list"), {"logits", "boxes"}),
        (lambda: _last("functional"), {"lstm_0", "lstm_1", "lstm_2"}),
        (lambda: _last("sequential"), {"lstm_0", "lstm_1", "lstm_2"}),
    ],
    ids=["two layers", "one layer", "the last of a Sequential"],
)
@pytest.mark.parametrize("join", ["stitch", "split"])
def test_a_list_of_outputs_is_an_error_that_names_them(tower, names, join):
    tower = tower()

    def joined(tower):
        if join == "stitch":
            return stitch({"a": tower, "b": tower, "c": tower}, [])
        return split({"a": tower, "b": tower}, tower.layers[-1].name)

    with pytest.raises(ValueError, match="tower of 'a' must give a tensor") as caught:
        joined(tower)

    # Given that its remedy is code.
    (code,) = re.findall(r"outputs = model.outputs; (.*?\}\))", str(caught.value))
    scope = {"keras": keras, "model": tower, "outputs": tower.outputs}
    exec(code, scope)
    assert set(joined(scope["model"]).output["b"]) == names


class Pair(layers.Layer):
    """Gives a dict."""

    def call(self, x):
        return {"q": x, "p": 2.0 * x[..., :2]}


@pytest.mark.parametrize("nested", [False, True])
def test_a_sequential_may_end_in_a_dict(nested):
    def tower(units):
        features = keras.Input((5,), name="features")
        one = layers.Dense(units, name="one")
        model = keras.Sequential([features, one, Pair(name="pair")], name="inner")
        if not nested:
            return model
        inputs = keras.Input((5,), name="features")
        both = model(inputs)
        return keras.Model(
            inputs, {"p": both["p"], "score": layers.Dense(3, name="two")(both["q"])}
        )

    towers = {"a": tower(4), "b": tower(4)}

    model = stitch(towers, ["one"], same_task=1.0)

    data = _data(model)
    for task, outputs in model(data).items():
        expected = towers[task](data)
        assert set(outputs) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(outputs[name], values)


def test_a_list_of_one_output_is_that_output():
    inputs = keras.Input((5,), name="features")
    tower = keras.Model([inputs], [layers.Dense(4, name="one")(inputs)])

    model = stitch({"a": tower, "b": tower}, [])

    assert model.output["a"].shape == (None, 4)


# stitch: what towers bring along


def test_frozen_layers_stay_frozen():
    towers = {"a": _dense_tower(3), "b": _nested(2)}
    towers["a"].get_layer("one").trainable = False
    towers["b"].get_layer("first").trainable = False

    model = stitch(towers, [])

    trainable = {v.path for v in model.trainable_variables}
    frozen = {v.path for v in model.weights} - trainable
    assert frozen == {
        "a_one/kernel",
        "a_one/bias",
        "b_first_inner/kernel",
        "b_first_inner/bias",
    }


def test_a_frozen_tower_stays_frozen():
    towers = _towers(_sequential)
    towers["seg"].trainable = False

    model = stitch(towers, ["conv"])

    assert not [v.path for v in model.trainable_variables if "seg_" in v.path]
    assert [v.path for v in model.trainable_variables if "normals_" in v.path]


@pytest.mark.parametrize("join", ["stitch", "split"])
def test_an_adapted_normalization_stays_adapted(join):
    rng = np.random.default_rng(0)

    def build(outputs):
        nested_input = keras.Input((5,))
        nested_norm = layers.Normalization(name="adapted")
        nested_norm.adapt(rng.normal(3, 2, (50, 5)))
        nested = keras.Model(nested_input, nested_norm(nested_input), name="nested")
        inputs = keras.Input((5,), name="features")
        x = layers.Normalization(name="adapted")
        x.adapt(rng.normal(5, 3, (50, 5)))
        x = layers.Dense(4, name="one")(nested(x(inputs)))
        return keras.Model(inputs, layers.Dense(outputs, name="score")(x))

    # No _towers: its weights would not be those that were adapted.
    towers = {"seg": build(3), "normals": build(2)}
    if join == "split":
        model = split(towers, "score")
        towers.pop("normals")
    else:
        model = stitch(towers, ["one"], same_task=1.0)

    data = _data(model)
    for task, tower in towers.items():
        _assert_same(model(data)[task], tower(data))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_units_have_the_dtype_policy_of_the_towers_taps(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        towers = _towers(_fcn)
    finally:
        keras.config.set_dtype_policy(before)

    model = stitch(towers, FCN_TAPS, same_task=1.0)

    for name in FCN_TAPS:
        unit = model.get_layer(f"cross_stitch_{name}")
        assert unit.dtype_policy.name == policy
        expected = {"mixed_bfloat16": "float32"}.get(policy, policy)
        assert unit.alpha.dtype == expected
    _assert_outputs_are_those_apart(model, towers)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize(
    ("policy", "globally"),
    [
        ("float32", "mixed_bfloat16"),
        ("mixed_bfloat16", "float32"),
        ("float64", "float32"),
    ],
)
def test_units_behind_operators_have_the_dtype_of_what_they_mix(
    policy, globally, project
):
    def tower(outputs, units):
        features = keras.Input((5,), name="features", dtype="float64")
        x = layers.Dense(units, dtype=policy, name="one")(features)
        x = keras.ops.add(x * 0.7, ops.square(x))
        score = layers.Dense(outputs, dtype=policy, name="score")
        return keras.Model(features, score(x))

    towers = {"a": tower(2, 4), "b": tower(3, 6 if project else 4), "c": tower(2, 4)}
    taps = [{task: x.operations[-2].name for task, x in towers.items()}]
    keras.config.set_dtype_policy(globally)
    try:
        model = stitch(towers, taps, project=project, same_task=1.0)
    finally:
        keras.config.set_dtype_policy("float32")

    (unit,) = (x for x in model.layers if isinstance(x, CrossStitch))
    assert unit.dtype_policy.name == policy
    assert unit.alpha.dtype == ("float64" if policy == "float64" else "float32")
    _assert_outputs_are_those_apart(model, towers)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize(
    "policies",
    [
        ("mixed_float16", "float32"),
        ("mixed_bfloat16", "float32", "mixed_bfloat16"),
        ("float32", "float64"),
        ("float16", "bfloat16"),
    ],
)
def test_no_tower_s_map_is_rounded_to_another_s_dtype(policies, project):
    def tower(policy, units):
        x = keras.Input((5,), name="x")
        tapped = layers.Dense(units, name="tap", dtype=policy)(x)
        return keras.Model(x, layers.Dense(2, dtype=policy)(tapped))

    for order in (policies, policies[::-1]):
        towers = {
            f"t{k}": tower(policy, 4 + project * k) for k, policy in enumerate(order)
        }
        model = stitch(towers, ["tap"], project=project, same_task=1.0)

        _assert_outputs_are_those_apart(model, towers)


@pytest.mark.slow
def test_one_step_of_training_changes_every_weight():
    rng = np.random.default_rng(0)
    towers = _towers(_unet)
    model = stitch(towers, ["down", "bottom"])
    before = {v.path: v.numpy() for v in model.trainable_variables}
    model.compile(
        keras.optimizers.SGD(1.0),
        loss={
            "seg": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "normals": "mse",
        },
    )

    history = model.fit(
        rng.uniform(-1, 1, (4, 12, 8, 3)).astype("float32"),
        {
            "seg": rng.integers(3, size=(4, 12, 8)),
            "normals": rng.normal(size=(4, 12, 8, 2)),
        },
        batch_size=4,
        verbose=0,
    )

    assert {"loss", "seg_loss", "normals_loss"} <= set(history.history)
    unchanged = [
        v.path
        for v in model.trainable_variables
        if np.array_equal(v.numpy(), before[v.path])
    ]
    assert unchanged == []


def test_gradients_reach_the_other_tower_through_the_units():
    model = stitch(_towers(_dense_tower), ["one"])
    kernel = model.get_layer("normals_one").kernel.value

    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(_data(model))["seg"] ** 2)

    assert np.abs(tape.gradient(loss, kernel)).max() > 1e-4


# stitch: errors


def _used_twice():
    inputs = keras.Input((5,), name="features")
    one = layers.Dense(5, name="one")
    x = layers.Dense(4, name="two")(one(one(inputs)))
    return keras.Model(inputs, x)


def _used_below_and_above():
    inputs = keras.Input((5,), name="features")
    one = layers.Dense(5, name="one")
    x = one(layers.Dense(5, name="two")(one(inputs)))
    return keras.Model(inputs, layers.Dense(2, name="score")(x))


def _two_alike():
    x = inputs = keras.Input((5,), name="features")
    for name in ("one", "other"):
        x = layers.Dense(5, name=name)(x)
    return keras.Model(inputs, layers.Dense(4, name="two")(x))


def _two_outputs():
    inputs = keras.Input((5, 2), name="features")
    x, state = layers.GRU(4, return_state=True, name="one")(inputs)
    return keras.Model(inputs, layers.Dense(2, name="two")(x + state))


class _Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


STITCH_ERRORS = {
    "unknown layer": (
        lambda: {"a": _fcn(3), "b": _fcn(2)},
        ["pol1"],
        r"tower of 'a' has no layer 'pol1'.*Did you mean one of \['pool1'",
    ),
    "unknown layer, nothing like it": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        ["qqq"],
        r"no layer 'qqq'.*one of \['one', 'two', 'score'\]",
    ),
    "unknown layer in the second tower": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2, prefix="x_")},
        ["one"],
        r"tower of 'b' has no layer 'one'.*'x_one'",
    ),
    "taps out of order": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        ["two", "one"],
        r"from input to output.*tower of 'a', the tap 'one'.*\['two', 'one'\]",
    ),
    "taps out of order in one tower": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        [{"a": "one", "b": "two"}, {"a": "two", "b": "one"}],
        "from input to output.*tower of 'b', the tap 'two'",
    ),
    "the same tap twice": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        ["one", "one"],
        r"each once.*tower of 'a', the tap 'one'.*\['one', 'one'\]",
    ),
    "unequal channels": (
        lambda: {"a": _dense_tower(3, units=4), "b": _dense_tower(2, units=6)},
        ["one"],
        r"At the tap 'one'.*'a': \(None, 4\), 'b': \(None, 6\)",
    ),
    "unequal ranks": (
        lambda: {"a": _sequential(3), "b": _sequential(2)},
        [{"a": "conv", "b": "pool"}],
        r"At the tap.*'a': \(None, 7, 5, 4\), 'b': \(None, 4\)",
    ),
    "a tap used twice": (
        lambda: {"a": _used_twice(), "b": _used_twice()},
        ["one"],
        r"tower of 'a', layer 'one' is called more than once: name one of "
        r"\{'one:0': \(None, 5\), 'one:1': \(None, 5\)\}. Received: 'one'",
    ),
    "a call that there is not": (
        lambda: {"a": _used_twice(), "b": _used_twice()},
        ["one:2"],
        r"name one of \{'one:0'.*Received: 'one:2'",
    ),
    "an output that there is not": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        ["one:out1"],
        r"layer 'one' has one output: name one of \{'one': \(None, 4\)\}",
    ),
    "a list of outputs": (
        lambda: {"a": _dense_tower(3), "b": _two_heads("list")},
        ["one"],
        r'tower of \'b\' must give.*\{"logits": outputs\[0\], "boxes": outputs\[1\]\}',
    ),
    "a tap of several outputs": (
        lambda: {"a": _two_outputs(), "b": _two_outputs()},
        ["one"],
        r"tower of 'a', layer 'one' has several outputs: name one of "
        r"\{'one:out0': \(None, 4\), 'one:out1': \(None, 4\)\}",
    ),
    "a tap that is an input": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        ["features"],
        r"tower of 'a', 'features' is an input.*such as one of \['one', 'two', 'score'",
    ),
    "a string for the list of taps": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        "one",
        r"`at` must be a list.*Received: at='one'.*at=\['one'\]",
    ),
    "a tap that lacks a task": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        [{"a": "one"}],
        r"one for each of \['a', 'b'\].*Received: \{'a': 'one'\}",
    ),
    "a tap with a task too many": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        [{"a": "one", "b": "one", "c": "one"}],
        r"one for each of \['a', 'b'\]",
    ),
    "a tap that is a number": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        [1],
        "the name of a layer, or a dict.*Received: 1",
    ),
    "unequal inputs": (
        lambda: {"a": _dense_tower(3), "b": _sequential(2)},
        [],
        r"same shape and dtype.*Resizing.*shared_input=False.*"
        r"Received: 'a' takes 'features' \(None, 5\) float32; "
        r"'b' takes 'image' \(None, 9, 7, 3\) float32$",
    ),
    "one tower": (
        lambda: {"a": _dense_tower(3)},
        ["one"],
        "`towers` must be a dict of at least two",
    ),
    "a list of towers": (
        lambda: [_dense_tower(3), _dense_tower(2)],
        ["one"],
        "`towers` must be a dict of at least two",
    ),
    "a subclassed model": (
        lambda: {"a": _dense_tower(3), "b": _Subclassed()},
        ["one"],
        "tower of 'b' must be a functional model",
    ),
    "an unbuilt Sequential": (
        lambda: {"a": _dense_tower(3), "b": keras.Sequential([layers.Dense(4)])},
        ["one"],
        "tower of 'b' must be .* Sequential one that starts with `keras.Input`",
    ),
    "no model": (
        lambda: {"a": _dense_tower(3), "b": "alexnet"},
        ["one"],
        "tower of 'b' must be a functional model.*'alexnet'",
    ),
}


@pytest.mark.parametrize(
    ("towers", "at", "words"), STITCH_ERRORS.values(), ids=STITCH_ERRORS.keys()
)
def test_towers_that_cannot_be_stitched_are_an_error(towers, at, words):
    towers = towers()

    with pytest.raises(ValueError, match=words):
        stitch(towers, at)


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_inputs_of_other_dtypes_cannot_be_shared(dtype):
    inputs = keras.Input((5,), dtype=dtype)
    other = keras.Model(inputs, layers.Dense(2)(layers.Rescaling(1.0)(inputs)))

    with pytest.raises(ValueError, match=f"same shape and dtype.*float32.*{dtype}"):
        stitch({"a": _dense_tower(2), "b": other}, [])


def test_a_flag_of_an_input_that_cannot_be_shared_is_named():
    sparse = keras.Input((5,), name="features", sparse=True)
    other = keras.Model(sparse, layers.Dense(2, name="one")(sparse))

    with pytest.raises(ValueError, match=r"\(None, 5\) float32; .* float32 sparse$"):
        stitch({"a": _dense_tower(2), "b": other}, ["one"])


def test_towers_of_other_sizes_share_a_picture_as_their_error_says():
    def build(size):
        image = keras.Input((size, size, 3), name="image")
        x = layers.Conv2D(4, 3, name="conv")(image)
        return keras.Model(image, layers.GlobalMaxPooling2D(name="pool")(x))

    small, large = build(9), build(17)
    with pytest.raises(ValueError, match=r"keras.layers.Resizing\(height, width\)"):
        stitch({"a": small, "b": large}, ["pool"])
    resized = keras.Sequential([keras.Input((9, 9, 3)), layers.Resizing(17, 17), large])
    model = stitch({"a": small, "b": resized}, ["pool"], same_task=1.0)

    x = _data(model)
    _assert_same(model(x)["b"], large(layers.Resizing(17, 17)(x)))


@pytest.mark.parametrize("unit", ["nddr", CrossStitch(), None, lambda maps: maps])
def test_a_unit_that_is_no_class_of_layers_is_an_error(unit):
    towers = {"a": _dense_tower(2), "b": _dense_tower(2)}
    with pytest.raises(ValueError, match=r"`unit` must be a class of layers.*Received"):
        stitch(towers, ["one"], unit=unit)


@pytest.mark.parametrize(
    "name", ["", "two words", "1st", "_a", "a-b", "a/b", "a.b", "tâche", 3, "a\n"]
)
def test_a_task_name_that_cannot_be_a_signature_is_an_error(name):
    with pytest.raises(ValueError, match=r"letters, digits and underscores.*Received"):
        stitch({name: _dense_tower(2), "b": _dense_tower(2)}, ["one"])


def test_a_task_named_serving_default_is_an_error():
    with pytest.raises(ValueError, match="'serving_default' is the signature of all"):
        check_task_names(["a", "serving_default"])
    with pytest.raises(ValueError, match="'signatures' is what a SavedModel calls"):
        check_task_names(["a", "signatures"])


@pytest.mark.parametrize("join", ["stitch", "split"])
def test_a_task_named_as_what_is_shared_is_an_error(join):
    towers = {"shared": _dense_tower(2), "b": _dense_tower(2)}
    with pytest.raises(ValueError, match=r"'shared' is in the names.*another name"):
        stitch(towers, []) if join == "stitch" else split(towers, "one")


def test_a_dict_of_the_tasks_is_one_tap_in_a_list():
    towers = {"a": _dense_tower(2), "b": _dense_tower(2)}
    message = r"names the units.* at=\[\{'a': 'one', 'b': 'one'\}\]"
    with pytest.raises(ValueError, match=message):
        stitch(towers, {"a": "one", "b": "one"})
    stitch(towers, {"a": {"a": "one", "b": "one"}})


@pytest.mark.parametrize("name", ["a", "Segmentation", "normals_2", "a_"])
def test_other_task_names_are_none(name):
    check_task_names([name])


# split

SPLITS = {
    "fcn_alexnet": (_fcn, ["conv1", "conv4", "fc7_dropout", "score"]),
    "matrices": (_dense_tower, ["one", "two", "score"]),
    "sequential": (_sequential, ["conv", "pool", "score"]),
    "unet": (_unet, ["down", "bottom", "up", "merged", "score"]),
    "operators": (_with_operators, ["conv1", "conv2", "score"]),
    "nested": (_nested, ["tap", "score"]),
    "recurrent": (_recurrent, ["lstm", "score"]),
    "two inputs": (_two_inputs, ["conv1", "conv2", "tap", "score"]),
}


@pytest.fixture(
    params=[(build, at) for build, layers_ in SPLITS.values() for at in layers_],
    ids=[f"{name}-{at}" for name, (_, layers_) in SPLITS.items() for at in layers_],
)
def at_layer(request):
    return request.param


def _depending_on(tower, at):
    """The names of the tower's layers that depend on `at`, and of `at`."""
    x = tower.outputs[0]
    reads = {}

    def visit(x):
        operation = x._keras_history.operation
        if operation.name not in reads:
            parents = operation._inbound_nodes[
                x._keras_history.node_index
            ].input_tensors
            reads[operation.name] = {
                parent._keras_history.operation.name for parent in parents
            }
            for parent in parents:
                visit(parent)

    visit(x)
    own = {at}
    for _ in reads:
        own |= {name for name, read in reads.items() if read & own}
    return own


@pytest.mark.slow
def test_the_layers_below_are_shared_and_the_others_are_not(at_layer):
    build, at = at_layer
    towers = _towers(build, (3, 2))
    own = _depending_on(towers["seg"], at)
    with_weights = _with_weights(towers["seg"])
    own = {name for name in with_weights if name in own or name.split("_")[0] in own}

    model = split(towers, at)

    expected = {f"{task}_{n}" for task in towers for n in with_weights if n in own}
    expected |= {f"shared_{name}" for name in with_weights if name not in own}
    assert {x.name for x in model.layers if x.weights} == expected
    paths = [v.path for v in model.weights]
    assert len(set(paths)) == len(paths)


@pytest.mark.slow
def test_split_towers_run_as_if_apart_where_the_shared_part_is_the_same(at_layer):
    build, at = at_layer
    towers = _towers(build, (3, 2))
    own = _depending_on(towers["seg"], at)
    for layer in towers["seg"].layers:
        if layer.name not in own:
            towers["normals"].get_layer(layer.name).set_weights(layer.get_weights())

    model = split(towers, at)

    _assert_outputs_are_those_apart(model, towers)


def test_the_shared_weights_are_the_first_tower_s():
    towers = _towers(_dense_tower)

    model = split(towers, "two")

    _assert_lists_equal(
        model.get_layer("shared_one").get_weights(),
        towers["seg"].get_layer("one").get_weights(),
    )
    for task, tower in towers.items():
        for name in ("two", "score"):
            _assert_lists_equal(
                model.get_layer(f"{task}_{name}").get_weights(),
                tower.get_layer(name).get_weights(),
            )


def test_both_tasks_train_the_shared_layers():
    towers = _towers(_dense_tower, (3, 2, 4))
    model = split(towers, "two")
    kernel = model.get_layer("shared_one").kernel.value

    with tf.GradientTape(persistent=True) as tape:
        outputs = model(_data(model))
        losses = {task: tf.reduce_sum(x**2) for task, x in outputs.items()}

    for loss in losses.values():
        assert np.abs(tape.gradient(loss, kernel)).max() > 1e-4
    own = model.get_layer("seg_two").kernel.value
    assert tape.gradient(losses["normals"], own) is None


@pytest.mark.slow
@pytest.mark.parametrize("at", ["bottom", "score"])
def test_a_split_model_loads_and_trains(tmp_path, at):
    model = split(_towers(_unet), at, name="hard")
    data = _data(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for task, output in model(data).items():
        _assert_same(loaded(data)[task], output)

    loaded.compile("sgd", {"seg": "mse", "normals": "mse"})
    labels = {task: np.zeros(x.shape) for task, x in model(data).items()}
    history = loaded.fit(data, labels, verbose=0)

    assert np.isfinite(history.history["loss"]).all()
    assert model.name == "hard"


def test_towers_may_split_at_layers_of_other_names():
    towers = {"a": _dense_tower(3), "b": _dense_tower(2, prefix="other_")}

    model = split(towers, {"a": "two", "b": "other_two"})

    assert [x.name for x in model.layers if x.weights] == [
        "shared_one",
        "a_two",
        "b_other_two",
        "a_score",
        "b_other_score",
    ]


def test_towers_may_differ_above_the_split():
    def deep(outputs):
        x = inputs = keras.Input((5,), name="features")
        for name, units in (("one", 4), ("two", 7), ("three", 6), ("score", outputs)):
            x = layers.Dense(units, name=name)(x)
        return keras.Model(inputs, x)

    towers = {"a": _dense_tower(3), "b": deep(2)}
    _distinct(*towers.values())
    towers["b"].get_layer("one").set_weights(towers["a"].get_layer("one").get_weights())

    model = split(towers, "two")

    _assert_outputs_are_those_apart(model, towers)


def _with_branches(outputs, depth, order=("left", "right")):
    """Two alike branches from the input; between `at` and where they meet, `depth`."""
    inputs = keras.Input((5,), name="features")
    branches = {name: layers.Dense(4, name=name)(inputs) for name in ("left", "right")}
    x = layers.Activation("tanh", name="at")(branches[order[0]])
    for n in range(depth):
        x = layers.Dense(4, name=f"deep{n}")(x)
    skip = layers.Activation("tanh", name="skip")(branches[order[1]])
    x = layers.Subtract(name="meet")([x, skip])
    return keras.Model(inputs, layers.Dense(outputs, name="score")(x))


@pytest.mark.parametrize("depths", [(0, 3), (3, 0), (2, 2)])
def test_branches_are_matched_by_what_they_read_not_by_their_depth(depths):
    # Given that `skip` may stand at another depth in each tower.
    towers = {"a": _with_branches(3, depths[0]), "b": _with_branches(2, depths[1])}
    _distinct(*towers.values())
    for name in ("left", "right"):
        weights = towers["a"].get_layer(name).get_weights()
        towers["b"].get_layer(name).set_weights(weights)

    model = split(towers, "at")

    assert {x.name for x in model.layers if "shared" in x.name} == {
        "shared_left",
        "shared_right",
        "shared_skip",
    }
    _assert_outputs_are_those_apart(model, towers)


def test_twin_branches_are_matched_by_their_names():
    towers = {
        "a": _with_branches(3, depth=1),
        "b": _with_branches(2, depth=1, order=("right", "left")),
    }

    with pytest.raises(ValueError, match=r"tower of 'b'.*'skip'"):
        split(towers, "at")


def test_the_order_of_what_a_shared_layer_reads_counts():
    def build(outputs, swap):
        inputs = keras.Input((5,), name="features")
        a = layers.Dense(4, name="left")(inputs)
        b = layers.Activation("tanh", name="right")(a)
        x = layers.Subtract(name="meet")([b, a] if swap else [a, b])
        return keras.Model(inputs, layers.Dense(outputs, name="score")(x))

    with pytest.raises(ValueError, match="tower of 'b' has 'meet'"):
        split({"a": build(3, False), "b": build(2, True)}, "score")


def _scaled_tower(factor):
    inputs = keras.Input((5,), name="features")
    return keras.Model(inputs, layers.Dense(2, name="score")(inputs * factor))


def _wired_tower(swap):
    inner = keras.Input((5,))
    a = layers.Dense(4)(inner)
    b = layers.Activation("tanh")(a)
    block = keras.Model(inner, layers.Subtract()([b, a] if swap else [a, b]))
    block.name = "block"
    inputs = keras.Input((5,), name="features")
    return keras.Model(inputs, layers.Dense(2, name="score")(block(inputs)))


def _with_twin(twin):
    inputs = keras.Input((5,), name="features")
    x = layers.Dense(4, name="score")(layers.Dense(4, name="left")(inputs))
    if twin:
        x = layers.Subtract(name="meet")([x, layers.Dense(4, name="right")(inputs)])
    return keras.Model(inputs, x)


SPLIT_ERRORS = {
    "a twin that the first has not": (
        lambda: {"a": _with_twin(False), "b": _with_twin(True)},
        "score",
        "tower of 'b' has 'right' where the first has 'nothing'",
    ),
    "unknown layer": (
        lambda: {"a": _fcn(3), "b": _fcn(2)},
        "con4",
        r"tower of 'a' has no layer 'con4'.*Did you mean one of \['conv4'",
    ),
    "other arguments below": (
        lambda: {"a": _dense_tower(3, units=4), "b": _dense_tower(2, units=6)},
        "two",
        "same layers up to where they split.*tower of 'b' has 'one' where.*'one'",
    ),
    "other constants below": (
        lambda: {"a": _scaled_tower(2.0), "b": _scaled_tower(3.0)},
        "score",
        "tower of 'b' has 'multiply.*' where the first has 'multiply.*other arguments",
    ),
    "nested models of other wiring below": (
        lambda: {"a": _wired_tower(swap=False), "b": _wired_tower(swap=True)},
        "score",
        "tower of 'b' has 'block/subtract.*' where the first has 'block/subtract.*'",
    ),
    "another kind below": (
        lambda: {
            "a": _sequential(2),
            "b": keras.Sequential(
                [
                    keras.Input((9, 7, 3)),
                    layers.DepthwiseConv2D(3, name="conv"),
                    layers.BatchNormalization(name="norm"),
                    layers.GlobalMaxPooling2D(name="pool"),
                ]
            ),
        },
        "pool",
        "tower of 'b' has 'conv' where the first has 'conv', of another kind",
    ),
    "fewer layers below": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        {"a": "score", "b": "two"},
        "tower of 'b' has 'nothing' where the first has 'two'",
    ),
    "more layers below": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        {"a": "two", "b": "score"},
        "tower of 'b' has 'two' where the first has 'nothing'",
    ),
    "a layer used below and above": (
        lambda: {"a": _used_below_and_above(), "b": _used_below_and_above()},
        "two",
        "tower of 'a' calls its layer 'one' below the split and above it",
    ),
    "one layer used twice, or two layers": (
        lambda: {"a": _two_alike(), "b": _used_twice()},
        "two",
        "tower of 'b' has 'one' where the first has 'one'",
    ),
    "unequal inputs": (
        lambda: {"a": _fcn(3, (33, 65)), "b": _fcn(3, (65, 33))},
        "conv2",
        "same shape and dtype.*None, 33, 65, 3.*None, 65, 33, 3",
    ),
    "one tower": (
        lambda: {"a": _dense_tower(3)},
        "two",
        "`towers` must be a dict of at least two",
    ),
    "a dict that lacks a task": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        {"b": "two"},
        r"one for each of \['a', 'b'\]",
    ),
    "a list": (
        lambda: {"a": _dense_tower(3), "b": _dense_tower(2)},
        ["two"],
        r"the name of a layer, or a dict.*Received: \['two'\]",
    ),
}


@pytest.mark.parametrize(
    ("towers", "at", "words"), SPLIT_ERRORS.values(), ids=SPLIT_ERRORS.keys()
)
def test_towers_that_cannot_be_split_are_an_error(towers, at, words):
    towers = towers()

    with pytest.raises(ValueError, match=words):
        split(towers, at)


def tower_of(data_format, channels=4):
    image = keras.Input((8, 8, 3) if data_format == "channels_last" else (3, 8, 8))
    x = keras.layers.Conv2D(channels, 3, data_format=data_format, name="conv")(image)
    x = keras.layers.ReLU(name="relu")(x)
    x = keras.layers.GlobalAveragePooling2D(data_format)(x)
    return keras.Model(image, keras.layers.Dense(2, name="score")(x))


@pytest.mark.parametrize("project", [False, True])
def test_units_have_their_channels_where_the_towers_have(project):
    first = {"a": tower_of("channels_first"), "b": tower_of("channels_first")}
    unit = stitch(first, ["relu"], project=project).get_layer("cross_stitch_relu")
    assert unit.data_format == "channels_first"
    assert tuple(unit.alpha.shape) == (2, 2, 4)

    mixed = {"a": tower_of("channels_last"), "b": tower_of("channels_first")}
    words = r"At the tap 'relu'.*'a': \['channels_last'\]; 'b': \['channels_first'\]"
    with pytest.raises(ValueError, match=words):
        stitch(mixed, ["relu"], shared_input=False, project=project)


def exchanging(exchange, behind):
    """A tower whose maps have their channels at another place behind a layer."""
    image = keras.Input((8, 7, 3), name="image")
    x = keras.layers.Conv2D(4, 3, name="conv", data_format="channels_last")(image)
    x = keras.layers.ReLU(name="relu")(x)
    x = keras.layers.ReLU(name="behind")(exchange(x))
    return keras.Model(image, keras.layers.Dense(2, name="score")(behind(x)))


@pytest.mark.parametrize(
    "exchange",
    [
        keras.layers.Permute((3, 1, 2)),
        lambda x: ops.transpose(x, (0, 3, 1, 2)),
        lambda x: ops.moveaxis(x, -1, 1),
        lambda x: ops.swapaxes(x, 1, 3),
    ],
)
def test_channels_are_where_an_exchange_of_axes_puts_them(exchange):
    pool = keras.layers.GlobalAveragePooling2D("channels_first")
    towers = {task: exchanging(exchange, pool) for task in "ab"}
    model = stitch(towers, ["relu", "behind"])

    unit = model.get_layer("cross_stitch_behind")
    assert unit.data_format == "channels_first"
    assert tuple(unit.alpha.shape) == (2, 2, 4)
    assert tuple(model.get_layer("cross_stitch_relu").alpha.shape) == (2, 2, 4)


def test_channels_at_a_place_that_nothing_says_are_asked_for():
    towers = {
        task: exchanging(keras.layers.Permute((3, 1, 2)), keras.layers.Flatten())
        for task in "ab"
    }
    words = r"'behind'.*'a': \['channels_first', 'channels_last'\].*say that of what"
    with pytest.raises(ValueError, match=words):
        stitch(towers, ["behind"])

    model = stitch(towers, ["behind"], data_format="channels_first")
    assert tuple(model.get_layer("cross_stitch_behind").alpha.shape) == (2, 2, 4)
