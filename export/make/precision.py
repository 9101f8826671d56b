"""A trained model in a smaller dtype, for processors that compute faster in it."""

import functools
import pathlib
from collections.abc import Iterator

import keras
from keras import ops

# All of whose weights are rounded at each call where they compute in a smaller dtype.
_PRODUCTS = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


def computed_here() -> bool:
    """Whether this machine's processor computes in bfloat16; as far as it is known."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text("utf-8").split()
    except OSError:  # not Linux
        return True
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))  # bf16: ARM's


def lower(model: keras.Model, dtype: str) -> keras.Model:
    """The model computing in `dtype`, with inputs and outputs as before.

    Weights of convolutions and dense layers are rounded once, and not at each call.
    All others stay float32, alphas among them, and the layers that give the outputs go
    on computing in it. Other layers are those of `model`, changed.
    """
    outputs = {id(x) for x in keras.tree.flatten(model.output)}
    for layer in _layers(model):
        if layer.dtype_policy.name == "float32" and not _gives(layer, outputs):
            layer.dtype_policy = f"mixed_{dtype}"
    lowered = _anew(model, {})
    same_dtypes = keras.tree.map_structure(
        lambda x, before: x if x.dtype == before.dtype else ops.cast(x, before.dtype),
        lowered.output,
        model.output,
    )
    return keras.Model(lowered.input, same_dtypes)


def _anew(layer: keras.Operation, known: dict[int, keras.Operation]) -> keras.Operation:
    """The same layers in a new graph, which knows the dtypes between them.

    Args:
        layer: The layer, the nested model, or an operation such as `x + y`, which has
            no dtype of its own.
        known: Dict of a layer's `id` to what stands for it, so that a layer that
            several models share stays one.
    """
    if id(layer) not in known:
        if _is_graph(layer):
            clone = functools.partial(_anew, known=known)
            known[id(layer)] = keras.models.clone_model(layer, clone_function=clone)
        elif _is_rounded_at_each_call(layer):
            known[id(layer)] = _rounded(layer)
        else:
            known[id(layer)] = layer
    return known[id(layer)]


def _is_rounded_at_each_call(layer: keras.Operation) -> bool:
    if type(layer) not in _PRODUCTS:
        return False
    smaller = layer.compute_dtype != layer.variable_dtype
    return smaller and not layer.quantization_mode


def _rounded(layer: keras.layers.Layer) -> keras.layers.Layer:
    config = {**layer.get_config(), "dtype": layer.compute_dtype}
    # Some initializers know no bfloat16, and what they draw is not used.
    drawn = [name for name in config if name.endswith("_initializer")]
    rounded = type(layer).from_config({**config, **dict.fromkeys(drawn, "zeros")})
    rounded.build_from_config(layer.get_build_config())
    rounded.set_weights(layer.get_weights())
    return rounded


def _layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    for layer in model.layers:
        if _is_graph(layer):
            yield from _layers(layer)
        elif not isinstance(layer, keras.Model):
            yield layer


def _is_graph(layer: keras.Operation) -> bool:
    functional = isinstance(layer, keras.Model) and hasattr(layer, "operations")
    return functional or isinstance(layer, keras.Sequential)


def _gives(layer: keras.layers.Layer, outputs: set[int]) -> bool:
    try:
        return any(id(x) in outputs for x in keras.tree.flatten(layer.output))
    except AttributeError:  # a layer that is called more than once
        return False
