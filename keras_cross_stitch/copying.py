"""A tower opened into the calls of its layers, and a layer copied whole.

Knows nothing of tasks that share: `networks` decides which calls are built.
"""

import dataclasses
import inspect
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer (or operation) in a tower's graph."""

    task: str  # whose tower
    path: str  # "conv1", or "backbone/conv1" where it is within a nested model
    layer: Any
    args: tuple
    kwargs: dict
    outputs: tuple  # of the tower's tensors

    @property
    def reads(self) -> list:
        """What it is called with, tensors and constants, in one list."""
        return keras.tree.flatten((self.args, self.kwargs))


class Tower:
    """A functional or Sequential model as the calls of its layers.

    Nested models are opened: their calls stand in the place of their own.

    Attributes:
        task: String.
        inputs: List of `keras.layers.InputLayer`.
        calls: List of `Call`, each after those whose outputs it reads.
        output: The model's output tensors, in its structure.
        nested: Dict of path to output tensors, of the nested models.
    """

    def __init__(self, task: str, model: keras.Model):
        graph = _graph(model)
        if graph is None:
            raise ValueError(
                f"The tower of '{task}' must be a functional model, or a Sequential "
                "one that starts with `keras.Input`; a subclass with a `call` of its "
                f"own cannot be taken apart. Received: {model!r}"
            )
        self.task = task
        self.inputs = [
            next(layer for layer in graph.layers if _is_input(layer, x))
            for x in graph.inputs
        ]
        self.calls: list[Call] = []
        self.nested: dict[str, list] = {}
        self._outside: dict[
            int, Any
        ] = {}  # {id of a nested model's tensor: what it is}
        self._used: set[Any] = set()
        self._open(graph, prefix="", context={})
        self.output = keras.tree.map_structure(self._resolve, graph.output)

    def call_of(self, x) -> Call:
        """The call that gives a tensor, or a ValueError for an input."""
        for call in self.calls:
            if any(x is output for output in call.outputs):
                return call
        raise ValueError(
            f"In the tower of '{self.task}', {x} is an input, which cannot be a tap"
        )

    def _resolve(self, x):
        if isinstance(x, keras.KerasTensor):
            return self._outside.get(id(x), x)
        return x

    def _open(self, graph, prefix, context):
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if not node.is_input:
                    self._add(node, prefix + node.operation.name, context)

    def _add(self, node, path, context):
        layer = node.operation
        if layer in self._used:
            raise ValueError(
                f"The tower of '{self.task}' uses its layer '{path}' more than once; "
                "only towers that use each layer once can be joined"
            )
        self._used.add(layer)
        args, kwargs = node.arguments.convert(self._resolve)
        nested = _graph(layer)
        if nested is not None:
            if _comes_by_itself(node.arguments):
                kwargs = {key: x for key, x in kwargs.items() if key != "mask"}
            self._add_nested(nested, node, path, context, args, dict(kwargs))
            return
        if context and "training" in inspect.signature(layer.call).parameters:
            kwargs = {**context, **kwargs}
        outputs = tuple(node.outputs)
        self.calls.append(Call(self.task, path, layer, args, kwargs, outputs))

    def _add_nested(self, nested, node, path, context, args, kwargs):
        given = args[0] if args else kwargs.pop("inputs", None)
        if isinstance(given, dict):
            given = [given.get(x.name) for x in nested.inputs]
        given = keras.tree.flatten(given)
        if set(kwargs) - {"training"} or len(given) != len(nested.inputs):
            raise ValueError(
                f"In the tower of '{self.task}', the nested model '{path}' is called "
                "in a way that cannot be taken apart: give it its inputs, and no "
                f"argument but `training`. Received: {given}, {kwargs}"
            )
        for x, outside in zip(nested.inputs, given, strict=True):
            self._outside[id(x)] = outside
        self._open(nested, f"{path}/", {**context, **kwargs})
        for x, inside in zip(node.outputs, nested.outputs, strict=True):
            self._outside[id(x)] = self._resolve(inside)
        self.nested[path] = [self._resolve(x) for x in node.outputs]


def _comes_by_itself(arguments):
    """Whether a call's mask is its input's own, which the copy's input has, too."""
    masks = keras.tree.flatten(arguments.kwargs.get("mask"))
    given = arguments.args[0] if arguments.args else arguments.kwargs.get("inputs")
    own = [getattr(x, "_keras_mask", None) for x in keras.tree.flatten(given)]
    return all(any(mask is x for x in [None, *own]) for mask in masks)


