"""A layer copied whole, and whether two layers are alike; knows no towers."""

import inspect
import tempfile
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import keras
import numpy as np


def copy_layer(layer: Any, name: str, copies: Mapping[Any, Any]) -> Any:
    """A new layer (or operation) of that name; `carry_over` gives it the weights.

    Layers within it that have a copy in `copies` already, {layer: copy}, are that.
    """
    with warnings.catch_warnings():
        # Keras warns that a lambda cannot be saved, which is not done here.
        warnings.simplefilter("ignore")
        config = _unbuilt(layer.get_config())
    policies = _policies(layer, name)
    config = _with_policies(config, policies)
    held: dict[str, Any] = {}
    config = _with_held(config, layer, held, copies)
    # Of the layers, and of what they hold: regularizers, initializers, constraints.
    held_by = [x for part in _within(layer) for x in (part, *vars(part).values())]
    classes = {
        type(x).__name__: type(x) for x in held_by if hasattr(type(x), "get_config")
    }
    # A model within it builds its variables now: under the new name, as all others.
    with keras.saving.custom_object_scope({**classes, **held}), keras.name_scope(name):
        try:
            copy = _from_config(layer, {**config, "name": name})
        except Exception:
            # Some configs have more than their constructor takes (KerasHub's ViT).
            # Keras itself keeps what a layer was constructed with.
            if getattr(layer, "_auto_config", None) is None:
                raise
            config = _with_policies(layer._auto_config.config, policies)
            copy = _from_config(layer, {**config, "name": name})
    copy.name = name
    # The config of a layer of one's own may leave it out.
    policy = getattr(layer, "dtype_policy", None)
    if policy is not None and copy.dtype_policy.name != policy.name:
        copy.dtype_policy = _with_policies(policy, policies)
    _build_as(layer, copy)
    return copy


def _build_as(layer: Any, copy: Any) -> None:
    """Builds a copy for the shapes of the original's first call, as loading does.

    The weights of a layer of one's own may hang on them, such as a longest sequence.
    """
    kind = type(layer)
    if kind.__module__.startswith("keras.") or not isinstance(layer, keras.Layer):
        return
    if kind.build is keras.Layer.build or not layer.built or copy.built:
        return
    if config := layer.get_build_config():
        copy.build_from_config(config)


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
    weights = _in_order_of(copy, layer)
    copy.set_weights([keras.ops.convert_to_numpy(x) for x in weights])
    for original, copied in pairs(layer, copy):
        # From the outside in, since setting it sets it for all that is within.
        copied.trainable = original.trainable
    for weight, copied in zip(weights, copy.weights, strict=True):
        if copied.trainable != weight.trainable:
            copied.trainable = weight.trainable


def _in_order_of(copy: keras.Layer, layer: keras.Layer) -> list[keras.Variable]:
    """The layer's weights as the copy has its own.

    Keras lists those behind the others that were added as not trainable, which a layer
    of one's own may make of what is frozen now.
    """
    names, wanted = ([x.name for x in of.weights] for of in (layer, copy))
    if names == wanted or len(set(names)) < len(names) or set(names) != set(wanted):
        return layer.weights
    return [layer.weights[names.index(name)] for name in wanted]


def _carry_state(layer: Any, copy: Any) -> None:
    """State that is not in the weights, in the way in which Keras itself saves it."""
    keras_own = keras.layers.Layer.load_own_variables
    for original, copied in pairs(layer, copy):
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


def pairs(layer: Any, copy: Any) -> Iterable[tuple]:
    """[(layer, copy)], of the layer and of all layers within it."""
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


def _policies(layer: Any, name: str) -> dict[str, Any]:
    """{path in a copy of that name: policy}, of what has a map of policies by path."""
    policies = {}
    for part in _within(layer):
        policy = part.dtype_policy
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap) and part.path:
            below = f"{part.path}/".removeprefix(f"{layer.path}/")
            policies[f"{name}/{below}".rstrip("/")] = policy[part.path]
    return policies


def _with_policies(config: Any, policies: dict[str, Any]) -> Any:
    """The config, where maps have the copy's paths: by its own it would find none."""
    kind = keras.dtype_policies.DTypePolicyMap
    if isinstance(config, kind):
        return kind(config.default_policy.name, dict(policies))
    if isinstance(config, list):
        return [_with_policies(x, policies) for x in config]
    if not isinstance(config, dict) or not policies:
        return config
    if config.get("class_name") == kind.__name__:
        return kind(config["config"]["default_policy"], dict(policies))
    return {key: _with_policies(x, policies) for key, x in config.items()}


