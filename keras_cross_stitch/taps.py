"""Taps: where units stand between towers, and what the names of layers mean."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras

from keras_cross_stitch.copying import kernels
from keras_cross_stitch.opening import (
    Call,
    InputCast,
    Tower,
    Value,
    opened_towers,
)

# What gives maps whose channels are at another place than those that it reads.
_EXCHANGES = ("Permute", "Transpose", "Moveaxis", "Swapaxes")


def read_taps(
    at: Any, towers: Mapping[str, Tower]
) -> list[tuple[str, dict[str, Value]]]:
    """[(name, {task: what is tapped})]: the first tower's layer names a tap."""
    if isinstance(at, Mapping):
        if set(at) == set(towers) and all(isinstance(x, str) for x in at.values()):
            raise ValueError(
                "`at` as a dict names the units: {name: tap}, and names of units must "
                f"not be those of all tasks. For one tap of all tasks: at=[{at!r}]"
            )
        return [
            (str(name), _found(names_by_task(tap, towers), towers))
            for name, tap in at.items()
        ]
    if isinstance(at, str) or not isinstance(at, Sequence):
        raise ValueError(
            "`at` must be a list of taps, each the name of a layer or a dict of "
            f"them. Received: at={at!r}. For one tap: at=[{at!r}]"
        )
    taps = []
    for tap in at:
        by_task = names_by_task(tap, towers)
        values = _found(by_task, towers)
        first = next(iter(by_task))
        taps.append((towers[first].full_name(by_task[first]), values))
    return taps


def names_by_task(
    tap: Any, towers: Mapping[str, Tower], least: int = 2
) -> dict[str, str]:
    """A tap (a layer name, or a dict of them) as {task: layer name}."""
    if isinstance(tap, str):
        tap = dict.fromkeys(towers, tap)
    if not isinstance(tap, Mapping) or set(tap) - set(towers) or len(tap) < least:
        some = ", or for two of them at least" if least == 2 < len(towers) else ""
        raise ValueError(
            "A tap must be the name of a layer, or a dict with one for each of "
            f"{sorted(towers)}{some}. Received: {tap!r}"
        )
    return {task: tap[task] for task in towers if task in tap}


def _found(names: Mapping[str, str], towers: Mapping[str, Tower]) -> dict[str, Value]:
    return {task: towers[task].find(name) for task, name in names.items()}


def check_not_shared(
    label: str,
    tap: Mapping[str, Value],
    towers: Mapping[str, Tower],
    same: Mapping[Call, Call],
) -> None:
    """Raises where all towers of a tap give the same: there is nothing to mix."""
    firsts = {same.get(towers[task].call_of(value)) for task, value in tap.items()}
    if len(firsts) == 1 and None not in firsts:
        raise ValueError(
            f"At the tap '{label}', the towers of {list(tap)} give the same: up to "
            "there they are frozen and equal, and are built once. Tap a layer behind "
            "what they have in common, or, to unfreeze it later, build it for each: "
            "`stitch(..., share_frozen=False)`"
        )


def which_fit(
    towers: Mapping[str, Tower], tap: Mapping[str, Value], project: bool
) -> str:
    """What is tapped, and which layers fit the first tower's, in words."""
    tapped = ", ".join(
        f"'{towers[task].name_of(value)}' of the tower of '{task}'"
        for task, value in tap.items()
    )
    first, *others = tap
    rank, shape = len(tap[first].shape), tap[first].shape[1:]
    remedy = ""
    if not project and all(len(value.shape) == rank for value in tap.values()):
        remedy = ". Or let `CrossStitch` project them: `stitch(..., project=True)`"

    formats = {task: data_formats(towers[task]) for task in others}

    def fits(task: str, value: Value) -> bool:
        if project:
            axis = _channel_axis(value, formats[task][value])
            return len(value.shape) == rank and value.shape[axis] is not None
        return value.shape[1:] == shape

    fitting = {
        task: [
            path
            for path, by_call in towers[task].outputs.items()
            if any(fits(task, x) for values in by_call for x in values)
        ][-5:]
        for task in others
    }
    found = "; ".join(f"'{task}': {paths or 'none'}" for task, paths in fitting.items())
    return (
        f"Tapped are {tapped}. Layers of the {'rank' if project else 'shape'} of the "
        f"first, {shape}, are, in the tower of {found}{remedy}"
    )


class Tap(dict[str, str]):
    """A tap, {task: name of a layer}, and why it is one."""

    def __init__(self, names: Mapping[str, str], reason: str) -> None:
        super().__init__(names)
        self.reason = reason

    def __repr__(self) -> str:
        return f"Tap({super().__repr__()}, {self.reason!r})"


