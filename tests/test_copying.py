"""Towers copied whole: state, frozen parts, functions, inputs, nested models."""

import functools
import warnings
from fractions import Fraction

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_cross_stitch import (
    CrossStitch,
    LearningRateGroups,
    common_taps,
    split,
    stitch,
)
from keras_cross_stitch.opening import Tower

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(1, 2, (7, 5)).astype("float32")
WORDS = np.array([["cat", "dog"], ["emu", "cat"], ["yak", "dog"]])
NUMBERS = np.array([[3, 5], [7, 3], [9, 5]])


def _tower(first, *, shape=(5,), dtype="float32", outputs=2, units=4):
    """Input, the layers given, `tap`, `score`."""
    x = inputs = keras.Input(shape, dtype=dtype, name="features")
    for layer in first:
        x = layer(x)
    x = layers.Dense(units, name="tap")(x)
    return keras.Model(inputs, layers.Dense(outputs, name="score")(x))


def _assert_as_apart(model, towers, data):
    together = model(data)
    for task, tower in towers.items():
        expected = ops.convert_to_numpy(tower(data))
        np.testing.assert_array_equal(ops.convert_to_numpy(together[task]), expected)
        assert expected.std() > 0


def _joined(towers, join="stitch"):
    """The towers joined so that they compute as apart."""
    if join == "split":
        return split(towers, next(iter(towers.values())).layers[1].name)
    return stitch(towers, ["tap"], same_task=1.0)


# Adapted state


def _adapted(layer, data):
    layer.adapt(data)
    return layer


def _as_floats(x):
    return ops.cast(x, "float32")


ADAPTED = {
    "discretization to int": lambda: [
        _adapted(layers.Discretization(num_bins=4, name="adapted"), FEATURES),
        layers.Rescaling(0.5),
    ],
    "discretization to one hot": lambda: [
        _adapted(
            layers.Discretization(num_bins=3, output_mode="one_hot", name="adapted"),
            FEATURES,
        ),
        layers.Flatten(),
    ],
    "normalization": lambda: [_adapted(layers.Normalization(name="adapted"), FEATURES)],
}
LOOKUPS = {
    "strings": (
        lambda: [_adapted(layers.StringLookup(name="adapted"), WORDS), _Floats()],
        WORDS,
    ),
    "strings to multi hot": (
        lambda: [
            _adapted(
                layers.StringLookup(output_mode="multi_hot", name="adapted"), WORDS
            )
        ],
        WORDS,
    ),
    "a string to one hot": (
        lambda: [
            _adapted(layers.StringLookup(output_mode="one_hot", name="adapted"), WORDS)
        ],
        WORDS[:, :1],
    ),
    "text to multi hot": (
        lambda: [
            _adapted(
                layers.TextVectorization(output_mode="multi_hot", name="adapted"),
                WORDS[:, 0],
            )
        ],
        WORDS[:, :1],
    ),
    "strings to tf-idf": (
        lambda: [
            _adapted(layers.StringLookup(output_mode="tf_idf", name="adapted"), WORDS)
        ],
        WORDS,
    ),
    "integers": (
        lambda: [_adapted(layers.IntegerLookup(name="adapted"), NUMBERS), _Floats()],
        NUMBERS,
    ),
    "a vocabulary that was given": (
        lambda: [layers.StringLookup(vocabulary=["cat", "emu"]), _Floats()],
        WORDS,
    ),
    "text": (
        lambda: [
            _adapted(
                layers.TextVectorization(
                    output_mode="count", name="adapted", pad_to_max_tokens=False
                ),
                WORDS[:, 0],
            )
        ],
        WORDS[:, :1],
    ),
}


@keras.saving.register_keras_serializable("test_copying")
class _Floats(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)

    def call(self, x):
        return ops.cast(x, "float32")


@pytest.mark.parametrize("join", ["stitch", "split"])
@pytest.mark.parametrize("build", ADAPTED.values(), ids=ADAPTED.keys())
def test_an_adapted_layer_stays_adapted(build, join):
    towers = {"a": _tower(build()), "b": _tower(build())}

    model = _joined(towers, join)

    _assert_as_apart(model, towers, FEATURES)


@pytest.mark.parametrize(("build", "data"), LOOKUPS.values(), ids=LOOKUPS.keys())
def test_a_vocabulary_comes_along(build, data):
    dtype = "string" if data.dtype.kind == "U" else "int64"
    towers = {task: _tower(build(), shape=data.shape[1:], dtype=dtype) for task in "ab"}
    data = ops.convert_to_tensor(data)

    model = _joined(towers)

    _assert_as_apart(model, towers, data)


def test_layers_adapted_to_other_words_are_not_built_once():
    def build(words):
        lookup = _adapted(layers.StringLookup(output_mode="multi_hot"), words)
        frozen = layers.Dense(3, trainable=False, kernel_initializer="ones")
        return _tower([lookup, frozen], shape=(2,), dtype="string")

    towers = {"a": build(WORDS), "b": build(WORDS[::-1, ::-1].copy()[:, 1:])}
    data = ops.convert_to_tensor(WORDS)

    model = stitch(towers, [], same_task=1.0)

    _assert_as_apart(model, towers, data)


# Frozen parts


@keras.saving.register_keras_serializable("test_copying")
class _Block(layers.Layer):
    """A composite layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(5)
        self.norm = layers.BatchNormalization()

    def build(self, shape):
        self.inner.build(shape)
        self.norm.build(shape)

    def call(self, x):
        return self.norm(self.inner(x))


class _Forgetful(layers.Layer):
    """Its config leaves out what the base class's has."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, x):
        return x @ self.kernel

    def compute_output_shape(self, shape):
        return *shape[:-1], self.units

    def get_config(self):
        return {"units": self.units}


def _trainable(model, prefix=""):
    names = sorted(v.path for v in model.trainable_variables)
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


@pytest.mark.slow
def test_a_frozen_part_of_a_composite_layer_stays_frozen():
    towers = {task: _tower([_Block(name="block")]) for task in "ab"}
    towers["a"].get_layer("block").norm.trainable = False

    model = stitch(towers, ["tap"])

    trainable = [v.path for v in model.get_layer("a_block").trainable_variables]
    assert len(trainable) == 2
    assert all("dense" in path for path in trainable)
    assert len(model.get_layer("b_block").trainable_variables) == 4
    # What is frozen infers, too: its moving mean stays.
    model.compile("sgd", loss="mse")
    moving = model.get_layer("a_block").norm.moving_mean.numpy()
    model.fit(FEATURES, {"a": FEATURES[:, :2], "b": FEATURES[:, :2]}, verbose=0)
    np.testing.assert_array_equal(
        model.get_layer("a_block").norm.moving_mean.numpy(), moving
    )


