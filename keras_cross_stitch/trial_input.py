"""Input to run a model on, that its layers accept: drawn, or from a given sample.

Needs TensorFlow, as the export does, and imports it inside the functions.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

SIDES = (64, 32, 16, 8, 4, 2, 1)  # drawn for unknown sizes, in pixels or words


def first_accepted_input(
    run: Callable, model: keras.Model, inputs: Any
) -> tuple[Any, dict[str, Any]]:
    """Input to compare on, drawn where none is given, and the model's outputs."""
    import tensorflow as tf

    drawn = inputs is None
    trials: Iterable = _draws(model) if drawn else [inputs]
    ran: list[tuple[Any, dict[str, Any]]] = []
    for trial in trials:
        with contextlib.suppress(tf.errors.OpError):
            outputs = run(trial)
            # Large numbers may overflow in a sound model; so it is tried with others.
            if not drawn or not _has_nan(outputs):
                return trial, outputs
            ran.append((trial, outputs))
    if ran:
        return ran[0]
    first = next(iter(_draws(model))) if drawn else inputs
    # The error of a graph names no layer, that of Keras does.
    with layer_named(
        "does not accept the input to compare the models on; give inputs that it "
        "accepts as `sample=`"
    ):
        return first, model(first, training=False)


def _draws(model: keras.Model) -> Iterator[Any]:
    """Random inputs, the likeliest first."""
    _check_drawable(model)
    unknown = any(None in x.shape[1:] for x in model.inputs)
    # A float input may feed an Embedding; only 0 and 1 are always valid.
    for high in (256, 2):
        for side in SIDES if unknown else SIDES[:1]:
            yield _drawn(model, high, side)


def _has_nan(outputs: dict[str, Any]) -> bool:
    import tensorflow as tf

    return any(
        isinstance(x, tf.Tensor)
        and x.dtype.is_floating
        and bool(tf.reduce_any(tf.math.is_nan(x)))
        for x in keras.tree.flatten(outputs)
    )


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
            f"{' '.join(str(error).splitlines()[:1])}"
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


def _check_drawable(model: keras.Model) -> None:
    for x in model.inputs:
        if x.dtype == "string":
            raise ValueError(
                f"Input '{x.name}' takes text, of which no random one says anything: "
                "give a batch of inputs to compare the models on as `sample=`"
            )


def _drawn(model: keras.Model, high: int, side: int) -> Any:
    """Random input: whole numbers below `high` for floats, `side` for unknown sizes.

    Pixels are whole numbers; of other integers, such as indices, only 0 and 1 are
    always valid. Seeded, so that an export that fails can be repeated.
    """
    import tensorflow as tf

    rng = np.random.default_rng(0)

    def draw(x: Any) -> Any:
        shape = [n or (2 if axis == 0 else side) for axis, n in enumerate(x.shape)]
        pixels = "float" in x.dtype or x.dtype == "uint8"
        drawn = rng.integers(high if pixels else 2, size=shape)
        return tf.convert_to_tensor(drawn.astype(x.dtype))

    return keras.tree.map_structure(draw, model.input)


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
        said = str(error).strip().splitlines()[:1] or ["no message"]
        raise ValueError(
            f"Layer '{names[0] if names else '?'}' {problem}. It raised "
            f"{type(error).__name__}: {said[0]}"
        ) from error
    finally:
        if filtered:
            keras.config.enable_traceback_filtering()
