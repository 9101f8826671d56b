"""What of several towers is built once, and what they should have in common."""

import functools
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_cross_stitch import split, stitch

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0, 255, (4, 8, 8, 3)).astype("float32")


def tower(first, outputs=2, seed=None, rescale=True):
    """Input, rescaled, the layers given, `conv` (the tap), `score`."""
    if seed is not None:
        keras.utils.set_random_seed(seed)
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Rescaling(1 / 255, name="rescaling")(image) if rescale else image
    for layer in first:
        x = layer(x)
    x = layers.Conv2D(4, 3, padding="same", name="conv")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, layers.Dense(outputs, name="score")(x))


def names(model):
    return {x.name for x in model.layers}


# Random layers


def flips(**arguments):
    return [
        layers.RandomFlip("horizontal", name="flip", **arguments),
        layers.RandomRotation(0.2, name="turn", **arguments),
    ]


def one_object():
    augment = keras.Sequential(flips(), name="augment")
    return [augment], [augment]


def loaded():
    both = []
    for _ in "ab":
        model = keras.Sequential([keras.Input((8, 8, 3)), *flips()], name="augment")
        both.append([keras.Sequential.from_config(model.get_config())])
    return both


SAME_PICTURE = {
    "one object": one_object,
    "equal ones": lambda: (flips(), flips()),
    "equal seeds": lambda: (flips(seed=3), flips(seed=3)),
    "other seeds": lambda: (flips(seed=3), flips(seed=4)),
    "as loaded from files": loaded,
}


@pytest.mark.parametrize("share_frozen", [True, False])
@pytest.mark.parametrize("build", SAME_PICTURE.values(), ids=SAME_PICTURE.keys())
def test_all_tasks_see_the_same_picture(build, share_frozen):
    first, second = build()
    towers = {"a": tower(first, seed=0), "b": tower(second, seed=0)}

    model = stitch(towers, ["conv"], same_task=1.0, share_frozen=share_frozen)

    flipped = [x.name for x in model.layers if "flip" in x.name]
    assert len(flipped) == 1
    assert flipped[0].startswith("shared")
    maps = keras.Model(model.input, [model.get_layer(f"{t}_conv").output for t in "ab"])
    keras.utils.set_random_seed(1)
    a, b = maps(IMAGES, training=True)
    np.testing.assert_array_equal(a, b)
    still = [towers["a"].get_layer("conv")(IMAGES / 255)] * 2
    assert np.abs(ops.convert_to_numpy(a - still[0])).max() > 1e-2


def test_random_layers_are_built_once_in_a_split_too():
    towers = {"a": tower(flips(), seed=0), "b": tower(flips(), seed=0)}

    model = split(towers, "flip")

    assert {"shared_flip", "shared_turn", "a_conv", "b_conv"} <= names(model)


OTHER_PICTURES = {
    "another range": (flips(), [flips()[0], layers.RandomRotation(0.4, name="turn")]),
    "another kind": (flips()[:1], [layers.GaussianNoise(0.1, name="noise")]),
    "one tower alone": (flips(), []),
}


@pytest.mark.parametrize(
    ("first", "second"), OTHER_PICTURES.values(), ids=OTHER_PICTURES.keys()
)
def test_random_layers_that_give_each_task_another_picture_warn(first, second):
    towers = {"a": tower(first, seed=0), "b": tower(second, seed=0)}

    with pytest.warns(UserWarning, match=r"draw for each task by itself.*the data set"):
        stitch(towers, ["conv"], same_task=1.0)

    # Without a tap behind them there is nothing to mix.
    stitch(towers, [])


def test_random_layers_on_inputs_of_their_own_warn_but_for_equal_seeds():
    towers = {"a": tower(flips(), seed=0), "b": tower(flips(), seed=0)}
    with pytest.warns(UserWarning, match=r"'a': \['flip', 'turn'\]"):
        stitch(towers, ["conv"], shared_input=False)

    seeded = {"a": tower(flips(seed=1), seed=0), "b": tower(flips(seed=1), seed=0)}
    model = stitch(seeded, ["conv"], shared_input=False)
    maps = keras.Model(model.input, [model.get_layer(f"{t}_conv").output for t in "ab"])
    a, b = maps({"a": IMAGES, "b": IMAGES}, training=True)
    np.testing.assert_array_equal(a, b)


def test_dropout_behind_what_is_trained_is_each_tower_s_own():
    def build():
        conv = layers.Conv2D(3, 3, padding="same", name="first")
        return tower([conv, layers.Dropout(0.5, name="drop")], seed=0)

    model = stitch({"a": build(), "b": build()}, ["conv"])

    assert {"a_drop", "b_drop"} <= names(model)


