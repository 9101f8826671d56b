"""Input to run a model on, that its layers accept: drawn, or from a given sample.

Needs TensorFlow, as the export does, and imports it inside the functions.
"""

import contextlib
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

SIDES = (64, 32, 16, 8, 4, 2, 1)  # tried for unknown sizes, in pixels or words


def tried(run: Callable, model: keras.Model, inputs: Any) -> tuple[Any, dict[str, Any]]:
    """Input to compare on, drawn where none is given, and the model's outputs."""
    import tensorflow as tf

    trials: Iterable = [inputs]
    if inputs is None:
        unknown = any(None in x.shape[1:] for x in model.inputs)
        sides = SIDES if unknown else SIDES[:1]
        # Floats may be indices, of which 0 and 1 are there for sure.
        trials = (_drawn(model, *x) for x in itertools.product((256, 2), sides))
    for trial in trials:
        inputs = trial if inputs is None else inputs
        with contextlib.suppress(tf.errors.OpError):
            return trial, run(trial)
    # The error of a graph names no layer, that of Keras does.
    with layer_named(
        "does not accept the input to compare the models on; give inputs that it "
        "accepts as `sample=`"
    ):
        return inputs, model(inputs, training=False)


def from_sample(sample: Any, model: keras.Model, from_jpeg: bool) -> Any:
    """A sample as the model is called with it, checked."""
    sample = list(sample) if isinstance(sample, tuple) else sample
    try:
        keras.tree.assert_same_structure(model.input, sample)
        arrays = [
            keras.ops.convert_to_tensor(array, x.dtype, sparse=False)
            for x, array in zip(model.inputs, keras.tree.flatten(sample), strict=True)
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`sample` must be one array for each input of the model, in the same list "
            f"or dict: {keras.tree.map_structure(lambda x: x.name, model.input)}. "
            f"{str(error).splitlines()[0]}"
        ) from error
    for x, array in zip(model.inputs, arrays, strict=True):
        if not array.shape[1:].is_compatible_with(x.shape[1:]) or not len(array):
            raise ValueError(
                f"`sample` must have the shape {(None, *x.shape[1:])} for input "
                f"'{x.name}', and a row at least. Received: shape={array.shape}"
            )
    if from_jpeg:
        pixels = keras.ops.clip(keras.ops.round(arrays[0]), 0, 255)
        arrays = [keras.ops.cast(pixels, model.inputs[0].dtype)]
    return keras.tree.pack_sequence_as(model.input, arrays)


def _drawn(model: keras.Model, high: int, side: int) -> Any:
    """Random input: whole numbers below `high` for floats, `side` for unknown sizes."""
    import tensorflow as tf

    values = _accepted_values(model, high)

    def draw(x: Any) -> Any:
        shape = [n or (2 if axis == 0 else side) for axis, n in enumerate(x.shape)]
        drawn = np.random.default_rng().choice(values[x.name], shape)
        dtype = str if x.dtype == "string" else x.dtype
        return tf.convert_to_tensor(drawn.astype(dtype))

    return keras.tree.map_structure(draw, model.input)


def _accepted_values(model: keras.Model, high: int) -> dict[str, np.ndarray]:
    """The values to draw from for each input: {name: array}."""
    # Pixels are whole numbers; of indices and masks only 0 and 1 are sure.
    values = {
        x.name: np.arange(high if "float" in x.dtype or x.dtype == "uint8" else 2)
        for x in model.inputs
    }
    narrowed: dict[str, Any] = {}
    for layer, names in _readers(model, {id(x): {x.name} for x in model.inputs}):
        accepted = _accepted_by(layer)
        for name in names if accepted is not None and len(accepted) else ():
            narrowed[name] = min(narrowed.get(name, accepted), accepted, key=len)
    return {**values, **narrowed}


def _accepted_by(layer: Any) -> Any:
    """The values that a layer can look up, or None where it does not look up."""
    if isinstance(layer, keras.layers.Embedding):
        return np.arange(layer.input_dim)
    if isinstance(layer, keras.layers.CategoryEncoding):
        return np.arange(layer.num_tokens)
    lookups = ("StringLookup", "IntegerLookup", "TextVectorization")
    kinds: Any = tuple(getattr(keras.layers, name) for name in lookups)
    if isinstance(layer, kinds):
        if getattr(layer, "invert", False):
            return np.arange(layer.vocabulary_size())
        return np.array(layer.get_vocabulary(include_special_tokens=False))
    return None


def _readers(
    model: keras.Model, reached: dict[int, set[str]]
) -> Iterator[tuple[Any, set[str]]]:
    """Yields (layer, names of the inputs whose values it reads).

    A layer reads what an input holds if only layers without weights, such as a
    `Reshape`, stand between. `reached` is {id of a tensor: names}; it grows.
    """
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            layer, tensors = node.operation, node.input_tensors
            names = set().union(*(reached.get(id(x), ()) for x in tensors))
            if isinstance(layer, keras.Model) and names:
                inner = keras.Model(layer.inputs, layer.outputs)
                pairs = zip(inner.inputs, tensors, strict=True)
                reached |= {id(x): reached.get(id(y), set()) for x, y in pairs}
                yield from _readers(inner, reached)
                pairs = zip(node.outputs, inner.outputs, strict=True)
                reached |= {id(x): reached.get(id(y), set()) for x, y in pairs}
            elif names:
                yield layer, names
                if _accepted_by(layer) is None and not getattr(layer, "weights", None):
                    reached |= dict.fromkeys(map(id, node.outputs), names)


@contextlib.contextmanager
def layer_named(problem: str) -> Iterator[None]:
    """Turns what a layer raises into a ValueError that names the layer."""
    filtered = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()  # else its frames are cut out
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        called = [frame.f_locals.get("self") for frame in frames]
        layers = [x for x in called if isinstance(x, keras.layers.Layer)]
        names = [x.name for x in layers if not isinstance(x, keras.Model)]
        raise ValueError(
            f"Layer '{names[0] if names else '?'}' {problem}. It raised "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        if filtered:
            keras.config.enable_traceback_filtering()
