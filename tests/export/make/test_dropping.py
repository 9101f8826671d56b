import keras
import numpy as np
import pytest

from export.make.dropping import leave_out, negligible_links
from keras_cross_stitch import CrossStitch, stitch

pytestmark = pytest.mark.xdist_group("export")

layers = keras.layers
TASKS = ("b", "c", "a")  # alpha is in the order of the sorted names


def linear(per):
    """Three towers of two linear layers, with a unit between; alphas of all sizes."""
    keras.utils.set_random_seed(1)

    def tower():
        x = keras.Input((4,), name="x")
        y = layers.Dense(5, name="first")(x)
        return keras.Model(x, layers.Dense(2, name="second")(y))

    model = stitch({task: tower() for task in TASKS}, at=["first"], per=per)
    unit = model.get_layer("cross_stitch_first")
    sizes = np.array([[1, 1e-6, 1e-4], [1e-2, 1, 0.3], [3e-5, 2, 1]])
    alpha = np.random.default_rng(2).uniform(0.5, 1, size=unit.alpha.shape)
    unit.alpha.assign(sizes.reshape(3, 3, *(1,) * (alpha.ndim - 2)) * alpha)
    return model


def statement(model, x, absent):
    """The model in float64 without the links (i, j)."""
    alpha = np.array(model.get_layer("cross_stitch_first").alpha, "float64")
    for i, j in absent:
        alpha[i, j] = 0

    def dense(name, x):
        kernel, bias = model.get_layer(name).get_weights()
        return x @ kernel.astype("float64") + bias

    tasks = sorted(TASKS)
    maps = [dense(f"{task}_first", x) for task in tasks]
    return {
        task: dense(
            f"{task}_second", sum(a * m for a, m in zip(row, maps, strict=True))
        )
        for task, row in zip(tasks, alpha, strict=True)
    }


def change(model, x, absent):
    before, after = statement(model, x, []), statement(model, x, absent)
    return max(np.abs(after[t] - y).max() / np.abs(y).max() for t, y in before.items())


@pytest.fixture(scope="module", params=["channel", "layer"])
def model(request):
    return linear(request.param)


X = np.random.default_rng(3).normal(size=(7, 4)).astype("float32")


@pytest.mark.parametrize("epsilon", [1e-4, 0.05])
def test_links_are_left_out_as_far_as_the_outputs_stay_within_epsilon(model, epsilon):
    links = negligible_links(model, epsilon, X)
    left_out = [(link.i, link.j) for link in links]
    assert 0 < len(left_out) < 6
    assert change(model, X, left_out) <= epsilon
    effects = [link.effect for link in links]
    assert effects == sorted(effects)
    for link in links:
        assert link.effect == pytest.approx(
            change(model, X, [(link.i, link.j)]), rel=1e-2, abs=1e-6
        )
        assert (link.task, link.source) == (sorted(TASKS)[link.i], "abc"[link.j])
    for i, j in {(i, j) for i in range(3) for j in range(3) if i != j} - {*left_out}:
        assert change(model, X, [*left_out, (i, j)]) > epsilon


def test_links_that_change_too_much_together_are_not_all_left_out():
    model = linear("layer")
    unit = model.get_layer("cross_stitch_first")
    unit.alpha.assign(np.full((3, 3), 0.01) + np.eye(3))
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    epsilon = 1.1 * max(change(model, X, [pair]) for pair in pairs)
    left_out = [(link.i, link.j) for link in negligible_links(model, epsilon, X)]
    assert change(model, X, pairs) > epsilon >= change(model, X, left_out)


def test_the_model_is_as_it_was(model):
    before = model.get_weights()
    links = negligible_links(model, 0.05, X)
    leave_out(model, links)
    for weights, weights_before in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weights, weights_before)


def test_the_outputs_are_those_without_the_links(model):
    links = [x for x in negligible_links(model, 10.0, X) if x.task != "b"]
    assert len(links) >= 3
    outputs = leave_out(model, links).predict(X, verbose=0)
    expected = statement(model, X, [(link.i, link.j) for link in links])
    for task, output in expected.items():
        np.testing.assert_allclose(outputs[task], output, rtol=1e-5, atol=1e-5)


def test_a_tower_is_gone_from_where_a_task_takes_nothing_from_it(model):
    links = [x for x in negligible_links(model, 10.0, X) if x.task == "a"]
    assert [link.source for link in sorted(links, key=lambda x: x.j)] == ["b", "c"]
    without = leave_out(model, links)
    part = keras.Model(without.input, without.output["a"])
    assert {x.name for x in part.layers if x.weights} == {"a_first", "a_second"}
    part = keras.Model(without.input, without.output["b"])
    assert {x.name for x in part.layers} > {"a_first", "b_first", "c_first"}


def test_channels_first_and_lists():
    inputs = [keras.Input((3, 5, 4), name=name) for name in ("left", "right")]
    unit = CrossStitch(data_format="channels_first", name="unit")
    left, right = unit(inputs)
    model = keras.Model(inputs, {"left": left, "right": right})
    rng = np.random.default_rng(4)
    alpha = rng.normal(size=(2, 2, 3)) * [[[1], [1e-5]], [[1], [1]]]
    unit.alpha.assign(alpha)
    xs = [rng.normal(size=(2, 3, 5, 4)).astype("float32") for _ in inputs]
    links = negligible_links(model, 1e-3, xs)
    assert [(link.unit, link.i, link.j) for link in links] == [("unit", 0, 1)]
    outputs = leave_out(model, links).predict(xs, verbose=0)
    np.testing.assert_allclose(
        outputs["left"], alpha[0, 0, :, None, None] * xs[0], rtol=1e-5
    )
    np.testing.assert_allclose(
        outputs["right"],
        np.einsum("tc,tnchw->nchw", alpha[1], xs),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_model_without_units_is_an_error():
    x = keras.Input((4,))
    model = keras.Model(x, {"a": layers.Dense(1, name="score")(x)})
    with pytest.raises(ValueError, match=r"model with CrossStitch layers.*'score'"):
        negligible_links(model, 0.1, X)


@pytest.mark.parametrize("epsilon", [0, -1.0, float("nan")])
def test_epsilon_is_above_zero(model, epsilon):
    with pytest.raises(ValueError, match=f"above 0. Received: {epsilon}"):
        negligible_links(model, epsilon, X)