class Jitters(layers.Layer):
    """Generators of its own, in a list and within a layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [layers.GaussianNoise(0.1)]
        self.generators = [keras.random.SeedGenerator(3)]

    def call(self, x, training=False):
        x = self.parts[0](x, training=training)
        return x + keras.random.normal((1,), seed=self.generators[0]) * training


class Generator(Jitters):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [layers.Identity()]


RECURRENT = {
    "LSTM": (False, lambda: layers.LSTM(3, return_sequences=True)),
    "stateful": (False, lambda: layers.GRU(3, stateful=True, return_sequences=True)),
    "both ways": (
        False,
        lambda: layers.Bidirectional(layers.SimpleRNN(3, return_sequences=True)),
    ),
    "cells": (
        False,
        lambda: layers.RNN(
            [layers.LSTMCell(3), layers.GRUCell(3)], return_sequences=True
        ),
    ),
    "dropout": (True, lambda: layers.LSTM(3, dropout=0.1, return_sequences=True)),
    "dropout between steps": (
        True,
        lambda: layers.Bidirectional(
            layers.GRU(3, recurrent_dropout=0.1, return_sequences=True)
        ),
    ),
    "one cell with dropout": (
        True,
        lambda: layers.RNN(
            [layers.LSTMCell(3), layers.GRUCell(3, dropout=0.2)], return_sequences=True
        ),
    ),
    "a generator in a list": (True, Generator),
    "a layer in a list": (True, Jitters),
}


@pytest.mark.parametrize(("random", "make"), RECURRENT.values(), ids=RECURRENT)
def test_what_drops_nothing_is_not_random(random, make):
    def build(outputs):
        x = inputs = keras.Input(batch_shape=(3, 5, 4), name="steps")
        x = layers.Rescaling(outputs)(x)  # in which the towers differ
        memory = make()
        x = layers.Dense(3, name="tap")(memory(x))
        memory.trainable = False
        return keras.Model(inputs, layers.Dense(outputs, name="score")(x))

    towers = {"a": build(1), "b": build(2)}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stitch(towers, ["tap"], same_task=1.0)

    said = [x for x in caught if str(x.message).startswith("Random layers in front")]
    assert len(said) == random


def test_the_seed_of_what_drops_nothing_says_nothing():
    def build(seed):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5, 4), name="steps")
        memory = layers.LSTM(3, seed=seed, return_sequences=True, name="memory")
        x = layers.Dense(3, name="tap")(memory(inputs))
        memory.trainable = False
        return keras.Model(inputs, x)

    model = stitch({"a": build(1), "b": build(2)}, ["tap"])

    assert "shared_memory" in names(model)


def frozen_noisy(outputs):
    """Frozen up to `act`, with noise on the input and a Dropout behind weights."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="features")
    x = layers.GaussianNoise(0.1, name="noise")(inputs)
    x = layers.Dense(5, name="trunk", trainable=False)(x)
    x = layers.Activation("relu", name="act")(layers.Dropout(0.5, name="drop")(x))
    x = layers.Dense(5, name="hidden")(x)
    return keras.Model(inputs, layers.Dense(outputs, name="score")(x))


@pytest.mark.filterwarnings("error:Random layers:UserWarning")
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_a_trunk_with_dropout_is_each_tower_s_own_if_it_is_to_be_unfrozen(tasks):
    towers = {f"t{n}": frozen_noisy(n + 1) for n in range(tasks)}
    each = {f"t{n}_{name}" for n in range(tasks) for name in ("trunk", "drop", "act")}

    model = stitch(towers, ["act"], share_frozen=False)
    above = split(towers, "trunk", share_frozen=False)

    for joined in (model, above):
        assert each < names(joined)
        shared = {name for name in names(joined) if name.startswith("shared")}
        assert shared == {"shared_noise"}
    once = {"shared_noise", "shared_trunk", "shared_drop"}
    assert once < names(stitch(towers, ["hidden"]))
    assert once < names(split(towers, "trunk"))
    features = RNG.normal(size=(7, 4)).astype("float32")
    model = stitch(towers, ["hidden"], share_frozen=False, same_task=1.0)
    for task, output in model(features).items():
        np.testing.assert_array_equal(output, towers[task](features))


