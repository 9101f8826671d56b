"""The AlexNet towers: their shapes, what their cells see, and how they train."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cross_stitch import alexnet, fcn_alexnet
from keras_cross_stitch.towers import (
    BilinearUpsampling,
    LocalResponseNormalization,
)

TAPS = ["pool1", "pool2", "pool5", "fc6", "fc7"]
CONVOLUTIONS = ["conv1", "conv2", "conv3", "conv4", "conv5"]
NORMS = [f"{name}_norm" for name in [*CONVOLUTIONS, "fc6", "fc7"]]


def _images(n, height, width, seed=0):
    images = np.random.default_rng(seed).uniform(0, 255, (n, height, width, 3))
    return images.astype("float32")


def _names(model):
    return [layer.name for layer in model.layers]


@pytest.mark.parametrize("build", [alexnet, fcn_alexnet])
def test_layers_have_the_names_of_the_paper_in_its_order(build):
    model = build(7, width=0.02)

    named = [*CONVOLUTIONS[:1], "pool1", "conv2", "pool2", *CONVOLUTIONS[2:]]
    named += ["pool5", "fc6", "fc7", "score"]
    assert [name for name in _names(model) if name in named] == named
    assert model.name == build.__name__
    assert build(7, width=0.02, name="segmentation").name == "segmentation"


@pytest.mark.slow
def test_alexnet_at_width_1_has_the_filters_of_the_paper():
    model = alexnet(20, (67, 67, 3), width=1.0, normalization=None)

    kernels = {
        layer.name: tuple(layer.kernel.shape) for layer in model.layers if layer.weights
    }
    assert kernels == {
        "conv1": (11, 11, 3, 96),
        "conv2": (5, 5, 96, 256),
        "conv3": (3, 3, 256, 384),
        "conv4": (3, 3, 384, 384),
        "conv5": (3, 3, 384, 256),
        "fc6": (256, 4096),
        "fc7": (4096, 4096),
        "score": (4096, 20),
    }


def test_alexnet_at_227_pixels_has_the_maps_of_the_paper():
    model = alexnet(20, width=0.125)

    shapes = {name: model.get_layer(name).output.shape[1:] for name in TAPS}
    assert shapes == {
        "pool1": (27, 27, 12),
        "pool2": (13, 13, 32),
        "pool5": (6, 6, 32),
        "fc6": (512,),
        "fc7": (512,),
    }
    assert model.input_shape == (None, 227, 227, 3)


def test_fcn_alexnet_has_the_kernels_of_alexnet():
    model = fcn_alexnet(40, width=0.125, normalization=None)

    kernels = {
        layer.name: tuple(layer.kernel.shape) for layer in model.layers if layer.weights
    }
    assert kernels == {
        "conv1": (11, 11, 3, 12),
        "conv2": (5, 5, 12, 32),
        "conv3": (3, 3, 32, 48),
        "conv4": (3, 3, 48, 48),
        "conv5": (3, 3, 48, 32),
        "fc6": (6, 6, 32, 512),
        "fc7": (1, 1, 512, 512),
        "score": (1, 1, 512, 40),
    }


@pytest.mark.parametrize("build", [alexnet, fcn_alexnet])
@pytest.mark.parametrize(
    ("normalization", "norms"),
    [("batch", NORMS), ("local_response", ["conv1_norm", "conv2_norm"]), (None, [])],
)
def test_normalization_decides_the_norm_layers(build, normalization, norms):
    model = build(3, width=0.02, normalization=normalization)

    kinds = {layer.name: type(layer) for layer in model.layers if "_norm" in layer.name}
    kind = {
        "batch": keras.layers.BatchNormalization,
        "local_response": LocalResponseNormalization,
        None: None,
    }[normalization]
    assert kinds == dict.fromkeys(norms, kind)


def test_dropout_and_regularizer_reach_their_layers():
    l2 = keras.regularizers.L2(2.5e-4)

    for model in (
        alexnet(3, width=0.02, dropout=0.25, kernel_regularizer=l2),
        fcn_alexnet(3, width=0.02, dropout=0.25, kernel_regularizer=l2),
    ):
        assert [model.get_layer(f"{fc}_dropout").rate for fc in ("fc6", "fc7")] == [
            0.25,
            0.25,
        ]
        regularized = [
            layer.name
            for layer in model.layers
            if getattr(layer, "kernel_regularizer", None) is l2
        ]
        assert regularized == [*CONVOLUTIONS, "fc6", "fc7", "score"]
        assert len(model.losses) == 8


@pytest.mark.slow
@pytest.mark.parametrize("upsampling", [32, 16, 8])
@pytest.mark.parametrize("size", [(96, 64), (33, 97), (31, 70), (4, 9), (48, 80)])
def test_a_known_size_comes_out_as_it_went_in(size, upsampling):
    model = fcn_alexnet(5, (*size, 3), width=0.02, upsampling=upsampling)

    height, width = (n * upsampling // 32 for n in size)
    assert model.output.shape == (None, height, width, 5)
    assert model(_images(2, *size)).shape == (2, height, width, 5)


@pytest.mark.parametrize("upsampling", [32, 16])
def test_an_unknown_size_comes_out_as_the_next_multiple_of_32(upsampling):
    model = fcn_alexnet(5, width=0.02, upsampling=upsampling)

    assert model.output.shape == (None, None, None, 5)
    for size, cells in (((64, 96), (2, 3)), ((65, 31), (3, 1)), ((40, 97), (2, 4))):
        expected = (1, cells[0] * upsampling, cells[1] * upsampling, 5)
        assert model(_images(1, *size)).shape == expected


def _all_ones(model):
    """Sets all kernels to 1 and all biases to 0, so that every path counts alike."""
    for layer in model.layers:
        layer.set_weights(
            [
                np.ones(w.shape) if w.ndim > 1 else np.zeros(w.shape)
                for w in layer.get_weights()
            ]
        )


def _centres(responses, positions):
    """The mean position that each cell responds to: (positions, cells) -> (cells,)."""
    return positions @ responses / responses.sum(axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("size", [512, 480, 496])
def test_a_cell_of_score_sees_what_lies_where_upsampling_puts_it(size, axis):
    shape = (size, 32, 3) if axis == "rows" else (32, size, 3)
    model = fcn_alexnet(1, shape, width=0.01, normalization=None)
    _all_ones(model)
    positions = np.arange(0, size, 4) + 1.5  # one white bar, 4 pixels wide
    bars = np.full((len(positions), size, 32, 3), 127.5, "float32")  # 127.5 is 0
    for bar, position in zip(bars, positions, strict=True):
        bar[int(position) - 1 : int(position) + 3] = 255
    if axis == "columns":
        bars = bars.swapaxes(1, 2)

    score = keras.Model(model.input, model.get_layer("score").output)
    cells = score.predict(bars, verbose=0).max(
        axis=(2, 3) if axis == "rows" else (1, 3)
    )

    # Given cells whose field of view, 355 pixels, lies within the image.
    inner = slice(6, size // 32 - 6)
    upsampled = keras.layers.UpSampling2D(32, interpolation="bilinear")(
        np.eye(len(cells[0]), dtype="float32")[..., None, None]
    )
    peaks = _centres(np.array(upsampled)[..., 0, 0].T, np.arange(32.0 * len(cells[0])))
    assert len(peaks[inner]) >= 3
    np.testing.assert_allclose(_centres(cells, positions)[inner], peaks[inner], atol=2)


@pytest.mark.parametrize("factor", [1, 2, 3, 16])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 2)])
def test_upsampling_is_bilinear(size, factor):
    maps = np.random.default_rng(0).normal(size=(2, *size, 7)).astype("float32")
    expected = keras.layers.UpSampling2D(factor, interpolation="bilinear")(maps)

    for x in (keras.Input((*size, 7)), keras.Input((None, None, 7))):
        model = keras.Model(x, BilinearUpsampling(factor)(x))
        np.testing.assert_allclose(model(maps), expected, atol=1e-5)
    known = keras.Input((*size, 7))
    assert BilinearUpsampling(factor)(known).shape[1:] == expected.shape[1:]


@pytest.mark.slow
def test_a_tower_for_any_size_trains_and_is_exported(tmp_path):
    """As Keras's own bilinear upsampling is not."""
    model = fcn_alexnet(3, width=0.02, upsampling=16)
    model.compile("sgd", "mse")

    for size in (64, 96):
        targets = np.ones((2, size // 2, size // 2, 3), "float32")
        assert np.isfinite(model.train_on_batch(_images(2, size, size), targets))

    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    images = _images(1, 32, 96)
    np.testing.assert_allclose(
        served.serve(images), model(images), rtol=1e-4, atol=1e-5
    )


def test_pixels_are_rescaled_to_between_minus_1_and_1():
    rescaling = alexnet(3, width=0.02).get_layer("rescaling")

    np.testing.assert_allclose(rescaling([0.0, 127.5, 255.0]), [-1, 0, 1], atol=1e-6)


def test_the_score_of_an_untrained_fcn_is_small_but_not_zero():
    """At zero, losses that normalise have a gradient of 1e7."""
    model = fcn_alexnet(5, (33, 65, 3), width=0.1)

    kernel = np.array(model.get_layer("score").kernel)
    assert kernel.std() == pytest.approx(0.01, rel=0.1)
    length = np.linalg.norm(model(_images(2, 33, 65)), axis=-1)
    assert length.min() > 1e-3
    assert length.max() < 5


@pytest.mark.parametrize("build", [alexnet, lambda *_, **more: fcn_alexnet(3, **more)])
def test_kernels_start_with_the_spread_of_he(build):
    for layer in build(3, width=0.1).layers:
        if layer.weights and "norm" not in layer.name and layer.name != "score":
            expected = np.sqrt(2 / np.prod(layer.kernel.shape[:-1]))
            assert np.std(layer.kernel) == pytest.approx(expected, rel=0.15), layer.name


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5, 11), (2, 3, 1, 1), (2, 5, 2)])
def test_local_response_normalization_is_that_of_alexnet(shape):
    x = np.random.default_rng(0).normal(scale=100, size=shape)

    y = LocalResponseNormalization()(x.astype("float32"))

    expected = np.empty_like(x)
    for c in range(shape[-1]):
        neighbours = x[..., max(0, c - 2) : c + 3]
        energy = (neighbours**2).sum(axis=-1)
        expected[..., c] = x[..., c] / (1 + 1e-4 / 5 * energy) ** 0.75
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_local_response_normalization_survives_float16():
    # Given maps whose squares are above float16's 65 504.
    x = np.full((1, 5), 1000.0)

    y = LocalResponseNormalization(dtype="mixed_float16")(x)

    expected = 1000 / (1 + 1e-4 / 5 * 1e6 * np.array([3, 4, 5, 4, 3])) ** 0.75
    assert y.dtype == "float16"
    np.testing.assert_allclose(np.array(y)[0], expected, rtol=2e-3)


