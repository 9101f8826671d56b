"""Towers opened into the calls of their layers, and the names that these have.

Knows nothing of what is shared or mixed.
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import keras


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of an opened tower. What is within a nested model has one a call."""

    spec: keras.KerasTensor

    @property
    def shape(self) -> tuple[int | None, ...]:
        return tuple(self.spec.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer (or operation) in a tower's graph."""

    task: str  # whose tower
    path: str  # "conv1", or "backbone/conv1" where it is within a nested model
    layer: Any
    args: tuple
    kwargs: dict
    outputs: tuple[Value, ...]

    @property
    def reads(self) -> list[Value]:
        """The values that it is called with."""
        given = keras.tree.flatten((self.args, self.kwargs))
        return [x for x in given if isinstance(x, Value)]

    @property
    def weights(self) -> list:
        """Those of its layer; an operation has none."""
        return getattr(self.layer, "weights", [])

    @property
    def arguments(self) -> dict:
        """What it is called with, by parameter, given by name or by place."""
        parameters = inspect.signature(self.layer.call).parameters.values()
        names = [x.name for x in parameters if x.kind == x.POSITIONAL_OR_KEYWORD]
        by_place = enumerate(self.args)
        given = {names[n] if n < len(names) else n: x for n, x in by_place}
        return {**given, **self.kwargs}


@keras.saving.register_keras_serializable("keras_cross_stitch")
class InputCast(keras.layers.Layer):
    """Casts as the input of a nested model does, and adds or drops a last axis of 1.

    A layer, since it hands masks on.
    """

    def __init__(self, to: str, rank: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.to = to
        self.rank = rank
        self.supports_masking = True

    def call(self, inputs: Any) -> Any:
        x = keras.ops.cast(inputs, self.to)
        rank = len(x.shape)
        if rank == self.rank:
            return x
        return (
            keras.ops.squeeze(x, -1)
            if rank > self.rank
            else keras.ops.expand_dims(x, -1)
        )

    def compute_output_spec(self, inputs: Any) -> Any:
        # Not by `compute_output_shape`, which would have the layer's own dtype.
        shape = (*inputs.shape, 1)[: self.rank]
        return keras.KerasTensor(
            shape, self.to, sparse=inputs.sparse, ragged=inputs.ragged
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "to": self.to, "rank": self.rank}


class Tower:
    """A functional or Sequential model as the calls of its layers.

    Nested models are opened: their calls stand in the place of their own.

    Attributes:
        task: String.
        inputs: Dict of `keras.layers.InputLayer` to its `Value`.
        input_structure: The inputs' names as the model takes them.
        calls: List of `Call`, each after those whose outputs it reads.
        output: The model's output, a `Value` or a dict of them.
        outputs: Dict of path, of a layer or a nested model, to its outputs: a list
            with a list of `Value` for each call.
    """

    def __init__(
        self, task: str, model: keras.Model, towers: Mapping[str, Any]
    ) -> None:
        graph = as_graph(model)
        if graph is None:
            raise ValueError(_cannot_be_opened(task, model, towers))
        self.task = task
        self.inputs = {_input_layer(graph, x): Value(x) for x in graph.inputs}
        self.input_structure = graph.input
        self.calls: list[Call] = []
        self.outputs: dict[str, list[list[Value]]] = {}
        self._casts: dict[str, Any] = {}
        scope = dict(zip(map(id, graph.inputs), self.inputs.values(), strict=True))
        self._open(graph, "", {}, scope)
        self.output = _named_output(task, graph, scope)

    def needed_for(
        self, values: Iterable[Value], known: Collection[Value] = ()
    ) -> list[Call]:
        """The calls that `values` need, in their order, behind what is known."""
        needed = set(values)
        calls = []
        for call in reversed(self.calls):
            if any(x in needed and x not in known for x in call.outputs):
                needed.update(call.reads)
                calls.append(call)
        return calls[::-1]

    def call_of(self, value: Value) -> Call:
        """The call that gives a value which is no input."""
        return next(call for call in self.calls if value in call.outputs)

    def name_of(self, value: Value) -> str:
        """The name by which `find` finds a layer's output."""
        names = self._names(self.call_of(value).path)
        return next(name for name, x in names.items() if x is value)

    def _names(self, path: str) -> dict[str, Value]:
        """The outputs of a layer, or nested model, by their names."""
        by_call = self.outputs[path]
        return {
            path
            + (f":{k}" if len(by_call) > 1 else "")
            + (f":out{n}" if len(values) > 1 else ""): value
            for k, values in enumerate(by_call)
            for n, value in enumerate(values)
        }

    def full_name(self, name: str) -> str:
        """The name with the layer's path: `"backbone/act:1"` of `"act:1"`."""
        path, call, output = self._parsed(name)
        which = "" if call is None else f":{call}"
        return path + which + ("" if output is None else f":out{output}")

    def find(self, name: str) -> Value:
        """The output that a tap names, or a ValueError that says which there are.

        The name is a layer's, and what tells its outputs apart: `"act:1"` is the
        second call of a layer, `"lstm:out0"` the first of several outputs, and
        `"lstm:1:out0"` both.
        """
        path, call, output = self._parsed(name)
        by_call = self.outputs[path]
        found = [
            (k, n, value)
            for k, values in enumerate(by_call)
            for n, value in enumerate(values)
            if call in (None, k) and output in (None, n)
        ]
        if len(found) == 1:
            ((_, _, value),) = found
            if value in self.inputs.values():  # a nested model may hand it on
                raise ValueError(
                    f"In the tower of '{self.task}', '{name}' is an input, which "
                    "cannot be a tap"
                )
            return value
        names = {x: value.shape for x, value in self._names(path).items()}
        what = "is called more than once" if len(by_call) > 1 else "has several outputs"
        if len(names) == 1:
            what = "has one output"
        raise ValueError(
            f"In the tower of '{self.task}', layer '{path}' {what}: name one of "
            f"{names}. Received: {name!r}"
        )

    def _parsed(self, name: str) -> tuple[str, int | None, int | None]:
        match = re.fullmatch(r"(.+?)(?::(\d+))?(?::out(\d+))?", str(name))
        if match is None or name in self.outputs:
            return self.path(name), None, None
        base, call, output = match.groups()
        return (
            self.path(base),
            None if call is None else int(call),
            None if output is None else int(output),
        )

    def path(self, name: str) -> str:
        """The path of the layer, or nested model, of that name or path."""
        if name in self.outputs:
            return name
        paths = list(self.outputs)
        found = [path for path in paths if path.rsplit("/", 1)[-1] == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"The tower of '{self.task}' has several layers '{name}': name one of "
                f"{found}"
            )
        layers = [
            call.path
            for call in self.calls
            if isinstance(call.layer, keras.layers.Layer)
            and not isinstance(call.layer, InputCast)
        ]
        if name in [layer.name for layer in self.inputs]:
            raise ValueError(
                f"In the tower of '{self.task}', '{name}' is an input, which cannot "
                f"be a tap. Name a layer, such as one of {layers[:5]}"
            )
        raise ValueError(
            f"The tower of '{self.task}' has no layer '{name}'. Did you mean one of "
            f"{_like(str(name), layers)}?"
        )

    def _open(
        self, graph: keras.Model, prefix: str, context: dict, scope: dict[int, Any]
    ) -> None:
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if not node.is_input:
                    path = prefix + node.operation.name
                    outputs = self._add(node, path, context, scope)
                    scope |= zip(map(id, node.outputs), outputs, strict=True)
                    self.outputs.setdefault(path, []).append(list(outputs))

    def _add(
        self, node: Any, path: str, context: dict, scope: dict[int, Any]
    ) -> Iterable[Value]:
        layer = node.operation
        args, kwargs = node.arguments.convert(lambda x: _resolved(x, scope))
        nested = as_graph(layer)
        if nested is not None:
            if _comes_by_itself(node.arguments):
                kwargs = {key: x for key, x in kwargs.items() if key != "mask"}
            return self._add_nested(nested, path, context, args, dict(kwargs))
        if context and "training" in inspect.signature(layer.call).parameters:
            kwargs = {**kwargs, **context}  # as in Keras, the call around it wins
        outputs = tuple(map(Value, node.outputs))
        self.calls.append(Call(self.task, path, layer, args, kwargs, outputs))
        return outputs

    def _add_nested(
        self, nested: keras.Model, path: str, context: dict, args: tuple, kwargs: dict
    ) -> list[Value]:
        given = args[0] if args else kwargs.pop("inputs", None)
        if isinstance(given, dict):
            names = [x.name for x in nested.inputs]
            if isinstance(nested.input, dict):  # whose keys need not be the names
                names = sorted(nested.input)
            given = [given.get(name) for name in names]
        given = keras.tree.flatten(given)
        more = [x for x in args[1:] if x is not None]
        if more or set(kwargs) - {"training"} or len(given) != len(nested.inputs):
            raise ValueError(
                f"In the tower of '{self.task}', the nested model '{path}' is called "
                "in a way that cannot be taken apart: give it its inputs, and no "
                "argument but `training`, by its name. Received: "
                f"{[*given, *more]}, {kwargs}"
            )
        several = len(given) > 1
        cast = (
            self._cast(x, f"{path}/cast" + (f"_{k}" if several else ""), own)
            for k, (x, own) in enumerate(zip(given, nested.inputs, strict=True), 1)
        )
        scope = dict(zip(map(id, nested.inputs), cast, strict=True))
        told = {key: x for key, x in kwargs.items() if x is not None}
        self._open(nested, f"{path}/", {**told, **context}, scope)
        return [_resolved(x, scope) for x in nested.outputs]

    def _cast(self, x: Any, path: str, own: keras.KerasTensor) -> Any:
        """What a model is given, as its input casts it: images of bytes to floats."""
        if not isinstance(x, Value):
            return x
        rank = len(own.shape)
        if x.spec.dtype == own.dtype and len(x.shape) == rank:
            return x
        cast = InputCast(own.dtype, rank, name="cast")
        layer = self._casts.setdefault(path, cast)
        value = Value(layer.compute_output_spec(x.spec))
        self.calls.append(Call(self.task, path, layer, (x,), {}, (value,)))
        return value


def opened_towers(towers: Any) -> dict[str, Tower]:
    """{task: `Tower`}, or a ValueError for what `stitch` cannot join."""
    if not isinstance(towers, Mapping) or len(towers) < 2:
        raise ValueError(
            "`towers` must be a dict of at least two: task name to model. "
            f"Received: towers={towers!r}"
        )
    check_task_names(towers)
    if "shared" in towers:
        raise ValueError(
            "'shared' is in the names of layers that several tasks have in common, "
            "'shared_<layer>'; give the task another name"
        )
    return {task: Tower(task, model, towers) for task, model in towers.items()}


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
        if task == "signatures":
            raise ValueError(
                "'signatures' is what a SavedModel calls those that it has; give the "
                "task another name"
            )


def as_graph(model: Any) -> keras.Model | None:
    """The model as a functional one; None for a layer, and for a `call` of its own."""
    own_call = any(
        "call" in vars(kind) and not kind.__module__.startswith("keras.")
        for kind in type(model).__mro__
    )
    if not isinstance(model, keras.Model) or own_call:
        return None
    if isinstance(model, keras.Sequential) and getattr(model, "inputs", None):
        # Its `outputs` are flat; its last layer may give a list or a dict.
        structure = model.compute_output_spec(model.inputs[0])
        output = keras.tree.pack_sequence_as(structure, model.outputs)
        return keras.Model(model.inputs, output)
    return model if hasattr(model, "operations") else None


def _resolved(x: Any, scope: dict[int, Any]) -> Any:
    return scope.get(id(x), x) if isinstance(x, keras.KerasTensor) else x


def _input_layer(graph: keras.Model, x: Any) -> keras.layers.InputLayer:
    return next(
        layer
        for layer in graph.layers
        if isinstance(layer, keras.layers.InputLayer) and layer.output is x
    )


def _comes_by_itself(arguments: Any) -> bool:
    """Whether a call's mask is its input's own, which the copy's input has, too."""
    masks = keras.tree.flatten(arguments.kwargs.get("mask"))
    given = arguments.args[0] if arguments.args else arguments.kwargs.get("inputs")
    own = [getattr(x, "_keras_mask", None) for x in keras.tree.flatten(given)]
    return all(any(mask is x for x in [None, *own]) for mask in masks)


def _named_output(task: str, graph: keras.Model, scope: dict[int, Any]) -> Any:
    """The output in its structure, of which each part must have a name."""
    output = graph.output
    if isinstance(output, list | tuple) and len(output) == 1:
        (output,) = output
    values = output.values() if isinstance(output, dict) else [output]
    if not all(isinstance(x, keras.KerasTensor) for x in values):
        names = list(graph.output_names)
        if len(set(names)) < len(names):  # outputs of one layer
            names = [f"{x}_{n}" for n, x in enumerate(names)]
        # A Sequential model that was never called has `inputs` only.
        given = "inputs" if isinstance(graph.input, list) else "input"
        named = ", ".join(f'"{x}": outputs[{n}]' for n, x in enumerate(names))
        raise ValueError(
            f"The tower of '{task}' must give a tensor or a dict of name to tensor, "
            "since a served output has a name. Name them: outputs = model.outputs; "
            f"model = keras.Model(model.{given}, {{{named}}}). Received: {output}"
        )
    return keras.tree.map_structure(lambda x: _resolved(x, scope), output)


def _like(name: str, names: list[str], most: int = 5) -> list[str]:
    """The names most like one, whatever their case; any where none is like it."""
    by_lower: dict[str, str] = {}
    for full in reversed(names):
        by_lower[full.lower()] = full
        by_lower[full.rsplit("/", 1)[-1].lower()] = full
    near = difflib.get_close_matches(name.lower(), by_lower, n=most)
    return list(dict.fromkeys(by_lower[x] for x in near)) or names[:most]


def _cannot_be_opened(task: str, model: Any, towers: Mapping[str, Any]) -> str:
    said = (
        f"The tower of '{task}' must be a functional model, or a Sequential one that "
        "starts with `keras.Input`; a subclass with a `call` of its own cannot be "
        f"taken apart. Received: {model!r}"
    )
    if not isinstance(model, keras.Model):
        return said
    inputs = _inputs_like(_known_inputs(model, towers))
    if inputs is None:
        return (
            f"{said}. Build it, by `model.build((None, ...))` or a first call, so that "
            "its inputs are known, and try again"
        )
    return (
        f"{said}. If its `call` can be traced, these two lines make a tower of it, "
        "without what is called under `if training:` alone (call that always, with "
        "`training=training`):\n\n"
        f"    inputs = {_as_code(inputs)}\n"
        f'    towers["{task}"] = keras.Model(inputs, towers["{task}"].call(inputs))\n'
    )


def _known_inputs(model: keras.Model, towers: Mapping[str, Any]) -> Any:
    """The inputs that the model was built for, or else those of another tower."""
    if getattr(model, "inputs", None):  # a graph, with a `call` of its own
        sequential = isinstance(model, keras.Sequential)
        return _unwrapped(model.inputs if sequential else model.input)
    config = (model.get_build_config() or {}) if model.built else {}
    shapes = config.get("input_shape", config.get("shapes_dict"))
    graphs = filter(None, map(as_graph, towers.values()))
    other = next((_unwrapped(graph.input) for graph in graphs), None)
    return other if shapes is None else shapes


def _unwrapped(inputs: Any) -> Any:
    """A Sequential model has a list of its one input."""
    if isinstance(inputs, list) and len(inputs) == 1:
        return inputs[0]
    return inputs


def _inputs_like(known: Any, name: str = "inputs") -> Any:
    """A new `keras.Input` for each shape, or symbolic tensor, of a structure."""
    if isinstance(known, keras.KerasTensor):
        return keras.Input(known.shape[1:], dtype=known.dtype, name=known.name)
    if isinstance(known, dict):
        return {key: _inputs_like(x, str(key)) for key, x in known.items()}
    if isinstance(known, list | tuple) and known and isinstance(known[0], int | None):
        return keras.Input(tuple(known[1:]), name=name)
    if isinstance(known, list | tuple) and known:
        return [_inputs_like(x, f"{name}_{n}") for n, x in enumerate(known, 1)]
    return None


def _as_code(inputs: Any) -> str:
    if isinstance(inputs, dict):
        return "{" + ", ".join(f'"{k}": {_as_code(x)}' for k, x in inputs.items()) + "}"
    if isinstance(inputs, list):
        return "[" + ", ".join(map(_as_code, inputs)) + "]"
    dtype = "" if inputs.dtype == "float32" else f', dtype="{inputs.dtype}"'
    return f'keras.Input({tuple(inputs.shape[1:])}{dtype}, name="{inputs.name}")'