@pytest.mark.parametrize("share_frozen", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_what_is_adapted_in_front_of_augmentation_is_no_trunk_to_unfreeze(
    trainable, share_frozen
):
    def build(images):
        norm = layers.Normalization(name="norm", trainable=trainable)
        norm.adapt(images)
        return tower([norm, *flips()], seed=0, rescale=False)

    towers = {"a": build(IMAGES), "b": build(IMAGES)}
    model = stitch(towers, ["conv"], share_frozen=share_frozen)

    assert {"shared_norm", "shared_flip", "shared_turn", "a_conv"} <= names(model)
    with pytest.warns(UserWarning, match="Random layers in front of a tap"):
        model = stitch({**towers, "b": build(2 * IMAGES)}, ["conv"])
    assert {"a_norm", "b_norm", "a_flip", "b_flip"} <= names(model)


class Centred(layers.Layer):
    """One's own, whose statistics training moves."""

    def build(self, shape):
        self.mean = self.add_weight(shape[-1:], "zeros", trainable=False)

    def adapt(self, data):
        self.mean.assign(np.mean(data, axis=(0, 1, 2)))

    def call(self, x, training=False):
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, axis=(0, 1, 2)))
        return x - self.mean


def test_a_layer_of_ones_own_that_can_be_adapted_is_each_tower_s():
    towers = {
        task: tower([Centred(name="centred"), *flips()], seed=0, rescale=False)
        for task in "ab"
    }
    with pytest.warns(UserWarning, match="Random layers in front of a tap"):
        model = stitch(towers, ["conv"])
    assert {"a_centred", "b_centred"} <= names(model)


# Layers that only look alike


def test_an_argument_that_is_called_as_the_layer_is_is_no_name():
    frozen = layers.Conv2D(3, 1, trainable=False, name="frozen")
    towers = {
        task: tower([layers.MaxPooling2D(3, 1, padding=p, name=p), frozen], seed=0)
        for task, p in (("a", "valid"), ("b", "same"))
    }

    model = stitch(towers, [], same_task=1.0)

    together = model(IMAGES)
    for task, one in towers.items():
        np.testing.assert_array_equal(together[task], one(IMAGES))
    with pytest.raises(ValueError, match=r"tower of 'b' has 'same' where.*'valid'"):
        split(towers, "conv")


def by_name(x, name, seed=0):
    return getattr(keras.ops, name)(x)


def scaled_by(factor):
    def scaled(x, *, factor=factor):
        return factor * x

    return scaled


@functools.cache
def of_a_module(factor):
    """As by `from my_module import scaled`, where each module has its own FACTOR."""
    module = {"FACTOR": factor}
    exec("def scaled(x):\n    return FACTOR * x", module)
    return module["scaled"]


def with_an_empty_cell(n):
    if n:
        forgotten = 1.0

    def scaled(x, *, factor=n + 1.0):
        return factor * x if factor else forgotten * x

    return scaled


class Fourier(layers.Layer):
    """Random, but by a seed that is no generator's."""

    def __init__(self, seed, **kwargs):
        super().__init__(**kwargs)
        self.seed = seed

    def call(self, x):
        return x * keras.random.normal(x.shape[1:], seed=self.seed)

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}


def closure(factor):
    def scaled(x):
        return factor * x

    return scaled


def by_default(factor):
    def scaled(x, factor=factor):
        return factor * x

    return scaled


UNLIKE = {
    "what a closure holds": lambda n: layers.Lambda(closure(n + 1.0), name="one"),
    "a default by place": lambda n: layers.Lambda(by_default(n + 1.0), name="one"),
    "an argument of a lambda": lambda n: layers.Lambda(
        by_name, arguments={"name": ["relu", "tanh"][n]}, name="one"
    ),
    "a seed among its arguments": lambda n: layers.Lambda(
        lambda x, seed: (1.0 + seed) * x, arguments={"seed": n}, name="one"
    ),
    "what the module of its function holds": lambda n: layers.Activation(
        of_a_module(n + 1.0), name="one"
    ),
    "a variable that is not there": lambda n: layers.Lambda(
        with_an_empty_cell(n), name="one"
    ),
    "a default by keyword": lambda n: layers.Lambda(scaled_by(n + 1.0), name="one"),
    "an array": lambda n: layers.Lambda(scaled_by(np.arange(3.0) + n), name="one"),
    "a seed of its own": lambda n: Fourier(n, name="one"),
    "a dtype": lambda n: layers.Rescaling(
        1.0, dtype=["float32", "float16"][n], name="one"
    ),
}