@pytest.mark.parametrize("normalization", ["batch", "local_response", None])
@pytest.mark.parametrize(
    ("build", "shape"), [(alexnet, (67, 71, 3)), (fcn_alexnet, (33, 65, 3))]
)
def test_a_saved_tower_loads(tmp_path, build, shape, normalization):
    model = build(3, shape, width=0.02, normalization=normalization)
    for seed, variable in enumerate(model.variables):
        if "seed" not in variable.path:
            rng = np.random.default_rng(seed)
            variable.assign(rng.uniform(0.1, 0.2, variable.shape))
    images = _images(2, *shape[:2])

    model.save(tmp_path / "tower.keras")
    loaded = keras.saving.load_model(tmp_path / "tower.keras")

    before, after = np.array(model(images)), np.array(loaded(images))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    assert before.std() > 0


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (alexnet, (67, 67, 3)),
        (fcn_alexnet, (33, 65, 3)),
        (fcn_alexnet, (None, None, 3)),
    ],
)
def test_logits_are_float32_under_mixed_precision(build, shape, policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = build(3, shape, width=0.02, normalization="local_response")
    finally:
        keras.config.set_dtype_policy(before)

    assert model.output.dtype == "float32"
    assert model(_images(1, *(n or 33 for n in shape[:2]))).dtype == "float32"
    assert model.get_layer("pool1").output.dtype == policy.removeprefix("mixed_")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "shape", "labels"),
    [
        (alexnet, (67, 67, 3), (4,)),
        (fcn_alexnet, (33, 65, 3), (4, 33, 65)),
    ],
)
def test_a_step_of_training_changes_every_weight(build, shape, labels):
    rng = np.random.default_rng(0)
    model = build(5, shape, width=0.05, dropout=0.1)
    before = {v.path: np.array(v) for v in model.trainable_variables}
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    history = model.fit(_images(4, *shape[:2]), rng.integers(5, size=labels), verbose=0)

    assert np.isfinite(history.history["loss"]).all()
    unchanged = [
        v.path
        for v in model.trainable_variables
        if np.array_equal(before[v.path], np.array(v))
    ]
    assert unchanged == []