def test_a_frozen_projection_of_attention_stays_frozen():
    def build():
        inputs = keras.Input((3, 4), name="x")
        attention = layers.MultiHeadAttention(2, 2, name="attention")
        x = layers.Dense(4, name="tap")(attention(inputs, inputs))
        return keras.Model(inputs, x), attention

    (a, attention), (b, _) = build(), build()
    attention.query_dense.trainable = False

    model = stitch({"a": a, "b": b}, ["tap"])

    frozen = {v.path for v in model.weights} - set(_trainable(model))
    assert frozen == {
        "a_attention/query/kernel",
        "a_attention/query/bias",
    }


def test_a_layer_whose_config_says_little_stays_frozen_and_as_precise():
    towers = {"a": _tower([_Forgetful(3, dtype="float64")]), "b": _tower([])}
    layer = towers["a"].layers[1]
    layer.trainable = False

    model = stitch(towers, ["tap"])

    copy = model.get_layer(f"a_{layer.name}")
    assert not copy.trainable_variables
    assert copy.kernel.dtype == "float64"
    np.testing.assert_array_equal(copy.kernel, layer.kernel)


def test_a_frozen_variable_stays_frozen():
    towers = {task: _tower([layers.Dense(5, name="first")]) for task in "ab"}
    towers["a"].get_layer("first").bias.trainable = False

    model = stitch(towers, ["tap"])

    assert "a_first/bias" not in _trainable(model)
    assert "a_first/kernel" in _trainable(model)
    assert "b_first/bias" in _trainable(model)


class _FrozenFirst(layers.Layer):
    """Adds what is frozen as not trainable, which Keras lists behind the others."""

    def build(self, shape):
        kinds = {"scale": self.trainable, "shift": True}
        self.scale, self.shift = (
            self.add_weight((shape[-1],), name=name, trainable=trainable)
            for name, trainable in kinds.items()
        )

    def call(self, inputs):
        return inputs * self.scale + self.shift


def test_weights_that_the_copy_lists_in_another_order_are_told_by_their_names():
    towers = {task: _tower([_FrozenFirst(name="first")]) for task in "ab"}
    first = towers["a"].get_layer("first")
    first.trainable = False

    model = stitch(towers, ["tap"], same_task=1.0)

    copy = model.get_layer("a_first")
    assert [x.name for x in copy.weights] == ["shift", "scale"]
    np.testing.assert_array_equal(copy.scale, first.scale)
    np.testing.assert_array_equal(copy.shift, first.shift)
    assert not copy.trainable_variables


# Quantized towers


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_towers_are_stitched_by_units_that_are_not(mode):
    towers = {task: _tower([layers.Dense(6, name="first")]) for task in "ab"}
    for tower in towers.values():
        with pytest.warns(UserWarning, match="InputLayer does not have a `quantize`"):
            tower.quantize(mode)

    model = _joined(towers)

    _assert_as_apart(model, towers, FEATURES)
    unit = model.get_layer("cross_stitch_tap")
    assert unit.dtype_policy.name == "float32"
    assert model.get_layer("a_tap").dtype_policy.quantization_mode == mode


def test_lora_within_attention_is_merged_by_saving_and_loading(tmp_path):
    def build(outputs):
        inputs = keras.Input((4, 6), name="features")
        attention = layers.MultiHeadAttention(2, 3, name="tap")
        x = attention(inputs, inputs)
        tower = keras.Model(inputs, layers.Dense(outputs, name="score")(x))
        attention._query_dense.enable_lora(2)
        attention._value_dense.enable_lora(3)
        for weight in tower.trainable_weights:
            weight.assign(RNG.normal(size=weight.shape))
        return tower

    towers = {"a": build(1), "b": build(2)}
    said = r"'a', layer 'tap' \(MultiHeadAttention\).*LoRA.*save the tower and load it"
    with pytest.raises(ValueError, match=said):
        _joined(towers)

    loaded = {}
    for task, tower in towers.items():
        tower.save(tmp_path / f"{task}.keras")
        loaded[task] = keras.saving.load_model(tmp_path / f"{task}.keras")
    data = RNG.normal(size=(3, 4, 6)).astype("float32")
    together = _joined(loaded)(data)
    for task, tower in towers.items():
        np.testing.assert_allclose(together[task], tower(data), rtol=1e-4, atol=1e-4)


# Policies by path


def _by_path(outputs):
    """A tower of layers in bfloat16 and float64, as a map of policies by path says."""
    keras.utils.set_random_seed(0)
    policies = keras.dtype_policies.DTypePolicyMap("float32")
    policies["first"] = "mixed_bfloat16"
    policies["attention/(query|value)"] = "mixed_bfloat16"
    policies["each/inner"] = "float64"
    policies["tap"] = "bfloat16"
    inputs = keras.Input((4, 6), name="features")
    x = layers.Dense(6, dtype=policies, name="first")(inputs)
    x = layers.MultiHeadAttention(2, 3, dtype=policies, name="attention")(x, x)
    inner = layers.Dense(5, dtype=policies, name="inner")
    x = layers.TimeDistributed(inner, name="each")(x)
    x = layers.Dense(6, dtype=policies, name="tap")(x)
    return keras.Model(inputs, layers.Dense(outputs, dtype="float32", name="score")(x))


def _dtypes(layer):
    return [(x.compute_dtype, x.variable_dtype) for x in layer._flatten_layers()]


