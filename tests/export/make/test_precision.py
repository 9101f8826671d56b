import keras
import numpy as np

from export.make.precision import lower
from export.version.signatures import signatures
from tests.export.conftest import tower


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


def test_a_bfloat16_version_takes_and_gives_float32(cheaper, version):
    written, _, changes = cheaper
    for name, signature in signatures(written).items():
        assert signature.inputs == signatures(version)[name].inputs
        assert signature.outputs == signatures(version)[name].outputs
    for change in changes.values():
        assert 0 < change.largest < 0.03
        assert change.after.ops["Cast"] > change.before.ops["Cast"]
