"""Taps: where units stand between towers, and what the names of layers mean."""

from collections.abc import Mapping, Sequence
from typing import Any

from keras_cross_stitch.opening import Call, Tower, Value


def read_taps(
    at: Any, towers: Mapping[str, Tower]
) -> list[tuple[str, dict[str, Value]]]:
    """[(name, {task: what is tapped})]: the first tower's layer names a tap."""
    if isinstance(at, Mapping):
        return [
            (str(name), _tap(names_by_task(tap, towers), towers))
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
        values = _tap(by_task, towers)
        first = next(iter(by_task))
        layer, *which = by_task[first].split(":")
        taps.append((":".join([towers[first].path(layer), *which]), values))
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


def _tap(names: Mapping[str, str], towers: Mapping[str, Tower]) -> dict[str, Value]:
    values = {task: towers[task].find(name) for task, name in names.items()}
    for task, value in values.items():
        if towers[task].call_of(value) is None:
            raise ValueError(
                f"In the tower of '{task}', '{names[task]}' is an input, which cannot "
                "be a tap"
            )
    return values


def check_not_shared(
    label: str,
    tap: Mapping[str, Value],
    towers: Mapping[str, Tower],
    same: Mapping[Call, Call],
) -> None:
    """Raises where all towers of a tap give the same: there is nothing to mix."""
    calls = [towers[task].call_of(value) for task, value in tap.items()]
    firsts = {same.get(call) for call in calls if call is not None}
    if len(firsts) == 1 and None not in firsts:
        raise ValueError(
            f"At the tap '{label}', the towers of {list(tap)} give the same: up to "
            "there they are frozen and equal, and are built once. Tap a layer behind "
            "what they have in common, or, to unfreeze it later, build it for each: "
            "`stitch(..., share_frozen=False)`"
        )


def fitting(towers: Mapping[str, Tower], tap: Mapping[str, Value]) -> str:
    """Which layers of the other towers have the first one's shape, in words."""
    first, *others = tap
    shape = tap[first].shape[1:]
    fitting = {
        task: [
            path
            for path, by_call in towers[task].outputs.items()
            if any(x.shape[1:] == shape for values in by_call for x in values)
        ][-5:]
        for task in others
    }
    found = "; ".join(f"'{task}': {paths or 'none'}" for task, paths in fitting.items())
    return f"Layers of that of '{first}', {shape}, are, in the tower of {found}"
