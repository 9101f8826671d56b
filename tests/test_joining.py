"""Layers that are called more than once, hold others, or give several outputs."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_cross_stitch import CrossStitch, split, stitch

RNG = np.random.default_rng(0)


def distinct(model, seed):
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "seed" not in variable.path:
            variable.assign(rng.uniform(0.2, 1.0, variable.shape))
    return model


def assert_as_apart(model, towers, data):
    together = model(data)
    for task, tower in towers.items():
        expected = ops.convert_to_numpy(tower(data))
        np.testing.assert_array_equal(ops.convert_to_numpy(together[task]), expected)
        assert expected.std() > 0


def trained_step(model, data):
    labels = {task: np.zeros(x.shape, "f") for task, x in model(data).items()}
    model.compile(keras.optimizers.SGD(0.01), loss="mse")
    assert np.isfinite(model.train_on_batch(data, labels)).all()


def one_activation(outputs):
    """One `ReLU` object called at three places."""
    act = layers.ReLU(name="act")
    x = inputs = keras.Input((6,), name="features")
    for name in ("one", "two", "three"):
        x = act(layers.Dense(4, name=name)(x))
    return keras.Model(inputs, layers.Dense(outputs, name="score")(x))


def siamese(outputs):
    """One encoder, a nested model, for both halves of the input."""
    half = keras.Input((3,))
    x = layers.BatchNormalization(name="norm")(layers.Dense(4, name="enc")(half))
    encoder = keras.Model(half, x, name="encoder")
    inputs = keras.Input((6,), name="features")
    merged = layers.Subtract(name="apart")(
        [encoder(inputs[:, :3]), encoder(inputs[:, 3:])]
    )
    return keras.Model(inputs, layers.Dense(outputs, name="score")(merged))


def tied_embedding(outputs):
    """The layer is its own inverse: called with other arguments the second time."""
    tied = Tied(6, 4, name="tied")
    inputs = keras.Input((6,), name="features")
    x = layers.Dense(4, name="mid")(tied(inputs))
    return keras.Model(inputs, layers.Dense(outputs, name="score")(tied(x, back=True)))


@keras.saving.register_keras_serializable("test_joining")
class Tied(layers.Layer):
    def __init__(self, size, units, **kwargs):
        super().__init__(**kwargs)
        self.size, self.units = size, units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(self.size, self.units), name="kernel")

    def call(self, x, back=False):
        return x @ (ops.transpose(self.kernel) if back else self.kernel)

    def get_config(self):
        return {**super().get_config(), "size": self.size, "units": self.units}


def one_cell(outputs):
    """One RNN cell in two branches."""
    cell = layers.GRUCell(4, name="cell")
    inputs = keras.Input((6,), name="features")
    steps = layers.Reshape((3, 2), name="steps")(inputs)
    left = layers.RNN(cell, name="left")(steps)
    right = layers.RNN(cell, go_backwards=True, name="right")(steps)
    x = layers.Concatenate(name="all")([left, right])
    return keras.Model(inputs, layers.Dense(outputs, name="score")(x))


def inside_and_outside(outputs):
    both = layers.Dense(6, name="both")
    inner = keras.Sequential([keras.Input((6,)), both], name="inner")
    inputs = keras.Input((6,), name="features")
    x = both(layers.Dense(6, name="mid")(inner(inputs)))
    return keras.Model(inputs, layers.Dense(outputs, name="score")(x))


def one_frozen(outputs):
    tower = siamese(outputs)
    tower.get_layer("encoder").get_layer("enc").trainable = False
    return tower


BUILDS = {
    "an activation": (one_activation, ["act:0", "two", "act:2"]),
    "a siamese encoder": (siamese, ["encoder/enc:0", "encoder:1", "apart"]),
    "a tied embedding": (tied_embedding, ["tied:0", "mid", "tied:1"]),
    "inside and outside": (inside_and_outside, ["inner/both", "mid", "both"]),
    "a frozen part": (one_frozen, ["encoder/enc:1", "apart"]),
}
DATA = RNG.normal(size=(5, 6)).astype("float32")


@pytest.fixture(params=BUILDS.values(), ids=BUILDS.keys())
def build(request):
    return request.param


def two(build):
    return {"a": distinct(build(2), 1), "b": distinct(build(3), 2)}


def test_a_layer_that_is_called_more_than_once_is_copied_once(build, tmp_path):
    build, at = build
    towers = two(build)

    model = stitch(towers, at, same_task=1.0)

    assert_as_apart(model, towers, DATA)
    units = [x for x in model.layers if isinstance(x, CrossStitch)]
    assert {x.name for x in units} == {
        f"cross_stitch_{name.replace('/', '_').replace(':', '_')}" for name in at
    }
    of_towers = sum(len(tower.weights) for tower in towers.values())
    assert len(model.weights) == of_towers + len(units)
    paths = [v.path for v in model.weights]
    assert len(set(paths)) == len(paths)
    trainable = sum(len(tower.trainable_weights) for tower in towers.values())
    assert len(model.trainable_weights) == trainable + len(units)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(loaded.weights) == len(model.weights)
    assert_as_apart(loaded, towers, DATA)
    trained_step(loaded, DATA)


def test_the_towers_stay_as_they_are(build):
    build, at = build
    towers = two(build)
    before = {
        task: (tower(DATA), tower.get_weights()) for task, tower in towers.items()
    }

    model = stitch(towers, at)
    for weight in model.trainable_weights:
        weight.assign_add(ops.ones_like(weight))

    for task, (output, weights) in before.items():
        np.testing.assert_array_equal(towers[task](DATA), output)
        for actual, expected in zip(towers[task].get_weights(), weights, strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_one_cell_of_two_layers_stays_one():
    # Not saved: Keras does not load such a tower itself, nor what follows.
    towers = two(one_cell)

    model = stitch(towers, ["left", "right", "all"], same_task=1.0)

    assert_as_apart(model, towers, DATA)
    assert len(model.weights) == 2 * (3 + 2) + 3
    assert model.get_layer("a_left").cell is model.get_layer("a_right").cell
    trained_step(model, DATA)


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_a_layer_may_be_wrapped_and_called_by_itself(wrapped_first):
    def build(outputs):
        dense = layers.Dense(2, name="dense")
        each = layers.TimeDistributed(dense, name="each")
        inputs = keras.Input((6,), name="features")
        steps = layers.Reshape((3, 2))(inputs)
        x = dense(each(steps)) if wrapped_first else each(dense(steps))
        x = layers.Flatten(name="flat")(x)
        return keras.Model(inputs, layers.Dense(outputs, name="score")(x))

    towers = two(build)

    model = stitch(towers, ["dense", "flat"], same_task=1.0)

    assert_as_apart(model, towers, DATA)
    assert len(model.weights) == 4 + 4 + 2
    assert {"a_dense", "b_each"} <= {x.name for x in model.layers}


def test_a_tap_at_one_call_leaves_the_other_calls_alone():
    towers = two(one_activation)
    model = stitch(towers, ["act:1"], per="layer")
    model.get_layer("cross_stitch_act_1").alpha.assign([[0.0, 1.0], [1.0, 0.0]])

    def to_second(tower):
        x = DATA
        for name in ("one", "two"):
            x = ops.relu(tower.get_layer(name)(x))
        return x

    together = model(DATA)
    for task, other in (("a", "b"), ("b", "a")):
        x = ops.relu(towers[task].get_layer("three")(to_second(towers[other])))
        expected = towers[task].get_layer("score")(x)
        np.testing.assert_allclose(together[task], expected, rtol=1e-5, atol=1e-6)


def test_the_calls_of_a_siamese_encoder_are_in_their_order():
    towers = two(siamese)
    model = stitch(towers, ["encoder:1"], per="layer")
    model.get_layer("cross_stitch_encoder_1").alpha.assign(np.zeros((2, 2)))

    together = model(DATA)

    # Given that the second half is gone.
    for task, tower in towers.items():
        first = tower.get_layer("encoder")(DATA[:, :3])
        np.testing.assert_allclose(
            together[task], tower.get_layer("score")(first), rtol=1e-5, atol=1e-6
        )


def test_a_frozen_encoder_that_is_called_twice_is_built_once():
    encoder = siamese(1).get_layer("encoder")
    encoder.trainable = False

    def build(outputs):
        inputs = keras.Input((6,), name="features")
        both = [encoder(inputs[:, :3]), encoder(inputs[:, 3:])]
        x = layers.Dense(4, name="tap")(layers.Concatenate()(both))
        return keras.Model(inputs, layers.Dense(outputs, name="score")(x))

    towers = two(build)
    model = stitch(towers, ["tap"], same_task=1.0)

    assert_as_apart(model, towers, DATA)
    shared = [x.name for x in model.layers if x.name.startswith("shared") and x.weights]
    assert sorted(shared) == ["shared_encoder_enc", "shared_encoder_norm"]


def frozen_tied(outputs, between=True, twice=True):
    """A frozen encoder, called again behind what is trained, and a frozen trunk."""
    keras.utils.set_random_seed(0)
    encoder, *both = (
        layers.Dense(6, name=name, trainable=False) for name in ("enc", "one", "two")
    )
    inputs = keras.Input((6,), name="features")
    x = layers.Dense(6, name="trunk", trainable=False)(inputs)
    x = layers.ReLU(name="relu")(x)
    first, second = (encoder, encoder) if twice else both
    x = first(x)
    if between:
        x = layers.Dense(6, name="mid")(x)
    x = second(x)
    x = layers.Dense(6, name="last")(x)
    tower = keras.Model(inputs, layers.Dense(outputs, name="score")(x))
    if not twice:
        tower.get_layer("two").set_weights(tower.get_layer("one").get_weights())
    return tower


def with_weights(model):
    return {x.name for x in model.layers if x.weights}


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_a_frozen_layer_that_is_not_shared_with_all_its_calls_is_each_tower_s_own(
    tasks,
):
    towers = {f"t{n}": frozen_tied(n + 1) for n in range(tasks)}

    model = stitch(towers, ["mid"], same_task=1.0)

    assert_as_apart(model, towers, DATA)
    shared = {name for name in with_weights(model) if name.startswith("shared")}
    assert shared == {"shared_trunk"}
    encoders = {name for name in with_weights(model) if name.endswith("enc")}
    assert encoders == {f"t{n}_enc" for n in range(tasks)}
    assert len(model.get_layer("t0_enc")._inbound_nodes) == 2
    above = split(towers, "trunk")
    assert_as_apart(above, towers, DATA)
    assert {"shared_trunk", "t0_enc", "t1_enc"} <= with_weights(above)
    whole = {f"t{n}": frozen_tied(n + 1, between=False) for n in range(tasks)}
    assert {"shared_trunk", "shared_enc"} <= with_weights(stitch(whole, ["last"]))


@pytest.mark.parametrize("tied_first", [True, False])
def test_one_frozen_layer_and_two_equal_ones_are_not_built_once(tied_first):
    towers = {
        "a": frozen_tied(1, between=False, twice=tied_first),
        "b": frozen_tied(2, between=False, twice=not tied_first),
    }
    tied, two = towers.values() if tied_first else reversed(towers.values())
    two.get_layer("one").set_weights(tied.get_layer("enc").get_weights())
    two.get_layer("two").set_weights(tied.get_layer("enc").get_weights())

    model = stitch(towers, ["last"], same_task=1.0)

    assert_as_apart(model, towers, DATA)
    t, o = "ab" if tied_first else "ba"
    assert {"shared_trunk", f"{t}_enc", f"{o}_one", f"{o}_two"} <= with_weights(model)


def test_a_frozen_layer_within_another_and_by_itself_stays_one():
    def build(outputs):
        keras.utils.set_random_seed(0)
        wrapped = layers.Dense(6, name="inner", trainable=False)
        inputs = keras.Input((4, 6), name="features")
        x = layers.TimeDistributed(wrapped, name="outer")(inputs)
        x = layers.Dense(6, name="mid")(x)
        return keras.Model(inputs, layers.Dense(outputs, name="score")(wrapped(x)))

    towers = {"a": build(1), "b": build(2)}
    for tower in towers.values():
        tower.get_layer("outer").trainable = False
    data = RNG.normal(size=(3, 4, 6)).astype("float32")

    model = stitch(towers, ["mid"], same_task=1.0)

    assert_as_apart(model, towers, data)
    assert model.get_layer("a_outer").layer is model.get_layer("a_inner")
    with pytest.raises(ValueError, match="'a' calls its layer 'outer' below the split"):
        split(towers, "inner")


def test_a_split_shares_a_layer_with_all_of_its_calls():
    towers = two(siamese)
    model = split(towers, "score")
    towers["b"].get_layer("encoder").set_weights(
        towers["a"].get_layer("encoder").get_weights()
    )

    assert_as_apart(model, towers, DATA)
    names = {x.name for x in model.layers if x.weights}
    assert names == {
        "shared_encoder_enc",
        "shared_encoder_norm",
        "a_score",
        "b_score",
    }


class Holder(layers.Layer):
    """Holds a layer that its config does not have under the attribute's name."""

    def __init__(self, held, **kwargs):
        super().__init__(**kwargs)
        self.inner = held

    def build(self, shape):
        if not self.inner.built:
            self.inner.build(shape)

    def call(self, x):
        return self.inner(x)

    def get_config(self):
        config = keras.saving.serialize_keras_object(self.inner)
        return {**super().get_config(), "held": config}

    @classmethod
    def from_config(cls, config):
        held = keras.saving.deserialize_keras_object(config.pop("held"))
        return cls(held, **config)


