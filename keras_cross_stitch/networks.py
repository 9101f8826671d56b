"""Towers into one multi-task model: stitched, or split (hard sharing).

Both rebuild the towers' graphs layer by layer on new inputs, with every layer
cloned under a new name. The towers stay as they are.
"""

import difflib
import re

import keras
import numpy as np

from keras_cross_stitch.cross_stitch import CrossStitch


def stitch(towers, at, *, shared_input=True, name="cross_stitch", **unit):
    """Joins one model per task into one, with cross-stitch units between them.

    At each tap, the towers' outputs are replaced by their mix. Whatever else
    reads a tap, such as a skip connection, reads the mix too. The weights are
    carried over; with alpha = identity the model gives what the towers give.

    Args:
        towers: Dict of task name to functional or Sequential model, at least
            two. A task name becomes a key of the model's output, a prefix of
            its layers' names and a signature of the exported model: letters,
            digits and underscores.
        at: List of taps from input to output, each the name of a layer, or a
            dict of task name to layer name where the towers' names differ. With
            an empty list the towers stand side by side and share nothing.
        shared_input: Whether all towers read the same input, which must then be
            of one shape. If `False`, the model takes a dict of task name to
            input (`<task>_<input name>` for towers of several inputs).
        name: String, the model's name.
        **unit: Arguments of every `CrossStitch`, such as `per` or `same_task`.

    Returns:
        A functional `keras.Model` with a dict of task name to output. Tower
        layers are named `<task>_<layer>`, units `cross_stitch_<layer>`.

    Raises:
        ValueError: For an unknown layer, taps out of order, unequal shapes at a
            tap, a layer that is used twice, an invalid task name, or inputs that
            cannot be shared; it names the tower and the layer.

    Example:

    >>> def tower(units):
    ...     image = keras.Input((8, 8, 3), name="image")
    ...     x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(image)
    ...     x = keras.layers.Flatten()(x)
    ...     return keras.Model(image, keras.layers.Dense(units, name="score")(x))
    >>> model = stitch({"kind": tower(5), "age": tower(1)}, at=["conv"])
    >>> {task: output.shape for task, output in model.output.items()}
    {'kind': (None, 5), 'age': (None, 1)}
    >>> tuple(model.get_layer("cross_stitch_conv").alpha.shape)
    (2, 2, 4)

    Reference:

    - [Misra et al., 2016](https://arxiv.org/abs/1604.03539), Figure 4
    """
    towers = _checked_towers(towers)
    taps = [_by_task(tap, towers) for tap in at]
    inputs = _inputs(towers, shared_input)
    rebuilt = {task: {} for task in towers}  # {task: {layer name: its new output}}
    copies = []

    def rebuild(task, outputs):
        used = set()

        def call(layer, *args, **kwargs):
            _check_used_once(layer, used, task)
            if layer.name not in rebuilt[task]:
                copy = _renamed(layer, task)
                rebuilt[task][layer.name] = copy(*args, **kwargs)
                copies.append((layer, copy))
            return rebuilt[task][layer.name]

        return _run(towers[task], outputs, inputs, task, call)

    for tap in taps:
        maps = {}
        for task, layer in tap.items():
            if layer in rebuilt[task]:
                raise ValueError(
                    "Taps must go from input to output, each once. In the tower of "
                    f"'{task}', layer '{layer}' comes before an earlier tap, or is "
                    f"one. Received: at={at}"
                )
            maps[task] = rebuild(task, _output(towers[task], layer, task))
        mixed = _mix(maps, tap, towers, unit)
        for task, layer in tap.items():
            rebuilt[task][layer] = mixed[task]
    outputs = {task: rebuild(task, tower.output) for task, tower in towers.items()}
    return _model(inputs, outputs, copies, name)


