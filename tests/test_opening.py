"""Models that cannot be opened: the two lines that make towers of them."""

import textwrap

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_cross_stitch import stitch


class Plain(keras.Model):
    def __init__(self):
        super().__init__()
        self.one = layers.Dense(4, name="one")
        self.two = layers.Dense(2, name="two")

    def call(self, x):
        return self.two(self.one(x))


class InTraining(keras.Model):
    """A list of layers, some of which are told whether it trains."""

    def __init__(self):
        super().__init__()
        self.all = [layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5)]
        self.score = layers.Dense(3)

    def call(self, x, training=None):
        x = self.all[0](x)
        for layer in self.all[1:]:
            x = layer(x, training=training)
        return ops.relu(self.score(x)) + 0.5 * x[:, :3]


class TwoInputs(keras.Model):
    def __init__(self):
        super().__init__()
        self.one, self.two = layers.Dense(4), layers.Dense(2)

    def call(self, inputs):
        return {"p": self.one(inputs["left"]), "q": self.two(inputs["right"])}


RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(2, 5)).astype("float32")
BOTH = {"left": FEATURES, "right": FEATURES[:, :3]}
MODELS = {
    "plain": (Plain, FEATURES, True),
    "plain, not built": (Plain, FEATURES, False),
    "in training": (InTraining, FEATURES, True),
    "two inputs": (TwoInputs, BOTH, True),
    "a Sequential, not built": (
        lambda: keras.Sequential([layers.Dense(4), layers.Dense(2)]),
        FEATURES,
        False,
    ),
}


@pytest.mark.parametrize(("build", "data", "built"), MODELS.values(), ids=MODELS.keys())
def test_the_error_gives_the_lines_that_make_a_tower(build, data, built):
    features = keras.Input((5,), name="features")
    other = keras.Model(features, layers.Dense(2, name="one")(features))
    model = build()
    if built:
        model(data)

    with pytest.raises(ValueError, match=r"tower of 'b'.*these two lines") as caught:
        stitch({"a": other, "b": model}, [])

    lines = [x.strip() for x in str(caught.value).split("\n") if x.startswith("    ")]
    assert len(lines) == 2
    scope = {"keras": keras, "towers": {"b": model}}
    exec("\n".join(lines), scope)
    tower = scope["towers"]["b"]
    joined = stitch({"a": tower, "b": tower}, [])(data)["b"]
    expected = model(data)
    for a, e in zip(
        keras.tree.flatten(joined), keras.tree.flatten(expected), strict=True
    ):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


class Twice(keras.Sequential):
    def call(self, x, training=None, mask=None):
        return 2 * super().call(x, training=training, mask=mask)


class Thrice(keras.Model):
    """Functional, with a call of its own."""

    def call(self, x, training=None, mask=None):
        return 3 * super().call(x, training=training, mask=mask)


def own_calls(outputs):
    inputs = keras.Input((5,), name="features")
    yield Twice([inputs, layers.Dense(outputs, name="tap")])
    yield Thrice(inputs, layers.Dense(outputs, name="tap")(inputs))


def test_a_subclass_with_a_call_of_its_own_is_not_opened():
    for a, b in zip(own_calls(2), own_calls(3), strict=True):
        towers = {"a": a, "b": b}
        with pytest.raises(ValueError, match=r"cannot be taken.*two lines make a") as e:
            stitch(towers, ["tap"])
        lines = textwrap.dedent(str(e.value).split(":\n\n")[1])
        exec(lines, {"keras": keras, "towers": towers})
        exec(lines.replace('"a"', '"b"'), {"keras": keras, "towers": towers})
        model = stitch(towers, [])
        for task, one in (("a", a), ("b", b)):
            np.testing.assert_array_equal(model(FEATURES)[task], one(FEATURES))


def test_where_it_is_nested_it_is_copied_whole():
    for a, b in zip(own_calls(2), own_calls(3), strict=True):
        towers = {}
        for task, inner in (("a", a), ("b", b)):
            inputs = keras.Input((5,), name="features")
            towers[task] = keras.Model(inputs, inner(inputs))
        model = stitch(towers, [])
        for task, one in towers.items():
            np.testing.assert_array_equal(model(FEATURES)[task], one(FEATURES))


def test_an_unbuilt_model_beside_a_sequential_one_gets_its_lines():
    towers = {
        "a": keras.Sequential([layers.Dense(3), layers.Dense(2)]),
        "b": keras.Sequential([keras.Input((5,)), layers.Dense(3), layers.Dense(2)]),
    }
    with pytest.raises(ValueError, match="these two lines make a tower of it"):
        stitch(towers, [])


def test_of_an_unbuilt_model_nothing_is_built_to_say_so():
    features = keras.Input((5,), name="features")
    other = keras.Model(features, layers.Dense(2)(features))
    unbuilt = keras.Sequential([layers.Dense(3)])

    with pytest.raises(ValueError, match=r"tower of 'b'.* can be traced, these two"):
        stitch({"a": other, "b": unbuilt}, [])

    assert unbuilt(np.zeros((2, 7), "float32")).shape == (2, 3)
