"""Taps that are found: at the ends of stages, fit for `stitch`."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_cross_stitch import common_taps, stitch


def unet(outputs, widths=(4, 8)):
    x = image = keras.Input((16, 16, 3), name="image")
    skips = []
    for n, width in enumerate(widths):
        x = layers.Conv2D(width, 3, padding="same", name=f"first{n}")(x)
        x = layers.Conv2D(width, 3, padding="same", name=f"down{n}")(x)
        skips.append(x)
        x = layers.MaxPooling2D(name=f"pool{n}")(x)
    x = layers.Conv2D(16, 3, padding="same", name="bottom")(x)
    for n, width in reversed(list(enumerate(widths))):
        x = layers.Concatenate(name=f"skip{n}")([layers.UpSampling2D()(x), skips[n]])
        x = layers.Conv2D(width, 3, padding="same", name=f"up{n}")(x)
    return keras.Model(image, layers.Conv2D(outputs, 1, name="score")(x))


def squeezing(outputs, frozen=False):
    """Residual blocks whose channels are weighed by what a vector says."""
    x = image = keras.Input((16, 16, 3), name="image")
    for n, width in enumerate((4, 6)):
        x = layers.ZeroPadding2D(name=f"pad{n}")(x)
        x = layers.Conv2D(width, 3, 2, name=f"enter{n}")(x)
        weight = layers.GlobalAveragePooling2D(name=f"squeeze{n}")(x)
        weight = layers.Dense(width, activation="sigmoid", name=f"excite{n}")(weight)
        weight = layers.Reshape((1, 1, width), name=f"shape{n}")(weight)
        inner = layers.Multiply(name=f"weigh{n}")([x, weight])
        inner = layers.Conv2D(width, 3, padding="same", name=f"inner{n}")(inner)
        x = layers.Add(name=f"block{n}")([x, inner])
    x = layers.GlobalAveragePooling2D(name="pooled")(x)
    model = keras.Model(image, layers.Dense(outputs, name="score")(x))
    for layer in model.layers:
        layer.trainable = not (frozen and layer.name.endswith("0"))
    return model


def text(outputs, units=5, depth=6):
    words = keras.Input((7,), dtype="int32", name="words")
    x = layers.Embedding(9, units, name="embedding")(words)
    for n in range(depth):
        x = layers.LSTM(units, return_sequences=True, name=f"lstm{n}")(x)
    x = layers.LSTM(units, name="last")(x)
    return keras.Model(words, layers.Dense(outputs, name="score")(x))


def named(taps):
    return [tuple(tap.values()) for tap in taps]


def test_a_u_net_is_tapped_at_the_end_of_each_stage_down_and_up():
    taps = common_taps({"a": unet(2), "b": unet(3)})

    names = ["down0", "down1", "bottom", "up1", "up0"]
    assert named(taps) == [(name, name) for name in names]
    assert taps[0].reason == "the end of (16, 16, 4)"
    assert repr(taps[0]) == (
        "Tap({'a': 'down0', 'b': 'down0'}, 'the end of (16, 16, 4)')"
    )


def test_branches_that_weigh_channels_are_no_stages_nor_is_padding():
    taps = common_taps({"a": squeezing(2), "b": squeezing(3)})

    assert named(taps) == [(n, n) for n in ("block0", "block1", "pooled")]


def test_what_is_frozen_alike_is_not_tapped():
    keras.utils.set_random_seed(0)
    tower = squeezing(2, frozen=True)
    towers = {"a": tower, "b": keras.models.clone_model(tower)}
    towers["b"].set_weights(tower.get_weights())

    taps = common_taps(towers)

    assert named(taps) == [(n, n) for n in ("block1", "pooled")]
    stitch(towers, at=taps)


def test_sequences_are_tapped_by_depth():
    taps = common_taps({"a": text(2), "b": text(3)})

    sequence = [n for n, _ in named(taps)]
    assert sequence == ["lstm0", "lstm3", "lstm5", "last"]


def test_without_projection_shapes_are_equal():
    taps = common_taps({"a": unet(2), "b": unet(2, widths=(4, 9))})

    assert named(taps) == [(n, n) for n in ("down0", "bottom", "up0")]


def test_a_stage_is_tapped_with_the_one_of_its_size_not_with_the_nearest_before_it():
    def tower(*strides):
        x = image = keras.Input((16, 16, 3), name="image")
        for n, stride in enumerate(strides):
            x = layers.Conv2D(4, 3, stride, padding="same", name=f"conv{n}")(x)
        return keras.Model(image, layers.Dense(2, name="score")(layers.Flatten()(x)))

    taps = common_taps({"a": tower(1, 2, 2), "b": tower(2, 2)}, project=True)

    assert named(taps)[:2] == [("conv1", "conv0"), ("conv2", "conv1")]


def test_towers_of_which_nothing_fits_are_told():
    towers = {"a": unet(2), "b": text(2)}

    told = r"shares nothing.*or let units project.*'b': \['lstm0 \(7, 5\)'"
    with pytest.warns(UserWarning, match=told):
        assert common_taps(towers) == []
    with pytest.warns(UserWarning, match=r"name layers yourself\. Ends of stages"):
        assert common_taps(towers, project=True) == []


def stages(data_format, widths=(7, 5, 3)):
    """Halved sizes; channels that are no multiples of them."""
    where = {"data_format": data_format}
    size, channels = (32, 24), (3,)
    first = data_format == "channels_first"
    x = image = keras.Input((*channels, *size) if first else (*size, *channels))
    for n, width in enumerate(widths):
        x = layers.Conv2D(width, 3, padding="same", **where, name=f"enter{n}")(x)
        wide = layers.Conv2D(2 * width, 1, **where, name=f"wide{n}")(x)
        x = layers.Concatenate(axis=1 if first else -1, name=f"end{n}")([x, wide])
        x = layers.MaxPooling2D(2, **where, name=f"pool{n}")(x)
    x = layers.GlobalAveragePooling2D(**where, name="vector")(x)
    return keras.Model(image, layers.Dense(2, name="score")(x))


@pytest.mark.parametrize("project", [False, True])
def test_taps_are_the_same_wherever_the_channels_are(project):
    def found(data_format):
        more = {"widths": (4, 6)} if project else {}
        builds = [{}, more, {}]
        towers = {
            task: stages(data_format, **arguments)
            for task, arguments in zip("abc", builds, strict=True)
        }
        return common_taps(towers, project=project)

    first, last = found("channels_first"), found("channels_last")

    assert named(first) == named(last)
    names = ["end0", "end1"] if project else ["end0", "end1", "end2"]
    assert [a for a, *_ in named(first)[: len(names)]] == names
    assert last[0].reason.startswith("the end of (32, 24, 21)")
    assert first[0].reason.startswith("the end of (21, 32, 24)")


@pytest.fixture
def images_have_channels_first():
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format("channels_last")


def attention(outputs, units=6):
    inputs = keras.Input((5, 4), name="steps")
    x = layers.Dense(units, name="wide")(inputs)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.GRU(units, return_sequences=True, name="gru")(x)
    return keras.Model(inputs, layers.Dense(outputs, name="score")(x[:, -1]))


@pytest.mark.usefixtures("images_have_channels_first")
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_sequences_have_their_features_last_whatever_images_have(tasks):
    towers = {f"t{n}": attention(n + 1) for n in range(tasks)}

    model = stitch(towers, ["wide", "attention", "gru"], same_task=1.0)

    for name in ("wide", "attention", "gru"):
        unit = model.get_layer(f"cross_stitch_{name}")
        assert unit.data_format == "channels_last"
        assert tuple(unit.alpha.shape) == (tasks, tasks, 6)
    steps = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
    for task, output in model(steps).items():
        np.testing.assert_allclose(output, towers[task](steps), rtol=1e-5)
    (tap,) = [x for x in common_taps(towers) if x["t0"] == "gru"]
    assert set(tap.values()) == {"gru"}

    # Mixed as Eq. 1 says, by hand.
    alpha = np.random.default_rng(1).normal(size=(tasks, tasks, 6))
    model.get_layer("cross_stitch_gru").alpha.assign(alpha)
    maps = [
        keras.Model(x.input, x.get_layer("gru").output)(steps) for x in towers.values()
    ]
    mixed = np.einsum("ijc,jntc->intc", alpha, np.stack(maps))
    for n, (task, output) in enumerate(model(steps).items()):
        expected = towers[task].get_layer("score")(mixed[n, :, -1].astype("float32"))
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("images_have_channels_first")
def test_sequences_are_projected_by_their_features_whatever_images_have():
    towers = {"a": attention(1, 6), "b": attention(2, 4)}

    taps = common_taps(towers, project=True)
    model = stitch(towers, taps, project=True, same_task=1.0)

    unit = next(x for x in model.layers if x.name.startswith("cross_stitch"))
    assert unit.data_format == "channels_last"


def test_towers_with_channels_at_other_places_do_not_fit():
    def tower(data_format):
        x = image = keras.Input((6, 6, 6), name="image")
        for n in range(3):
            x = layers.Conv2D(6, 3, 1, "same", data_format, name=f"conv{n}")(x)
        return keras.Model(image, layers.Flatten(name="flat")(x))

    towers = {"a": tower("channels_first"), "b": tower("channels_last")}
    with pytest.warns(UserWarning, match="Nothing of the towers fits"):
        assert common_taps(towers) == []


@pytest.mark.parametrize("towers", [[], {"a": None}])
def test_towers_are_a_dict_of_two_at_least(towers):
    with pytest.raises(ValueError, match="must be a dict of at least two"):
        common_taps(towers)


PAIRS = {
    "a U-Net and a squeezing net": (unet, squeezing),
    "texts of other widths": (text, lambda n: text(n, units=8, depth=3)),
    "U-Nets of other widths": (unet, lambda n: unet(n, widths=(3, 5))),
    "three": (unet, squeezing, lambda n: unet(n, widths=(3, 5))),
}


@pytest.mark.parametrize("builds", PAIRS.values(), ids=PAIRS.keys())
def test_models_that_were_not_made_for_each_other_are_joined(builds):
    towers = {task: build(2) for task, build in zip("abc", builds, strict=False)}

    taps = common_taps(towers, project=True)
    model = stitch(towers, at=taps, project=True, same_task=1.0)

    assert len(taps) >= 2
    assert "projected to each other" in taps[0].reason
    rng = np.random.default_rng(0)
    shape = (2, *model.input.shape[1:])
    data = rng.integers(0, 9, shape) if len(shape) == 2 else rng.uniform(size=shape)
    for task, output in model(data).items():
        apart = ops.convert_to_numpy(towers[task](data))
        np.testing.assert_array_equal(output, apart)
        assert apart.std() > 0