@pytest.mark.parametrize("build", [alexnet, fcn_alexnet])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"outputs": 0}, "`outputs` must be a positive integer.*outputs=0"),
        ({"outputs": 2.0}, "`outputs` must be a positive integer.*outputs=2.0"),
        ({"outputs": "7"}, "`outputs` must be a positive integer.*outputs='7'"),
        ({"outputs": 3, "width": 0}, "`width` must be above 0.*width=0"),
        ({"outputs": 3, "width": -1.0}, "`width` must be above 0.*width=-1.0"),
        (
            {"outputs": 3, "normalization": "layer"},
            "`normalization` must be one of.*'batch'.*normalization='layer'",
        ),
    ],
)
def test_bad_arguments_are_an_error(build, arguments, words):
    with pytest.raises(ValueError, match=words):
        build(**arguments)


def test_an_image_that_alexnet_leaves_nothing_of_is_an_error():
    assert alexnet(3, (67, 67, 3), width=0.02).output.shape == (None, 3)
    with pytest.raises(ValueError, match=r"at least 67 pixels.*\(67, 66, 3\)"):
        alexnet(3, (67, 66, 3), width=0.02)
    with pytest.raises(ValueError, match=r"known sides.*`fcn_alexnet`.*\(None, None"):
        alexnet(3, (None, None, 3), width=0.02)


@pytest.mark.parametrize("upsampling", [0, 2.5, None])
def test_upsampling_is_a_whole_number(upsampling):
    with pytest.raises(ValueError, match=r"whole number.*upsampling="):
        fcn_alexnet(3, (64, 64, 3), width=0.02, upsampling=upsampling)
