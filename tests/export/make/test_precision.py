import keras
import numpy as np
import pytest

from export.make.precision import lower
from export.version.signatures import signatures
from tests.export.conftest import tower

pytestmark = pytest.mark.xdist_group("export")


def test_outputs_stay_float32_and_close(images, model_file, model):
    lowered = lower(keras.saving.load_model(model_file), "bfloat16")
    assert lowered.get_layer("kind_conv1").compute_dtype == "bfloat16"
    assert lowered.get_layer("cross_stitch_conv1").alpha.dtype == "float32"
    assert lowered.get_layer("kind_score").compute_dtype == "float32"
    expected = model.predict(images, verbose=0)
    outputs = lowered.predict(images, verbose=0)
    for task, output in outputs.items():
        assert output.dtype == np.float32
        difference = np.abs(output - expected[task]).max()
        assert 0 < difference < 0.03 * np.abs(expected[task]).max()


def test_nested_models_compute_in_it_too(images):
    nested = tower(4)
    image = keras.Input((9, 7, 3), name="image")
    x = nested(image)
    model = keras.Model(image, {"a": keras.layers.Dense(2)(x), "features": x})
    lowered = lower(model, "bfloat16")
    assert nested.get_layer("conv1").compute_dtype == "bfloat16"
    outputs = lowered.predict(images, verbose=0)
    assert {x.dtype for x in outputs.values()} == {np.dtype("float32")}


LAYERS = {
    "dense": lambda: keras.layers.Dense(3),
    "einsum": lambda: keras.layers.EinsumDense("nhwc,cd->nhwd", (None, None, 3)),
    "conv": lambda: keras.layers.Conv2D(3, 3, padding="same"),
    "transposed": lambda: keras.layers.Conv2DTranspose(3, 3, 2, padding="same"),
    "depthwise": lambda: keras.layers.DepthwiseConv2D(3, padding="same"),
    "separable": lambda: keras.layers.SeparableConv2D(3, 3, padding="same"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_are_rounded_once_and_to_the_same(kind, images):
    """As at each call by a mixed policy, also where a layer is called twice."""
    image = keras.Input((9, 7, 3), name="image")
    shared = LAYERS[kind]()
    x = shared(image)
    if x.shape == image.shape:
        x = shared(x)
    x = keras.layers.BatchNormalization()(x)
    model = keras.Model(image, {"a": keras.layers.Activation("relu")(x)})
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 1, w.shape) for w in model.get_weights()])
    mixed = keras.models.clone_model(
        model,
        clone_function=lambda layer: type(layer).from_config(
            {**layer.get_config(), "dtype": "mixed_bfloat16"}
        ),
    )
    mixed.set_weights(model.get_weights())

    lowered = lower(model, "bfloat16")

    ours = lowered.predict(images, verbose=0)["a"]
    theirs = mixed.predict(images, verbose=0)["a"]
    np.testing.assert_allclose(ours, theirs.astype("float32"), rtol=0.02)
    assert {w.dtype for w in lowered.get_layer(shared.name).weights} == {"bfloat16"}
    normalization = next(x for x in lowered.layers if "normalization" in x.name)
    assert {w.dtype for w in normalization.weights} == {"float32"}


def test_an_initializer_that_knows_no_bfloat16_is_not_asked(images):
    image = keras.Input((9, 7, 3), name="image")
    x = keras.layers.Conv2D(4, 3, kernel_initializer="orthogonal")(image)
    model = keras.Model(image, {"a": keras.layers.ReLU()(x)})
    expected = model.predict(images, verbose=0)["a"]
    given = lower(model, "bfloat16").predict(images, verbose=0)["a"]
    np.testing.assert_allclose(given, expected, atol=0.03 * expected.max())


OPERATIONS = {
    "add": lambda x, y: x + y,
    "slice": lambda x, y: x[:, :4],
    "concatenate": lambda x, y: keras.ops.concatenate([x, y], axis=1),
    "cast": lambda x, y: keras.ops.cast(x, "float32"),
    "where": lambda x, y: keras.ops.where(x > 0, x, y),
    "of two": lambda x, y: keras.ops.sum(keras.ops.stack(keras.ops.split(x, 2, 1)), 0),
    "image": lambda x, y: x * keras.ops.mean(keras.ops.abs(y), axis=-1, keepdims=True),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_operations_that_are_no_layers_stay_as_they_are(kind, nested):
    given = keras.Input((8,), name="given")
    x = keras.layers.Dense(8, activation="relu")(given)
    y = OPERATIONS[kind](x, given if kind == "image" else keras.layers.Dense(8)(x))
    if nested:
        y = keras.Model(given, y)(given)
    outputs = {"a": keras.layers.Dense(3)(y), "b": y, "best": keras.ops.argmax(y, -1)}
    model = keras.Model(given, outputs)
    examples = np.random.default_rng(0).uniform(-1, 1, (5, 8)).astype("float32")
    expected = model.predict(examples, verbose=0)

    lowered = lower(model, "bfloat16")

    answers = lowered.predict(examples, verbose=0)
    for task, answer in answers.items():
        assert answer.dtype == expected[task].dtype
    for task in ("a", "b"):
        most = 0.03 * np.abs(expected[task]).max()
        np.testing.assert_allclose(answers[task], expected[task], atol=most)
    assert np.abs(answers["a"] - expected["a"]).max() > 0


def test_quantized_layers_stay_as_they_are(images):
    image = keras.Input((9, 7, 3), name="image")
    x = keras.layers.Flatten()(image)
    dense = keras.layers.Dense(4, dtype="mixed_bfloat16")
    model = keras.Model(image, {"a": keras.layers.ReLU(dtype="float32")(dense(x))})
    dense.quantize("int8")
    lowered = lower(model, "bfloat16")
    assert lowered.get_layer(dense.name) is dense
    lowered.predict(images, verbose=0)


def test_a_layer_that_two_nested_models_share_stays_one(images):
    image = keras.Input((9, 7, 3), name="image")
    shared = keras.layers.Conv2D(4, 3, name="shared")
    inner = [keras.Model(x, shared(x)) for x in map(keras.Input, [(9, 7, 3)] * 2)]
    a, b = (keras.layers.ReLU()(of(image)) for of in inner)
    model = keras.Model(image, {"a": a, "b": b})
    lowered = lower(model, "bfloat16")
    assert lowered.count_params() == model.count_params()
    given = lowered.predict(images, verbose=0)
    np.testing.assert_array_equal(given["a"], given["b"])


def test_a_bfloat16_version_takes_and_gives_float32(cheaper, version):
    written, _, changes = cheaper
    for name, signature in signatures(written).items():
        assert signature.inputs == signatures(version)[name].inputs
        assert signature.outputs == signatures(version)[name].outputs
    for change in changes.values():
        assert 0 < change.largest < 0.03
        assert change.after.ops["Cast"] > change.before.ops["Cast"]
