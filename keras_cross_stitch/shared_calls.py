"""What of several towers is built once.

Value numbering across towers: calls of equal layers on equal inputs share one result.
"""

import collections
import contextlib
import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import keras

from keras_cross_stitch.copying import (
    equal,
    frozen_alike,
    is_adapted,
    is_random,
    same_draws,
)
from keras_cross_stitch.opening import Call, Tower, Value


def built_once(
    towers: Mapping[str, Tower],
    inputs: Mapping[str, list],
    taps: Collection[Value],
    may_share: Callable[[Call, Call], bool],
) -> dict[Call, Call]:
    """The calls that give the same for several tasks.

    Equal values have one number. A call gives what a call of an earlier tower gives
    if it reads values of the same numbers, and if `may_share(call, other)`. Behind
    the `taps` every task goes on with a number of its own.

    Returns:
        Dict of `Call` to the one that is built for it, also of that one to itself.
    """
    same: dict[Call, Call] = {}
    known: list[tuple] = []  # [(call, its arguments by number, its outputs' numbers)]
    count = itertools.count()
    of_input = {id(x): next(count) for of_task in inputs.values() for x in of_task}
    for task, tower in towers.items():
        new = [of_input[id(x)] for x in inputs[task]]
        numbers = dict(zip(tower.inputs.values(), new, strict=True))
        free = list(known)
        for call in tower.calls:
            arguments = _numbered(call.arguments, numbers)
            with named(call):  # comparing reads a layer's config, as copying does
                twins = [
                    entry
                    for entry in free
                    if equal(entry[1], arguments) and may_share(entry[0], call)
                ]
            if twins:
                # Of twin branches, the one of the same name.
                entry = min(twins, key=lambda entry: entry[0].path != call.path)
                free.remove(entry)
                same[call] = same[entry[0]] = entry[0]
            else:
                entry = (call, arguments, [next(count) for _ in call.outputs])
                known.append(entry)
            for value, number in zip(call.outputs, entry[2], strict=True):
                numbers[value] = next(count) if value in taps else number
    return same


def worth_sharing(
    same: dict[Call, Call],
    towers: Mapping[str, Tower],
    wanted: Callable[[Call], bool],
) -> dict[Call, Call]:
    """Of the calls that give the same, those that are `wanted`, and what leads to them.

    Layers without weights alone are not worth another name. A layer's calls go on
    sharing all or none, since its weights would come apart.
    """
    kept = set()
    for tower in towers.values():
        needed: set[Value] = set()
        for call in reversed(tower.calls):
            if call in same and (wanted(call) or not needed.isdisjoint(call.outputs)):
                kept.add(same[call])
                needed.update(call.reads)
    worth = {call: first for call, first in same.items() if first in kept}
    torn = _torn(worth, towers)
    if torn:
        whole = {call: x for call, x in worth.items() if torn.isdisjoint((call, x))}
        return worth_sharing(whole, towers, wanted)
    return worth


def _torn(same: Mapping[Call, Call], towers: Mapping[str, Tower]) -> set[Call]:
    """Of the calls that give the same, those that cannot be built once after all.

    They have weights in common with a call that is not, or other weights in common
    than the call that is built for them, or read what is not built once, or are alone.
    """
    shared_by = collections.Counter(same.values())
    torn = {call for call, first in same.items() if shared_by[first] == 1}
    for tower in towers.values():
        apart = [call for call in tower.calls if call not in same]
        own = {id(x) for call in apart for x in call.weights}
        own |= {id(x) for call in apart for x in call.outputs}
        partner: dict[int, Any] = {}
        taken: dict[int, Any] = {}
        for call in tower.calls:
            if call in same:
                pairs = list(zip(call.weights, same[call].weights, strict=True))
                if (
                    any(id(x) in own for x in [*call.weights, *call.reads])
                    or any(partner.setdefault(id(x), y) is not y for x, y in pairs)
                    or any(taken.setdefault(id(y), x) is not x for x, y in pairs)
                ):
                    torn.add(call)
    return torn