def split(towers, at, *, name="split"):
    """Joins one model per task into one that shares its first layers.

    Hard parameter sharing, the alternative to stitching: the layers below `at`
    are the first tower's, for all tasks; the layer `at` and all above, that is,
    all that depend on it, are each task's own. With the last layer for `at` it is
    the paper's MTL-shared. The weights are carried over.

    Args:
        towers: Dict of task name to functional or Sequential model, at least
            two, with the same input and the same layers below `at`.
        at: The name of the first layer that is not shared, or a dict of task
            name to layer name where the towers' names differ.
        name: String, the model's name.

    Returns:
        A functional `keras.Model` with a dict of task name to output. Shared
        layers are named `shared_<layer>`, the others `<task>_<layer>`.

    Raises:
        ValueError: For an unknown layer, towers that differ below `at`, a layer
            that is used twice, an invalid task name, or inputs that differ.

    Example:

    >>> from keras_cross_stitch import alexnet
    >>> towers = {"kind": alexnet(5, width=0.05), "age": alexnet(1, width=0.05)}
    >>> model = split(towers, at="conv4")
    >>> [layer.name for layer in model.layers if "conv3" in layer.name]
    ['shared_conv3', 'shared_conv3_norm']
    >>> sorted(layer.name for layer in model.layers if "score" in layer.name)
    ['age_score', 'kind_score']

    Reference:

    - [Misra et al., 2016](https://arxiv.org/abs/1604.03539), Figure 2
    """
    towers = _checked_towers(towers)
    first_own = _by_task(at, towers)
    inputs = _inputs(towers, shared_input=True)
    shared = []  # (layer, its new arguments and output), in the order of the graph
    copies = []

    def rebuild(task, unmatched):
        used, own = set(), {}  # own: the tensors that depend on `at`, by id

        def call(layer, *args, **kwargs):
            _check_used_once(layer, used, task)
            arguments = keras.tree.flatten((args, kwargs))
            is_own = layer.name == first_own[task] or any(
                id(x) in own for x in arguments
            )
            if unmatched is not None and not is_own:
                return _match(layer, arguments, unmatched, task)
            copy = _renamed(layer, task if is_own else "shared")
            outputs = copy(*args, **kwargs)
            copies.append((layer, copy))
            if is_own:
                own.update((id(x), x) for x in keras.tree.flatten(outputs))
            else:
                shared.append((layer, arguments, outputs))
            return outputs

        return _run(towers[task], towers[task].output, inputs, task, call)

    first, *others = towers
    outputs = {first: rebuild(first, None)}
    for task in others:
        unmatched = list(shared)
        outputs[task] = rebuild(task, unmatched)
        if unmatched:
            raise _differ(task, None, unmatched)
    return _model(inputs, outputs, copies, name)


def check_task_names(tasks):
    """Raises a ValueError where a task's name cannot be that of a signature."""
    for task in tasks:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", str(task)):
            raise ValueError(
                "A task's name must be letters, digits and underscores, since it "
                f"names layers and a signature. Received: {task!r}"
            )
        if task == "serving_default":
            raise ValueError(
                "'serving_default' is the signature of all tasks together; give the "
                "task another name"
            )


def _checked_towers(towers):
    if not isinstance(towers, dict) or len(towers) < 2:
        raise ValueError(
            "`towers` must be a dict of at least two: task name to model. "
            f"Received: towers={towers!r}"
        )
    check_task_names(towers)
    return {task: _as_functional(task, tower) for task, tower in towers.items()}


def _as_functional(task, tower):
    if isinstance(tower, keras.Sequential) and tower.built:
        return keras.Model(tower.inputs, tower.outputs[0])
    if _is_functional(tower):
        return tower
    raise ValueError(
        f"The tower of '{task}' must be a functional model, or a Sequential one that "
        f"starts with `keras.Input`. Received: {tower!r}"
    )


def _is_functional(model):
    return isinstance(model, keras.Model) and hasattr(model, "operations")


def _by_task(tap, towers):
    """A tap (a layer name, or a dict of them) as {task: layer name}, checked."""
    if isinstance(tap, str):
        tap = dict.fromkeys(towers, tap)
    if not isinstance(tap, dict) or set(tap) != set(towers):
        raise ValueError(
            "A tap must be the name of a layer, or a dict with one for each of "
            f"{sorted(towers)}. Received: {tap!r}"
        )
    for task, name in tap.items():
        layers = {layer.name: layer for layer in towers[task].layers}
        if name not in layers:
            near = difflib.get_close_matches(str(name), layers, n=3) or list(layers)
            raise ValueError(
                f"The tower of '{task}' has no layer '{name}'. "
                f"Did you mean one of {near}?"
            )
        if isinstance(layers[name], keras.layers.InputLayer | keras.Model):
            raise ValueError(
                f"In the tower of '{task}', '{name}' is an input or a nested model, "
                "which cannot be a tap. Name a layer of the tower itself (a tower "
                "built on `nested.output` has the nested model's layers)"
            )
    return {task: tap[task] for task in towers}


def _output(tower, name, task):
    """The layer's output in this tower: `layer.output` may be of a call elsewhere."""
    nodes = [node for nodes in tower._nodes_by_depth.values() for node in nodes]
    outputs = next(node.outputs for node in nodes if node.operation.name == name)
    if len(outputs) > 1:
        raise ValueError(
            f"In the tower of '{task}', layer '{name}' has several outputs, and so "
            f"cannot be a tap. Received: outputs={outputs}"
        )
    return outputs[0]


def _inputs(towers, shared_input):
    """New inputs of the model: {task: list of `keras.Input`}."""
    if not shared_input:
        return {
            task: [
                _new_input(x, f"{task}_{x.name}" if len(tower.inputs) > 1 else task)
                for x in tower.inputs
            ]
            for task, tower in towers.items()
        }
    # Several inputs belong together by name; a single one may have any.
    named = {
        task: {x.name if len(tower.inputs) > 1 else "": x for x in tower.inputs}
        for task, tower in towers.items()
    }
    specs = {
        task: {name: (x.shape, x.dtype) for name, x in of_task.items()}
        for task, of_task in named.items()
    }
    first = next(iter(towers))
    if any(spec != specs[first] for spec in specs.values()):
        raise ValueError(
            "Towers that share an input must take the same shape and dtype, and "
            "several inputs the same names; `stitch(..., shared_input=False)` gives "
            f"each its own. Received: inputs={specs}"
        )
    shared = {name: _new_input(x, x.name) for name, x in named[first].items()}
    return {task: [shared[name] for name in of_task] for task, of_task in named.items()}