def common_taps(
    towers: Mapping[str, keras.Model], *, project: bool = False
) -> list[Tap]:
    """Finds taps for `stitch`: where towers fit, one at the end of each stage.

    A stage is what computes maps of one size. Its end is the last layer, in front of
    another with weights, that all of the stage's maps lead to or come from, so that no
    branch goes round it. Stages of one size belong together, or of the nearest size
    where shapes need not be equal. Where the size never changes, as for sequences and
    vectors, three layers are taken by their depth.

    Args:
        towers: Dict of task name to functional or Sequential model, at least two.
        project: Whether the taps are for `stitch(..., project=True)`, which takes maps
            of other channels and sizes. Otherwise the shapes of a tap are equal.

    Returns:
        List of taps from input to output, each a dict of task name to the name of a
        layer, with a `reason`. Empty where nothing fits.

    Raises:
        ValueError: For towers that cannot be opened.

    Warns:
        UserWarning: If nothing fits.

    Example:

    >>> from keras_cross_stitch import alexnet
    >>> towers = {"kind": alexnet(5, width=0.05), "age": alexnet(1, width=0.05)}
    >>> for tap in common_taps(towers)[:2]:
    ...     print(tap["kind"], tap.reason)
    conv1 the end of (55, 55, 5)
    conv2 the end of (27, 27, 13)
    """
    opened = opened_towers(towers)
    ends = {task: _stage_ends(tower) for task, tower in opened.items()}
    first, *others = opened
    taps: list[Tap] = []
    after = dict.fromkeys(opened, -1)
    for end in ends[first]:
        found = {first: end}
        for task in others:
            near = [
                other
                for other in ends[task]
                if other.position > after[task] and _fit(end, other, project)
            ]
            if not near:
                break
            found[task] = min(near, key=lambda x: _apart(end, x))
            best = _apart(end, found[task])
            later = [x for x in ends[first] if x.position > end.position]
            if any(_apart(x, found[task]) < best for x in later):
                break  # a later stage is nearer to it
        else:
            _append(taps, found, opened)
            after = {task: x.position for task, x in found.items()}
    if not taps:
        ask = "" if project else ", or let units project: `common_taps(project=True)`"
        found_ends = {
            task: [f"{tower.name_of(x.value)} {x.shape}" for x in ends[task]]
            for task, tower in opened.items()
        }
        warnings.warn(
            "Nothing of the towers fits, and `stitch` without taps shares nothing: "
            f"name layers yourself{ask}. Ends of stages: {found_ends}",
            UserWarning,
            stacklevel=2,
        )
    return taps


def _append(
    taps: list[Tap],
    found: Mapping[str, "_Map"],
    towers: Mapping[str, Tower],
) -> None:
    shapes = list(dict.fromkeys(str(x.shape) for x in found.values()))
    projected = ", projected to each other" if len(shapes) > 1 else ""
    names = {task: towers[task].name_of(x.value) for task, x in found.items()}
    taps.append(Tap(names, f"the end of {' and '.join(shapes)}{projected}"))


class _Map(NamedTuple):
    """What a call gives, and where it has its channels."""

    position: int  # the call's
    value: Value
    channel_axis: int

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.value.shape[1:]

    @property
    def size(self) -> tuple[int | None, ...]:
        return self.shape[1:] if self.channel_axis == 1 else self.shape[:-1]


def data_formats(tower: Tower) -> dict[Value, set[str]]:
    """{a map: where the tower's layers have its channels}.

    Of layers that have maps with the axes in the same places, if there are any. Both
    places, if a layer that exchanges axes may be between the map and all that say it.
    """
    # Maps with the axes in the same places.
    same: dict[Value, set[Value]] = {x: {x} for x in tower.inputs.values()}
    exchanged = set()
    for call in tower.calls:
        for x in (maps := (*call.reads, *call.outputs)):
            same.setdefault(x, {x})
        if type(call.layer).__name__ in _EXCHANGES:
            exchanged |= {len(x.shape) for x in maps}
            continue
        for rank in {len(x.shape) for x in maps}:
            merged = set().union(*(same[x] for x in maps if len(x.shape) == rank))
            same.update(dict.fromkeys(merged, merged))
    here: dict[int, set[str]] = {id(maps): set() for maps in same.values()}
    anywhere: dict[int, set[str]] = {len(x.shape): set() for x in same}
    for call in tower.calls:
        told = getattr(call.layer, "data_format", None)
        # Flatten's is one by default, whatever the maps that it reads.
        if isinstance(told, str) and not isinstance(call.layer, keras.layers.Flatten):
            for x in (*call.reads, *call.outputs):
                here[id(same[x])].add(told)
                anywhere[len(x.shape)].add(told)
    for rank in exchanged:
        if anywhere[rank]:
            anywhere[rank] = {"channels_first", "channels_last"}
    return {x: here[id(maps)] or anywhere[len(x.shape)] for x, maps in same.items()}