def wanted_once(call: Call, share_frozen: bool) -> bool:
    """Whether a call is worth building once: it costs, or all must draw the same."""
    return is_random(call.layer) or (share_frozen and bool(call.weights))


def may_be_built_once(call: Call, other: Call, share_frozen: bool) -> bool:
    if not share_frozen and _may_be_unfrozen(call.layer):
        return False
    return frozen_alike(call.layer, other.layer)


def _may_be_unfrozen(layer: Any) -> bool:
    """Whether it has weights that training changes once it is no more frozen."""
    return bool(getattr(layer, "weights", None)) and not is_adapted(layer)


def _numbered(arguments: dict, numbers: Mapping[Value, int]) -> dict:
    """The arguments, with a number for each value and its type for each constant."""
    return keras.tree.map_structure(
        lambda x: numbers[x] if isinstance(x, Value) else (type(x), x), arguments
    )


def named(call: Call) -> contextlib.AbstractContextManager:
    """Turns what Keras says of a layer that cannot be copied into one that names it."""
    return _named(
        call,
        "cannot be copied",
        "A layer of your own needs a `get_config` with all that its `__init__` takes, "
        "and `**kwargs` in `__init__` for the name",
        "Give a layer of Keras's own what Keras can save: a function of your own "
        "instead of a `functools.partial`, and objects whose class has a `get_config` "
        "with all that its `__init__` takes",
    )


def weights_named(call: Call) -> contextlib.AbstractContextManager:
    """Turns what Keras says of weights that do not fit into what names the layer."""
    return _named(
        call,
        "has other layers or weights than its copy, which is made from its "
        "`get_config` and built by the calls of the tower",
        "Make all that it needs in `__init__` and `build`",
        "If it was given LoRA after it was built, save the tower and load it, which "
        "merges LoRA into the weights; if it was quantized, join the towers as they "
        "were before; a layer of your own within it must make all that it needs in "
        "`__init__` and `build`",
    )


@contextlib.contextmanager
def _named(call: Call, problem: str, of_yours: str, of_keras: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        kind = type(call.layer)
        remedy = of_keras if kind.__module__.startswith("keras.") else of_yours
        raise ValueError(
            f"In the tower of '{call.task}', layer '{call.path}' ({kind.__name__}) "
            f"{problem}. {remedy}. Keras says: {str(error).strip()}"
        ) from error


def warn_of_unlike_draws(
    towers: Mapping[str, Tower],
    same: dict[Call, Call],
    taps: Collection[Value],
    share_frozen: bool,
) -> None:
    """Warns of random layers that give every task another picture before a tap.

    Only in front of what is trained, or is to be: the towers' own Dropout is theirs.
    """
    trained = _trained if share_frozen else _may_be_unfrozen
    drawn = {
        task: _own_draws(tower, same, taps, trained) for task, tower in towers.items()
    }
    first, *others = drawn.values()
    alike = all(
        len(first) == len(other)
        and all(same_draws(a.layer, b.layer) for a, b in zip(first, other, strict=True))
        for other in others
    )
    if not alike:
        named_ = {task: [call.path for call in calls] for task, calls in drawn.items()}
        warnings.warn(
            f"Random layers in front of a tap draw for each task by itself: {named_}. "
            "In training, a unit then mixes maps of pictures that were flipped or "
            "turned otherwise. Give all towers the same random layer on the same "
            "input, which is then built once, or the same `seed`, or augment in the "
            "data set",
            stacklevel=3,
        )


def _own_draws(
    tower: Tower,
    same: dict[Call, Call],
    taps: Collection[Value],
    trained: Callable[[Any], bool],
) -> list[Call]:
    """The random calls in front of a tap and of all that is trained, built alone."""
    untrained = set(tower.inputs.values())
    for call in tower.calls:
        if untrained.issuperset(call.reads) and not trained(call.layer):
            untrained.update(call.outputs)
    return [
        call
        for call in tower.needed_for(taps)
        if untrained.issuperset(call.outputs)
        and call not in same
        and is_random(call.layer)
    ]


def _trained(layer: Any) -> bool:
    return bool(getattr(layer, "trainable_weights", None))