def _is_input(layer, x):
    return isinstance(layer, keras.layers.InputLayer) and layer.output is x


def _graph(model):
    """The model as a functional one; None for a layer, and for a `call` of its own."""
    if isinstance(model, keras.Sequential) and getattr(model, "inputs", None):
        return keras.Model(model.inputs, model.outputs[0])
    if not isinstance(model, keras.Model) or not hasattr(model, "operations"):
        return None
    own_call = any(
        "call" in vars(kind) and not kind.__module__.startswith("keras.")
        for kind in type(model).__mro__
    )
    return None if own_call else model


def copy_layer(layer: Any, name: str) -> Any:
    """A new layer (or operation) of that name, whose weights are still to come.

    Adapted state of layers without weights, such as a vocabulary, comes along, since
    it may be needed at the first call. `carry_over` brings the rest.
    """
    with warnings.catch_warnings():
        # Keras warns that a lambda cannot be saved, which is not done here.
        warnings.simplefilter("ignore")
        config = _unbuilt(layer.get_config())
    functions: dict[str, Callable] = {}
    config = _with_functions(config, layer, functions)
    config["name"] = name
    refused = _refused(type(layer), config)
    classes = {type(x).__name__: type(x) for x in _within(layer)}
    with keras.saving.custom_object_scope({**classes, **functions}):
        copy = type(layer).from_config(
            {key: value for key, value in config.items() if key not in refused}
        )
    if copy.name != name:
        copy.name = name
    if isinstance(layer, keras.layers.Layer):
        # The config of a layer of one's own may leave it out.
        if copy.dtype_policy.name != layer.dtype_policy.name:
            copy.dtype_policy = layer.dtype_policy
        if not layer.weights:
            _carry_state(layer, copy)
    return copy


def _refused(kind, config):
    """What every layer's config has, and the layer's constructor may not take."""
    parameters = inspect.signature(kind.__init__).parameters
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return set()
    return {"name", "trainable", "dtype"} & set(config) - set(parameters)


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


def _carry_state(layer, copy):
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


def _pairs(layer, copy):
    return zip(_within(layer), _within(copy), strict=True)


def _within(layer) -> Iterator:
    """The layer and all layers within it."""
    if isinstance(layer, keras.layers.Layer):
        yield from layer._flatten_layers()


def _unbuilt(config):
    """The config, without what builds a wrapped layer before its wrapper has a name."""
    if isinstance(config, list):
        return [_unbuilt(x) for x in config]
    if isinstance(config, dict):
        return {k: _unbuilt(x) for k, x in config.items() if k != "build_config"}
    return config


def _with_functions(config, layer, functions):
    """The config, with the layer's own functions where it has their names or code.

    `functions` gets those that Keras looks up by name, here by one of ours.
    """
    found = dict(config)
    for key, value in config.items():
        held = getattr(layer, key, getattr(layer, f"_{key}", None))
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


def _is_function_config(value, held):
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


def _kind(layer):
    """What a layer is, whatever it and the layers in it are called."""
    names = [x.name for x in _within(layer)]

    def nameless(x):
        if isinstance(x, dict):
            return {key: nameless(value) for key, value in x.items() if key != "name"}
        if isinstance(x, list | tuple):
            return [nameless(value) for value in x]
        return names.index(x) if isinstance(x, str) and x in names else x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `copy_layer`
        return type(layer), nameless(layer.get_config()), len(_functions(layer))


def _functions(layer):
    """The functions that the layer was given, which its config only names."""
    return [
        value
        for part in list(_within(layer)) or [layer]
        for key, value in sorted(vars(part).items())
        # Keras wraps some of a layer's own methods.
        if isinstance(value, types.FunctionType) and not hasattr(type(part), key)
    ]


def _same_function(a, b):
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


def _weights(layer):
    return layer.get_weights() if isinstance(layer, keras.layers.Layer) else []


def _is_fixed(layer):
    """Nothing to train, no moving statistics, no randomness, no loss of its own."""
    return all(
        (not part.trainable or not part.weights)
        and not any(weight.trainable for weight in part.weights)
        and len(part.variables) == len(part.weights)
        and part.activity_regularizer is None
        for part in _within(layer)
    )