def test_weights_that_would_no_more_be_tied_are_an_error():
    def build():
        held = layers.Dense(6, name="held")
        inputs = keras.Input((6,), name="features")
        x = Holder(held, name="second")(Holder(held, name="first")(inputs))
        return keras.Model(inputs, x)

    with pytest.raises(ValueError, match=r"'first' and 'second' have the weight.*held"):
        stitch({"a": build(), "b": build()}, [])


# Several outputs


def recurrent(outputs):
    steps = keras.Input((6,), name="features")
    x = layers.Reshape((3, 2))(steps)
    whole, state, memory = layers.LSTM(
        4, return_sequences=True, return_state=True, name="lstm"
    )(x)
    x = layers.Concatenate()([ops.mean(whole, axis=1), state, memory])
    return keras.Model(steps, layers.Dense(outputs, name="score")(x))


def with_scores(outputs):
    steps = keras.Input((6,), name="features")
    x = layers.Reshape((3, 2))(steps)
    x, scores = layers.MultiHeadAttention(2, 3, name="mha")(
        x, x, return_attention_scores=True
    )
    x = layers.Concatenate()([layers.Flatten()(x), layers.Flatten()(scores)])
    return keras.Model(steps, layers.Dense(outputs, name="score")(x))


def pyramid(outputs):
    inputs = keras.Input((6,))
    fine = layers.Dense(5, name="fine")(inputs)
    levels = {"p3": fine, "p4": layers.Dense(3, name="coarse")(fine)}
    backbone = keras.Model(inputs, levels, name="pyramid")
    features = keras.Input((6,), name="features")
    found = backbone(features)
    x = layers.Concatenate()([found["p3"], found["p4"]])
    return keras.Model(features, layers.Dense(outputs, name="score")(x))