@pytest.mark.parametrize("join", ["stitch", "split"])
def test_policies_by_path_hold_for_the_copies(join, tmp_path):
    towers = {task: _by_path(n) for n, task in enumerate("abc", 1)}

    model = _joined(towers, join)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for joined in (model, loaded):
        for task, tower in towers.items():
            for layer in tower.layers[1:]:
                if joined is loaded and layer.name == "each":
                    continue  # Keras builds what is within by itself, by another path
                names = [f"{task}_{layer.name}", f"shared_{layer.name}"]
                (copy,) = [x for x in joined.layers if x.name in names]
                assert _dtypes(copy) == _dtypes(layer)
        if join == "stitch":
            unit = joined.get_layer("cross_stitch_tap")
            assert (unit.compute_dtype, unit.variable_dtype) == ("bfloat16",) * 2
    assert _dtypes(towers["a"].get_layer("attention"))[1][0] == "bfloat16"
    assert towers["a"].get_layer("each").layer.dtype == "float64"
    data = RNG.normal(size=(3, 4, 6)).astype("float32")
    _assert_as_apart(model, towers, data)


def test_layers_of_one_map_and_other_paths_are_not_alike():
    policies = keras.dtype_policies.DTypePolicyMap("float32")
    policies["half"] = "mixed_bfloat16"

    def build(name):
        keras.utils.set_random_seed(0)
        dense = layers.Dense(6, dtype=policies, name=name, trainable=False)
        return _tower([dense])

    towers = {"a": build("whole"), "b": build("half"), "c": build("full")}

    model = _joined(towers)

    assert {"shared_whole", "b_half"} <= _names(model)
    assert model.get_layer("b_half").compute_dtype == "bfloat16"
    _assert_as_apart(model, towers, FEATURES)


def test_a_layer_whose_config_has_no_dtype_gets_its_map():
    policies = keras.dtype_policies.DTypePolicyMap("float32")
    policies["first"] = "mixed_bfloat16"
    towers = {
        "a": _tower([_Forgetful(3, dtype=policies, name="first")]),
        "b": _tower([]),
    }
    assert towers["a"].layers[1].compute_dtype == "bfloat16"

    model = _joined(towers)

    assert model.get_layer("a_first").compute_dtype == "bfloat16"
    _assert_as_apart(model, towers, FEATURES)


# Functions, and layers of one's own


def _twice(x):
    return 2 * x


class _Plain(layers.Layer):
    """Takes no `**kwargs`, and is not registered."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, x):
        return self.factor * x


class _SaysTooMuch(layers.Layer):
    """Its config holds more than it can be constructed with."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x):
        return self.factor * x

    def get_config(self):
        return {**super().get_config(), "factor": 1.0, "derived": 2 * self.factor}


class _Array(layers.Layer):
    def __init__(self, factors, **kwargs):
        super().__init__(**kwargs)
        self.factors = factors

    def call(self, x):
        return x * ops.convert_to_tensor(self.factors, x.dtype)

    def get_config(self):
        return {**super().get_config(), "factors": self.factors}


def _scale(factor):
    return lambda x: factor * x


class _Cubes(keras.regularizers.Regularizer):
    def __call__(self, x):
        return ops.sum(ops.abs(x) ** 3)

    def get_config(self):
        return {}


class _Positive(keras.constraints.Constraint):
    def __call__(self, x):
        return ops.relu(x)


class _Filled(keras.initializers.Initializer):
    def __init__(self, value):
        self.value = value

    def __call__(self, shape, dtype=None):
        return ops.full(shape, self.value, dtype)

    def get_config(self):
        return {"value": self.value}


FUNCTIONS = {
    "a lambda": lambda: layers.Lambda(lambda x: np.float32(3) * x),
    "a closure": lambda: layers.Lambda(_scale(4.0)),
    "a named function": lambda: layers.Lambda(_twice, name="twice"),
    "an output shape": lambda: layers.Lambda(_twice, output_shape=lambda shape: shape),
    "an activation": lambda: layers.Dense(4, activation=_twice),
    "an initializer of one's own": lambda: layers.Dense(
        4, kernel_initializer=lambda shape, dtype=None: ops.ones(shape, dtype)
    ),
    "a regularizer of one's own": lambda: layers.Dense(4, kernel_regularizer=_Cubes()),
    "a wrapped constraint of one's own": lambda: layers.TimeDistributed(
        layers.Dense(3, bias_constraint=_Positive(), kernel_initializer=_Filled(0.3))
    ),
    "a wrapped model with an activation": lambda: layers.TimeDistributed(
        keras.Sequential([keras.Input((5,)), layers.Dense(3, activation=_twice)])
    ),
    "an array in a closure": lambda: layers.Lambda(_scale(np.arange(5.0, 10.0))),
    "a layer with an array in its config": lambda: _Array(np.arange(5.0, 10.0)),
    "a wrapped layer with an activation": lambda: layers.TimeDistributed(
        layers.Dense(3, activation=_twice)
    ),
    "a plain layer": lambda: _Plain(3.0),
    "a layer that says too much": lambda: _SaysTooMuch(3.0),
    "a layer that says little": lambda: _Forgetful(3),
    "a wrapped layer of one's own": lambda: layers.TimeDistributed(_Forgetful(3)),
}