def _with_held(
    config: dict, layer: Any, held: dict[str, Any], copies: Mapping[Any, Any]
) -> dict:
    """The config, with the objects themselves where it has names or code of them.

    These are the layer's own functions, and copies that layers within it have.
    `held` gets what Keras then looks up by name, here by one of ours.
    """

    def replaced(value: Any, own: Any) -> Any:
        if isinstance(value, list) and isinstance(own, list | tuple):
            if len(value) != len(own):  # a Sequential's config has its input
                own = [_of_config(x, own) for x in value]
            return [replaced(x, y) for x, y in zip(value, own, strict=True)]
        if not isinstance(value, dict):
            return value
        if isinstance(own, keras.layers.Layer):
            if own in copies:
                return _by_name(copies[own], held)
            inner = _with_held(value.get("config", {}), own, held, copies)
            return {**value, "config": inner}
        return _by_name(own, held) if _is_function_config(value, own) else value

    return {
        key: replaced(value, getattr(layer, key, getattr(layer, f"_{key}", None)))
        for key, value in config.items()
    }


def _of_config(value: Any, layers: Iterable[Any]) -> Any:
    """The layer of which a config is, by its name."""
    name = value.get("config", {}).get("name") if isinstance(value, dict) else None
    return next((x for x in layers if name and getattr(x, "name", "") == name), None)


def _by_name(own: Any, held: dict[str, Any]) -> dict:
    """A config for which Keras looks up what is held by a name."""
    name = f"held_{len(held)}"
    held[name] = own
    return {
        "module": "builtins",
        "class_name": "function",
        "config": name,
        "registered_name": name,
    }


def _is_function_config(value: Any, held: Any) -> bool:
    return (
        isinstance(held, types.FunctionType)
        and isinstance(value, dict)
        and value.get("class_name") in ("function", "__lambda__")
    )


def alike(layer: Any, other: Any, apart_from: frozenset[str] = frozenset()) -> bool:
    """Whether two layers are the same but for their names and their weights.

    `apart_from` are further arguments that may differ.
    """
    if type(layer) is not type(other):
        return False
    kinds = [_kind(x, apart_from) for x in (layer, other)]
    return equal(*kinds) and all(
        _same_function(a, b)
        for a, b in zip(_functions(layer), _functions(other), strict=True)
    )


def _kind(layer: Any, apart_from: frozenset[str]) -> tuple:
    """What a layer is, whatever it and the layers in it are called."""
    names = [x.name for x in _within(layer)] or [layer.name]
    random = [x.name for x in _within(layer) if _seeds(x)]

    def nameless(x: Any, key: str = "config") -> Any:
        if isinstance(x, dict):
            left_out: set[str] = set()
            if key == "config" or "class_name" in x:  # of a layer, or an initializer
                left_out |= apart_from
                if x.get("name") in names:
                    left_out.add("name")
                    # A layer that draws nothing of Keras's may use its seed at will.
                    if x["name"] not in random:
                        left_out.discard("seed")
            return {k: nameless(v, k) for k, v in x.items() if k not in left_out}
        if isinstance(x, list | tuple):
            if _is_reference(x, key) and x[0] in names:
                return [names.index(x[0]), *x[1:]]
            return [nameless(value, key) for value in x]
        return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `copy_layer`
        config = nameless(layer.get_config())
    # A map of policies has them by the layers' names.
    dtypes = [(x.compute_dtype, x.variable_dtype) for x in _within(layer)]
    return config, dtypes, len(_functions(layer))


def _is_reference(x: list | tuple, key: str) -> bool:
    """Whether it is [layer's name, call, output], as a config of a model has it."""
    return (
        key in ("keras_history", "input_layers", "output_layers")
        and len(x) == 3
        and isinstance(x[0], str)
    )


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
    empty = types.CellType()
    cells = [
        [c if c == empty else c.cell_contents for c in f.__closure__ or ()]
        for f in (a, b)
    ]
    return (
        a.__code__ == b.__code__
        and a.__globals__ is b.__globals__  # two modules may name two things alike
        and equal(a.__defaults__, b.__defaults__)
        and equal(a.__kwdefaults__, b.__kwdefaults__)
        and equal(*cells)
    )