@pytest.mark.parametrize(
    ("build", "at"),
    [
        (recurrent, ["lstm:out0", "lstm:out2"]),
        (recurrent, ["lstm:out2", "lstm:out1"]),
        (with_scores, ["mha:out1"]),
        (with_scores, ["mha:out0"]),
        (pyramid, ["pyramid:out1"]),
        (pyramid, ["pyramid:out0", "pyramid:out1"]),
    ],
)
def test_one_of_several_outputs_is_tapped(build, at, tmp_path):
    towers = two(build)

    model = stitch(towers, at, same_task=1.0)

    assert_as_apart(model, towers, DATA)
    apart = stitch(towers, at, same_task=0.0)(DATA)
    assert np.abs(ops.convert_to_numpy(apart["a"] - towers["a"](DATA))).max() > 1e-4
    model.save(tmp_path / "model.keras")
    assert_as_apart(keras.saving.load_model(tmp_path / "model.keras"), towers, DATA)


def test_a_call_and_an_output_are_both_named():
    def build(outputs):
        lstm = layers.LSTM(2, return_sequences=True, return_state=True, name="lstm")
        inputs = keras.Input((6,), name="features")
        x, *_ = lstm(layers.Reshape((3, 2))(inputs))
        x, state, _ = lstm(x)
        x = layers.Concatenate()([layers.Flatten()(x), state])
        return keras.Model(inputs, layers.Dense(outputs, name="score")(x))

    towers = two(build)
    model = stitch(towers, ["lstm:0:out0", "lstm:1:out1"], same_task=1.0)
    assert_as_apart(model, towers, DATA)

    with pytest.raises(ValueError, match=r"'lstm:0:out0': .*'lstm:1:out2'.*'lstm:1'"):
        stitch(towers, ["lstm:1"])


