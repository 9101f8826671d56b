"""A trained model in a smaller dtype, for processors that compute faster in it."""

import keras
from keras import ops


def lower(model, dtype):
    """The model computing in `dtype`, with inputs and outputs as before.

    Weights and alphas stay float32, and the layers that give the outputs go on
    computing in it. The layers are those of `model`, changed.
    """
    outputs = {id(x) for x in keras.tree.flatten(model.output)}
    for layer in _layers(model):
        if layer.dtype_policy.name == "float32" and not _gives(layer, outputs):
            layer.dtype_policy = f"mixed_{dtype}"
    # Anew, for the dtypes between the layers.
    lowered = keras.models.clone_model(model, clone_function=lambda layer: layer)
    same_dtypes = keras.tree.map_structure(
        lambda x, before: x if x.dtype == before.dtype else ops.cast(x, before.dtype),
        lowered.output,
        model.output,
    )
    return keras.Model(lowered.input, same_dtypes)


def _layers(model):
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers(layer)
        else:
            yield layer


def _gives(layer, outputs):
    try:
        return any(id(x) in outputs for x in keras.tree.flatten(layer.output))
    except AttributeError:  # a layer that is called more than once
        return False