@pytest.mark.parametrize("build", UNLIKE.values(), ids=UNLIKE)
def test_layers_that_differ_in_little_are_each_built(build):
    frozen = layers.Conv2D(3, 1, trainable=False, name="frozen")
    frozen.build((None, None, None, 3))

    def of(*kinds):
        return {
            task: tower([build(n), layers.Conv2D.from_config(frozen.get_config())])
            for task, n in zip("ab", kinds, strict=True)
        }

    towers = of(0, 1)
    for one in towers.values():
        one.get_layer("frozen").set_weights(frozen.get_weights())

    model = stitch(towers, [], same_task=1.0)

    together = model(IMAGES)
    for task, one in towers.items():
        np.testing.assert_array_equal(together[task], one(IMAGES))
    with pytest.raises(ValueError, match="must have the same layers"):
        split(towers, "conv")
    split(of(1, 1), "conv")


@pytest.mark.parametrize("other", [-1.0, np.float64(-1)])
def test_equal_numbers_of_other_kinds_are_alike(other):
    towers = {
        task: tower([layers.Rescaling(1.0, offset=x, name="one")])
        for task, x in (("a", -1), ("b", other))
    }
    assert "shared_one" in names(split(towers, "conv"))


def test_layers_of_other_names_are_alike():
    def build(name):
        wrapped = layers.TimeDistributed(layers.Dense(3, name=f"{name}_inner"))
        return tower([layers.Conv2D(3, 1, name=name), wrapped], seed=0)

    model = split({"a": build("one"), "b": build("two")}, "conv")

    assert "shared_one" in names(model)


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(ops.abs(x)))
        return x


def penalty(layer, x):
    layer.add_loss(1.0 * ops.mean(x * 0 + 1))


class AddsLossElsewhere(layers.Layer):
    def call(self, x):
        penalty(self, x)
        return x