# Names of taps, and taps of some tasks


@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_with_a_colon_in_its_name_is_tapped(nested):
    def build(outputs):
        features = keras.Input((5,), name="features")
        x = layers.Dense(4, name="conv:1")(features)
        if nested:
            x = keras.Model(features, x, name="inner")(features)
        return keras.Model(features, layers.Dense(outputs, name="score")(x))

    towers = {task: distinct(build(n), n) for n, task in enumerate("abc", 1)}
    model = stitch(towers, ["inner/conv:1" if nested else "conv:1"], same_task=1.0)

    unit = "cross_stitch_inner_conv_1" if nested else "cross_stitch_conv_1"
    assert model.get_layer(unit).alpha.shape == (3, 3, 4)
    assert_as_apart(model, towers, RNG.normal(size=(3, 5)).astype("f"))


def test_a_tap_may_have_a_name():
    towers = two(one_activation)

    model = stitch(
        towers, {"early": "one", "late": {"a": "two", "b": "three"}}, same_task=1.0
    )

    units = [x.name for x in model.layers if isinstance(x, CrossStitch)]
    assert units == ["cross_stitch_early", "cross_stitch_late"]
    assert_as_apart(model, towers, DATA)


def test_a_tap_may_be_of_some_of_the_tasks():
    towers = {**two(one_activation), "c": distinct(one_activation(4), 3)}

    model = stitch(towers, ["one", {"a": "two", "c": "two"}], same_task=1.0)

    assert_as_apart(model, towers, DATA)
    assert model.get_layer("cross_stitch_one").tasks == ("a", "b", "c")
    assert model.get_layer("cross_stitch_two").tasks == ("a", "c")
    with pytest.raises(ValueError, match=r"each of \['a', 'b', 'c'\], or for two of"):
        stitch(towers, [{"a": "one"}])


