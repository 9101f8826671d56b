"""Towers into one multi-task model: stitched, or split (hard sharing).

Both call copies of the towers' layers on new inputs, one after the other, every
copy under a new name. The towers stay as they are.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_cross_stitch.copying import alike
from keras_cross_stitch.cross_stitch import CrossStitch
from keras_cross_stitch.joining import Joined, new_inputs
from keras_cross_stitch.opening import Call, Tower, Value, opened_towers
from keras_cross_stitch.projecting import ProjectedCrossStitch
from keras_cross_stitch.shared_calls import (
    built_once,
    may_be_built_once,
    wanted_once,
    warn_of_unlike_draws,
    worth_sharing,
)
from keras_cross_stitch.taps import (
    check_not_shared,
    data_formats,
    default_data_format,
    names_by_task,
    read_taps,
    which_fit,
)
from keras_cross_stitch.unrelated_towers import warn_of_unrelated_towers


def stitch(
    towers: Mapping[str, keras.Model],
    at: Sequence[str | Mapping[str, str]] | Mapping[str, str | Mapping[str, str]],
    *,
    shared_input: bool = True,
    share_frozen: bool = True,
    project: bool = False,
    unit: type[keras.layers.Layer] = CrossStitch,
    name: str = "cross_stitch",
    **arguments: Any,
) -> keras.Model:
    """Joins one model per task into one, with cross-stitch units between them.

    A tower is the model of one task, and a tap is a layer of each tower at which
    a unit stands. The unit replaces the outputs of these layers by their mixes.
    Whatever else reads a tap, such as a skip connection, reads the mix too. The
    towers are copied whole, with weights, adapted state and frozen layers. With
    alpha = identity the model gives what the towers give.

    Nested models (`backbone(x)`, as in Keras's guide to transfer learning) are
    opened: their layers are layers of the joined model, and can be tapped.

    Args:
        towers: Dict of task name to functional or Sequential model, at least
            two. A task name becomes a key of the model's output, a prefix of
            its layers' names and a signature of the exported model: letters,
            digits and underscores.
        at: List of taps from input to output. A tap is the name of a layer, or a
            dict of task name to layer name if the names differ, or if the tap is of
            some of the tasks only (at least two). To name the units yourself, give a
            dict of unit name to tap instead of the list. With an empty list the
            towers stand side by side and share nothing. A layer of a nested model is
            named `"backbone/conv1"`, or `"conv1"` if only one layer has that name;
            `"backbone"` is the nested model's output. If a layer is called more than
            once, `"act:0"` is its first call. If it has several outputs,
            `"lstm:out0"` is the first, and `"lstm:1:out0"` the first of its second
            call.
        shared_input: Whether all towers read the same input, which must then have
            one shape. If `False`, the model takes a dict of task name to
            input (`<task>_<input name>` for towers of several inputs).
        share_frozen: Whether layers that compute the same in several towers, now
            and after training, are built once. These are frozen layers, and layers
            without weights, of one kind and with equal weights, that read the same
            tensors. The frozen trunk of a common backbone is an example. A frozen
            layer that is called more than once is, if all of its calls are. Equal
            random layers that read the same tensors, such as the towers'
            augmentation, are always built once, so that all tasks see the same
            picture.
        project: Whether towers may have different channels or sizes at a tap. What
            a task takes from another then goes through a learned 1x1 convolution
            and a resize. If the shapes are known and equal, the unit is the same as
            without. Sizes that are not known before the model runs may differ, so
            that such maps are projected and resized, too.
        unit: Class of the units: `CrossStitch`, `NDDR`, or a layer of yours that
            takes a dict of task name to map and gives another. It is called with
            `name` and `dtype`, and with `data_format` if that of the towers, or of
            sequences, whose features are last, is not Keras's.
        name: String, the model's name.
        **arguments: Arguments of every unit, such as `per` or `same_task`.

    Returns:
        A functional `keras.Model` with a dict of task name to output. A layer of a
        tower is named `<task>_<layer>`, or `<task>_<model>_<layer>` if it is nested.
        A layer that is built once is named `shared_<layer>`. A unit is named
        `cross_stitch_<layer>` after the first tower's layer, or
        `cross_stitch_<name>` if you named it; other units have the name of their
        class in front, such as `nddr_<layer>`. Several shared inputs stay in the
        list or dict that the first tower takes. Inputs keep their names. Those
        without a name of their own are called `input` (`input_1`, `input_2` ... if
        there are several, unless they are called so in another order), so that every
        export has the same names.

    Raises:
        ValueError: For an unknown layer, taps out of order, unequal shapes at a
            tap, a tap where all towers give the same, a layer that cannot be copied,
            outputs without names, an invalid task name, or inputs that cannot be
            shared; it names the tower and the layer.

    Warns:
        UserWarning: If the towers have unrelated weights and units take from other
            tasks at the start, or if random layers in front of a tap give every task
            another picture.

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
    if not (isinstance(unit, type) and issubclass(unit, keras.layers.Layer)):
        raise ValueError(
            "`unit` must be a class of layers: `CrossStitch`, `NDDR` or one of yours. "
            f"Received: unit={unit!r}"
        )
    if project and unit is not CrossStitch:
        raise ValueError(
            "Only `CrossStitch` units project what they take: leave `project` or "
            f"`unit`. Received: project={project}, unit={unit}"
        )
    opened = opened_towers(towers)
    taps = read_taps(at, opened)
    inputs = new_inputs(opened, shared_input)
    tapped = [value for _, tap in taps for value in tap.values()]

    def may_share(call: Call, other: Call) -> bool:
        return may_be_built_once(call, other, share_frozen)

    same = built_once(opened, inputs, tapped, may_share)
    if share_frozen:
        for label, tap in taps:
            check_not_shared(label, tap, opened, same)
    same = worth_sharing(same, opened, lambda call: wanted_once(call, share_frozen))
    warn_of_unlike_draws(opened, same, tapped, share_frozen)
    joined = Joined(opened, inputs, same)
    for n, (label, tap) in enumerate(taps):
        for task, value in tap.items():
            if value in joined.read:
                raise ValueError(
                    "Taps must go from input to output, each once. In the tower of "
                    f"'{task}', the tap '{label}' comes before an earlier one, or is "
                    f"one. Received: at={at}"
                )
        maps = {task: joined.run(task, [value])[0] for task, value in tap.items()}
        mix = _unit(joined, label, tap, unit, arguments, project)
        try:
            outputs = mix(maps)
        except ValueError as error:
            raise ValueError(
                f"At the tap '{label}': {error}. {which_fit(opened, tap, project)}"
            ) from error
        if n == 0 and _takes_from_others(mix):
            warn_of_unrelated_towers(opened, tap, label)
        for task, value in tap.items():
            joined.tensors[task][value] = outputs[task]
            joined.read.add(value)
    return joined.model(name)


def split(
    towers: Mapping[str, keras.Model],
    at: str | Mapping[str, str],
    *,
    share_frozen: bool = True,
    name: str = "split",
) -> keras.Model:
    """Joins one model per task into one that shares its first layers.

    This is hard sharing, the alternative to stitching. All tasks use the first
    tower's layers below `at`. Each task has its own layer `at`, and its own layers
    above, that is, all that depend on `at`. If `at` is the last layer, this is the
    paper's MTL-shared. The towers are copied as `stitch` copies them.

    Args:
        towers: Dict of task name to functional or Sequential model, at least
            two, with the same input and the same layers below `at`.
        at: The name of the first layer that is not shared, or a dict of task
            name to layer name if the names differ. Layers of nested models are named
            as in `stitch`; here `"backbone"` is the whole nested model.
        share_frozen: Whether frozen layers above `at` are built once, too, if they
            are the same in several towers and read the same tensors.
        name: String, the model's name.

    Returns:
        A functional `keras.Model` with a dict of task name to output. Shared
        layers are named `shared_<layer>`, the others `<task>_<layer>`.

    Raises:
        ValueError: For an unknown layer, towers that differ below `at`, a layer
            that is used below `at` and above it or cannot be copied, an invalid task
            name, or inputs that differ.

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
    opened = opened_towers(towers)
    inputs = new_inputs(opened, shared_input=True)
    own = {
        call
        for task, name_ in names_by_task(at, opened, len(opened)).items()
        for call in _depending(opened[task], name_)
    }

    def may_share(call: Call, other: Call) -> bool:
        if call not in own and other not in own:
            return alike(call.layer, other.layer)
        both = call in own and other in own
        return both and may_be_built_once(call, other, share_frozen)

    same = worth_sharing(
        built_once(opened, inputs, [], may_share),
        opened,
        lambda call: call not in own or wanted_once(call, share_frozen),
    )
    _check_alike_below(opened, own, same)
    return Joined(opened, inputs, same).model(name)


def _takes_from_others(unit: keras.layers.Layer) -> bool:
    """Whether a task takes something of another at the start."""
    if not isinstance(unit, CrossStitch):
        return getattr(unit, "same_task", None) != 1
    alpha = keras.ops.convert_to_numpy(unit.alpha)
    tasks = len(alpha)
    return bool(np.any(alpha[~np.eye(tasks, dtype=bool)]))


def _depending(tower: Tower, name: str) -> list[Call]:
    """The calls of a layer, or within a nested model, and all that depend on them."""
    path = tower.path(name)
    calls: list[Call] = []
    values: set[Value] = set()
    for call in tower.calls:
        if (
            call.path == path
            or call.path.startswith(f"{path}/")
            or not values.isdisjoint(call.reads)
        ):
            calls.append(call)
            values.update(call.outputs)
    return calls


def _check_alike_below(
    towers: Mapping[str, Tower], own: Collection[Call], same: dict[Call, Call]
) -> None:
    """Raises a ValueError where the first tower and another differ below the split."""
    below = {
        task: [call for call in tower.calls if call not in own]
        for task, tower in towers.items()
    }
    for task, calls in below.items():
        above = {
            id(weight)
            for call in towers[task].calls
            if call in own
            for weight in call.weights
        }
        for call in calls:
            if not above.isdisjoint(map(id, call.weights)):
                raise ValueError(
                    f"The tower of '{task}' calls its layer '{call.path}' below the "
                    "split and above it, so that it cannot be shared and its own. "
                    "Split before its first call, or behind its last"
                )
    first, *others = below
    for task in others:
        calls = below[task]
        matched = {same.get(call) for call in calls}
        extra = next((x.path for x in calls if same.get(x) not in below[first]), None)
        missed = next((x.path for x in below[first] if x not in matched), None)
        if extra or missed:
            raise ValueError(
                "The towers must have the same layers up to where they split. The "
                f"tower of '{task}' has '{extra or 'nothing'}' where the first has "
                f"'{missed or 'nothing'}', of another kind, with other arguments or "
                "with other inputs. Split at that layer or below it, or `stitch()` the "
                "towers"
            )


def _unit(
    joined: Joined,
    label: str,
    tap: Mapping[str, Value],
    unit: type[keras.layers.Layer],
    arguments: dict,
    project: bool,
) -> keras.layers.Layer:
    """The unit of a tap."""
    kind = "cross_stitch" if unit is CrossStitch else unit.__name__.lower()
    name = f"{kind}_{re.sub('[/:]', '_', label)}"
    joined.claim(name, f"the unit at '{label}'")
    shapes = [value.shape[1:] for value in tap.values()]
    if "data_format" not in arguments and len(shapes[0]) > 1:
        arguments = {**arguments, **_data_format(joined, label, tap)}
    # Sizes that are not known yet may differ, which a projection resizes.
    differ = len(set(shapes)) > 1 or any(None in shape for shape in shapes)
    if project and differ:
        unit = ProjectedCrossStitch
    return unit(name=name, **{"dtype": _policy(joined, tap), **arguments})


def _policy(joined: Joined, tap: Mapping[str, Value]) -> Any:
    """The dtype policy of the first tower whose map none of the others is rounded to.

    Of no tower, if their dtypes are such as float16 and bfloat16.
    """
    widest = keras.backend.result_type(*(x.spec.dtype for x in tap.values()))
    task = next((t for t, x in tap.items() if x.spec.dtype == widest), None)
    if task is None:
        return widest
    call = joined.towers[task].call_of(tap[task])
    policy = getattr(call.layer, "dtype_policy", None)
    if policy is None and "float" in widest:
        # An operator has no policy, and Keras's own may be another than the tower's.
        half = widest in ("float16", "bfloat16")
        return f"mixed_{widest}" if half else widest
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[call.layer.path]
    if isinstance(policy, keras.DTypePolicy) and policy.quantization_mode:
        # "int8_from_float32": the unit is not quantized.
        return policy.name.split("_from_")[1]
    return policy


def _data_format(
    joined: Joined, label: str, tap: Mapping[str, Value]
) -> dict[str, str]:
    """Where the layers of the towers have their channels."""
    formats = {
        task: data_formats(joined.towers[task])[value] for task, value in tap.items()
    }
    found = set().union(*formats.values())
    if len(found) > 1:
        told = "; ".join(f"'{task}': {sorted(x)}" for task, x in formats.items())
        raise ValueError(
            f"At the tap '{label}', maps have their channels at other places: the "
            f"layers of the towers have, by task, {told}. Give all towers one "
            "`data_format`, or say that of what is tapped: "
            "`stitch(..., data_format='channels_last')`"
        )
    found = found or {default_data_format(len(next(iter(tap.values())).shape))}
    # A layer of somebody's own need not know of it, unless it matters.
    if found == {keras.config.image_data_format()}:
        return {}
    return {"data_format": found.pop()}
