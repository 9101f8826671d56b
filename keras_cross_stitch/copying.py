"""A layer copied whole, and whether two layers are alike; knows no towers."""

import inspect
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np


def copy_layer(layer: Any, name: str) -> Any:
    """A new layer (or operation) of that name; `carry_over` gives it the weights."""
    with warnings.catch_warnings():
        # Keras warns that a lambda cannot be saved, which is not done here.
        warnings.simplefilter("ignore")
        config = _unbuilt(layer.get_config())
    functions: dict[str, Callable] = {}
    config = _with_functions(config, layer, functions)
    classes = {type(x).__name__: type(x) for x in _within(layer)}
    with keras.saving.custom_object_scope({**classes, **functions}):
        try:
            copy = _from_config(layer, {**config, "name": name})
        except Exception:
            # Some configs have more than their constructor takes (KerasHub's ViT).
            # Keras itself keeps what a layer was constructed with.
            if getattr(layer, "_auto_config", None) is None:
                raise
            copy = _from_config(layer, {**layer._auto_config.config, "name": name})
    if copy.name != name:
        copy.name = name
    # The config of a layer of one's own may leave it out.
    policy = getattr(layer, "dtype_policy", None)
    if policy is not None and copy.dtype_policy.name != policy.name:
        copy.dtype_policy = policy
    return copy


def _from_config(layer: Any, config: dict) -> Any:
    """A layer like the one given, without the arguments that only Keras's own take."""
    parameters = inspect.signature(type(layer).__init__).parameters
    if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        refused = {"name", "trainable", "dtype"} - set(parameters)
        config = {key: value for key, value in config.items() if key not in refused}
    return type(layer).from_config(config)


def carry_over(layer: Any, copy: Any) -> None:
    """Gives a built copy the layer's weights, other state and frozen parts."""
    if not isinstance(layer, keras.layers.Layer):
        return
    _carry_state(layer, copy)
    copy.set_weights(layer.get_weights())
    for original, copied in _pairs(layer, copy):
        # From the outside in, since setting it sets it for all that is within.
        copied.trainable = original.trainable
    for weight, copied in zip(layer.weights, copy.weights, strict=True):
        if copied.trainable != weight.trainable:
            copied.trainable = weight.trainable


def _carry_state(layer: Any, copy: Any) -> None:
    """State that is not in the weights, in the way in which Keras itself saves it."""
    keras_own = keras.layers.Layer.load_own_variables
    for original, copied in _pairs(layer, copy):
        if type(original).load_own_variables is not keras_own:
            store: dict[str, Any] = {}
            original.save_own_variables(store)
            copied.load_own_variables(
                {key: keras.ops.convert_to_numpy(x) for key, x in store.items()}
            )
        if hasattr(original, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                original.save_assets(directory)
                copied.load_assets(directory)


def _pairs(layer: Any, copy: Any) -> Iterable[tuple]:
    return zip(_within(layer), _within(copy), strict=True)


def _within(layer: Any) -> Iterator:
    """The layer and all layers within it."""
    if isinstance(layer, keras.layers.Layer):
        yield from layer._flatten_layers()


def _unbuilt(config: Any) -> Any:
    """The config, without what builds a wrapped layer before its wrapper has a name."""
    if isinstance(config, list):
        return [_unbuilt(x) for x in config]
    if isinstance(config, dict):
        return {k: _unbuilt(x) for k, x in config.items() if k != "build_config"}
    return config


def _with_functions(config: dict, layer: Any, functions: dict[str, Callable]) -> dict:
    """The config, with the layer's own functions where it has their names or code.

    `functions` gets those that Keras looks up by name, here by one of ours.
    """
    found = dict(config)
    for key, value in config.items():
        held: Any = getattr(layer, key, getattr(layer, f"_{key}", None))
        if isinstance(held, keras.layers.Layer) and isinstance(value, dict):
            inner = _with_functions(value.get("config", {}), held, functions)
            found[key] = {**value, "config": inner}
        elif _is_function_config(value, held):
            name = f"function_{len(functions)}"
            functions[name] = held
            found[key] = {
                "module": "builtins",
                "class_name": "function",
                "config": name,
                "registered_name": name,
            }
    return found


def _is_function_config(value: Any, held: Any) -> bool:
    return (
        isinstance(held, types.FunctionType)
        and isinstance(value, dict)
        and value.get("class_name") in ("function", "__lambda__")
    )


def alike(layer: Any, other: Any) -> bool:
    """Whether two layers are the same but for their names and their weights."""
    return _kind(layer) == _kind(other) and all(
        _same_function(a, b)
        for a, b in zip(_functions(layer), _functions(other), strict=True)
    )


def _kind(layer: Any) -> tuple:
    """What a layer is, whatever it and the layers in it are called."""
    names = [x.name for x in _within(layer)]

    def nameless(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: nameless(value) for key, value in x.items() if key != "name"}
        if isinstance(x, list | tuple):
            return [nameless(value) for value in x]
        return names.index(x) if isinstance(x, str) and x in names else x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `copy_layer`
        return type(layer), nameless(layer.get_config()), len(_functions(layer))


def _functions(layer: Any) -> list[types.FunctionType]:
    """The functions that the layer was given, which its config only names."""
    return [
        value
        for part in list(_within(layer)) or [layer]
        for key, value in sorted(vars(part).items())
        # Keras wraps some of a layer's own methods.
        if isinstance(value, types.FunctionType) and not hasattr(type(part), key)
    ]


def _same_function(a: types.FunctionType, b: types.FunctionType) -> bool:
    """The same one, or made anew by the same code with the same values."""
    if a is b:
        return True
    cells = [[c.cell_contents for c in f.__closure__ or ()] for f in (a, b)]
    return (
        a.__code__ == b.__code__
        and a.__defaults__ == b.__defaults__
        and all(x is y or x == y for x, y in zip(*cells, strict=True))
    )


def frozen_alike(layer: Any, other: Any) -> bool:
    """Whether two layers compute the same, and training changes neither."""
    if not _is_fixed(layer) or not _is_fixed(other):
        return False
    if layer is other:
        return True
    if any(hasattr(part, "save_assets") for part in _within(layer)):
        return False  # a vocabulary, which is not compared here
    return alike(layer, other) and all(
        np.array_equal(a, b)
        for a, b in zip(_weights(layer), _weights(other), strict=True)
    )


def _weights(layer: Any) -> list:
    return layer.get_weights() if isinstance(layer, keras.layers.Layer) else []


def _is_fixed(layer: Any) -> bool:
    """Nothing to train, no moving statistics, no randomness, no loss of its own."""
    return all(
        (not part.trainable or not part.weights)
        and not any(weight.trainable for weight in part.weights)
        and len(part.variables) == len(part.weights)
        and part.activity_regularizer is None
        for part in _within(layer)
    )