@pytest.mark.parametrize("build", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_functions_and_layers_of_one_s_own_are_carried_over(build):
    towers = {}
    for task in "ab":
        inputs = keras.Input((2, 5), name="features")
        x = layers.Dense(4, name="tap")(build()(inputs))
        towers[task] = keras.Model(inputs, x)

    model = _joined(towers)

    _assert_as_apart(model, towers, RNG.normal(size=(3, 2, 5)).astype("float32"))


class _Positions(layers.Layer):
    """As long as the first sequence that it sees."""

    def build(self, shape):
        self.table = self.add_weight(shape[1:], "uniform", name="table")

    def call(self, x):
        return x + self.table[: x.shape[1]]


def test_a_layer_that_was_built_for_longer_inputs_is_copied_so():
    def build(outputs):
        positions = _Positions(name="positions")
        positions(np.zeros((1, 10, 5), "float32"))
        inputs = keras.Input((4, 5), name="features")
        x = layers.Flatten()(layers.Dense(3, name="tap")(positions(inputs)))
        return keras.Model(inputs, layers.Dense(outputs, name="score")(x))

    towers = {"a": build(2), "b": build(3)}
    model = stitch(towers, ["tap"], same_task=1.0)

    assert model.get_layer("a_positions").table.shape == (10, 5)
    _assert_as_apart(model, towers, RNG.normal(size=(3, 4, 5)).astype("float32"))


class _Grows(layers.Layer):
    def call(self, x):
        return x


def test_weights_that_do_not_fit_the_copy_name_the_layer():
    def build():
        grows = _Grows(name="grows")
        grows.extra = layers.Dense(4)
        grows.extra.build((None, 5))
        return _tower([grows])

    with pytest.raises(ValueError, match=r"'a', layer 'grows' \(_Grows\) has other"):
        stitch({"a": build(), "b": build()}, ["tap"])


class _Uncopiable(layers.Layer):
    """Given something that no config can hold."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def call(self, x):
        return x + float(self.number)


def test_what_a_layer_of_keras_is_given_is_said_to_be_at_fault():
    def build():
        leaky = functools.partial(keras.activations.leaky_relu, negative_slope=0.3)
        return _tower([layers.Dense(3, activation=leaky, name="leaky")])

    said = r"tower of 'a', layer 'leaky' \(Dense\) cannot be copied\. Give a layer of "
    said += (
        r"Keras's own what Keras can save: .*`functools\.partial`.*Keras says: Cannot"
    )
    with pytest.raises(ValueError, match=said) as caught:
        stitch({"a": build(), "b": build()}, ["tap"])
    assert "`**kwargs`" not in str(caught.value)


@pytest.mark.parametrize("others", [[], [_Uncopiable(Fraction(1, 2))]])
def test_a_layer_that_cannot_be_copied_is_named(others):
    towers = {"a": _tower(others), "b": _tower([_Uncopiable(Fraction(1, 3))])}

    with pytest.raises(
        ValueError,
        match=r"(?s)tower of 'b', layer '.*uncopiable.*' \(_Uncopiable\).*get_config",
    ):
        stitch(towers, ["tap"])


# Names


def test_names_that_collide_are_an_error():
    towers = {
        "age": _tower([layers.Dense(5, name="group_fc")]),
        "age_group": _tower([layers.Dense(5, name="fc")]),
    }

    with pytest.raises(
        ValueError,
        match=r"'age_group_fc': layer 'group_fc'.*'age', and layer 'fc'.*'age_group'",
    ):
        stitch(towers, ["tap"])


def test_a_task_whose_layer_is_called_as_a_unit_is_an_error():
    with pytest.raises(ValueError, match=r"'cross_stitch_tap'.*unit at 'tap'"):
        stitch({"cross_stitch": _tower([]), "b": _tower([])}, ["tap"])


# Inputs


def test_an_input_without_a_name_gets_one_that_stays(tmp_path):
    def build():
        inputs = keras.Input((5,))
        return keras.Model(inputs, layers.Dense(2, name="tap")(inputs))

    a, b = build(), build()
    a.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")

    for towers in ({"a": a, "b": b}, {"a": loaded, "b": b}):
        assert stitch(towers, ["tap"]).input.name == "input"
    apart = stitch({"a": a, "b": b}, [], shared_input=False)
    assert sorted(apart.input) == ["a", "b"]


def test_several_inputs_without_names_are_counted():
    def build():
        inputs = [keras.Input((5,)), keras.Input((5,))]
        x = layers.Subtract()([layers.Dense(3)(inputs[0]), layers.Dense(3)(inputs[1])])
        return keras.Model(inputs, layers.Dense(2, name="tap")(x))

    towers = {"a": build(), "b": build()}

    model = stitch(towers, ["tap"], same_task=1.0)

    assert [x.name for x in model.input] == ["input_1", "input_2"]
    data = [FEATURES, FEATURES[::-1]]
    together = model(data)
    for task, tower in towers.items():
        np.testing.assert_array_equal(together[task], tower(data))


def _of_two(names, swapped=False):
    """Called with two inputs, of which it takes the second from the first."""
    inputs = [keras.Input((5,), name=name) for name in names]
    one, two = inputs[::-1] if swapped else inputs
    x = layers.Dense(3, name="tap")(layers.Concatenate(name="both")([one, two]))
    return keras.Model(inputs, layers.Dense(2, name="score")(x))


ONE_TWO, TWO_ONE = ["input_1", "input_2"], ["input_2", "input_1"]
NUMBERED = {
    "in another order": [(ONE_TWO, False), (TWO_ONE, True)],
    "the second first": [(TWO_ONE, True), (ONE_TWO, False)],
    "of three": [(ONE_TWO, False), (ONE_TWO, False), (TWO_ONE, True)],
    "all of another order": [(TWO_ONE, True), (TWO_ONE, True)],
    "of both orders": [(TWO_ONE, n % 2 == 0) for n in range(5)],
}


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("kinds", NUMBERED.values(), ids=NUMBERED)
def test_inputs_that_have_numbers_keep_them(kinds, shared_input):
    towers = {task: _of_two(*kind) for task, kind in zip("abcde", kinds, strict=False)}

    model = stitch(towers, ["tap"], same_task=1.0, shared_input=shared_input)

    data = {"input_1": FEATURES, "input_2": FEATURES[::-1] + 1}
    given = data
    if not shared_input:
        given = {f"{task}_{x}": data[x] for task in towers for x in data}
    together = model(given)
    for task, tower in towers.items():
        np.testing.assert_array_equal(together[task], tower(data))


def test_made_up_names_of_one_set_of_inputs_belong_together():
    inputs = [keras.Input((5,)), keras.Input((5,))]
    x = layers.Dense(3, name="tap")(layers.Concatenate()(inputs))
    towers = {"a": keras.Model(inputs, x), "b": keras.Model(inputs[::-1], x)}

    model = stitch(towers, ["tap"], same_task=1.0)

    assert [x.name for x in model.input] == ONE_TWO
    together = model([FEATURES, FEATURES[::-1]])
    np.testing.assert_array_equal(together["a"], together["b"])
    expected = towers["b"]([FEATURES[::-1], FEATURES])
    np.testing.assert_array_equal(together["b"], expected)


@pytest.mark.parametrize(
    "names",
    [(["input_3", "input_4"], ["input_1", "input_2"]), (["input_5", "input_4"],) * 2],
)
def test_numbers_that_were_counted_on_are_those_of_the_places(names):
    towers = {task: _of_two(x) for task, x in zip("ab", names, strict=True)}

    model = stitch(towers, ["tap"], same_task=1.0)

    assert [x.name for x in model.input] == ONE_TWO
    together = model([FEATURES, FEATURES[::-1]])
    for task, tower in towers.items():
        expected = tower([FEATURES, FEATURES[::-1]])
        np.testing.assert_array_equal(together[task], expected)


def test_keys_of_inputs_stay_though_they_are_numbers():
    def build(keys):
        inputs = {key: keras.Input((5,), name=key) for key in keys}
        x = layers.Concatenate()([inputs[key] for key in keys])
        return keras.Model(inputs, layers.Dense(3, name="tap")(x))

    towers = {task: build(["input_2", "input_7"]) for task in "ab"}

    model = stitch(towers, ["tap"], same_task=1.0)

    data = {"input_2": FEATURES, "input_7": FEATURES[::-1]}
    together = model(data)
    for task, tower in towers.items():
        np.testing.assert_array_equal(together[task], tower(data))


def test_inputs_whose_names_collide_are_an_error():
    towers = {"a": _of_two(["b_c", "d"]), "a_b": _of_two(["c", "e"])}

    with pytest.raises(
        ValueError,
        match=r"'a_b_c': an input of the tower of 'a', and an input .*'a_b'\. Give a",
    ):
        stitch(towers, ["tap"], shared_input=False)


def test_optional_and_sparse_inputs_stay_so():
    @keras.saving.register_keras_serializable("test_copying")
    class Either(layers.Layer):
        def call(self, x, extra=None):
            return x if extra is None else x + extra

        def compute_output_spec(self, x, extra=None):
            return keras.KerasTensor(x.shape, x.dtype)

    def build():
        inputs = keras.Input((5,), name="x", sparse=True)
        extra = keras.Input((4,), name="extra", optional=True)
        x = Either()(layers.Dense(4, name="tap")(inputs), extra=extra)
        return keras.Model([inputs, extra], x)

    towers = {"a": build(), "b": build()}

    model = stitch(towers, ["tap"], same_task=1.0)

    by_name = {layer.name: layer for layer in model.layers}
    assert by_name["x"].output.sparse
    assert by_name["extra"].optional
    together = model([FEATURES, None])
    for task, tower in towers.items():
        np.testing.assert_array_equal(together[task], tower([FEATURES, None]))


def test_a_ragged_input_stays_so():
    words = keras.Input((None,), dtype="int64", ragged=True, name="words")
    dense = layers.Lambda(
        lambda x: ops.cast(x.to_tensor(shape=(None, 3)), "float32"), output_shape=(3,)
    )
    tower = keras.Model(words, layers.Dense(4, name="tap")(dense(words)))

    model = stitch({"a": tower, "b": tower}, [])

    assert model.input.ragged
    ragged = tf.ragged.constant([[1, 2], [3]], dtype="int64")
    np.testing.assert_array_equal(model(ragged)["a"], tower(ragged))


# Nested models


def _backbone(name="backbone"):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="block1")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.5, name="dropout")(x)
    x = layers.Conv2D(6, 3, strides=2, name="block2")(x)
    return keras.Model(inputs, x, name=name)


def _transfer(outputs, backbone=None, **call):
    """A head on a backbone, as in Keras's guide to transfer learning."""
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = (backbone or _backbone())(x, **call)
    x = layers.GlobalAveragePooling2D(name="pooled")(x)
    return keras.Model(image, layers.Dense(outputs, name="score")(x))


IMAGES = RNG.uniform(0, 255, (3, 8, 8, 3)).astype("float32")


@pytest.mark.parametrize("call", [{}, {"training": False}])
@pytest.mark.parametrize(
    "at", ["backbone/block1", "block2", "backbone", {"a": "norm", "b": "backbone/norm"}]
)
def test_a_nested_backbone_is_tapped(at, call):
    towers = {"a": _transfer(2, **call), "b": _transfer(3, **call)}

    model = stitch(towers, [at], same_task=1.0)

    _assert_as_apart(model, towers, IMAGES)
    names = [x.name for x in model.layers]
    assert {"a_backbone_block1", "b_backbone_block2"} <= set(names)
    assert sum(isinstance(x, CrossStitch) for x in model.layers) == 1
    assert not any(isinstance(x, keras.Model) for x in model.layers)


def test_the_unit_of_a_nested_model_stands_behind_it():
    towers = {"a": _transfer(2), "b": _transfer(3)}

    model = stitch(towers, ["backbone"], per="layer", same_task=0.0)

    # Given that each task takes the other's features.
    together = model(IMAGES)
    for task, other in (("a", "b"), ("b", "a")):
        features = towers[other].get_layer("backbone")(IMAGES / 127.5 - 1)
        x = ops.mean(features, axis=(1, 2))
        expected = towers[task].get_layer("score")(x)
        np.testing.assert_allclose(together[task], expected, rtol=1e-4, atol=1e-5)


def test_a_nested_backbone_is_split():
    backbone = _backbone()
    towers = {"a": _transfer(2, backbone), "b": _transfer(3, backbone)}

    within = split(towers, "block2")
    behind = split(towers, "pooled")
    before = split(towers, "backbone")

    for model in (within, behind, before):
        _assert_as_apart(model, towers, IMAGES)
    names = {x.name for x in within.layers}
    assert {"shared_backbone_block1", "a_backbone_block2"} <= names
    assert "shared_backbone_block2" in {x.name for x in behind.layers}
    assert "a_backbone_block1" in {x.name for x in before.layers}


def test_a_frozen_nested_backbone_stays_frozen():
    backbones = [_backbone(), _backbone()]
    for backbone in backbones:
        backbone.trainable = False
    towers = dict(zip("ab", (_transfer(2, b) for b in backbones), strict=True))

    model = stitch(towers, [])

    assert {p.split("_", 1)[1] for p in _trainable(model)} == {
        "score/kernel",
        "score/bias",
    }


def test_models_in_nested_models_are_opened_too():
    def build(outputs):
        inner = keras.Sequential(
            [keras.Input((5,)), layers.Dense(5, name="deep")], name="inner"
        )
        outer_inputs = keras.Input((5,))
        outer = keras.Model(outer_inputs, inner(outer_inputs) + 1.0, name="outer")
        inputs = keras.Input((5,), name="features")
        return keras.Model(inputs, layers.Dense(outputs, name="score")(outer(inputs)))

    towers = {"a": build(2), "b": build(3)}

    model = stitch(towers, ["outer/inner/deep", "outer"], same_task=1.0)

    _assert_as_apart(model, towers, FEATURES)
    assert model.get_layer("cross_stitch_outer_inner_deep") is not None


def test_a_nested_model_of_several_inputs_and_outputs_is_opened():
    def build(outputs):
        left, right = keras.Input((5,), name="left"), keras.Input((5,), name="right")
        inner = keras.Model(
            {"left": left, "right": right},
            {"sum": layers.Dense(3, name="one")(left - right), "left": left * 2.0},
            name="inner",
        )
        inputs = keras.Input((5,), name="features")
        both = inner({"right": inputs + 1.0, "left": inputs})
        x = layers.Concatenate()([both["left"], both["sum"]])
        return keras.Model(inputs, layers.Dense(outputs, name="score")(x))

    towers = {"a": build(2), "b": build(3)}

    model = stitch(towers, ["one"], same_task=1.0)

    _assert_as_apart(model, towers, FEATURES)


@pytest.mark.filterwarnings("ignore:Layer 'inner' .* was passed an input with a mask")
def test_masks_reach_the_layers_of_a_nested_model():
    def build(outputs):
        inner_inputs = keras.Input((4, 3))
        last = layers.LSTM(3, name="last")(inner_inputs)
        inner = keras.Model(inner_inputs, last, name="inner")
        words = keras.Input((4,), dtype="int32", name="words")
        x = inner(layers.Embedding(9, 3, mask_zero=True)(words))
        return keras.Model(words, layers.Dense(outputs, name="score")(x))

    towers = {"a": build(2), "b": build(3)}

    model = stitch(towers, ["last"], same_task=1.0)

    _assert_as_apart(model, towers, np.array([[1, 2, 0, 0], [3, 4, 5, 0]]))


def test_a_nested_model_that_is_called_as_in_training_stays_so():
    def build(outputs):
        inner = keras.Sequential(
            [keras.Input((5,)), layers.BatchNormalization(name="norm")], name="inner"
        )
        inputs = keras.Input((5,), name="features")
        x = inner(inputs, training=True)  # by the batch's own statistics
        return keras.Model(inputs, layers.Dense(outputs, name="score")(x))

    towers = {"a": build(2), "b": build(3)}

    model = stitch(towers, [])

    _assert_as_apart(model, towers, FEATURES)


@pytest.mark.parametrize("training", [False, True])
def test_the_call_of_a_nested_model_wins_over_those_within(training):
    def build(outputs):
        x = features = keras.Input((5,))
        x = layers.Dropout(0.5)(x, training=not training)
        x = layers.BatchNormalization(momentum=0.5)(x, training=not training)
        inner = keras.Model(features, x, name="inner")
        inputs = keras.Input((5,), name="features")
        x = layers.Dense(outputs, name="score")(inner(inputs, training=training))
        return keras.Model(inputs, x)

    towers = {"a": build(2), "b": build(3)}
    model = stitch(towers, [])

    if training:
        assert np.std(model(FEATURES)["a"] - model(FEATURES)["a"]) > 0
    else:
        _assert_as_apart(model, towers, FEATURES)


@pytest.mark.parametrize("join", ["stitch", "split"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_nested_model_gets_what_its_input_casts(join, calls, sequential):
    """Bytes minus 128 wrap round; as floats they do not."""

    def build(outputs):
        pixels = keras.Input((6, 6, 3), name="pixels")
        first = layers.Rescaling(1 / 64, offset=-2.0, name="rescaled")
        convolution = layers.Conv2D(4, 3, name="tap")
        if sequential:
            backbone = keras.Sequential([pixels, first, convolution], name="backbone")
        else:
            x = convolution(first(pixels - 128.0))
            backbone = keras.Model(pixels, x, name="backbone")
        image = keras.Input((6, 6, 3), dtype="uint8", name="image")
        x = sum(backbone(image) * float(k + 1) for k in range(calls))
        x = layers.GlobalAveragePooling2D(name="pool")(x)
        return keras.Model(image, layers.Dense(outputs, name="score")(x))

    towers = {"a": build(2), "b": build(3)}
    if join == "split":
        towers["b"].get_layer("backbone").set_weights(
            towers["a"].get_layer("backbone").get_weights()
        )
        model = split(towers, "score")
    else:
        model = stitch(towers, ["pool"], same_task=1.0)

    _assert_as_apart(model, towers, RNG.integers(0, 256, (3, 6, 6, 3), "uint8"))


# Keras says that the mask is lost; it is not.
@pytest.mark.filterwarnings("ignore:(?s).*does not support masking")
def test_masks_pass_what_an_input_casts():
    def build(outputs):
        features = keras.Input((None, 4))
        inner = keras.Model(features, layers.LSTM(4, name="tap")(features), name="in")
        words = keras.Input((None,), dtype="int32", name="words")
        x = layers.Embedding(
            10, 4, mask_zero=True, dtype="mixed_float16", name="embedded"
        )(words)
        return keras.Model(words, layers.Dense(outputs, name="score")(inner(x)))

    towers = {"a": build(2), "b": build(3)}
    model = stitch(towers, ["tap"], same_task=1.0)
    casts = [layer.name for layer in model.layers if "cast" in layer.name]
    assert casts == ["a_in_cast", "b_in_cast"]
    _assert_as_apart(model, towers, np.array([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]]))
    assert [tap["a"] for tap in common_taps(towers)] == ["embedded"]


def test_a_nested_model_of_floats_gets_halves_as_floats():
    def build(outputs):
        features = keras.Input((4,))
        inner = keras.Model(features, features + 1000.0, name="inner")
        inputs = keras.Input((5,), name="features")
        x = layers.Dense(4, dtype="float16", name="half")(inputs)
        return keras.Model(inputs, layers.Dense(outputs, name="score")(inner(x)))

    towers = {"a": build(2), "b": build(3)}
    _assert_as_apart(stitch(towers, []), towers, FEATURES)


def _wrapped(name, outputs):
    given = keras.Input((4,))
    one = keras.Model(given, layers.Dense(4, name="conv")(given), name="one")
    two = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="conv")])
    clips = keras.Input((3, 4), name="clips")
    x = layers.TimeDistributed(one, name="each")(clips)
    x = layers.GlobalAveragePooling1D()(layers.TimeDistributed(two, name="other")(x))
    return keras.Model(clips, layers.Dense(outputs, name="score")(x), name=name)


