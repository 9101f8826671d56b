"""Towers opened into the calls of their layers, and calls built into one model.

Knows nothing of taps and splits: `networks` says what is shared, and what is mixed.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_cross_stitch.copying import carry_over, copy_layer


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

    def __init__(self, task: str, model: keras.Model) -> None:
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

    def call_of(self, x: Any) -> Call:
        """The call that gives a tensor, or a ValueError for an input."""
        for call in self.calls:
            if any(x is output for output in call.outputs):
                return call
        raise ValueError(
            f"In the tower of '{self.task}', {x} is an input, which cannot be a tap"
        )

    def _resolve(self, x: Any) -> Any:
        if isinstance(x, keras.KerasTensor):
            return self._outside.get(id(x), x)
        return x

    def _open(self, graph: keras.Model, prefix: str, context: dict) -> None:
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if not node.is_input:
                    self._add(node, prefix + node.operation.name, context)

    def _add(self, node: Any, path: str, context: dict) -> None:
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

    def _add_nested(
        self,
        nested: keras.Model,
        node: Any,
        path: str,
        context: dict,
        args: tuple,
        kwargs: dict,
    ) -> None:
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


def _comes_by_itself(arguments: Any) -> bool:
    """Whether a call's mask is its input's own, which the copy's input has, too."""
    masks = keras.tree.flatten(arguments.kwargs.get("mask"))
    given = arguments.args[0] if arguments.args else arguments.kwargs.get("inputs")
    own = [getattr(x, "_keras_mask", None) for x in keras.tree.flatten(given)]
    return all(any(mask is x for x in [None, *own]) for mask in masks)


def _is_input(layer: Any, x: Any) -> bool:
    return isinstance(layer, keras.layers.InputLayer) and layer.output is x


def _graph(model: Any) -> keras.Model | None:
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


def built_once(
    towers: Mapping[str, Tower],
    inputs: Mapping[str, list],
    taps: Collection[Call],
    may_share: Callable[[Call, Call], bool],
) -> dict[Call, Call]:
    """The calls that are built once for several tasks.

    Each tensor gets a value; tensors that are the same have the same one. A call
    gives what a call of an earlier tower gives if it reads the same values, and if
    `may_share(call, other)`. Behind the `taps`, a list of calls, every task goes on
    with a value of its own.

    Returns:
        Dict of `Call` to the one that is built for it, also of that one to itself.
    """
    same: dict[Call, Call] = {}
    known: list[tuple] = []  # [(call, what it reads, the values of its outputs)]
    for task, tower in towers.items():
        values = _by_id([layer.output for layer in tower.inputs], inputs[task])
        free = list(known)
        for call in tower.calls:
            reads = [(values.get(id(x)), x) for x in call.reads]
            twins = [
                entry
                for entry in free
                if _read_the_same(entry[1], reads) and may_share(entry[0], call)
            ]
            if twins:
                # Of twin branches, the one of the same name.
                entry = min(twins, key=lambda entry: entry[0].path != call.path)
                free.remove(entry)
                same[call] = same[entry[0]] = entry[0]
            else:
                entry = (call, reads, [object() for _ in call.outputs])
                known.append(entry)
            own = [object() for _ in call.outputs]
            values |= _by_id(call.outputs, own if call in taps else entry[2])
    return same


def with_purpose(
    same: dict[Call, Call],
    towers: Mapping[str, Tower],
    own: Collection[Call] | None = None,
) -> dict[Call, Call]:
    """Of the calls that are built once, those with weights, and what leads to them.

    Layers without weights alone are not worth another name. `own` are the calls that
    this is about, all where it is None.
    """
    kept = set()
    for tower in towers.values():
        needed: set[int] = set()
        for call in reversed(tower.calls):
            if call in same and (
                (own is not None and call not in own)
                or getattr(call.layer, "weights", None)
                or any(id(x) in needed for x in call.outputs)
            ):
                kept.add(same[call])
                needed.update(id(x) for x in call.reads)
    return {call: first for call, first in same.items() if first in kept}


