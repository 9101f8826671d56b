"""Towers into one multi-task model: stitched, or split (hard sharing).

Both call copies of the towers' layers on new inputs, one after the other, every
copy under a new name. The towers stay as they are.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import keras

from keras_cross_stitch.copying import alike, frozen_alike
from keras_cross_stitch.cross_stitch import CrossStitch
from keras_cross_stitch.joining import Call, Joined, Tower, built_once, with_purpose


def stitch(
    towers: Mapping[str, keras.Model],
    at: Sequence[str | Mapping[str, str]],
    *,
    shared_input: bool = True,
    share_frozen: bool = True,
    name: str = "cross_stitch",
    **unit: Any,
) -> keras.Model:
    """Joins one model per task into one, with cross-stitch units between them.

    At each tap, the towers' outputs are replaced by their mix. Whatever else
    reads a tap, such as a skip connection, reads the mix too. The towers are
    copied whole, with weights, adapted state and frozen layers; with alpha =
    identity the model gives what the towers give.

    Nested models (`backbone(x)`, as in Keras's guide to transfer learning) are
    opened: their layers are layers of the joined model, and can be tapped.

    Args:
        towers: Dict of task name to functional or Sequential model, at least
            two. A task name becomes a key of the model's output, a prefix of
            its layers' names and a signature of the exported model: letters,
            digits and underscores.
        at: List of taps from input to output, each the name of a layer, or a
            dict of task name to layer name where the towers' names differ. With
            an empty list the towers stand side by side and share nothing. Layers
            of a nested model are named `"backbone/conv1"`, or `"conv1"` where
            only one layer has that name; `"backbone"` is the model's output.
        shared_input: Whether all towers read the same input, which must then be
            of one shape. If `False`, the model takes a dict of task name to
            input (`<task>_<input name>` for towers of several inputs).
        share_frozen: Whether layers of several towers that compute the same, now
            and after training, are built once: frozen layers (or those without
            weights) of one kind with equal weights that read the same tensors,
            such as the frozen trunk of a backbone that the towers have in common.
        name: String, the model's name.
        **unit: Arguments of every `CrossStitch`, such as `per` or `same_task`.

    Returns:
        A functional `keras.Model` with a dict of task name to output. Tower
        layers are named `<task>_<layer>`, and `<task>_<model>_<layer>` where they
        are nested; units `cross_stitch_<layer>`; layers that are built once
        `shared_<layer>`. Inputs keep their names; one without a name of its own is
        `input` (`input_1`, `input_2` ... where there are several), so that every
        export has the same.

    Raises:
        ValueError: For an unknown layer, taps out of order, unequal shapes at a
            tap, a layer that is used twice or cannot be copied, an invalid task
            name, or inputs that cannot be shared; it names the tower and the layer.

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
    opened = _opened(towers)
    if isinstance(at, str) or not isinstance(at, Sequence):
        raise ValueError(
            "`at` must be a list of taps, each the name of a layer or a dict of "
            f"them. Received: at={at!r}. For one tap: at=[{at!r}]"
        )
    taps = [_tap(tap, opened) for tap in at]
    inputs = _inputs(opened, shared_input)
    tapped = [call for tap in taps for call in tap.values()]
    same = built_once(opened, inputs, tapped, _frozen) if share_frozen else {}
    same = with_purpose(same, opened)
    joined = Joined(opened, inputs, same)
    for tap, received in zip(taps, at, strict=True):
        maps = {}
        for task, call in tap.items():
            if id(call.outputs[0]) in joined.tensors[task]:
                raise ValueError(
                    "Taps must go from input to output, each once. In the tower of "
                    f"'{task}', layer '{call.path}' comes before an earlier tap, or is "
                    f"one. Received: at={at}"
                )
            maps[task] = joined.run(task, call.outputs)[0]
        mix = _unit(joined, tap, unit)
        try:
            outputs = mix(maps)
        except ValueError as error:
            raise ValueError(f"At the tap {received!r}: {error}") from error
        for task, call in tap.items():
            joined.tensors[task][id(call.outputs[0])] = outputs[task]
    return joined.model(name)


def split(
    towers: Mapping[str, keras.Model],
    at: str | Mapping[str, str],
    *,
    share_frozen: bool = True,
    name: str = "split",
) -> keras.Model:
    """Joins one model per task into one that shares its first layers.

    Hard parameter sharing, the alternative to stitching: the layers below `at`
    are the first tower's, for all tasks; the layer `at` and all above, that is,
    all that depend on it, are each task's own. With the last layer for `at` it is
    the paper's MTL-shared. The towers are copied as `stitch` copies them.

    Args:
        towers: Dict of task name to functional or Sequential model, at least
            two, with the same input and the same layers below `at`.
        at: The name of the first layer that is not shared, or a dict of task
            name to layer name where the towers' names differ; nested models as
            in `stitch`, where `"backbone"` is all of it.
        share_frozen: Whether frozen layers above `at` that are the same in several
            towers, and read the same tensors, are built once, too.
        name: String, the model's name.

    Returns:
        A functional `keras.Model` with a dict of task name to output. Shared
        layers are named `shared_<layer>`, the others `<task>_<layer>`.

    Raises:
        ValueError: For an unknown layer, towers that differ below `at`, a layer
            that is used twice or cannot be copied, an invalid task name, or inputs
            that differ.

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
    opened = _opened(towers)
    inputs = _inputs(opened, shared_input=True)
    own = {
        call
        for task, name_ in _by_task(at, opened).items()
        for call in _depending(opened[task], _path(name_, opened[task]))
    }

    def may_share(call: Call, other: Call) -> bool:
        if call not in own and other not in own:
            return alike(call.layer, other.layer)
        return share_frozen and call in own and other in own and _frozen(call, other)

    same = built_once(opened, inputs, [], may_share)
    _check_alike_below(opened, own, same)
    same = with_purpose(same, opened, own)
    return Joined(opened, inputs, same).model(name)


def check_task_names(tasks: Iterable[str]) -> None:
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


def _opened(towers: Any) -> dict[str, Tower]:
    if not isinstance(towers, Mapping) or len(towers) < 2:
        raise ValueError(
            "`towers` must be a dict of at least two: task name to model. "
            f"Received: towers={towers!r}"
        )
    check_task_names(towers)
    return {task: Tower(task, model) for task, model in towers.items()}


def _by_task(tap: Any, towers: Mapping[str, Tower]) -> dict[str, str]:
    """A tap (a layer name, or a dict of them) as {task: layer name}."""
    if isinstance(tap, str):
        tap = dict.fromkeys(towers, tap)
    if not isinstance(tap, Mapping) or set(tap) != set(towers):
        raise ValueError(
            "A tap must be the name of a layer, or a dict with one for each of "
            f"{sorted(towers)}. Received: {tap!r}"
        )
    return {task: tap[task] for task in towers}


def _tap(tap: Any, towers: Mapping[str, Tower]) -> dict[str, Call]:
    """{task: the `Call` whose output is the tap}, checked."""
    calls = {}
    for task, name in _by_task(tap, towers).items():
        tower = towers[task]
        path = _path(name, tower)
        call = next((call for call in tower.calls if call.path == path), None)
        outputs = call.outputs if call else tower.nested[path]
        if len(outputs) > 1:
            raise ValueError(
                f"In the tower of '{task}', layer '{path}' has several outputs, and so "
                f"cannot be a tap. Received: outputs={outputs}"
            )
        calls[task] = call or tower.call_of(outputs[0])
    return calls


def _path(name: str, tower: Tower) -> str:
    """The path of the tower's layer, or nested model, of that name or path."""
    layers = [
        call.path for call in tower.calls if isinstance(call.layer, keras.layers.Layer)
    ]
    paths = [*layers, *tower.nested]
    if name in paths:
        return name
    found = [path for path in paths if path.rsplit("/", 1)[-1] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"The tower of '{tower.task}' has several layers '{name}': name one of "
            f"{found}"
        )
    if name in [layer.name for layer in tower.inputs]:
        raise ValueError(
            f"In the tower of '{tower.task}', '{name}' is an input, which cannot be a "
            f"tap. Name one of {paths}"
        )
    near = difflib.get_close_matches(str(name), paths, n=3) or paths
    raise ValueError(
        f"The tower of '{tower.task}' has no layer '{name}'. Did you mean one of "
        f"{near}?"
    )


def _inputs(towers: Mapping[str, Tower], shared_input: bool) -> dict[str, list]:
    """New inputs of the model: {task: list of `keras.Input`}."""
    layers = {
        task: {
            name: layer
            for name, layer in zip(_input_names(tower), tower.inputs, strict=True)
        }
        for task, tower in towers.items()
    }
    if not shared_input:
        return {
            task: [
                _new_input(x, f"{task}_{name}" if len(of_task) > 1 else task)
                for name, x in of_task.items()
            ]
            for task, of_task in layers.items()
        }
    # Several inputs belong together by name; a single one may have any.
    specs = {
        task: {
            name if len(of_task) > 1 else "": _spec(x) for name, x in of_task.items()
        }
        for task, of_task in layers.items()
    }
    first = next(iter(towers))
    if any(spec != specs[first] for spec in specs.values()):
        raise ValueError(
            "Towers that share an input must take the same shape and dtype, and "
            "several inputs the same names; `stitch(..., shared_input=False)` gives "
            f"each its own. Received: inputs={specs}"
        )
    shared = {
        key: _new_input(x, name)
        for key, (name, x) in zip(specs[first], layers[first].items(), strict=True)
    }
    return {task: [shared[key] for key in spec] for task, spec in specs.items()}


def _input_names(tower: Tower) -> list[str]:
    """The inputs' names, fixed where Keras made them up: it would count them on."""
    made_up = r"(keras_tensor|input_layer|input)(_\d+)?"
    several = len(tower.inputs) > 1
    return [
        (f"input_{k}" if several else "input")
        if re.fullmatch(made_up, layer.output.name)
        else layer.output.name
        for k, layer in enumerate(tower.inputs, 1)
    ]


def _spec(layer: keras.layers.InputLayer) -> dict[str, Any]:
    """What an input takes, as the arguments of `keras.Input`."""
    spec = {"batch_shape": layer.batch_shape, "dtype": layer.dtype}
    flags = {
        "sparse": layer.output.sparse,
        "ragged": layer.output.ragged,
        "optional": layer.optional,
    }
    return {**spec, **{flag: True for flag, value in flags.items() if value}}


def _new_input(layer: keras.layers.InputLayer, name: str) -> Any:
    return keras.Input(name=name, **_spec(layer))


def _depending(tower: Tower, path: str) -> list[Call]:
    """The calls of a layer, or within a nested model, and all that depend on them."""
    calls: list[Call] = []
    tensors: set[int] = set()
    for call in tower.calls:
        if (
            call.path == path
            or call.path.startswith(f"{path}/")
            or any(id(x) in tensors for x in call.reads)
        ):
            calls.append(call)
            tensors.update(id(x) for x in call.outputs)
    return calls


def _frozen(call: Call, other: Call) -> bool:
    return frozen_alike(call.layer, other.layer)


def _check_alike_below(
    towers: Mapping[str, Tower], own: Collection[Call], same: dict[Call, Call]
) -> None:
    """Raises a ValueError where the first tower and another differ below the split."""
    below = [
        [call for call in tower.calls if call not in own] for tower in towers.values()
    ]
    first = below[0]
    for calls in below[1:]:
        matched = {same.get(call) for call in calls}
        extra = next((x.path for x in calls if same.get(x) not in first), None)
        missed = next((x.path for x in first if x not in matched), None)
        if extra or missed:
            raise ValueError(
                "The towers must have the same layers up to where they split. The "
                f"tower of '{list(towers)[below.index(calls)]}' has "
                f"'{extra or 'nothing'}' where the first has '{missed or 'nothing'}', "
                "of another kind, with other arguments or with other inputs"
            )


def _unit(joined: Joined, tap: dict[str, Call], arguments: dict) -> CrossStitch:
    """The unit of a tap, named after the first tower's layer, with its dtype."""
    first = next(iter(tap.values()))
    policy = getattr(first.layer, "dtype_policy", None)
    if policy is not None and policy.quantization_mode:
        # "int8_from_float32": the unit is not quantized.
        policy = policy.name.split("_from_")[1]
    name = f"cross_stitch_{first.path.replace('/', '_')}"
    joined.claim(name, f"the unit at '{first.path}'")
    return CrossStitch(name=name, **{"dtype": policy, **arguments})