def test_variables_of_wrapped_models_have_paths_of_their_own():
    towers = {task: _wrapped(task, n) for n, task in enumerate("abc", 1)}

    model = stitch(towers, ["each"], same_task=1.0)

    paths = [v.path for v in model.variables]
    assert len(set(paths)) == len(paths)
    for task in towers:
        assert sum(path.startswith(f"{task}_each/") for path in paths) == 2
        assert sum(path.startswith(f"{task}_other/") for path in paths) == 2
    optimizer = LearningRateGroups(keras.optimizers.SGD(0.1), {"^a_": 0})
    model.compile(optimizer, loss="mse")
    clips = RNG.normal(size=(8, 3, 4)).astype("float32")
    _assert_as_apart(model, towers, clips)
    before = {v.path: v.numpy() for v in model.trainable_variables}
    labels = {task: 9 * np.ones((8, n)) for n, task in enumerate("abc", 1)}
    model.fit(clips, labels, verbose=0)
    for v in model.trainable_variables:
        assert np.array_equal(v, before[v.path]) == v.path.startswith("a_"), v.path


def _embeds(shape):
    """An encoder of numbers, called on what has an axis of 1 more, or less."""

    def build(outputs):
        number = keras.Input(shape, dtype="int32")
        x = layers.Embedding(10, 4, name="embedded")(number)
        encoder = keras.Model(number, layers.Dense(4, name="tap")(x), name="encoder")
        numbers = keras.Input((1,) if shape == () else shape[:-1], dtype="int32")
        x = keras.ops.relu(encoder(numbers))
        return keras.Model(numbers, layers.Dense(outputs, name="score")(x))

    return build