def default_data_format(rank: int) -> str:
    """Where maps of that rank have their channels, if no layer says it."""
    # Keras's own is that of images: LSTM, attention and Dense have features last.
    return "channels_last" if rank == 3 else keras.config.image_data_format()


def _channel_axis(value: Value, formats: set[str]) -> int:
    """As the unit at the value has it."""
    rank = len(value.shape)
    first = (formats or {default_data_format(rank)}) == {"channels_first"}
    return 1 if rank > 2 and first else -1


def _stage_ends(tower: Tower) -> list[_Map]:
    """The ends of the tower's stages, from input to output."""
    before, earliest = _ancestors(tower.calls)
    firsts = [call.outputs[0] for call in tower.calls]
    formats = data_formats(tower)
    maps = [_Map(n, x, _channel_axis(x, formats[x])) for n, x in enumerate(firsts)]
    leads = 0  # the calls that lead to one with weights
    for n in reversed(range(len(tower.calls))):
        if getattr(tower.calls[n].layer, "weights", None):
            leads |= before[n] & ~(1 << n)
    trained = 0  # those that are, or come behind, what is trained
    for n, call in enumerate(tower.calls):
        if getattr(call.layer, "trainable_weights", None) or before[n] & trained:
            trained |= 1 << n
    of_size: dict[tuple, int] = {}
    for n, given in enumerate(maps):
        of_size[given.size] = of_size.get(given.size, 0) | 1 << n
    stages: list[list[int]] = []
    for n, given in enumerate(maps):
        behind = sum(1 << m for m in range(n + 1, len(maps)) if before[m] >> n & 1)
        goes_round = of_size[given.size] & ~(before[n] | behind)
        # What is squeezed to a vector may only weigh the channels of a larger map.
        pixels = math.prod(size or 2 for size in given.size)
        weighs = pixels == 1 and min(earliest[n + 1 :], default=n) < n
        if goes_round or weighs or not (leads & trained) >> n & 1:
            continue
        if not _can_be_tapped(given) or _only_passes_on(tower.calls[n]):
            continue
        if not stages or _apart(maps[stages[-1][0]], given) >= 0.5:
            stages.append([])
        stages[-1].append(n)
    ends: list[int] = []
    for stage in stages:
        if len(stages) == 1 or len(maps[stage[0]].size) < 2:
            ends += _by_depth(stage, tower.calls)
        else:
            ends.append(stage[-1])
    return [maps[n] for n in ends]


def _by_depth(stage: list[int], calls: Sequence[Call], most: int = 3) -> list[int]:
    """At most three calls, evenly apart, each the last in front of a kernel."""
    lasts = [
        n
        for n, following in zip(stage, [*stage[1:], None], strict=True)
        if following is None or kernels(calls[following].layer)
    ]
    parts = min(most, len(lasts))
    return [lasts[round((k + 1) * len(lasts) / parts) - 1] for k in range(parts)]


def _can_be_tapped(given: _Map) -> bool:
    shape = given.value.shape
    known = 2 <= len(shape) <= 5 and shape[given.channel_axis] is not None
    return known and "float" in given.value.spec.dtype


def _only_passes_on(call: Call) -> bool:
    return isinstance(call.layer, InputCast) or "Padding" in type(call.layer).__name__


def _ancestors(calls: Sequence[Call]) -> tuple[list[int], list[int]]:
    """For each call: the set, as bits, of it and of those that lead to it; and the
    first position that it reads from, -1 for an input."""
    giver: dict[Value, int] = {}
    before: list[int] = []
    earliest: list[int] = []
    for n, call in enumerate(calls):
        read = [giver.get(x, -1) for x in call.reads]
        bits = 1 << n
        for m in read:
            bits |= before[m] if m >= 0 else 0
        before.append(bits)
        earliest.append(min(read, default=n))
        giver |= dict.fromkeys(call.outputs, n)
    return before, earliest


def _fit(a: _Map, b: _Map, project: bool) -> bool:
    if a.channel_axis != b.channel_axis:
        return False
    if project:
        return len(a.shape) == len(b.shape) and _apart(a, b) <= 1
    return a.shape == b.shape


def _apart(a: _Map, b: _Map) -> float:
    """How many halvings two sizes are apart; many where their ranks differ."""
    if len(a.size) != len(b.size):
        return math.inf
    known = [(x, y) for x, y in zip(a.size, b.size, strict=True) if x and y]
    return sum(abs(math.log2(x / y)) for x, y in known) / max(1, len(known))