def _by_id(tensors: Iterable, values: Iterable) -> dict[int, Any]:
    return {id(x): value for x, value in zip(tensors, values, strict=True)}


def _read_the_same(reads: list[tuple], others: list[tuple]) -> bool:
    """Whether both are lists of the same (value, None) and equal (None, constant)."""
    return len(reads) == len(others) and all(
        a is b and (a is not None or (type(x) is type(y) and np.array_equal(x, y)))
        for (a, x), (b, y) in zip(reads, others, strict=True)
    )


class Joined:
    """The joined model while it is built.

    Attributes:
        tensors: {task: {id of the tower's tensor: the new one}}, as far as built.
        layers: {name of a new layer: what it is, in words}.
    """

    def __init__(
        self,
        towers: Mapping[str, Tower],
        inputs: Mapping[str, list],
        same: dict[Call, Call],
    ) -> None:
        self.towers = towers
        self.inputs = inputs
        self.same = same  # see `built_once`
        self.tensors = {
            task: _by_id([layer.output for layer in tower.inputs], inputs[task])
            for task, tower in towers.items()
        }
        self.layers = {x.name: "an input" for xs in inputs.values() for x in xs}
        self._outputs: dict[Call, list] = {}  # {call: what its copy gives}
        self._copies: list[tuple] = []  # [(layer, copy)]

    def run(self, task: str, outputs: Iterable) -> list:
        """Builds what the tower's `outputs` need, and returns the new tensors."""
        tensors = self.tensors[task]
        needed = {id(x) for x in outputs}
        todo = []
        for call in reversed(self.towers[task].calls):
            if any(id(x) in needed and id(x) not in tensors for x in call.outputs):
                todo.append(call)
                needed.update(id(x) for x in call.reads)
        for call in reversed(todo):
            tensors |= _by_id(call.outputs, self._build(call))
        return [tensors[id(x)] for x in outputs]

    def _build(self, call: Call) -> list:
        first = self.same.get(call, call)
        if first not in self._outputs:
            prefix = "shared" if call in self.same else call.task
            name = f"{prefix}_{call.path.replace('/', '_')}"
            self.claim(name, f"layer '{call.path}' of the tower of '{call.task}'")
            self._outputs[first] = self._copy(call, first.layer, name)
        return self._outputs[first]

    def _copy(self, call: Call, layer: Any, name: str) -> list:
        tensors = self.tensors[call.task]
        args, kwargs = keras.tree.map_structure(
            lambda x: tensors[id(x)] if isinstance(x, keras.KerasTensor) else x,
            (call.args, call.kwargs),
        )
        try:
            copy = copy_layer(layer, name)
            outputs = keras.tree.flatten(copy(*args, **kwargs))
        except Exception as error:
            raise ValueError(
                f"In the tower of '{call.task}', layer '{call.path}' "
                f"({type(layer).__name__}) cannot be copied. A layer of your own needs "
                "a `get_config` with all that its `__init__` takes, and `**kwargs` in "
                f"`__init__` for the name. Keras says: {error}"
            ) from error
        self._copies.append((layer, copy))
        return outputs

    def claim(self, name: str, what: str) -> None:
        """Takes a name for a new layer; what it is, in words, is for the error."""
        if name in self.layers:
            raise ValueError(
                f"Two layers of the joined model would be called '{name}': "
                f"{self.layers[name]}, and {what}. Give a task or a layer another name"
            )
        self.layers[name] = what

    def model(self, name: str) -> keras.Model:
        """The model, all that is missing built, with the towers' weights."""
        outputs = {}
        for task, tower in self.towers.items():
            flat = keras.tree.flatten(tower.output)
            new = self.run(task, flat)
            outputs[task] = keras.tree.pack_sequence_as(tower.output, new)
        flat = {x.name: x for xs in self.inputs.values() for x in xs}
        inputs = flat if len(flat) > 1 else next(iter(flat.values()))
        model = keras.Model(inputs, outputs, name=name)
        for layer, copy in self._copies:
            carry_over(layer, copy)
        return model