def _sequential_within(inner, outer):
    """The weights of `tap` are of the inner shape."""

    def build(outputs):
        given = keras.Input(inner, name="given")
        tapped = keras.Model(given, layers.Dense(4, name="tap")(given), name="inner")
        return keras.Sequential([keras.Input(outer, name="features"), tapped])

    return build


OTHER_RANKS = {
    "numbers of an axis of 1": (_embeds(()), np.array([[3], [5]])),
    "numbers without an axis of 1": (_embeds((3, 1)), np.array([[3, 5, 7], [1, 2, 3]])),
    "one for all": (_embeds((1,)), np.array([3, 5])),
    "a Sequential of an axis of 1": (
        _sequential_within((5,), (5, 1)),
        FEATURES[..., None],
    ),
    "a Sequential without it": (_sequential_within((5, 1), (5,)), FEATURES),
}


@pytest.mark.parametrize("join", ["stitch", "split"])
@pytest.mark.parametrize(
    ("build", "data"), OTHER_RANKS.values(), ids=OTHER_RANKS.keys()
)
def test_a_nested_model_gets_the_rank_of_its_input(build, data, join, tmp_path):
    towers = {"a": build(2), "b": build(3), "c": build(2)}
    if join == "split":
        for tower in towers.values():  # equal below the split
            for own, first in zip(tower.weights, towers["a"].weights, strict=True):
                if own.shape == first.shape:
                    own.assign(first)
        model = split(towers, "tap")
    else:
        model = stitch(towers, ["tap"], same_task=1.0)

    _assert_as_apart(model, towers, data)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    _assert_as_apart(loaded, towers, data)


