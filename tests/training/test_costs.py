"""What a model costs, against counts by hand."""

import keras
import pytest
from keras import layers

from keras_cross_stitch import NDDR, split, stitch
from training import costs


def tower():
    image = keras.Input((9, 8, 3), name="image")
    x = layers.Conv2D(4, 3, strides=2, padding="same", name="conv")(image)  # 5x4x4
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(image, layers.Dense(7, name="score")(x))


CONV, DEPTHWISE, SCORE = 5 * 4 * 4 * 27, 5 * 4 * 4 * 9, 80 * 7
WEIGHTS = (27 + 1) * 4, (9 + 1) * 4, 81 * 7


def test_a_tower_by_hand():
    assert costs.count(tower()) == {
        "parameters": sum(WEIGHTS),
        "multiply_adds": CONV + DEPTHWISE + SCORE,
    }


@pytest.mark.parametrize("count", [2, 3])
def test_towers_side_by_side_cost_as_many_and_shared_layers_once(count):
    towers = {f"task{k}": tower() for k in range(count)}
    one = costs.count(tower())["multiply_adds"]
    stitched = costs.count(stitch(towers, at=["conv"]))

    assert costs.count(stitch(towers, at=[]))["multiply_adds"] == count * one
    assert stitched == {
        "parameters": count * sum(WEIGHTS) + count**2 * 4,  # alpha per channel
        "multiply_adds": count * one,
    }
    assert costs.count(split(towers, at="score")) == {
        "parameters": sum(WEIGHTS[:2]) + count * WEIGHTS[2],
        "multiply_adds": CONV + DEPTHWISE + count * SCORE,
    }


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_projections_are_counted(rank):
    def one(channels):
        x = keras.Input((4,) * (rank - 2) + (3,), name="x")
        return keras.Model(x, layers.Dense(channels, name="score")(x))

    model = stitch({"a": one(5), "b": one(2)}, at=["score"], project=True)
    apart = stitch({"a": one(5), "b": one(2)}, at=[])

    more = {key: x - costs.count(apart)[key] for key, x in costs.count(model).items()}
    weights = (5 + 1) * 2 + (2 + 1) * 5
    assert more == {"parameters": weights + 4, "multiply_adds": 4 ** (rank - 2) * 20}


@pytest.mark.parametrize("count", [2, 3])
def test_nddrs_units_are_products_of_all_channels(count):
    towers = {f"task{k}": tower() for k in range(count)}
    apart = costs.count(stitch(towers, at=[]))
    joined = costs.count(stitch(towers, at=["conv"], unit=NDDR))

    weights = count * (count * 4 * 4 + 4 * 4)  # and of the batch normalisation
    assert joined["parameters"] - apart["parameters"] == weights
    products = count * 5 * 4 * (count * 4) * 4
    assert joined["multiply_adds"] - apart["multiply_adds"] == products


def test_products_of_matrices_and_free_sizes_are_counted():
    rois, image = keras.Input((None, 6), name="rois"), keras.Input((4, 5), name="x")
    product = layers.Dense(3)(rois)  # of each region
    other = layers.Dot(axes=(2, 2))([image, image])  # 4x4, of 5 each
    model = keras.Model({"rois": rois, "x": image}, [product, other])

    for regions in (1, 7):
        counted = costs.count(model, free=regions)["multiply_adds"]
        assert counted == regions * 6 * 3 + 16 * 5