def equal(a: Any, b: Any) -> bool:
    """Whether two values are, arrays and tensors among them; False where in doubt."""
    if a is b:
        return True
    if isinstance(a, Real) and isinstance(b, Real):
        return a == b or (a != a and b != b)  # 1 is 1.0, and NaN itself
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    try:
        if hasattr(a, "shape"):
            return np.array_equal(*map(keras.ops.convert_to_numpy, (a, b)))
        return bool(a == b)
    except Exception:  # what compares itself may raise anything
        return False


# Of frozen layers with equal weights, these arguments say how they came about, or what
# they would do in training. Of random layers that are built once, the first one's
# seed holds.
_WITHOUT_EFFECT = frozenset({"trainable", "seed"})


def frozen_alike(layer: Any, other: Any) -> bool:
    """Whether two layers compute the same, and training changes neither.

    Random ones do, where both draw the same, as they do when they are built once.
    """
    if not _is_fixed(layer) or not _is_fixed(other):
        return False
    if layer is other:
        return True
    if any(hasattr(part, "save_assets") for part in _within(layer)):
        return False  # a vocabulary, which is not compared here
    return alike(layer, other, _WITHOUT_EFFECT) and all(
        np.array_equal(a, b)
        for a, b in zip(_weights(layer), _weights(other), strict=True)
    )


def same_draws(layer: Any, other: Any) -> bool:
    """Whether two random layers draw the same, though each is built."""
    seeded = all(part.get_config().get("seed") is not None for part in _random(layer))
    return seeded and alike(layer, other, frozenset({"trainable"}))


def is_random(layer: Any) -> bool:
    """Whether it draws at random."""
    return bool(_random(layer))


def _random(layer: Any) -> list:
    """The layer, and those within it, that draw by a generator of Keras's."""
    parts = list(_within(layer))
    idle = set().union(*(_seeds(part) for part in parts if _drops_nothing(part)))
    return [part for part in parts if _seeds(part) - idle]


def _seeds(layer: Any) -> set[int]:
    """The states of the generators in a layer: its variables that are no weights."""
    return set(map(id, layer.variables)) - set(map(id, layer.weights))


def _drops_nothing(layer: Any) -> bool:
    """Whether it is a recurrent layer or cell without dropout: it has a generator."""
    rates = {getattr(layer, key, None) for key in ("dropout", "recurrent_dropout")}
    return type(layer).__module__.startswith("keras.") and rates == {0}


def kernels(layer: Any) -> list[np.ndarray]:
    """The layer's weights that have a channel axis, which is the last."""
    return [x for x in _weights(layer) if x.ndim > 1]


def _weights(layer: Any) -> list:
    return layer.get_weights() if isinstance(layer, keras.layers.Layer) else []


def is_adapted(layer: Any) -> bool:
    """Whether it is Keras's own, with statistics that `adapt` alone moves."""
    return hasattr(layer, "adapt") and type(layer).__module__.startswith("keras.")


def _is_fixed(layer: Any) -> bool:
    """Nothing to train, no moving statistics, no loss of its own."""
    return all(
        (not part.trainable or not part.weights or is_adapted(part))
        and not any(weight.trainable for weight in part.weights)
        and not _adds_loss(part)
        for part in _within(layer)
    )


def _adds_loss(layer: Any) -> bool:
    """Whether the layer adds losses: two of it count twice, one built once does not."""
    return (
        layer.activity_regularizer is not None
        or bool(layer.losses)
        or any(
            _mentions(function, "add_loss", set())
            for kind in type(layer).__mro__
            if not kind.__module__.startswith("keras.")
            for function in vars(kind).values()
            if isinstance(function, types.FunctionType)
        )
    )


def _mentions(function: types.FunctionType, name: str, seen: set) -> bool:
    """Whether a function uses a name, itself or in the functions that it calls."""
    codes = [function.__code__]
    for code in codes:
        codes.extend(x for x in code.co_consts if isinstance(x, types.CodeType))
    used = {used for code in codes for used in code.co_names}
    seen.add(function)
    called = [function.__globals__.get(x) for x in used]
    return name in used or any(
        _mentions(x, name, seen)
        for x in called
        if isinstance(x, types.FunctionType)
        and x not in seen
        and x.__module__.split(".")[0] == function.__module__.split(".")[0]
    )