def test_names_are_proposed_whatever_their_case_and_five_at_most():
    def build():
        x = inputs = keras.Input((6,), name="features")
        for n in range(30):
            x = layers.Dense(6, name=f"Block{n}_conv")(x)
        return keras.Model(inputs, x)

    for name in ("block7_CONV", "nothing_like_it"):
        with pytest.raises(ValueError, match="Did you mean one of") as caught:
            stitch({"a": build(), "b": build()}, [name])
        proposed = str(caught.value).split("one of ")[1]
        assert proposed.count("'") <= 10
        assert name.startswith("nothing") or "'Block7_conv'" in proposed


def test_unequal_shapes_name_the_layers_that_would_fit():
    def build(units):
        x = inputs = keras.Input((6,), name="features")
        for n in units:
            x = layers.Dense(n, name=f"of_{n}")(x)
        return keras.Model(inputs, x)

    with pytest.raises(ValueError, match=r"\(4,\), are, in the tower of 'b': \['of_4'"):
        stitch(
            {"a": build([4, 2]), "b": build([3, 4, 2])}, [{"a": "of_4", "b": "of_3"}]
        )


def test_labels_in_the_order_of_the_towers():
    towers = {"z": distinct(one_activation(2), 1), "a": distinct(one_activation(3), 2)}
    model = stitch(towers, [])

    assert list(model.output) == ["z", "a"]
    assert list(model.predict(DATA, verbose=0)) == ["z", "a"]