def _new_input(x, name):
    return keras.Input(batch_shape=x.shape, dtype=x.dtype, name=name)


def _run(tower, outputs, inputs, task, call):
    """Runs a tower's graph as far as `outputs` on the model's inputs.

    `clone_model` walks the graph; `call(layer, *args, **kwargs)` decides what
    comes out of each layer, so no layer of the tower is ever called itself.
    """
    mine = inputs[task]
    own = {id(x) for x in mine}
    # The walk ends in a keras.Model, for which a map that other towers have
    # been mixed into must not come from nowhere: so it gets their inputs too.
    others = {id(x): x for xs in inputs.values() for x in xs if id(x) not in own}
    part = keras.Model([*tower.inputs, *others.values()], outputs)
    new_inputs = [*mine, *others.values()]
    return keras.models.clone_model(
        part,
        input_tensors=new_inputs if isinstance(part.input, list) else new_inputs[0],
        clone_function=lambda layer: layer,
        call_function=call,
    ).output


def _check_used_once(layer, used, task):
    if layer.name in used:
        raise ValueError(
            f"The tower of '{task}' uses its layer '{layer.name}' more than once; "
            "only towers that use each layer once can be joined"
        )
    used.add(layer.name)


def _renamed(layer, prefix):
    """A copy of the layer, weights new, named `<prefix>_<layer>` throughout."""
    name = f"{prefix}_{layer.name}"
    if isinstance(layer, keras.Sequential) or _is_functional(layer):
        copy = keras.models.clone_model(
            layer, clone_function=lambda inner: _renamed(inner, name)
        )
        copy.name = name
        return copy
    return layer.__class__.from_config({**_unbuilt(layer.get_config()), "name": name})


def _unbuilt(config):
    """The config, without what builds a wrapped layer before its wrapper has a name."""
    if isinstance(config, list):
        return [_unbuilt(x) for x in config]
    if isinstance(config, dict):
        return {k: _unbuilt(x) for k, x in config.items() if k != "build_config"}
    return config


def _mix(maps, tap, towers, unit):
    layers = {task: towers[task].get_layer(name) for task, name in tap.items()}
    first = next(iter(layers.values()))
    unit = {"dtype": first.dtype_policy, **unit}
    mix = CrossStitch(name=f"cross_stitch_{first.name}", **unit)
    try:
        return mix(maps)
    except ValueError as error:
        raise ValueError(f"At the tap {tap}: {error}") from error


def _match(layer, arguments, unmatched, task):
    """The output of the shared layer that is and reads the same as `layer`."""
    alike = [
        shared
        for shared in unmatched
        if _kind(shared[0]) == _kind(layer) and _read_the_same(shared[1], arguments)
    ]
    if not alike:
        raise _differ(task, layer, unmatched)
    # Of twin branches, the one of the same name.
    match = next((shared for shared in alike if shared[0].name == layer.name), alike[0])
    unmatched.remove(match)
    return match[2]


def _differ(task, layer, unmatched):
    first = unmatched[0][0] if unmatched else None
    names = [x.name if x is not None else "nothing" for x in (layer, first)]
    return ValueError(
        "The towers must have the same layers up to where they split. The tower "
        f"of '{task}' has '{names[0]}' where the first has '{names[1]}', of "
        "another kind, with other arguments or with other inputs"
    )


def _read_the_same(arguments, others):
    return len(arguments) == len(others) and all(
        a is b
        if isinstance(a, keras.KerasTensor) or isinstance(b, keras.KerasTensor)
        else np.array_equal(a, b)
        for a, b in zip(arguments, others, strict=True)
    )


def _kind(layer):
    """What a layer is, whatever it and the layers in it are called."""
    names = _names_within(layer)

    def nameless(x):
        if isinstance(x, dict):
            return {key: nameless(value) for key, value in x.items() if key != "name"}
        if isinstance(x, list | tuple):
            return [nameless(value) for value in x]
        return names.index(x) if isinstance(x, str) and x in names else x

    return type(layer), nameless(layer.get_config())


def _names_within(layer):
    inner = getattr(layer, "operations", getattr(layer, "layers", ()))
    return [name for x in inner for name in (x.name, *_names_within(x))]


def _model(inputs, outputs, copies, name):
    flat = {x.name: x for xs in inputs.values() for x in xs}
    model = keras.Model(
        flat if len(flat) > 1 else next(iter(flat.values())), outputs, name=name
    )
    for layer, copy in copies:
        if isinstance(layer, keras.layers.Layer):
            copy.set_weights(layer.get_weights())
            _finalize(copy)
    return model


def _finalize(layer):
    """Has adapted layers, such as `Normalization`, read their new weights."""
    if hasattr(layer, "finalize_state"):
        layer.finalize_state()
    for inner in getattr(layer, "layers", ()):
        _finalize(inner)