class Composite(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = AddsLossElsewhere()

    def call(self, x):
        return self.inner(x)


def penalised(name):
    return layers.ReLU(activity_regularizer="l2", name=name)


@pytest.mark.parametrize("kind", [AddsLoss, AddsLossElsewhere, Composite, penalised])
def test_layers_that_add_losses_are_each_built(kind):
    frozen = layers.Conv2D(3, 1, trainable=False, name="frozen")
    towers = {task: tower([kind(name="adds"), frozen], seed=0) for task in "ab"}

    model = stitch(towers, ["conv"])

    model(IMAGES)
    assert len(model.losses) == 2
    assert {"a_adds", "b_adds"} <= names(model)


# Calls that only look alike


class Spread(layers.Layer):
    """Takes numbers by keyword, and tensors in a dict."""

    def call(self, x, low=0.0, high=0.0):
        if isinstance(x, dict):
            x = x.get("plus", 0.0) - 2 * x.get("minus", 0.0)
        return x * (1 + low) - high


def attention(*args, **kwargs):
    return layers.MultiHeadAttention(2, 3, name="one")(*args, **kwargs)


def spread(*args, **kwargs):
    return Spread(name="one")(*args, **kwargs)


UNLIKE_CALLS = {
    "keywords of attention": (
        lambda x, y: attention(x, x, use_causal_mask=True),
        lambda x, y: attention(x, x, training=True),
    ),
    "key for value": (
        lambda x, y: attention(x, y, key=x),
        lambda x, y: attention(x, value=x, key=y),
    ),
    "keywords": (lambda x, y: spread(x, low=2.0), lambda x, y: spread(x, high=2.0)),
    "keys of a dict": (
        lambda x, y: spread({"plus": x}),
        lambda x, y: spread({"minus": x}),
    ),
}


def sequences(read, outputs):
    """What is read of the input and of its double, then a frozen layer."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((4, 6), name="x")
    y = layers.Rescaling(2.0, offset=1.0, name="double")(x)
    x = layers.Dense(5, name="frozen")(read(x, y))
    tower = keras.Model(inputs, layers.Dense(outputs, name="score")(x))
    tower.get_layer("one").trainable = tower.get_layer("frozen").trainable = False
    return tower


@pytest.mark.parametrize("reads", UNLIKE_CALLS.values(), ids=UNLIKE_CALLS)
def test_calls_with_equal_values_by_other_names_are_each_built(reads):
    of = [sequences(read, n) for n, read in enumerate([*reads, reads[0]], 1)]
    towers = dict(zip("abc", of, strict=True))

    model = stitch(towers, [], same_task=1.0)

    data = RNG.normal(size=(5, 4, 6)).astype("float32")
    together = model(data)
    for task, one in towers.items():
        np.testing.assert_array_equal(together[task], one(data))
    assert {"shared_one", "b_one", "shared_frozen", "b_frozen"} <= names(model)
    with pytest.raises(ValueError, match="'b' has 'one' where the first has 'one'"):
        split(towers, "score")


@pytest.mark.parametrize("tasks", ["ab", "abc"])
def test_a_whole_number_is_no_fraction(tasks):
    """In int8 100 * 2 is -56, and 100 * 2.0 is 200."""

    def doubled(by):
        keras.utils.set_random_seed(0)
        x = keras.Input((3,), dtype="int8", name="x")
        frozen = layers.Dense(5, name="frozen", trainable=False)
        return keras.Model(x, layers.Dense(2, name="score")(frozen(x * by)))

    towers = {task: doubled(by) for task, by in zip(tasks, (2, 2.0, 2), strict=False)}
    model = stitch(towers, [])

    data = np.array([[100, -7, 3], [1, 99, -90]], "int8")
    together = model(data)
    for task, one in towers.items():
        np.testing.assert_array_equal(together[task], one(data))
    assert not np.allclose(together["a"], together["b"])
    assert ("shared_frozen" in names(model)) == (tasks == "abc")  # of a and c


def test_calls_by_name_and_by_place_are_alike():
    reads = {
        "a": lambda x, y: attention(x, y, x, use_causal_mask=True, training=False),
        "b": lambda x, y: attention(
            x, training=False, value=y, key=x, use_causal_mask=True
        ),
        "c": lambda x, y: attention(
            query=x, value=y, key=x, use_causal_mask=True, training=False
        ),
    }
    towers = {task: sequences(read, 2) for task, read in reads.items()}

    model = stitch(towers, [])

    assert {"shared_one", "shared_frozen"} <= names(model)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_behind_a_tap_each_task_goes_on_with_maps_of_its_own(tasks):
    """Many times: numbers that were addresses were given twice, by chance."""
    towers = {f"t{k}": tower([], seed=0) for k in range(tasks)}

    for _ in range(15):
        model = stitch(towers, ["conv", "pool"])
        assert {f"t{k}_pool" for k in range(tasks)} <= names(model)


# Weights that have nothing to do with each other


def convolutions(seed, trained=0.0):
    one = tower([layers.Conv2D(8, 3, activation="relu", name="first")], seed=seed)
    rng = np.random.default_rng(int(1000 * trained))
    for weight in one.trainable_weights:
        size = trained * np.std(weight.numpy())
        weight.assign_add(rng.normal(size=weight.shape) * size)
    return one


UNRELATED = "The towers of 'a' and '[bc]' have unrelated weights"


def test_towers_of_unrelated_weights_warn_once():
    towers = {task: convolutions(seed) for seed, task in enumerate("abc")}

    with pytest.warns(UserWarning, match=UNRELATED) as caught:
        stitch(towers, ["first", "conv"])

    caught = [x for x in caught if x.category is UserWarning]
    assert len(caught) == 1
    assert "same weights" in str(caught[0].message)
    assert "same_task=1.0" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error:The towers of:UserWarning")
def test_others_do_not():
    started_alike = {task: convolutions(0) for task in "ab"}
    trained = {"a": convolutions(0, 0.5), "b": convolutions(0, 1.0)}
    unrelated = {"a": convolutions(0), "b": convolutions(1)}

    stitch(started_alike, ["conv"])
    stitch(trained, ["first", "conv"])
    stitch(unrelated, ["first"], same_task=1.0)
    stitch(unrelated, ["first"], alpha_initializer="identity")
    stitch(unrelated, [])


@pytest.mark.filterwarnings("error:The towers of:UserWarning")
@pytest.mark.parametrize("seed", range(5))
def test_small_towers_of_one_start_do_not_either(seed):
    def build(trained):
        keras.utils.set_random_seed(seed)
        x = inputs = keras.Input((5,))
        for name in ("one", "two"):
            x = layers.Dense(4, name=name)(x)
        one = keras.Model(inputs, x)
        rng = np.random.default_rng([seed, int(10 * trained)])
        for weight in one.weights:
            weight.assign_add(trained * 0.3 * rng.normal(size=weight.shape))
        return one

    stitch({"a": build(0.1), "b": build(0.5)}, ["one", "two"])


@pytest.mark.parametrize("seed", range(20))
def test_towers_of_other_starts_do_each_time(seed):
    towers = {"a": convolutions(seed), "b": convolutions(seed + 100)}

    with pytest.warns(UserWarning, match=UNRELATED):
        stitch(towers, ["conv"])


def test_towers_of_other_families_do():
    other = tower([layers.Conv2D(5, 3, name="first")])

    with pytest.warns(UserWarning, match=UNRELATED):
        stitch({"a": convolutions(0), "b": other}, ["conv"])