class Summed(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, x):
        return ops.sum(x, -1)


# Keras says that the mask is lost; it is not.
@pytest.mark.filterwarnings("ignore:Layer 'inner' .* was passed an input with a mask")
def test_masks_pass_where_the_rank_changes():
    def build(outputs):
        steps = keras.Input((4, 1))
        inner = keras.Model(steps, layers.LSTM(3, name="tap")(steps), name="inner")
        words = keras.Input((4,), dtype="int32", name="words")
        x = inner(Summed()(layers.Embedding(9, 2, mask_zero=True)(words)))
        return keras.Model(words, layers.Dense(outputs, name="score")(x))

    towers = {"a": build(2), "b": build(3)}
    model = stitch(towers, ["tap"], same_task=1.0)
    _assert_as_apart(model, towers, np.array([[1, 2, 0, 0], [3, 4, 5, 0]]))


@pytest.mark.parametrize("nested", [False, True])
def test_inputs_may_have_other_keys_than_names(nested):
    def build(outputs):
        pair = {key: keras.Input((5,), name=f"of_{key}") for key in ("q", "p")}
        x = layers.Dense(4, name="tap")(pair["p"] - 2.0 * pair["q"])
        model = keras.Model(pair, layers.Dense(outputs, name="score")(x))
        if not nested:
            return model
        own = {key: keras.Input((5,), name=key) for key in ("p", "q")}
        return keras.Model(own, model(own) * 2.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's, of such a model
        towers = {"a": build(2), "b": build(3)}
    model = stitch(towers, ["tap"], same_task=1.0)

    data = {key: RNG.normal(size=(3, 5)).astype("float32") for key in "pq"}
    _assert_as_apart(model, towers, data)


NESTED_ERRORS = {
    "a bare name of two layers": (
        lambda: _two_backbones(),
        ["block1"],
        r"several layers 'block1': name one of \['first/block1', 'second/block1'\]",
    ),
    "an unknown layer within": (
        lambda: _transfer(2),
        ["backbone/block3"],
        r"no layer 'backbone/block3'.*'backbone/block2'",
    ),
    "an argument more": (
        lambda: _told_its_mask(),
        ["encoder"],
        r"'encoder' is called in a way .* but `training`, by its name\. Received: .*Va",
    ),
}


def _told_its_mask():
    """By its place, as the third argument, which the layers within need."""
    steps = keras.Input((5, 4))
    encoder = keras.Model(steps, layers.LSTM(3)(steps), name="encoder")
    x = keras.Input((5, 4), name="x")
    mask = keras.ops.any(x > 0.5, axis=-1)
    return keras.Model(x, layers.Dense(2)(encoder(x, None, mask)))


def _two_backbones():
    image = keras.Input((8, 8, 3), name="image")
    first, second = _backbone("first")(image), _backbone("second")(image)
    return keras.Model(image, layers.Dense(2)(first - second))


@pytest.mark.parametrize(
    ("build", "at", "words"), NESTED_ERRORS.values(), ids=NESTED_ERRORS.keys()
)
def test_nested_models_that_cannot_be_taken_apart_are_an_error(build, at, words):
    with pytest.raises(ValueError, match=f"tower of 'a'.*{words}"):
        stitch({"a": build(), "b": build()}, at)


# Frozen trunks


def _frozen_to(tower, last):
    for layer in tower.layers:
        layer.trainable = False
        if layer.name == last:
            break
    return tower


def _trunk_tower(outputs, seed=0, frozen="norm"):
    keras.utils.set_random_seed(seed)
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Rescaling(1 / 255, name="rescaling")(image)
    x = layers.Conv2D(4, 3, name="conv1")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Conv2D(5, 3, name="conv2")(x)
    x = layers.Flatten(name="flatten")(x)
    tower = keras.Model(image, layers.Dense(outputs, name="score")(x))
    return _frozen_to(tower, frozen)


def _names(model):
    return {x.name for x in model.layers}


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_a_frozen_trunk_is_built_once(tasks):
    towers = {f"task{n}": _trunk_tower(n + 2) for n in range(tasks)}

    once = stitch(towers, ["conv2"], same_task=1.0)
    each = stitch(towers, ["conv2"], same_task=1.0, share_frozen=False)

    _assert_as_apart(once, towers, IMAGES)
    _assert_as_apart(each, towers, IMAGES)
    shared = {"shared_rescaling", "shared_conv1", "shared_norm"}
    assert shared < _names(once)
    assert len(each.layers) - len(once.layers) == 3 * (tasks - 1)
    assert "task1_flatten" in _names(once)
    assert not any(name.startswith("shared") for name in _names(each))


@pytest.mark.slow
def test_a_shared_trunk_trains_as_each_its_own():
    towers = {"a": _trunk_tower(2), "b": _trunk_tower(3)}
    targets = {"a": RNG.normal(size=(3, 2)), "b": RNG.normal(size=(3, 3))}
    after = []
    for share in (True, False):
        model = stitch(towers, ["conv2"], share_frozen=share)
        model.compile(keras.optimizers.SGD(0.01), loss="mse")
        model.fit(IMAGES, targets, epochs=2, verbose=0)
        after.append(model.predict(IMAGES, verbose=0))
    for task in towers:
        np.testing.assert_allclose(after[0][task], after[1][task], rtol=1e-4, atol=1e-5)


NOT_SHARED = {
    "other weights": lambda: (_trunk_tower(2), _trunk_tower(2, seed=1)),
    "nothing frozen": lambda: (
        _trunk_tower(2, frozen="image"),
        _trunk_tower(2, frozen="image"),
    ),
    "one of them frozen": lambda: (_trunk_tower(2), _trunk_tower(2, frozen="image")),
}


@pytest.mark.parametrize("build", NOT_SHARED.values(), ids=NOT_SHARED.keys())
def test_other_trunks_are_each_built(build):
    model = stitch(dict(zip("ab", build(), strict=True)), ["conv2"])

    assert not any(name.startswith("shared") for name in _names(model))


@pytest.mark.parametrize("at", [["norm"], ["conv1", "conv2"], ["rescaling"]])
def test_a_tap_where_all_towers_give_the_same_is_an_error(at):
    towers = {task: _trunk_tower(2) for task in "ab"}

    with pytest.raises(ValueError, match=rf"'{at[0]}'.*the same.*share_frozen=False"):
        stitch(towers, at)

    model = stitch(towers, at, share_frozen=False, same_task=1.0)
    _assert_as_apart(model, towers, IMAGES)
    assert {"a_conv1", "b_conv1"} <= _names(model)


def test_a_trunk_is_shared_as_far_as_the_first_tap():
    # Given a third tower with a trunk of its own, from which the two may take.
    towers = {task: _trunk_tower(2, frozen="conv2") for task in "ab"}
    towers["c"] = _trunk_tower(2, seed=1)

    model = stitch(towers, ["norm"], same_task=1.0)

    shared = {name for name in _names(model) if name.startswith("shared")}
    assert shared == {"shared_rescaling", "shared_conv1", "shared_norm"}
    assert {"a_conv2", "b_conv2", "c_conv1"} <= _names(model)
    _assert_as_apart(model, towers, IMAGES)


def test_one_frozen_model_as_two_towers_is_built_once():
    tower = _frozen_to(_trunk_tower(2), "score")

    model = stitch({"a": tower, "b": tower}, [])

    assert all(name.startswith("shared") or name == "image" for name in _names(model))
    _assert_as_apart(model, {"a": tower, "b": tower}, IMAGES)


def test_dropout_is_built_once_in_front_of_what_is_trained_and_not_behind():
    def build():
        keras.utils.set_random_seed(0)
        frozen = _frozen_to(
            _tower(
                [
                    layers.Dense(3, name="one"),
                    layers.Dropout(0.5, name="drop"),
                    layers.Dense(3, name="two"),
                    layers.Dense(3, name="three"),
                    layers.Dropout(0.5, name="last"),
                ]
            ),
            "two",
        )
        return frozen

    model = stitch({"a": build(), "b": build()}, ["tap"])

    assert {"shared_one", "shared_drop", "shared_two"} <= _names(model)
    assert {"a_last", "b_last", "a_three", "b_three"} <= _names(model)


def test_a_split_within_a_frozen_trunk_builds_the_rest_of_it_once_too():
    towers = {task: _trunk_tower(2, frozen="norm") for task in "ab"}

    model = split(towers, "conv1")
    each = split(towers, "conv1", share_frozen=False)

    assert {"shared_rescaling", "shared_conv1", "shared_norm", "a_conv2"} <= _names(
        model
    )
    assert {"shared_rescaling", "a_conv1", "b_norm"} <= _names(each)
    _assert_as_apart(model, towers, IMAGES)


# Private names of Keras


def test_the_private_names_that_copying_reads_are_there():
    tower = _tower([layers.Dense(3, name="first")])

    nodes = [node for nodes in tower._nodes_by_depth.values() for node in nodes]

    (first,) = [node for node in nodes if node.operation.name == "first"]
    args, _ = first.arguments.convert(lambda x: x)
    assert args[0] is tower.inputs[0]
    assert first.outputs[0] is tower.get_layer("first").output
    assert not first.is_input
    constructed = tower.get_layer("first")._auto_config.config
    assert constructed["units"] == 3
    assert tower.get_layer("first")._flatten_layers() == [tower.get_layer("first")]
    assert [call.path for call in Tower("a", tower, {}).calls] == [
        "first",
        "tap",
        "score",
    ]
